//! The receiver: takes one machine in, acknowledges it, lets it run when the source says so.
//!
//! One thread conducts; it is fed by events from the listener (new connections), from one pump per
//! channel (messages, ends), from the import and from signals. What it may do in the switchover is
//! decided by [`DestStep`]; who owns the guest, by the `vmrun` that it drives.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc::{Receiver as EventReceiver, RecvTimeoutError, Sender as EventSender, channel};
use std::time::{Duration, Instant};

use crate::control::{Client, ClientError, Imported, Postcopy};
use crate::switchover::{Attempt, DestInput, DestStep};
use crate::transport::{Address, Sender};
use crate::wire::{self, Message};

use super::host::Host;
use super::intake::{Caller, Intake};
use super::options::{Arrived, ReceiveOptions};
use super::outcome::{Ending, MigrateError, Side};
use super::placer::Placer;
use super::postcopy::pager::Pager;
use super::pump::{Brought, PlacerSlot};
use super::report::Observer;
use super::wires::MainLine;

mod door;
mod fetch;
mod load;
mod switch;
mod tell;

use fetch::TakenOver;
use tell::Lost;

/// How often the conductor looks after its `vmrun` and shows progress.
const TICK: Duration = Duration::from_millis(100);

/// Everything that wakes the conductor.
#[derive(Debug)]
pub enum Event {
    /// Somebody has connected and said HELLO or JOIN.
    Caller(Caller),
    /// From the main channel of this connection. Named by session and epoch: what an attempt that is
    /// over still brings must not be taken for the next one's, which begins with the same epoch.
    Main(Attempt, Brought),
    /// From a bulk channel of this connection.
    Bulk(Attempt, Brought),
    /// The import of this attempt has ended.
    Imported(Attempt, Result<Imported, ClientError>),
    /// Postcopy: the last missing page has come.
    AllPresent,
}

/// Takes in one machine. Attempts that fail leave it waiting for the next, unless the connection
/// itself was given (`-`, `exec:`) and so cannot come again. `signal` is where a signal handler puts
/// the number of a signal that wants this to stop, 0 for none.
pub fn receive(
    options: &ReceiveOptions,
    signal: &AtomicUsize,
    observer: &mut dyn Observer,
) -> Result<Arrived, MigrateError> {
    let mut host = Host::open(&options.host)?;
    host.check_empty()?;
    take_in(options, signal, observer, host, None)
}

/// What was taken over from a receiver that has died: its `vmrun`, with the guest that is acknowledged
/// or runs there and the set of pages that are present. It has no thread yet and has heard nothing
/// from another host.
pub struct Takeover {
    options: ReceiveOptions,
    host: Host,
    taken: TakenOver,
}

impl Takeover {
    /// Takes over. Where to listen is `listen`, or what the one before has recorded.
    pub fn from_vmrun(options: &ReceiveOptions, listen: Option<Address>) -> Result<Self, MigrateError> {
        let mut host = Host::open(&options.host)?;
        let taken = fetch::take_over(&mut host)?;
        let mut options = options.clone();
        options.listen = match (listen, &taken.listen) {
            (Some(listen), _) => listen,
            (None, Some(recorded)) => match recorded.parse().map_err(failed)? {
                Address::Exec(_) | Address::Stdio => {
                    return Err(failed(format!(
                        "the one before listened at {recorded}, which cannot come again: say LISTEN"
                    )));
                }
                listen => listen,
            },
            (None, None) => return Err(failed("nobody has recorded where to listen: say LISTEN")),
        };
        Ok(Self { options, host, taken })
    }

    /// Where the source is going to be waited for.
    pub fn listen(&self) -> &Address {
        &self.options.listen
    }

    /// Goes on as [`receive`] does.
    pub fn resume(self, signal: &AtomicUsize, observer: &mut dyn Observer) -> Result<Arrived, MigrateError> {
        take_in(&self.options, signal, observer, self.host, Some(self.taken))
    }
}

