//! The sender: attaches to a `vmrun`, sends passes while the guest runs, and conducts the
//! switchover. The mirror image of [`super::dest`].
//!
//! One thread conducts; it is fed by events from the reader of the main channel, from the workers
//! of the bulk channels and from signals. Until the fence every error ends with the guest running
//! here; from the fence on nothing unwinds past [`super::handover`].

use std::sync::Arc;
use std::sync::mpsc::{Receiver as EventReceiver, RecvTimeoutError, Sender as EventSender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::memory::{PageRun, PageSet};
use crate::switchover::Attempt;
use crate::wire::{self, Message};

use super::bulk::Views;
use super::convergence::{Decision, Mode, PassReport, cuts_short, decide};
use super::link::{Event, Link};
use super::options::SendOptions;
use super::outcome::{Downtime, Ending, MigrateError, Side, Summary, here, ms};
use super::postcopy::server::PageServer;
use super::precopy::{Bulk, Conductor, Pass};
use super::report::Observer;
use super::settings::{Settings, Stop};
use super::source_vm::SourceVm;
use super::told::LinkDown;

/// How often progress is shown.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);
/// Chunks that wait for a channel: enough to keep them busy, few enough to stop at once.
const QUEUE_CHUNKS_PER_CHANNEL: usize = 4;
/// What the switchover is expected to cost beside the last pass, before it was ever measured.
pub(super) const FIXED_COST: Duration = Duration::from_millis(5);

/// How the guest is handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// What is left goes in one pass while the guest stands still.
    LastPass {
        /// Its number.
        number: u32,
    },
    /// What is left goes after the guest.
    Postcopy {
        /// No pass over all of RAM was made before.
        at_once: bool,
    },
}

/// A migration under way, on the source's side.
pub struct Migration<'a> {
    pub(super) options: &'a SendOptions,
    pub(super) settings: Settings,
    pub(super) observer: &'a mut dyn Observer,
    pub(super) vm: SourceVm,
    pub(super) attempt: Attempt,
    pub(super) hello: wire::Hello,
    pub(super) events: EventSender<Event>,
    pub(super) inbox: EventReceiver<Event>,
    pub(super) link: Option<Link>,
    pub(super) started: Instant,
    pub(super) bulk: Option<Bulk>,
    pub(super) history: Vec<PassReport>,
    pub(super) phase: &'static str,
    pub(super) paused: bool,
    /// The destination is known to have run the guest.
    pub(super) moved: bool,
    /// Since the connection was lost, until it stands again.
    pub(super) link_down: Option<LinkDown>,
    pub(super) downtime: Downtime,
    pub(super) digest: Option<String>,
    /// Postcopy: what is owed to the guest that runs at the destination.
    pub(super) server: Option<Arc<PageServer>>,
    /// Postcopy: how many pages went ahead of the guest while it ran here.
    pub(super) warm_up_pages: u64,
    /// When a pass under way is to end, whatever the policy.
    pub(super) cut_at: Option<Instant>,
    /// Postcopy: how many pages were owed at first.
    pub(super) postcopy_pages: Option<u64>,
    pub(super) latency: Option<serde_json::Value>,
    may_postcopy: bool,
    /// Pages that are known to be lacking at the destination: taken from the dirty log and not sent since;
    /// postcopy at once: those that had memory while the guest still ran and were not sent ahead.
    pub(super) unsent: Option<PageSet>,
    /// Postcopy: the pages that the destination has been told to be missing.
    pub(super) named: Option<PageSet>,
    /// The pages that the last pass had to send: what was dirtied during the one before it; where that was cut short,
    /// what was dirtied during it.
    pub(super) last_set: Option<PageSet>,
    pub(super) hashing: Option<JoinHandle<std::io::Result<String>>>,
    pub(super) last_progress: Instant,
    pub(super) pass_started: (Instant, u64),
}

