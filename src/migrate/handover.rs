//! The switchover on the source: READY, fence, RUN, RUNNING, and what follows when any of it is
//! lost. [`SourceStep`] decides, this does.

use std::time::{Duration, Instant};

use crate::control::ClientError;
use crate::switchover::{OperatorWord, Ownership, SourceAction, SourceInput, SourceStep};
use crate::wire::{self, Message};

use super::bulk::Views;
use super::link::Event;
use super::options::SendOptions;
use super::outcome::{Ending, MigrateError, Side, Summary, here, ms};
use super::postcopy::heard::Heard;
use super::precopy::Bulk;
use super::report::Observer;
use super::settings::{Settings, Stop};
use super::source::{Finish, Migration};
use super::source_vm::SourceVm;

mod fence;

/// How often a wait looks at what the operator wants.
pub(super) const TICK: Duration = Duration::from_millis(50);

/// Where the `vmrun` at `vm` has committed its guest to, if it has. Whatever is wrong there, [`resume`]
/// will say.
pub fn recorded_destination(vm: &std::path::Path) -> Option<crate::transport::Address> {
    match SourceVm::connect(vm).and_then(|mut vm| vm.client.status()).ok()?.ownership {
        Ownership::Committed { dest, .. } => dest.parse().ok(),
        _ => None,
    }
}

/// Goes on with a migration whose `vmsend` has gone after the fence.
pub fn resume(
    options: &SendOptions,
    settings: Settings,
    observer: &mut dyn Observer,
) -> Result<Summary, MigrateError> {
    let mut vm = SourceVm::connect(&options.vm).map_err(here)?;
    let status = vm.client.status().map_err(here)?;
    let Ownership::Committed { dest, .. } = status.ownership else {
        let what = format!("nothing to resume: the vmrun at {} {}", options.vm.display(), status.ownership);
        return Err(here(what));
    };
    let dest = options.redirect.as_ref().map_or(dest, |now_at| now_at.to_string());
    let attached = vm.client.attach(None, &dest).map_err(here)?;
    let machine = vm.client.machine().map_err(here)?;
    let mut options = options.clone();
    options.dest = attached.dest.parse().map_err(|e| here(format!("the recorded destination: {e}")))?;
    let hello = wire::Hello {
        version_min: wire::VERSION,
        version_max: wire::VERSION,
        release: env!("CARGO_PKG_VERSION").to_owned(),
        host: super::wires::host_name(),
        vm_uuid: machine.uuid,
        vm_name: machine.name,
        resume: true,
        superseded: None,
        channels: if options.dest.takes_many() { options.channels.max(1) } else { 0 },
        // Whether pages are owed is the destination's to say.
        features: vec![wire::POSTCOPY.to_owned()],
        verify: false,
        peer_timeout_ms: options.peer_timeout.as_millis() as u64,
    };
    let mut migration = Migration::new(&options, settings, observer, vm, attached.attempt, hello);
    migration.paused = true;
    let views = Views::new(migration.vm.ram().map_err(here)?).map_err(here)?;
    migration.bulk = Some(Bulk::new(views, 1));
    // Wanted back from the start: then RUN is not said again before REVOKE.
    let step = match migration.settings.back_wanted() {
        true => SourceStep::AwaitRevoked,
        false => SourceStep::AwaitRunning,
    };
    let mut handover = Handover::new(&mut migration, step);
    handover.reconnect(Some(attached.attempt))?;
    handover.conduct()
}

impl Migration<'_> {
    /// Pauses the guest, sends the rest, and hands the guest over.
    pub(super) fn hand_over(&mut self, finish: Finish) -> Result<Summary, MigrateError> {
        self.phase = "switchover";
        let start = Instant::now();
        self.stop(finish)?;
        let mut handover = Handover::new(self, SourceStep::AwaitReady);
        handover.paused_at = start;
        handover.conduct()
    }
}

