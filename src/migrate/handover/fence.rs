//! The fence (S3): asked of `vmrun` until it is certain whether it stands.

use std::time::Instant;

use crate::control::ClientError;
use crate::migrate::outcome::{Ending, MigrateError, Side, here, ms};
use crate::migrate::reconnect::UNCERTAIN_FOR;
use crate::migrate::source_vm::SourceVm;
use crate::switchover::SourceInput;

use super::{Handover, TICK};

impl Handover<'_, '_> {
    /// Records the commitment, or learns that there is none: RUN may be said only of one that stands, and
    /// the guest may go on only without.
    pub(super) fn fence(&mut self) -> Result<(), MigrateError> {
        let ready_after = self.paused_at.elapsed();
        let fence_started = Instant::now();
        let settled = self.settle_fence();
        let d = &mut self.migration.downtime;
        d.import_ms = self.ready.import_us as f64 / 1e3;
        d.sync_ms = self.ready.sync_us as f64 / 1e3;
        let before = d.pause_ms + d.export_ms + d.last_pass_ms + d.verify_ms + d.import_ms + d.sync_ms;
        d.ready_ms = (ms(ready_after) - before).max(0.0);
        d.fence_ms = ms(fence_started.elapsed());
        self.follow_up.push(settled?);
        Ok(())
    }

    /// Asks until there is an answer: one that did not come may be of a fence that stands, or is about to,
    /// and a repeat changes nothing. An error when it stays open whether it does.
    fn settle_fence(&mut self) -> Result<SourceInput, MigrateError> {
        let since = Instant::now();
        let dest = self.migration.options.dest.to_string();
        loop {
            let error = match self.migration.vm.client.fence(self.migration.attempt, &dest) {
                Ok(()) => return Ok(SourceInput::Fenced),
                Err(ClientError::Refused { failure, .. }) => {
                    self.cause = Some(here(format!("the fence was refused: {failure}")));
                    return Ok(SourceInput::FenceRefused);
                }
                Err(error) => error,
            };
            self.migration.observer.note(&format!("the fence got no answer: {error}"));
            let patience = self.migration.options.recover_timeout.unwrap_or(UNCERTAIN_FOR);
            if !self.migration.vm.client.is_alive() {
                // Whoever is gone runs nothing, and its copy is as good as fenced.
                if self.is_vmrun_gone() {
                    return Ok(SourceInput::Fenced);
                }
            } else if since.elapsed() < patience {
                continue;
            }
            let vm = self.migration.options.vm.display();
            let what = format!(
                "it is open whether the guest is fenced ({error}): `vmctl {vm} status` tells, and where it is \
                 committed `vmsend --resume --vm {vm}` goes on"
            );
            return Err(MigrateError::new(Ending::Unknown, Side::Source, what));
        }
    }

    /// Whether the `vmrun` that has hung up is gone, and not just tired of us. One that is ending may
    /// still be called for a moment.
    fn is_vmrun_gone(&self) -> bool {
        let until = Instant::now() + TICK * 20;
        loop {
            match SourceVm::connect(&self.migration.options.vm) {
                Err(ClientError::NoServer { .. }) => return true,
                Err(_) if Instant::now() < until => std::thread::sleep(TICK),
                _ => return false,
            }
        }
    }
}
