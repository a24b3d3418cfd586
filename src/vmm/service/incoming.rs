//! Requests of a receiver.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use nix::fcntl::{FcntlArg, fcntl};

use super::beside::Chore;
use super::calls::Task;
use super::hosted::{Activity, Hosted, failed};
use super::lease::PausedBy;
use super::told::Told;
use super::{Handled, Reply, Service};
use crate::control::{ConnectionId, Failure, FailureCode, Imported, Prepared, Remap};
use crate::state::{MAX_STATE_BYTES, MachineDescription};
use crate::switchover::{Attempt, Ownership};
use crate::vmm::{LocalConfig, Machine, NoticeSender, PrepareError, SyncTimes, VmmError};

impl Service {
    pub(super) fn prepare(
        &mut self,
        from: ConnectionId,
        attempt: Attempt,
        machine: &MachineDescription,
        remap: Vec<Remap>,
        postcopy: bool,
    ) -> Handled {
        self.alone(from)?;
        // Asked of a copy first: a machine is made only when it will be taken.
        self.ownership.clone().prepare(attempt).map_err(|e| Failure::refused(e.to_string()))?;
        let mut local = LocalConfig { postcopy, ..self.local.clone() };
        local.remaps.extend(remap.into_iter().map(|r| (r.id, r.value)));
        let (sender, notices) =
            NoticeSender::channel().map_err(|e| failed(format!("cannot make an event descriptor: {e}")))?;
        let machine = machine.clone();
        self.start(Chore::Prepare, move || {
            let made = Machine::prepare(&machine, local, sender);
            Box::new(move |service: &mut Self| {
                let hosted = Hosted::new(made.map_err(unprepared)?, notices, false);
                service.prepared(from, attempt, hosted)
            })
        })
    }

    fn prepared(&mut self, from: ConnectionId, attempt: Attempt, hosted: Hosted) -> Handled {
        let (ram, fds) = hosted.ram()?;
        self.change(|o| o.prepare(attempt))?;
        super::tell_terminal(&hosted.machine);
        self.hosted = Some(hosted);
        self.paused_by = PausedBy::default();
        self.set_mover(from);
        self.make_record_ready();
        self.emit("run-state", None);
        Reply::with_fds(Prepared { ram }, fds)
    }

    /// Refused while another live receiver has the machine; else this connection takes its place.
    fn alone(&mut self, from: ConnectionId) -> Result<(), Failure> {
        match self.mover.filter(|m| *m != from) {
            None => Ok(()),
            Some(other) => {
                let who = self.server.client_name(other);
                let why = format!("another mover ({who}) is attached: one migration at a time");
                Err(Failure::new(FailureCode::Busy, why))
            }
        }
    }

    /// From any connection that names the attempt: it may take long, and the receiver's own has to
    /// stay free for a revoke meanwhile.
    pub(super) fn import(&mut self, attempt: Attempt, bytes: u64, fds: Vec<OwnedFd>) -> Handled {
        let loading = matches!(self.ownership, Ownership::Loading { .. });
        if !loading {
            return Err(Failure::refused(format!("the import is refused: this vmrun {}", self.ownership)));
        }
        // As for a promise, which comes next: the session, and no older epoch.
        self.ownership.clone().promise(attempt).map_err(|e| Failure::refused(e.to_string()))?;
        let hosted = self.live_mut()?;
        if hosted.activity != Activity::Parked || hosted.synchronised {
            return Err(Failure::refused(
                "the import is refused: there has been one, a machine takes only one",
            ));
        }
        let state = read_state(fds, bytes)?;
        hosted.activity = Activity::Importing;
        hosted.machine.request_import(state);
        Ok(Reply::Later(Task::Import))
    }

    /// The machine has been restored, or could not be.
    pub(super) fn synchronised(&mut self, outcome: Result<SyncTimes, VmmError>) {
        let Some(hosted) = &mut self.hosted else { return };
        if hosted.activity != Activity::Importing {
            return;
        }
        match outcome {
            Ok(SyncTimes { import_us, sync_us }) => {
                (hosted.activity, hosted.synchronised) = (Activity::Parked, true);
                self.finish_tasks(Task::Import, || Reply::now(Imported { import_us, sync_us }));
            }
            Err(e) => {
                // It stays as it is, half restored, until it is dropped: never tried again.
                tracing::warn!("import: {e}");
                self.finish_tasks(Task::Import, || Err(failed(format!("import: {e}"))));
            }
        }
    }

