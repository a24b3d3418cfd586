//! The receiver: takes one machine in, acknowledges it, lets it run when the source says so.
//!
//! One thread conducts; it is fed by events from the listener (new connections), from one pump per
//! channel (messages, ends), from the import and from signals. What it may do in the switchover is
//! decided by [`DestStep`]; who owns the guest, by the `vmrun` that it drives.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver as EventReceiver, RecvTimeoutError, Sender as EventSender, channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::control::{ClientError, FailureCode, Imported, Status};
use crate::state::MachineDescription;
use crate::switchover::{Attempt, DestAction, DestInput, DestStep};
use crate::transport::{Channel, Sender};
use crate::wire::{self, Message, Refused, RefusedCode, ResumePhase, Supported};

use super::host::{self, Host};
use super::intake::{Caller, Intake, Opening};
use super::options::{Arrived, ReceiveOptions};
use super::outcome::{Ending, MigrateError, Side, ms};
use super::placer::Placer;
use super::pump::{self, Brought, PlacerSlot};
use super::report::Observer;
use super::wires::MainLine;

/// How often the conductor looks after its `vmrun` and shows progress.
const TICK: Duration = Duration::from_millis(100);
/// How long the last words may take to be read.
const FAREWELL: Duration = Duration::from_secs(1);

/// Everything that wakes the conductor.
#[derive(Debug)]
pub enum Event {
    /// Somebody has connected and said HELLO or JOIN.
    Caller(Caller),
    /// From the main channel of the connection with this epoch.
    Main(u32, Brought),
    /// From a bulk channel of the connection with this epoch.
    Bulk(u32, Brought),
    /// The import has ended.
    Imported(Result<Imported, ClientError>),
}

/// Takes in one machine. Attempts that fail leave it waiting for the next, unless the connection
/// itself was given (`-`, `exec:`) and so cannot come again. `signal` is where a signal handler puts
/// the number of a signal that wants this to stop, 0 for none.
pub fn receive(
    options: &ReceiveOptions,
    signal: &AtomicUsize,
    observer: &mut dyn Observer,
) -> Result<Arrived, MigrateError> {
    let (events, inbox) = channel();
    let mut host = Host::open(&options.host)?;
    host.check_empty()?;
    let intake =
        Intake::open(options, events.clone()).map_err(|e| failed(format!("{}: {e}", options.listen)))?;
    observer.note(&format!("waiting for a machine at {}", intake.address()));
    loop {
        let mut attempt = Arrival::new(options, signal, &mut host, &events, &inbox, observer);
        let error = match attempt.conduct() {
            Ok(arrived) => return Ok(arrived),
            Err(error) => error,
        };
        let waits_on = !intake.is_single()
            && matches!(error.ending, Ending::PeerFailed | Ending::Unsuitable | Ending::Failed);
        if !waits_on {
            if matches!(
                error.ending,
                Ending::PeerFailed | Ending::Unsuitable | Ending::Failed | Ending::Signalled(_)
            ) {
                host.close();
            }
            return Err(error);
        }
        observer.note(&format!("{error}; waiting for the next"));
        if !host.client.is_alive() {
            host = Host::open(&options.host)?;
        }
        host.check_empty()?;
    }
}

/// One guest on its way in.
struct Arrival<'a> {
    options: &'a ReceiveOptions,
    signal: &'a AtomicUsize,
    host: &'a mut Host,
    events: &'a EventSender<Event>,
    inbox: &'a EventReceiver<Event>,
    observer: &'a mut dyn Observer,
    step: DestStep,
    session: Option<Session>,
    started: Instant,
}

/// What is known once a source has said HELLO.
struct Session {
    attempt: Attempt,
    hello: wire::Hello,
    main: Option<MainLine>,
    /// Bulk channels that have joined, by index.
    bulk: HashMap<u32, Sender>,
    placer: PlacerSlot,
    barriers: HashMap<u32, PassProgress>,
    state: Option<Vec<u8>>,
    digest: Option<String>,
    ready: wire::Ready,
    run_us: u64,
    /// When the connection was lost that has to come back.
    waiting_since: Option<Instant>,
    /// RUN was passed on to `vmrun`.
    run_passed_on: bool,
}

impl Session {
    fn machine(&self) -> Option<&Placer> {
        self.placer.get().and_then(Option::as_ref)
    }
}

#[derive(Default)]
struct PassProgress {
    channels: u32,
}