/// Moves the guest. `events` of signals may be sent into the migration by the caller.
pub fn send(
    options: &SendOptions,
    settings: Settings,
    observer: &mut dyn Observer,
) -> Result<Summary, MigrateError> {
    let mut vm = SourceVm::connect(&options.vm).map_err(here)?;
    let machine = vm.client.machine().map_err(here)?;
    let session = super::wires::new_session().map_err(here)?;
    let attached = vm.client.attach(Some(session), &options.dest.to_string()).map_err(here)?;
    let channels = if options.dest.takes_many() { options.channels.max(1) } else { 0 };
    let hello = wire::Hello {
        version_min: wire::VERSION,
        version_max: wire::VERSION,
        release: env!("CARGO_PKG_VERSION").to_owned(),
        host: super::wires::host_name(),
        vm_uuid: machine.uuid.clone(),
        vm_name: machine.name.clone(),
        resume: false,
        superseded: attached.superseded,
        channels,
        features: if options.wants_postcopy() {
            vec![format!("{}{}", wire::MUST_PREFIX, wire::POSTCOPY)]
        } else {
            vec![]
        },
        verify: options.verify,
        peer_timeout_ms: options.peer_timeout.as_millis() as u64,
    };
    let mut migration = Migration::new(options, settings, observer, vm, attached.attempt, hello);
    let result = migration.run(&machine);
    if let Err(error) = &result {
        migration.back_out(error);
    }
    result
}

impl<'a> Migration<'a> {
    pub(super) fn new(
        options: &'a SendOptions,
        settings: Settings,
        observer: &'a mut dyn Observer,
        vm: SourceVm,
        attempt: Attempt,
        hello: wire::Hello,
    ) -> Self {
        let (events, inbox) = std::sync::mpsc::channel();
        Self {
            options,
            settings,
            observer,
            vm,
            attempt,
            hello,
            events,
            inbox,
            link: None,
            started: Instant::now(),
            bulk: None,
            history: Vec::new(),
            phase: "connect",
            paused: false,
            moved: false,
            link_down: None,
            downtime: Downtime::default(),
            digest: None,
            server: None,
            warm_up_pages: 0,
            cut_at: None,
            postcopy_pages: None,
            latency: None,
            may_postcopy: false,
            unsent: None,
            named: None,
            last_set: None,
            hashing: None,
            last_progress: Instant::now(),
            pass_started: (Instant::now(), 0),
        }
    }

    fn run(&mut self, machine: &crate::state::MachineDescription) -> Result<Summary, MigrateError> {
        self.connect(machine)?;
        self.phase = "precopy";
        let finish = match self.settings.policy().mode {
            Mode::Postcopy => self.warm_up()?,
            Mode::Precopy | Mode::Hybrid => self.precopy()?,
        };
        self.hand_over(finish)
    }

    /// Connects, has the machine accepted, and opens the bulk channels. The guest is untouched.
    fn connect(&mut self, machine: &crate::state::MachineDescription) -> Result<(), MigrateError> {
        let (link, ack) = Link::connect(self.options, self.attempt, &self.hello, &self.events)?;
        self.observer.note(&format!("connected to {} ({})", ack.host, self.options.dest));
        crate::sys::sandbox::try_forbidden("send");
        self.may_postcopy = ack.features.iter().any(|f| f == wire::POSTCOPY);
        self.link = Some(link);
        self.say(&Message::Machine(wire::JsonBody::of(machine).map_err(here)?));
        self.await_message("the machine to be accepted", |message| {
            matches!(message, Message::Accepted).then_some(())
        })?;
        let views = Views::new(self.vm.ram().map_err(here)?).map_err(here)?;
        let bulk = Bulk::new(views, QUEUE_CHUNKS_PER_CHANNEL * self.hello.channels.max(1) as usize);
        if let Some(link) = &mut self.link {
            link.open_channels(self.options, &self.hello)?;
            link.start_passes(&bulk, &self.events)?;
        }
        self.bulk = Some(bulk);
        Ok(())
    }