    pub(super) fn promise(&mut self, from: ConnectionId, attempt: Attempt, paused: bool) -> Handled {
        self.alone(from)?;
        if !self.live()?.synchronised {
            return Err(Failure::refused("the promise is refused: the guest's state is not synchronised"));
        }
        let first = matches!(self.ownership, Ownership::Loading { .. });
        self.change_recorded(
            |o| o.promise(attempt),
            move |service, ()| {
                if first {
                    service.paused_by = PausedBy { operator: paused, ..PausedBy::default() };
                }
                Reply::done()
            },
        )
    }

    pub(super) fn run_here(&mut self, from: ConnectionId, attempt: Attempt) -> Handled {
        self.alone(from)?;
        self.change_recorded(
            |o| o.run(attempt),
            |service, _| {
                let hosted = service.live()?;
                if hosted.fetching.is_none() {
                    // It could have been postcopy, and was not.
                    hosted.machine.ram().join_pages(true);
                }
                service.settle()?;
                Reply::now(service.status())
            },
        )
    }

    pub(super) fn revoke(&mut self, from: ConnectionId, attempt: Attempt) -> Handled {
        self.alone(from)?;
        self.change(|o| o.give_up(attempt))?;
        self.drop_machine();
        self.mover = None;
        self.told = Told::default();
        self.emit("run-state", None);
        Reply::done()
    }

    pub(super) fn renew(&mut self, from: ConnectionId, attempt: Attempt) -> Handled {
        self.alone(from)?;
        self.change(|o| o.renew(attempt))?;
        if self.hosted.is_some() {
            self.set_mover(from);
        }
        Reply::now(self.status())
    }

    /// Lets the machine go. Its threads may take a while to end: not on this thread.
    pub(super) fn drop_machine(&mut self) {
        self.finish_tasks(Task::Import, || {
            Err(Failure::refused("the machine was dropped before the import ended"))
        });
        // A vCPU that waits for a page must not wait for ever: what it finds counts no more.
        self.stop_fetching();
        if let Some(hosted) = self.hosted.take() {
            let stop = move || hosted.machine.stop();
            if let Err(e) = std::thread::Builder::new().name("stop".into()).spawn(stop) {
                tracing::warn!("no thread to end the machine on: {e}");
            }
        }
    }
}

/// Why there is no machine, for the receiver.
fn unprepared(error: PrepareError) -> Failure {
    match error {
        PrepareError::Refused(problems) => {
            let message = PrepareError::Refused(problems.clone()).to_string();
            Failure { code: FailureCode::Unsuitable, message, problems }
        }
        PrepareError::Failed(e) => failed(format!("the machine cannot be made: {e}")),
    }
}

/// A copy of the state in the memfd that came along: whoever passed it may still write to it.
fn read_state(mut fds: Vec<OwnedFd>, bytes: u64) -> Result<Vec<u8>, Failure> {
    let usage = |why: String| Failure::new(FailureCode::Usage, why);
    let (Some(fd), 0) = (fds.pop(), fds.len()) else {
        return Err(usage("import needs one file descriptor with the saved state".into()));
    };
    if bytes > MAX_STATE_BYTES as u64 {
        return Err(usage(format!("{bytes} bytes of state are more than the limit of {MAX_STATE_BYTES}")));
    }
    // Only memory: a pipe, a device or a file on a network could keep this thread waiting.
    if fcntl(&fd, FcntlArg::F_GET_SEALS).is_err() {
        return Err(usage("the saved state must be in a memfd".into()));
    }
    let file = File::from(fd);
    let has = file.metadata().map_err(|e| failed(format!("saved state: {e}")))?.len();
    if has < bytes {
        return Err(usage(format!("the memfd has {has} bytes, {bytes} bytes of state were said")));
    }
    let mut state = vec![0; bytes as usize];
    file.read_exact_at(&mut state, 0).map_err(|e| failed(format!("saved state: {e}")))?;
    Ok(state)
}