impl<'a> Arrival<'a> {
    fn new(
        options: &'a ReceiveOptions,
        signal: &'a AtomicUsize,
        host: &'a mut Host,
        events: &'a EventSender<Event>,
        inbox: &'a EventReceiver<Event>,
        observer: &'a mut dyn Observer,
    ) -> Self {
        Self {
            options,
            signal,
            host,
            events,
            inbox,
            observer,
            step: DestStep::Loading,
            session: None,
            started: Instant::now(),
        }
    }

    /// Waits for events until the guest is here for good, or the attempt is over.
    fn conduct(&mut self) -> Result<Arrived, MigrateError> {
        loop {
            match self.inbox.recv_timeout(TICK) {
                Ok(event) => {
                    if let Some(arrived) = self.on_event(event)? {
                        return Ok(arrived);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(failed("the receiver's own threads are gone"));
                }
            }
            if let Some(arrived) = self.look_after()? {
                return Ok(arrived);
            }
        }
    }

    fn on_event(&mut self, event: Event) -> Result<Option<Arrived>, MigrateError> {
        match event {
            Event::Caller(caller) => self.on_caller(caller).map(|()| None),
            Event::Main(epoch, brought) if self.is_current(epoch) => match brought {
                Brought::Message(message) => self.on_message(message),
                Brought::Lost(why) => self.on_lost(&why).map(|()| None),
            },
            Event::Bulk(epoch, brought) if self.is_current(epoch) => match brought {
                Brought::Message(Message::Barrier { pass }) => self.on_barrier(pass).map(|()| None),
                Brought::Message(other) => {
                    self.fail(format!("{} does not belong on a bulk channel", other.kind()))?;
                    Ok(None)
                }
                Brought::Lost(why) => self.on_bulk_lost(&why).map(|()| None),
            },
            Event::Main(..) | Event::Bulk(..) => Ok(None),
            Event::Imported(result) => self.on_imported(result).map(|()| None),
        }
    }

    fn is_current(&self, epoch: u32) -> bool {
        self.session.as_ref().is_some_and(|s| s.attempt.epoch == epoch && s.main.is_some())
    }

    /// A new connection: the first, one more channel, the source coming back, or somebody else.
    fn on_caller(&mut self, caller: Caller) -> Result<(), MigrateError> {
        let attempt = caller.attempt;
        match caller.opening {
            Opening::Join { index } => self.on_join(attempt, index, caller.channel),
            Opening::Hello(hello) => {
                let Some(session) = &self.session else { return self.begin(attempt, *hello, caller.channel) };
                if session.attempt.session == attempt.session && hello.resume {
                    return self.come_back(attempt, &hello, caller.channel);
                }
                let superseded = hello.superseded.is_some_and(|old| old.session == session.attempt.session)
                    && hello.vm_uuid == session.hello.vm_uuid;
                if superseded && self.step != DestStep::Running {
                    // The source vmrun starts a new session only while it has not committed the
                    // old one: that is its ABORT, said late.
                    self.observer.note("the source has given the attempt before up, and comes again");
                    let _ = self.input(DestInput::Abort);
                    self.session = None;
                    self.step = DestStep::Loading;
                    return self.begin(attempt, *hello, caller.channel);
                }
                let message = match self.step {
                    DestStep::Running => "the guest of another migration runs here already",
                    DestStep::InDoubt => "an acknowledged guest is held here for its own source",
                    _ => "another migration is under way here",
                };
                refuse(caller.channel, RefusedCode::Busy, message);
                Ok(())
            }
        }
    }

    /// HELLO of a new session.
    fn begin(&mut self, attempt: Attempt, hello: wire::Hello, channel: Channel) -> Result<(), MigrateError> {
        if hello.resume {
            let phase = self.unknown_phase(attempt);
            let ack = self.hello_ack(&wire::Agreed { version: wire::VERSION, features: vec![] }, Some(phase));
            let _ = channel.send(&Message::HelloAck(ack));
            return Ok(());
        }
        let agreed = match wire::negotiate(&hello, &Supported::default()) {
            Ok(agreed) => agreed,
            Err(refused) => {
                self.observer.note(&format!("refused {}: {refused}", hello.host));
                let _ = channel.send(&Message::Refused(refused));
                return Ok(());
            }
        };
        self.started = Instant::now();
        self.observer.note(&format!("receiving {:?} from {}", hello.vm_name, hello.host));
        let ack = self.hello_ack(&agreed, None);
        let session = Session {
            attempt,
            hello,
            main: None,
            bulk: HashMap::new(),
            placer: Arc::new(OnceLock::new()),
            barriers: HashMap::new(),
            state: None,
            digest: None,
            ready: wire::Ready::default(),
            run_us: 0,
            waiting_since: None,
            run_passed_on: false,
        };
        self.session = Some(session);
        self.step = DestStep::Loading;
        self.connect_main(attempt, channel, ack)
    }

    /// What to say to a source that comes back for a session that no mover here knows: `vmrun` may.
    fn unknown_phase(&mut self, attempt: Attempt) -> ResumePhase {
        match self.host.client.status() {
            Ok(Status { ownership: crate::switchover::Ownership::Empty { refused: Some(old) }, .. })
                if old.session == attempt.session =>
            {
                ResumePhase::Revoked
            }
            _ => ResumePhase::Unknown,
        }
    }

    /// HELLO of our own session on a new connection: older ones are stale from here on.
    fn come_back(
        &mut self,
        attempt: Attempt,
        hello: &wire::Hello,
        channel: Channel,
    ) -> Result<(), MigrateError> {
        let Some(session) = &mut self.session else { return Ok(()) };
        if attempt.epoch <= session.attempt.epoch {
            let message =
                format!("epoch {} is stale, {} has been seen", attempt.epoch, session.attempt.epoch);
            refuse(channel, RefusedCode::Stale, &message);
            return Ok(());
        }
        if let Err(error) = self.host.client.renew(attempt) {
            refuse(channel, RefusedCode::Failed, &error.to_string());
            return Ok(());
        }
        session.attempt = attempt;
        if let Some(old) = session.main.take() {
            old.close();
        }
        session.waiting_since = None;
        let phase = match self.step {
            DestStep::Loading => ResumePhase::Loading,
            DestStep::InDoubt => ResumePhase::InDoubt,
            DestStep::Running => ResumePhase::Running,
            DestStep::Refused => ResumePhase::Revoked,
        };
        self.observer.note(&format!("{} has come back (epoch {})", hello.host, attempt.epoch));
        let ack = self.hello_ack(&wire::Agreed { version: wire::VERSION, features: vec![] }, Some(phase));
        self.connect_main(attempt, channel, ack)?;
        self.input(DestInput::Reconnected)
    }

    /// Answers HELLO and lets a pump read the channel from here on.
    fn connect_main(
        &mut self,
        attempt: Attempt,
        channel: Channel,
        ack: wire::HelloAck,
    ) -> Result<(), MigrateError> {
        let Some(session) = &mut self.session else { return Ok(()) };
        let theirs = Duration::from_millis(session.hello.peer_timeout_ms);
        let shorter_timeout = self.options.peer_timeout.min(theirs);
        let (line, receiver) = MainLine::start(channel, shorter_timeout).map_err(failed)?;
        let placer = session.placer.clone();
        let events = self.events.clone();
        let epoch = attempt.epoch;
        std::thread::spawn(move || pump::run(receiver, &placer, &events, |b| Event::Main(epoch, b)));
        let sent = line.send(&Message::HelloAck(ack));
        session.main = Some(line);
        if let Err(error) = sent { self.on_lost(&error.to_string()) } else { Ok(()) }
    }

    fn on_join(&mut self, attempt: Attempt, index: u32, channel: Channel) -> Result<(), MigrateError> {
        let expected = self.session.as_ref().is_some_and(|s| {
            s.attempt == attempt && (1..=s.hello.channels).contains(&index) && !s.bulk.contains_key(&index)
        });
        let Some(session) = self.session.as_mut().filter(|_| expected && self.step == DestStep::Loading)
        else {
            refuse(channel, RefusedCode::Session, "no such channel is expected here");
            return Ok(());
        };
        let (sender, receiver) = channel.split();
        let placer = session.placer.clone();
        let events = self.events.clone();
        std::thread::spawn(move || pump::run(receiver, &placer, &events, |b| Event::Bulk(attempt.epoch, b)));
        let sent = sender.send(&Message::Joined { index });
        session.bulk.insert(index, sender);
        if let Err(error) = sent { self.on_bulk_lost(&error.to_string()) } else { Ok(()) }
    }

    fn on_message(&mut self, message: Message) -> Result<Option<Arrived>, MigrateError> {
        match message {
            Message::Machine(body) if self.step == DestStep::Loading => {
                self.make_machine(&body).map(|()| None)
            }
            Message::Barrier { pass } => self.on_barrier(pass).map(|()| None),
            Message::State(bytes) if self.step == DestStep::Loading => {
                if let Some(session) = &mut self.session {
                    session.state = Some(bytes);
                }
                Ok(None)
            }
            Message::End(end) if self.step == DestStep::Loading => self.on_end(&end).map(|()| None),
            Message::Run => self.input(DestInput::Run).map(|()| None),
            Message::Revoke => self.input(DestInput::Revoke).map(|()| None),
            Message::Abort(abort) => {
                self.observer.note(&abort.to_string());
                self.input(DestInput::Abort).map(|()| None)
            }
            Message::Done(done) if self.step == DestStep::Running => Ok(Some(self.finish(Some(&done)))),
            other => {
                self.fail(format!("{} does not belong here", other.kind()))?;
                Ok(None)
            }
        }
    }

    /// Has `vmrun` make itself the machine that the source describes, or names what is in the way.
    fn make_machine(&mut self, body: &wire::JsonBody) -> Result<(), MigrateError> {
        let machine: MachineDescription = match body.parse() {
            Ok(machine) => machine,
            Err(error) => return self.fail(error),
        };
        let Some(session) = &mut self.session else { return Ok(()) };
        if session.machine().is_some() {
            return self.fail("MACHINE came twice");
        }
        match self.host.prepare(session.attempt, &machine) {
            Ok(ram) => {
                let _ = session.placer.set(Some(Placer::new(ram)));
                self.say(&Message::Accepted)
            }
            Err(error) => {
                let failure = error.failure();
                let unsuitable = failure.is_some_and(|f| f.code == FailureCode::Unsuitable);
                let refused = Refused {
                    code: if unsuitable { RefusedCode::Unsuitable } else { RefusedCode::Failed },
                    message: error.to_string(),
                    problems: failure.map(|f| f.problems.clone()).unwrap_or_default(),
                };
                let ending = if unsuitable { Ending::Unsuitable } else { Ending::Failed };
                let mut ours = MigrateError::new(ending, Side::Destination, &refused.message);
                ours.problems.clone_from(&refused.problems);
                let _ = self.say(&Message::Refused(refused));
                self.drop_session();
                Err(ours)
            }
        }
    }

    fn on_barrier(&mut self, pass: u32) -> Result<(), MigrateError> {
        let Some(session) = &mut self.session else { return Ok(()) };
        let progress = session.barriers.entry(pass).or_default();
        progress.channels += 1;
        if progress.channels < session.hello.channels.max(1) {
            return Ok(());
        }
        session.barriers.remove(&pass);
        let (data, zero) = session.machine().map(Placer::counts).unwrap_or_default();
        self.say(&Message::PassDone(wire::PassDone {
            pass,
            pages_placed: data + zero,
            bytes: data * 4096,
            elapsed_us: 0,
        }))
    }

    /// Everything is here: counts and digest are compared, then the import starts.
    fn on_end(&mut self, end: &wire::End) -> Result<(), MigrateError> {
        let Some(session) = &mut self.session else { return Ok(()) };
        let (Some(placer), Some(state)) =
            (session.placer.get().and_then(Option::as_ref), session.state.take())
        else {
            return self.fail("END before the machine and its state");
        };
        let counts = placer.counts();
        if counts != (end.pages, end.zero_pages) || placer.missing() > 0 {
            let why = format!(
                "pages are missing: the source sent {} and {} zero pages, {} and {} were placed; {} were never told",
                end.pages,
                end.zero_pages,
                counts.0,
                counts.1,
                placer.missing()
            );
            return self.fail(why);
        }
        if let Some(theirs) = &end.digest {
            match placer.ram().digest() {
                Ok(ours) if ours == *theirs => session.digest = Some(ours),
                Ok(ours) => {
                    return self
                        .fail(format!("the digests of RAM differ: source {theirs}, destination {ours}"));
                }
                Err(error) => return self.fail(error),
            }
        }
        let client = match self.host.second() {
            Ok(client) => client,
            Err(error) => return self.fail(error),
        };
        let (events, attempt) = (self.events.clone(), session.attempt);
        std::thread::spawn(move || drop(events.send(Event::Imported(host::import(client, attempt, &state)))));
        Ok(())
    }

    fn on_imported(&mut self, result: Result<Imported, ClientError>) -> Result<(), MigrateError> {
        if self.step != DestStep::Loading {
            return Ok(());
        }
        match result {
            Ok(imported) => {
                if let Some(session) = &mut self.session {
                    let digest = session.digest.clone();
                    session.ready =
                        wire::Ready { import_us: imported.import_us, sync_us: imported.sync_us, digest };
                }
                self.input(DestInput::Loaded)
            }
            Err(error) => self.fail(error),
        }
    }

    /// The main channel is gone.
    fn on_lost(&mut self, why: &str) -> Result<(), MigrateError> {
        if let Some(session) = &mut self.session {
            if let Some(main) = session.main.take() {
                main.close();
            }
            session.waiting_since = Some(Instant::now());
        }
        self.input(DestInput::LinkLost)?;
        match self.step {
            DestStep::InDoubt | DestStep::Running => {
                self.observer
                    .note(&format!("the connection is lost ({why}); waiting for the source to come back"));
                Ok(())
            }
            _ => Err(MigrateError::new(Ending::PeerFailed, Side::Link, why)),
        }
    }

    /// A bulk channel is gone: of no account once everything has come.
    fn on_bulk_lost(&mut self, why: &str) -> Result<(), MigrateError> {
        match self.step {
            DestStep::Loading
                if self.session.as_ref().is_some_and(|s| s.state.is_some() || s.digest.is_none()) =>
            {
                self.on_lost(why)
            }
            _ => Ok(()),
        }
    }

    fn on_signal(&mut self, signal: i32) -> Result<(), MigrateError> {
        match self.step {
            DestStep::InDoubt => {
                self.observer.note("not now: the guest is acknowledged and waits for the source's word");
                Ok(())
            }
            DestStep::Running => Ok(()),
            _ => {
                let _ = self.fail(format!("stopped by signal {signal}"));
                Err(MigrateError::new(
                    Ending::Signalled(signal),
                    Side::Destination,
                    format!("stopped by signal {signal}"),
                ))
            }
        }
    }

    /// Every tick: does a signal want us to stop, is `vmrun` still there, has the source been away for too long?
    fn look_after(&mut self) -> Result<Option<Arrived>, MigrateError> {
        match self.signal.swap(0, Ordering::Relaxed) {
            0 => {}
            signal => self.on_signal(signal as i32)?,
        }
        if !self.host.client.is_alive() {
            return self.on_host_gone().map(|()| None);
        }
        let away = self.session.as_ref().and_then(|s| s.waiting_since).map(|since| since.elapsed());
        if let Some(away) = away {
            if self.step == DestStep::Running && away > self.options.linger {
                self.observer.note("the source did not come back to take leave; the guest runs here");
                return Ok(Some(self.finish(None)));
            }
            if !self.options.listen.takes_many() && self.step == DestStep::InDoubt {
                let what = "the connection is lost and cannot come again; vmrun holds the guest for the source's word";
                return Err(MigrateError::new(Ending::Unknown, Side::Link, what));
            }
        }
        Ok(None)
    }

    fn on_host_gone(&mut self) -> Result<(), MigrateError> {
        let gone = "the receiving vmrun is gone";
        match self.step {
            DestStep::InDoubt if self.session.as_ref().is_some_and(|s| s.run_passed_on) => {
                Err(MigrateError::new(Ending::Lost, Side::Destination, format!("{gone}, after RUN")))
            }
            DestStep::Running => Err(MigrateError::new(Ending::Lost, Side::Destination, gone)),
            DestStep::InDoubt => {
                // Not an error yet: the source has to hear REVOKED, now or when it comes back.
                self.input(DestInput::GuestGone)?;
                Err(failed(format!("{gone} before the guest ran")))
            }
            _ => {
                let _ = self.input(DestInput::GuestGone);
                Err(failed(gone))
            }
        }
    }

    /// Something here failed: before READY the source is told and goes on.
    fn fail(&mut self, why: impl std::fmt::Display) -> Result<(), MigrateError> {
        let error = failed(why);
        if self.step == DestStep::Loading {
            let (step, _) = self.step.on(DestInput::LoadFailed);
            self.step = step;
            let abort = wire::Abort { side: wire::Side::Destination, reason: error.cause.clone() };
            let _ = self.say(&Message::Abort(abort));
            self.drop_session();
        }
        Err(error)
    }

    /// Lets the pure machine decide, and does what it says.
    fn input(&mut self, input: DestInput) -> Result<(), MigrateError> {
        let (next, actions) = self.step.on(input);
        for action in actions {
            self.act(*action)?;
        }
        self.step = next;
        if next == DestStep::Refused && self.session.is_some() {
            self.drop_session();
            return Err(MigrateError::new(
                Ending::PeerFailed,
                Side::Source,
                "the source has taken the guest back",
            ));
        }
        Ok(())
    }

    fn act(&mut self, action: DestAction) -> Result<(), MigrateError> {
        let Some(session) = &mut self.session else { return Ok(()) };
        let attempt = session.attempt;
        match action {
            DestAction::Promise => match self.host.client.promise(attempt) {
                Ok(_) => Ok(()),
                Err(error) => self.fail(error),
            },
            DestAction::SendReady => {
                let ready = Message::Ready(session.ready.clone());
                self.say(&ready)
            }
            DestAction::Run => {
                session.run_passed_on = true;
                let start = Instant::now();
                match self.host.client.run(attempt) {
                    Ok(_) => {
                        session.run_us = start.elapsed().as_micros() as u64;
                        Ok(())
                    }
                    Err(error) => Err(MigrateError::new(Ending::Unknown, Side::Destination, error)),
                }
            }
            DestAction::SendRunning => {
                let running = Message::Running(wire::Running { run_us: session.run_us });
                self.say(&running)
            }
            DestAction::GiveUp => {
                let _ = self.host.client.revoke(attempt);
                Ok(())
            }
            DestAction::SendRevoked => self.say(&Message::Revoked),
            DestAction::SendAbort => {
                let reason = "the destination could not load the guest".to_owned();
                self.say(&Message::Abort(wire::Abort { side: wire::Side::Destination, reason }))
            }
            DestAction::AwaitReconnect => Ok(()),
        }
    }

    /// Says something on the main channel; a channel that fails is noticed by its pump.
    fn say(&mut self, message: &Message) -> Result<(), MigrateError> {
        if let Some(main) = self.session.as_ref().and_then(|s| s.main.as_ref()) {
            let _ = main.send(message);
        }
        Ok(())
    }

    /// Ends the session's connections and makes `vmrun` empty again.
    fn drop_session(&mut self) {
        let Some(session) = self.session.take() else { return };
        // A pump that waits for the machine need not.
        let _ = session.placer.set(None);
        let _ = self.host.client.revoke(session.attempt);
        if let Some(main) = session.main {
            main.close();
        }
        for sender in session.bulk.values() {
            sender.close();
        }
    }

    /// The guest is here for good.
    fn finish(&mut self, done: Option<&wire::Done>) -> Arrived {
        let session = self.session.take();
        let counts = session.as_ref().and_then(Session::machine).map(Placer::counts).unwrap_or_default();
        if let Some(session) = &session {
            if done.is_some()
                && let Some(main) = &session.main
            {
                let ours =
                    wire::Done { pages: counts.0, zero_pages: counts.1, digest: session.digest.clone() };
                let _ = main.send(&Message::Done(ours));
                main.end();
                self.await_farewell();
            }
            for sender in session.bulk.values() {
                sender.close();
            }
        }
        Arrived {
            session: session.as_ref().map(|s| s.attempt.session.to_string()).unwrap_or_default(),
            name: session.as_ref().map(|s| s.hello.vm_name.clone()).unwrap_or_default(),
            control: self.options.host.control.clone(),
            total_ms: ms(self.started.elapsed()),
            data_pages: counts.0,
            zero_pages: counts.1,
            digest: session.and_then(|s| s.digest),
        }
    }

    /// Waits a moment until the source has hung up: closing before it has read our last words could
    /// take them from it.
    fn await_farewell(&self) {
        let until = Instant::now() + FAREWELL;
        while let Ok(event) = self.inbox.recv_timeout(until.saturating_duration_since(Instant::now())) {
            if matches!(event, Event::Main(_, Brought::Lost(_))) {
                return;
            }
        }
    }

    fn hello_ack(&self, agreed: &wire::Agreed, resume_phase: Option<ResumePhase>) -> wire::HelloAck {
        wire::HelloAck {
            version: agreed.version,
            features: agreed.features.clone(),
            resume_phase,
            release: env!("CARGO_PKG_VERSION").to_owned(),
            host: super::wires::host_name(),
            peer_timeout_ms: self.options.peer_timeout.as_millis() as u64,
        }
    }
}

/// Says no on a channel that is not ours, and lets go of it.
fn refuse(channel: Channel, code: RefusedCode, message: &str) {
    let refused = Refused { code, message: message.to_owned(), problems: vec![] };
    let _ = channel.send(&Message::Refused(refused));
}

fn failed(error: impl std::fmt::Display) -> MigrateError {
    MigrateError::new(Ending::Failed, Side::Destination, error)
}