    /// Passes until the policy says to switch over, and how.
    fn precopy(&mut self) -> Result<Finish, MigrateError> {
        let Some(bulk) = self.bulk.clone() else { return Err(here("no channels")) };
        let total = bulk.views.ram().map().total_pages();
        self.vm.dirty_start().map_err(here)?;
        let mut set = PageSet::full(total);
        let mut number = 0;
        loop {
            number += 1;
            self.pass_started = (Instant::now(), bulk.counters.get().0);
            let pass = Pass { number, set: &set, guest_runs: true, first: number == 1 };
            let (mut report, unsent) = bulk.run_pass(&pass, self)?;
            let sent = std::mem::replace(&mut set, self.vm.dirty_take(total).map_err(here)?);
            self.last_set = if unsent.is_empty() { (number > 1).then_some(sent) } else { Some(set.clone()) };
            set.union(&unsent);
            report.dirty_after_pages = set.count();
            self.history.push(report);
            self.tick_now(number, set.count());
            match decide(&self.history, self.started.elapsed(), FIXED_COST, &self.settings.policy()) {
                Decision::Continue => {}
                Decision::SwitchOver => {
                    self.unsent = Some(set);
                    return Ok(Finish::LastPass { number: number + 1 });
                }
                Decision::PostcopyNow if self.may_postcopy => {
                    self.name_missing(&set);
                    self.unsent = Some(set);
                    return Ok(Finish::Postcopy { at_once: false });
                }
                Decision::PostcopyNow => return Err(here("the destination cannot do postcopy")),
                Decision::GiveUp(why) => {
                    return Err(MigrateError::new(Ending::NotConverged, Side::Source, why));
                }
            }
        }
    }

    /// Before the fence: the guest goes on here, and the other side hears why.
    fn back_out(&mut self, error: &MigrateError) {
        // After the fence the guest is not ours to resume, whatever went wrong.
        if matches!(error.ending, Ending::Unknown | Ending::Resumable | Ending::Lost | Ending::Moved) {
            return;
        }
        if self.paused && self.vm.client.is_alive() {
            let word = crate::switchover::OperatorWord { force: false, peer_fenced: false };
            if let Err(e) = self.vm.client.resume(word) {
                self.observer.note(&format!("cannot resume the guest: {e}"));
            }
        }
        if self.vm.is_logging() {
            let _ = self.vm.dirty_stop();
        }
        self.say(&Message::Abort(wire::Abort { side: wire::Side::Source, reason: error.cause.clone() }));
        if let Some(bulk) = &self.bulk {
            bulk.queue.stop();
        }
        if let Some(link) = self.link.take() {
            link.close();
        }
    }

    /// Says something on the main channel; a channel that fails is noticed by its reader.
    pub(super) fn say(&mut self, message: &Message) {
        if let Some(link) = &self.link {
            let _ = link.send(message);
        }
    }

    /// Waits for the message that `wanted` picks, while nothing else is expected.
    fn await_message<T>(
        &mut self,
        what: &str,
        wanted: impl Fn(&Message) -> Option<T>,
    ) -> Result<T, MigrateError> {
        loop {
            self.check()?;
            if let Some(message) = self.next_message()? {
                match wanted(&message) {
                    Some(value) => return Ok(value),
                    None => return Err(unexpected(&message, what)),
                }
            }
        }
    }

    /// The next message of the current connection, or `None` after a tick without one.
    pub(super) fn next_message(&mut self) -> Result<Option<Message>, MigrateError> {
        match self.inbox.recv_timeout(PROGRESS_EVERY) {
            Ok(event) => self.sort(event),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(here("the sender's own threads are gone")),
        }
    }

