//! The source comes back: connections of a session after the first.

use std::time::{Duration, Instant};

use crate::switchover::{SourceInput, SourceStep};
use crate::wire::ResumePhase;

use super::handover::{Handover, TICK};
use super::link::Link;
use super::outcome::{Ending, MigrateError, Side};
use super::postcopy::heard::Heard;

/// Between two tries to reach the destination: doubled each time from the first to the last.
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LAST_BACKOFF: Duration = Duration::from_secs(2);
/// How long it is tried by default to learn what became of RUN.
const UNCERTAIN_FOR: Duration = Duration::from_secs(60);

impl Handover<'_, '_> {
    /// Connects anew with the next epoch, again and again, until the destination answers, the
    /// operator's time is over, or it is clear that nobody there can tell.
    pub(super) fn reconnect(
        &mut self,
        mut first: Option<crate::switchover::Attempt>,
    ) -> Result<(), MigrateError> {
        self.waiting_since = Instant::now();
        self.migration.phase = "reconnect";
        let mut backoff = FIRST_BACKOFF;
        loop {
            let attempt = match first.take() {
                Some(attempt) => attempt,
                None => self.next_epoch()?,
            };
            self.migration.attempt = attempt;
            self.migration.hello.resume = true;
            let m = &mut *self.migration;
            let why = match Link::connect(m.options, attempt, &m.hello, &m.events) {
                // It ran the guest: one who knows nothing of that is not the receiver that has it now,
                // which may come back (`vmrecv --resume`).
                Ok((link, ack)) if forgets(self.step, ack.resume_phase) => {
                    link.cut();
                    format!(
                        "whoever listens at {} knows nothing of the guest; where its vmrun lives, `vmrecv --resume` takes it over",
                        m.options.dest
                    )
                }
                Ok((link, ack)) => {
                    m.link = Some(link);
                    m.phase = "switchover";
                    let total = m.bulk.as_ref().map_or(0, |b| b.views.ram().map().total_pages());
                    self.heard = Heard::new(ack.fetching, total);
                    self.done = None;
                    self.follow_up.extend(phase_input(ack.resume_phase));
                    return Ok(());
                }
                Err(error) => error.cause,
            };
            if self.waiting_since.elapsed() >= self.patience() {
                if self.step == SourceStep::Moved {
                    return Err(self.interrupted(&why));
                }
                return Err(MigrateError::new(
                    Ending::Unknown,
                    Side::Link,
                    format!(
                        "the destination was told to run the guest, or was about to be, and cannot be reached ({why}): \
                         `vmsend --resume --vm {}` asks it again; if that host is fenced off for good, \
                         `vmctl {} resume --force --peer-fenced` brings the guest back with nothing lost",
                        self.migration.options.vm.display(),
                        self.migration.options.vm.display()
                    ),
                ));
            }
            self.pause_between_tries(backoff);
            backoff = (backoff * 2).min(LAST_BACKOFF);
        }
    }

    /// How long to try to reach the destination.
    pub(super) fn patience(&self) -> Duration {
        let by_default = if self.step == SourceStep::Moved { Duration::MAX } else { UNCERTAIN_FOR };
        self.migration.options.recover_timeout.unwrap_or(by_default)
    }

    /// Sleeps, but hears the operator.
    pub(super) fn pause_between_tries(&mut self, backoff: Duration) {
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
        self.migration.tick_now(0, 0);
    }

    pub(super) fn next_epoch(&mut self) -> Result<crate::switchover::Attempt, MigrateError> {
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
