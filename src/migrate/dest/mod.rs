//! The receiver: takes one machine in, acknowledges it, lets it run when the source says so.
//!
//! One thread conducts; it is fed by events from the listener (new connections), from one pump per
//! channel (messages, ends), from the import and from signals. What it may do in the switchover is
//! decided by [`DestStep`]; who owns the guest, by the `vmrun` that it drives.

use std::collections::HashMap;
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc::{Receiver as EventReceiver, RecvTimeoutError, Sender as EventSender, channel};
use std::time::{Duration, Instant};

use crate::control::{ClientError, Imported};
use crate::switchover::{Attempt, DestInput, DestStep};
use crate::transport::Sender;
use crate::wire::{self, Message};

use super::host::Host;
use super::intake::{Caller, Intake};
use super::options::{Arrived, ReceiveOptions};
use super::outcome::{Ending, MigrateError, Side};
use super::placer::Placer;
use super::pump::{Brought, PlacerSlot};
use super::report::Observer;
use super::wires::MainLine;

mod door;
mod load;
mod switch;

/// How often the conductor looks after its `vmrun` and shows progress.
const TICK: Duration = Duration::from_millis(100);

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
    let intake = match Intake::open(options, events.clone()) {
        Ok(intake) => intake,
        Err(error) => {
            host.close(); // not left behind, empty and with nobody to fill it
            return Err(failed(error));
        }
    };
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
    /// Channels that have ended a pass, by the pass.
    barriers: HashMap<u32, u32>,
    pass_began: PassBegan,
    state: Option<Vec<u8>>,
    digest: Option<String>,
    stays_paused: bool,
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

/// What the passes before the one under way had brought, and when it began.
struct PassBegan {
    data_pages: u64,
    zero_pages: u64,
    at: Instant,
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
}

fn failed(error: impl std::fmt::Display) -> MigrateError {
    MigrateError::new(Ending::Failed, Side::Destination, error)
}