    /// A message for the conductor; what ends the attempt is an error.
    fn sort(&mut self, event: Event) -> Result<Option<Message>, MigrateError> {
        match event {
            Event::Main(epoch, message, _) if epoch == self.attempt.epoch => match message {
                Message::Abort(abort) => {
                    Err(MigrateError::new(Ending::PeerFailed, Side::Destination, abort.reason))
                }
                Message::Refused(refused) => Err(super::link::refusal(refused)),
                message => Ok(Some(message)),
            },
            Event::Lost(epoch, why) if epoch == self.attempt.epoch => {
                Err(MigrateError::new(Ending::PeerFailed, Side::Link, why))
            }
            Event::Main(..) | Event::Lost(..) => Ok(None),
        }
    }

    /// Whether the migration may go on: nobody wants to stop, and the guest is still there.
    fn check(&mut self) -> Result<(), MigrateError> {
        match self.settings.cancelled() {
            Some(Stop::Signal(signal)) => {
                return Err(MigrateError::new(
                    Ending::Signalled(signal),
                    Side::Source,
                    format!("stopped by signal {signal}"),
                ));
            }
            Some(Stop::Operator) => return Err(here("cancelled by the operator")),
            None => {}
        }
        if !self.vm.client.is_alive() {
            return Err(here("the source vmrun is gone: its guest has ended, or it was killed"));
        }
        Ok(())
    }

    /// The summary of a migration that has moved the guest.
    pub(super) fn summary(&self) -> Summary {
        let (data_pages, zero_pages) = self.bulk.as_ref().map(|b| b.counters.get()).unwrap_or_default();
        Summary {
            ending: Ending::Moved,
            session: self.attempt.session.to_string(),
            total_ms: ms(self.started.elapsed()),
            passes: self.history.len() as u32 + u32::from(self.server.is_none()),
            warm_up_pages: self.postcopy_pages.map(|_| self.warm_up_pages),
            postcopy_pages: self.postcopy_pages,
            latency: self.latency.clone(),
            memory_bytes: self.bulk.as_ref().map_or(0, |b| b.views.ram().map().total_bytes()),
            wire_bytes: self.link.as_ref().map_or(0, Link::bytes_sent),
            data_pages,
            zero_pages,
            channels: self.hello.channels,
            digest: self.digest.clone(),
            downtime: self.downtime,
        }
    }
}

impl Conductor for Migration<'_> {
    fn clear_dirty(&mut self, run: PageRun) -> Result<(), MigrateError> {
        self.vm.client.dirty_clear(run).map_err(here)
    }

    fn tick(&mut self, pass: u32, left_pages: u64) -> Result<(), MigrateError> {
        self.check()?;
        if let Some(link) = &self.link {
            link.set_rate(self.settings.bandwidth_limit());
        }
        if self.last_progress.elapsed() >= PROGRESS_EVERY {
            self.tick_now(pass, left_pages);
        }
        while let Ok(event) = self.inbox.try_recv() {
            if let Some(message) = self.sort(event)? {
                return Err(unexpected(&message, "a pass to be sent"));
            }
        }
        Ok(())
    }

    fn is_cut_short(&self) -> bool {
        let is_over = self.cut_at.is_some_and(|at| Instant::now() >= at);
        is_over || cuts_short(self.started.elapsed(), &self.settings.policy())
    }

    fn await_pass(&mut self, pass: u32) -> Result<(), MigrateError> {
        loop {
            match self.next_message()? {
                Some(Message::PassDone(done)) if done.pass == pass => return Ok(()),
                Some(other) => return Err(unexpected(&other, "PASS_DONE")),
                None => {
                    self.check()?;
                    self.tick_now(pass, 0);
                }
            }
        }
    }

    fn why_stopped(&mut self) -> MigrateError {
        let until = Instant::now() + self.options.peer_timeout;
        while Instant::now() < until {
            match self.next_message() {
                Err(error) => return error,
                Ok(_) => {
                    if let Err(error) = self.check() {
                        return error;
                    }
                }
            }
        }
        here("the channels stopped and did not say why")
    }
}

fn unexpected(message: &Message, awaited: &str) -> MigrateError {
    MigrateError::new(
        Ending::PeerFailed,
        Side::Destination,
        format!("{} came while waiting for {awaited}", message.kind()),
    )
}