pub(super) struct Handover<'m, 'a> {
    pub(super) migration: &'m mut Migration<'a>,
    pub(super) step: SourceStep,
    /// Inputs that follow from what was just done.
    pub(super) follow_up: Vec<SourceInput>,
    /// What the destination has said of its pages on the connection that stands.
    pub(super) heard: Heard,
    /// It has said that it has everything.
    pub(super) done: Option<wire::Done>,
    /// Why the guest stays, when it does.
    cause: Option<MigrateError>,
    ready: wire::Ready,
    paused_at: Instant,
    pub(super) waiting_since: Instant,
    run_said_at: Instant,
    want_back_said: bool,
}

impl<'m, 'a> Handover<'m, 'a> {
    fn new(migration: &'m mut Migration<'a>, step: SourceStep) -> Self {
        let now = Instant::now();
        Self {
            migration,
            step,
            follow_up: vec![],
            heard: Heard::default(),
            done: None,
            cause: None,
            ready: wire::Ready::default(),
            paused_at: now,
            waiting_since: now,
            run_said_at: now,
            want_back_said: false,
        }
    }

    fn conduct(&mut self) -> Result<Summary, MigrateError> {
        while !self.step.is_over() {
            let input = match self.follow_up.pop() {
                Some(input) => Some(input),
                None => self.wait()?,
            };
            if let Some(input) = input {
                self.input(input)?;
            }
        }
        match self.step {
            SourceStep::Moved => {
                if self.owes() {
                    self.serve()?;
                }
                self.take_leave()
            }
            SourceStep::Back => Err(self.cause.take().unwrap_or_else(|| here("the guest was taken back"))),
            _ => Err(MigrateError::new(
                Ending::Unknown,
                Side::Destination,
                "the destination knows nothing of this migration any more, so it may have run the guest and lost it; \
                 once it is certain that it does not run there: vmctl SOCK resume --force --peer-fenced",
            )),
        }
    }

    /// Waits for something to happen; `None` after a tick in which nothing did.
    fn wait(&mut self) -> Result<Option<SourceInput>, MigrateError> {
        let event = self.migration.inbox.recv_timeout(TICK).ok();
        if let Some(input) = event.and_then(|event| self.on_event(event)) {
            return Ok(Some(input));
        }
        if let Some(stop) = self.migration.settings.cancelled() {
            if self.step == SourceStep::AwaitReady {
                self.cause = Some(match stop {
                    Stop::Signal(n) => MigrateError::new(
                        Ending::Signalled(n),
                        Side::Source,
                        format!("stopped by signal {n}"),
                    ),
                    Stop::Operator => here("cancelled by the operator"),
                });
            }
            return Ok(Some(SourceInput::Cancel));
        }
        if self.migration.settings.back_wanted()
            && !self.want_back_said
            && self.step == SourceStep::AwaitRunning
        {
            self.want_back_said = true;
            return Ok(Some(SourceInput::WantBack));
        }
        if self.step == SourceStep::AwaitReady && !self.migration.vm.client.is_alive() {
            // Without vmrun there is no guest to resume: say so, and let the other side go.
            return Err(here("the source vmrun is gone: its guest has ended, or it was killed"));
        }
        Ok(None)
    }

    fn on_event(&mut self, event: Event) -> Option<SourceInput> {
        let epoch = self.migration.attempt.epoch;
        match event {
            Event::Main(e, message, _) if e == epoch => self.on_message(message),
            Event::Lost(e, why) if e == epoch && self.migration.link.is_some() => {
                if self.step == SourceStep::AwaitReady {
                    self.cause = Some(MigrateError::new(Ending::PeerFailed, Side::Link, why));
                } else {
                    self.migration
                        .observer
                        .note(&format!("the connection is lost ({why}); both sides hold still"));
                }
                Some(SourceInput::LinkLost)
            }
            _ => None,
        }
    }

