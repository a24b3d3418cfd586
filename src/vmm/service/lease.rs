//! Why the guest is paused, and what happens when the connection that wanted it ends.

use std::collections::BTreeSet;

use super::beside::Chore;
use super::calls::Task;
use super::hosted::{Activity, failed};
use super::{Handled, Reply, Service};
use crate::control::{ConnectionId, Failure, FailureCode};
use crate::switchover::{OperatorWord, Ownership};
use crate::sys::sandbox::{self, Role};

/// Who wants the guest paused. It runs when nobody does, and its ownership allows it.
#[derive(Debug, Default)]
pub(super) struct PausedBy {
    /// `vmctl pause` or `vmrun --paused`: until `vmctl resume`.
    pub operator: bool,
    /// For as long as each connection lives.
    pub leases: BTreeSet<ConnectionId>,
}

impl PausedBy {
    fn nobody(&self) -> bool {
        !self.operator && self.leases.is_empty()
    }
}

impl Service {
    pub(super) fn pause(&mut self, from: ConnectionId, lease: bool) -> Handled {
        let activity = self.live()?.activity;
        if matches!(self.ownership, Ownership::Loading { .. } | Ownership::InDoubt { .. }) {
            return Err(Failure::refused(format!(
                "nothing runs that could be paused: this vmrun {}",
                self.ownership
            )));
        }
        if lease {
            self.paused_by.leases.insert(from);
        } else {
            self.paused_by.operator = true;
        }
        match activity {
            Activity::Running => {
                let hosted = self.live_mut()?;
                hosted.activity = Activity::Pausing;
                hosted.machine.request_pause();
                Ok(Reply::Later(Task::Pause))
            }
            Activity::Pausing => Ok(Reply::Later(Task::Pause)),
            Activity::Parked | Activity::Exporting(_) | Activity::Importing => Reply::now(self.status()),
        }
    }

    pub(super) fn resume(&mut self, from: ConnectionId, word: OperatorWord) -> Handled {
        self.live()?;
        if !self.ownership.may_run() {
            return self.change_recorded(
                |o| o.resume(word),
                |service, _| {
                    tracing::warn!("the guest is resumed on the operator's word that no other host runs it");
                    service.forget_mover();
                    service.paused_by = PausedBy::default();
                    service.settle()?;
                    Reply::now(service.status())
                },
            );
        }
        if self.paused_by.leases.remove(&from) || self.mover == Some(from) {
            // A mover gives back its own pause; an operator's pause stays.
        } else if !self.paused_by.leases.is_empty() && !word.force {
            let why = "resuming is refused: a migration has paused the guest for its switchover and \
                       resumes it itself when it fails (cancel it, or say --force)";
            return Err(Failure::new(FailureCode::Busy, why));
        } else {
            self.paused_by = PausedBy::default();
        }
        self.settle()?;
        Reply::now(self.status())
    }

    /// Lets the guest go on when nothing speaks against it. Called after everything that may change
    /// that; the only place where a machine is let run.
    pub(super) fn settle(&mut self) -> Result<(), Failure> {
        // Not while the record of a change is being written, either: what holds then is not known.
        let free = self.ownership.may_run() && !self.changing;
        if !free || !self.paused_by.nobody() || self.ending.is_some() {
            return Ok(());
        }
        let Some(hosted) = &mut self.hosted else { return Ok(()) };
        if hosted.ended.is_some() || hosted.activity != Activity::Parked || !hosted.synchronised {
            return Ok(());
        }
        // What was saved is old from here on, whatever becomes of this.
        hosted.exported = false;
        let started = hosted.machine.run();
        match started {
            Err(e) if hosted.machine.is_paused() => {
                self.paused_by.operator = true;
                let why = format!("the guest cannot run: {e}");
                tracing::error!("{why}");
                return Err(failed(why));
            }
            // It runs, and whoever wanted that must not be told otherwise.
            Err(e) => tracing::error!("the guest runs, but: {e}"),
            Ok(()) => {}
        }
        hosted.activity = Activity::Running;
        self.confine();
        self.emit("run-state", None);
        Ok(())
    }

    /// With a guest that runs, the service needs no more than its control socket and its record.
    fn confine(&mut self) {
        if std::mem::replace(&mut self.confined, true) {
            return;
        }
        let give_up = || {
            if let Err(e) = sandbox::confine_thread(Role::Service) {
                tracing::warn!("sandbox: the service cannot be confined further: {e}");
            }
        };
        give_up();
        self.beside.give(Chore::Confine, move || {
            give_up();
            None
        });
        sandbox::try_forbidden("service");
    }

    /// A connection has ended: what it held goes back to where it was, unless ownership is at stake.
    pub(super) fn connection_ended(&mut self, gone: ConnectionId) {
        self.listeners.remove(&gone);
        self.waits.retain(|w| w.reply.connection != gone);
        let had_lease = self.paused_by.leases.remove(&gone);
        if self.mover == Some(gone) {
            self.forget_mover();
            match &self.ownership {
                Ownership::Loading { attempt } => {
                    let attempt = *attempt;
                    tracing::warn!("the receiver has gone before the guest was acknowledged: it is dropped");
                    self.drop_machine();
                    let _ = self.change(|o| o.give_up(attempt));
                }
                held @ (Ownership::InDoubt { .. } | Ownership::Committed { .. }) => {
                    tracing::warn!("the mover has gone: this vmrun {held} and holds still");
                }
                Ownership::Sole { .. } => tracing::info!("the mover has gone: the guest stays here"),
                Ownership::Empty { .. } | Ownership::Released { .. } => {}
            }
        }
        if had_lease && self.ownership.may_run() {
            tracing::warn!("the connection that paused the guest has gone: the guest goes on");
        }
        // An error is logged there, and nobody is left to be told.
        let _ = self.settle();
    }

    /// The mover is not there any more, or counts no more: its dirty log goes.
    pub(super) fn forget_mover(&mut self) {
        self.mover = None;
        self.told.is_gone();
        let _ = self.stop_dirty_log(|_, stopped| {
            if let Err(e) = stopped {
                tracing::warn!("cannot turn the dirty log off: {e}");
            }
            Reply::done()
        });
    }
}