fn take_in(
    options: &ReceiveOptions,
    signal: &AtomicUsize,
    observer: &mut dyn Observer,
    mut host: Host,
    mut taken: Option<TakenOver>,
) -> Result<Arrived, MigrateError> {
    let (events, inbox) = channel();
    let intake = match Intake::open(options, events.clone()) {
        Ok(intake) => intake,
        Err(error) => {
            host.close(); // not left behind, empty and with nobody to fill it
            return Err(failed(error));
        }
    };
    observer.note(&format!("waiting for a machine at {}", intake.address()));
    loop {
        let surroundings =
            Surroundings { options, signal, events: &events, inbox: &inbox, address: intake.address() };
        let mut arrival = Arrival::new(surroundings, &mut host, observer);
        if let Some(taken) = taken.take() {
            arrival.adopt(taken)?;
        }
        let error = match arrival.conduct() {
            Ok(arrived) => return Ok(arrived),
            Err(error) => error,
        };
        let is_over = matches!(error.ending, Ending::PeerFailed | Ending::Unsuitable | Ending::Failed);
        if intake.is_single() || !is_over {
            if is_over || matches!(error.ending, Ending::Signalled(_)) {
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

/// What all attempts of one receiver share.
#[derive(Clone, Copy)]
pub(crate) struct Surroundings<'a> {
    pub options: &'a ReceiveOptions,
    pub signal: &'a AtomicUsize,
    pub events: &'a EventSender<Event>,
    pub inbox: &'a EventReceiver<Event>,
    /// Where we listen, with the port that was taken.
    pub address: &'a Address,
}

/// One guest on its way in.
pub(crate) struct Arrival<'a> {
    options: &'a ReceiveOptions,
    signal: &'a AtomicUsize,
    events: &'a EventSender<Event>,
    inbox: &'a EventReceiver<Event>,
    address: &'a Address,
    host: &'a mut Host,
    observer: &'a mut dyn Observer,
    step: DestStep,
    session: Option<Session>,
    started: Instant,
    /// When the vmrun was last told where things stand.
    told_at: Option<Instant>,
}

/// What is known once a source has said HELLO.
struct Session {
    attempt: Attempt,
    hello: wire::Hello,
    main: Option<MainLine>,
    /// Bulk channels that have joined, by index.
    bulk: HashMap<u32, Sender>,
    placer: PlacerSlot,
    /// The pass that some channels have ended, and how many.
    ending_pass: Option<(u32, u32)>,
    pass_began: PassBegan,
    state: Option<Vec<u8>>,
    digest: Option<String>,
    stays_paused: bool,
    ready: wire::Ready,
    run_us: u64,
    /// The connection was lost, and has to come back.
    lost: Option<Lost>,
    /// For the import, which may take long: a connection of its own.
    importer: Option<Client>,
    /// RUN was passed on to `vmrun`.
    run_passed_on: bool,
    /// Postcopy: the pages that come after the guest, from the MISSING frames.
    missing: Option<Vec<u64>>,
    /// Postcopy: what faults are served with, from the first MISSING to END.
    armed: Option<(Postcopy, OwnedFd, OwnedFd)>,
    /// Postcopy: serves the guest's faults from END on.
    pager: Option<Arc<Pager>>,
}

impl Session {
    fn new(attempt: Attempt, hello: wire::Hello) -> Self {
        Self {
            attempt,
            hello,
            main: None,
            bulk: HashMap::new(),
            placer: PlacerSlot::default(),
            ending_pass: None,
            pass_began: PassBegan { data_pages: 0, zero_pages: 0, at: Instant::now() },
            state: None,
            digest: None,
            stays_paused: false,
            ready: wire::Ready::default(),
            run_us: 0,
            lost: None,
            run_passed_on: false,
            importer: None,
            missing: None,
            armed: None,
            pager: None,
        }
    }

    /// Pages that have yet to come for the guest that is here.
    fn fetching(&self) -> u64 {
        self.pager.as_ref().map_or(0, |p| p.missing_pages())
    }

    /// Pages with data and zero pages that have come, before the guest and after it.
    fn counts(&self) -> (u64, u64) {
        let before = self.machine().map(Placer::counts).unwrap_or_default();
        let after = self.pager.as_ref().map(|p| p.counts()).unwrap_or_default();
        (before.0 + after.0, before.1 + after.1)
    }

    fn machine(&self) -> Option<&Placer> {
        self.placer.get().and_then(Option::as_ref)
    }
}

/// What the passes before the one under way had brought, and when it began.
struct PassBegan {
    data_pages: u64,
    zero_pages: u64,
    at: Instant,
}

impl<'a> Arrival<'a> {
    pub(crate) fn new(around: Surroundings<'a>, host: &'a mut Host, observer: &'a mut dyn Observer) -> Self {
        let Surroundings { options, signal, events, inbox, address } = around;
        let (step, started) = (DestStep::Loading, Instant::now());
        let (session, told_at) = (None, None);
        Self { options, signal, events, inbox, address, host, observer, step, session, started, told_at }
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
            self.tell();
        }
    }

    pub(crate) fn on_event(&mut self, event: Event) -> Result<Option<Arrived>, MigrateError> {
        match event {
            Event::Caller(caller) => self.on_caller(caller).map(|()| None),
            Event::Main(attempt, brought) if self.is_current(attempt) => match brought {
                Brought::Message(message, _) => self.on_message(message),
                Brought::Lost(why) => self.on_lost(&why).map(|()| None),
                Brought::HostGone => self.on_host_gone().map(|()| None),
            },
            Event::Bulk(attempt, brought) if self.is_current(attempt) => match brought {
                Brought::Message(Message::Barrier { pass }, _) if self.step == DestStep::Loading => {
                    self.on_barrier(pass).map(|()| None)
                }
                Brought::Message(other, _) => {
                    let what = format!("{} does not belong on a bulk channel", other.kind());
                    self.on_nonsense(&what).map(|()| None)
                }
                Brought::Lost(why) => self.on_bulk_lost(&why).map(|()| None),
                Brought::HostGone => self.on_host_gone().map(|()| None),
            },
            Event::Imported(attempt, result) if self.is_session(attempt) => {
                self.on_imported(result).map(|()| None)
            }
            Event::AllPresent => self.on_all_present().map(|()| None),
            Event::Main(..) | Event::Bulk(..) | Event::Imported(..) => Ok(None),
        }
    }

    /// Whether the source is there.
    #[cfg(any(fuzzing, test))]
    pub(crate) fn is_connected(&self) -> bool {
        self.session.as_ref().is_some_and(|s| s.main.is_some())
    }

    /// Leaves the guest where it is, and ends what is here.
    #[cfg(any(fuzzing, test))]
    pub(crate) fn abandon(mut self) {
        let session = self.session.take();
        if let Some(pager) = session.and_then(|s| s.pager) {
            pager.stop();
        }
    }

    fn is_current(&self, attempt: Attempt) -> bool {
        self.session.as_ref().is_some_and(|s| s.attempt == attempt && s.main.is_some())
    }

    fn is_fetching(&self) -> bool {
        self.session.as_ref().is_some_and(|s| s.fetching() > 0)
    }

    fn is_session(&self, attempt: Attempt) -> bool {
        self.session.as_ref().is_some_and(|s| s.attempt.session == attempt.session)
    }

    fn on_message(&mut self, message: Message) -> Result<Option<Arrived>, MigrateError> {
        match message {
            Message::Machine(body) if self.step == DestStep::Loading => {
                self.make_machine(&body).map(|()| None)
            }
            Message::Barrier { pass } if self.step == DestStep::Loading => {
                self.on_barrier(pass).map(|()| None)
            }
            Message::State(bytes) if self.step == DestStep::Loading => {
                if let Some(session) = &mut self.session {
                    session.state = Some(bytes);
                }
                Ok(None)
            }
            Message::Missing(part) if self.step == DestStep::Loading => self.on_missing(&part).map(|()| None),
            Message::End(end) if self.step == DestStep::Loading => self.on_end(&end).map(|()| None),
            Message::Run => self.input(DestInput::Run).map(|()| None),
            Message::Revoke => self.input(DestInput::Revoke).map(|()| None),
            Message::Abort(abort) => {
                self.observer.note(&abort.to_string());
                self.input(DestInput::Abort).map(|()| None)
            }
            Message::Done(_) if self.step == DestStep::Running && !self.is_fetching() => {
                self.compare().map(|()| None)
            }
            // Before this the source's vmrun still holds its copy, and somebody may come back for it.
            Message::Released if self.step == DestStep::Running && !self.is_fetching() => {
                Ok(Some(self.part()))
            }
            other => self.on_nonsense(&format!("{} does not belong here", other.kind())).map(|()| None),
        }
    }
}

fn failed(error: impl std::fmt::Display) -> MigrateError {
    MigrateError::new(Ending::Failed, Side::Destination, error)
}