    fn on_message(&mut self, message: Message) -> Option<SourceInput> {
        match message {
            Message::Ready(ready) => {
                if let (Some(ours), Some(theirs)) = (&self.migration.digest, &ready.digest)
                    && ours != theirs
                {
                    self.cause =
                        Some(here(format!("the digests of RAM differ: source {ours}, destination {theirs}")));
                    return Some(SourceInput::Cancel);
                }
                self.ready = ready;
                Some(SourceInput::Ready)
            }
            Message::Running(_) => Some(SourceInput::Running),
            Message::Received(part) => {
                self.heard.received(&part);
                None
            }
            Message::PageRequest(pages) => {
                // Answered by the connection's reader, where it may be.
                self.heard.requested(pages);
                None
            }
            Message::Done(done) => {
                self.done = Some(done);
                None
            }
            Message::Revoked => {
                self.cause = Some(MigrateError::new(
                    Ending::Failed,
                    Side::Destination,
                    "the destination gave the guest back unrun",
                ));
                Some(SourceInput::Revoked)
            }
            Message::Abort(abort) => {
                self.cause = Some(MigrateError::new(Ending::PeerFailed, Side::Destination, abort.reason));
                Some(SourceInput::PeerAborted)
            }
            Message::Refused(refused) => {
                self.cause = Some(super::link::refusal(refused));
                Some(SourceInput::PeerAborted)
            }
            other => {
                self.migration.observer.note(&format!("{} came out of turn and is ignored", other.kind()));
                None
            }
        }
    }

    fn input(&mut self, input: SourceInput) -> Result<(), MigrateError> {
        let (next, actions) = self.step.on(input);
        self.step = next;
        if next == SourceStep::Moved {
            let d = &mut self.migration.downtime;
            d.run_ms = ms(self.run_said_at.elapsed());
            d.total_ms = ms(self.paused_at.elapsed());
        }
        for action in actions {
            self.act(*action)?;
        }
        Ok(())
    }

    fn act(&mut self, action: SourceAction) -> Result<(), MigrateError> {
        let attempt = self.migration.attempt;
        match action {
            SourceAction::Fence => self.fence()?,
            SourceAction::SendRun => {
                self.run_said_at = Instant::now();
                self.migration.say(&Message::Run);
            }
            SourceAction::SendRevoke => self.migration.say(&Message::Revoke),
            SourceAction::SendAbort => {
                let reason = self.cause.as_ref().map_or_else(|| "given up".to_owned(), |c| c.cause.clone());
                self.migration.say(&Message::Abort(wire::Abort { side: wire::Side::Source, reason }));
                self.close_link();
            }
            SourceAction::TakeBack => {
                self.migration.vm.client.peer_revoked(attempt).map_err(|e| self.held(&e))?;
            }
            SourceAction::Resume => self.resume_guest()?,
            SourceAction::Reconnect => {
                self.close_link();
                self.reconnect(None)?;
            }
            SourceAction::RefuseCancel => {
                self.migration.settings.refuse_cancel();
                let text = "too late to cancel: the guest is committed to the destination; going on until it is settled";
                self.migration.observer.note(text);
            }
        }
        Ok(())
    }

    fn resume_guest(&mut self) -> Result<(), MigrateError> {
        let word = OperatorWord { force: false, peer_fenced: false };
        let vm = &mut self.migration.vm;
        if vm.is_logging() {
            let _ = vm.dirty_stop();
        }
        match vm.client.resume(word) {
            Ok(_) => {
                self.migration.paused = false;
                Ok(())
            }
            Err(error) => Err(here(format!("cannot resume the guest: {error}"))),
        }
    }

    pub(super) fn close_link(&mut self) {
        if let Some(link) = self.migration.link.take() {
            link.close();
        }
    }

    fn held(&self, error: &ClientError) -> MigrateError {
        MigrateError::new(Ending::Unknown, Side::Source, error)
    }
}
