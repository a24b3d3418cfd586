//! The source comes back: connections of a session after the first.

use std::time::{Duration, Instant};

use crate::switchover::{Attempt, SourceInput, SourceStep};
use crate::transport::Address;
use crate::wire::ResumePhase;

use super::handover::{Handover, TICK};
use super::link::Link;
use super::options::SendOptions;
use super::outcome::{Ending, MigrateError, Side};
use super::postcopy::heard::Heard;
use super::told::LinkDown;

/// Between two tries to reach the destination: doubled each time from the first to the last.
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LAST_BACKOFF: Duration = Duration::from_secs(2);
/// How long it is tried by default to learn what became of RUN.
pub(super) const UNCERTAIN_FOR: Duration = Duration::from_secs(60);

/// Why a try came to nothing.
enum NotConnected {
    /// Nobody was reached, or no answer came.
    Failed(String),
    /// Whoever answered does not know the guest that ran there.
    Forgotten(String),
}

impl Handover<'_, '_> {
    /// Connects anew with the next epoch, again and again, until the destination answers, the
    /// operator's time is over, or it is clear that nobody there can tell.
    pub(super) fn reconnect(&mut self, mut first: Option<Attempt>) -> Result<(), MigrateError> {
        self.waiting_since = Instant::now();
        self.migration.phase = "reconnect";
        self.migration.moved = self.step == SourceStep::Moved;
        if self.migration.options.dest == Address::Stdio && first.is_none() {
            return Err(
                self.unreachable("standard input and output are one connection, which cannot come again")
            );
        }
        let mut backoff = FIRST_BACKOFF;
        loop {
            let attempt = match first.take() {
                Some(attempt) => attempt,
                None => self.next_epoch()?,
            };
            let (why, is_elsewhere) = match self.connect_as(attempt) {
                Ok(()) => return Ok(()),
                Err(NotConnected::Failed(why)) => (why, false),
                // A command that leads to somebody else does so each time.
                Err(NotConnected::Forgotten(why)) => (why, !self.migration.options.dest.takes_many()),
            };
            if is_elsewhere || self.waiting_since.elapsed() >= self.patience() {
                return Err(self.unreachable(&why));
            }
            let down = self.migration.link_down.get_or_insert_with(|| LinkDown::now("lost"));
            down.failed(&why, backoff);
            self.show();
            self.pause_between_tries(backoff);
            backoff = (backoff * 2).min(LAST_BACKOFF);
        }
    }

    /// One try.
    fn connect_as(&mut self, attempt: Attempt) -> Result<(), NotConnected> {
        let m = &mut *self.migration;
        m.attempt = attempt;
        m.hello.resume = true;
        let (link, ack) = Link::connect(m.options, attempt, &m.hello, &m.events)
            .map_err(|error| NotConnected::Failed(error.cause))?;
        // It ran the guest: one who knows nothing of that is not the receiver that has it now,
        // which may come back (`vmrecv --resume`).
        if forgets(self.step, ack.resume_phase) {
            link.cut();
            let what = format!(
                "whoever listens at {} knows nothing of the guest; where its vmrun lives, `vmrecv --resume` takes it over",
                m.options.dest
            );
            return Err(NotConnected::Forgotten(what));
        }
        m.link = Some(link);
        m.link_down = None;
        m.phase = "switchover";
        let total = m.bulk.as_ref().map_or(0, |b| b.views.ram().map().total_pages());
        self.heard = Heard::new(ack.fetching, total);
        self.done = None;
        self.follow_up.extend(phase_input(ack.resume_phase));
        Ok(())
    }

    /// How long to try to reach the destination. A command may never lead there again, so that is not
    /// tried for ever.
    fn patience(&self) -> Duration {
        let for_ever = self.step == SourceStep::Moved && self.migration.options.dest.takes_many();
        let by_default = if for_ever { Duration::MAX } else { UNCERTAIN_FOR };
        self.migration.options.recover_timeout.unwrap_or(by_default)
    }

    /// It was tried for long enough: who has the guest, and how it goes on.
    fn unreachable(&self, why: &str) -> MigrateError {
        let SendOptions { vm, dest, .. } = self.migration.options;
        let vm = vm.display();
        let again = match dest.takes_many() {
            true => format!("`vmsend --resume --vm {vm}` goes on"),
            false => format!(
                "{dest} may not lead to it again: `vmrecv --resume --control SOCK LISTEN` there, then \
                 `vmsend --resume --vm {vm} DEST` with that address go on"
            ),
        };
        if self.step == SourceStep::Moved {
            let lacks = match &self.migration.server {
                Some(server) => format!("{} of its pages were not sent", server.left()),
                None => "it lacks pages".to_owned(),
            };
            let what = format!(
                "the guest runs at the destination, which cannot be reached ({why}); {lacks}, and the source keeps them: {again}"
            );
            return MigrateError::new(Ending::Resumable, Side::Link, what);
        }
        let what = format!(
            "the destination was told to run the guest, or was about to be, and cannot be reached ({why}): \
             {again}; if that host is fenced off for good, \
             `vmctl {vm} resume --force --peer-fenced` brings the guest back with nothing lost"
        );
        MigrateError::new(Ending::Unknown, Side::Link, what)
    }

    /// Says where things stand, for whoever watches.
    fn show(&mut self) {
        let left = self.migration.server.as_ref().map_or(0, |s| s.left());
        self.migration.tick_now(0, left);
    }

    /// Sleeps, but hears the operator.
    fn pause_between_tries(&mut self, backoff: Duration) {
        let until = Instant::now() + backoff;
        while Instant::now() < until {
            std::thread::sleep(TICK.min(until.saturating_duration_since(Instant::now())));
            if self.migration.settings.refuse_cancel().is_some() {
                self.migration.observer.note(
                    "too late to cancel: the destination may run the guest; trying to reach it \
                     (vmctl resume --force --peer-fenced on the source's vmrun ends this)",
                );
            }
        }
        self.show();
    }

    fn next_epoch(&mut self) -> Result<Attempt, MigrateError> {
        let dest = self.migration.options.dest.to_string();
        match self.migration.vm.client.attach(None, &dest) {
            Ok(attached) => Ok(attached.attempt),
            // vmrun is gone, its copy with it: RUN is still right, and epochs can be counted here.
            Err(error) if error.is_disconnect() => {
                let mut attempt = self.migration.attempt;
                attempt.epoch += 1;
                Ok(attempt)
            }
            // An operator has decided otherwise meanwhile.
            Err(error) => Err(MigrateError::new(Ending::Unknown, Side::Source, error)),
        }
    }
}

/// Whether the destination that had said RUNNING now is one that never heard of it.
fn forgets(step: SourceStep, phase: Option<ResumePhase>) -> bool {
    let knows = matches!(phase, Some(ResumePhase::Running | ResumePhase::InDoubt | ResumePhase::Revoked));
    step == SourceStep::Moved && !knows
}

fn phase_input(phase: Option<ResumePhase>) -> Option<SourceInput> {
    Some(match phase? {
        ResumePhase::Running => SourceInput::Running,
        ResumePhase::InDoubt => SourceInput::PeerInDoubt,
        ResumePhase::Revoked => SourceInput::Revoked,
        // RUN was said only after READY: a destination that is loading is not the one we spoke to.
        ResumePhase::Loading | ResumePhase::Unknown => SourceInput::PeerForgot,
    })
}
