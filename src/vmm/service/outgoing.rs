//! Requests of a sender.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Instant;

use super::beside::Chore;
use super::calls::Task;
use super::hosted::{Activity, DirtyShare, Hosted, failed};
use super::{Ending, Handled, Reply, Service};
use crate::control::{Attached, ConnectionId, DirtyPages, Failure, FailureCode, StateBlob};
use crate::memory::PageIndex;
use crate::switchover::{Attempt, Ownership, SessionId};
use crate::sys::memfd;
use crate::vmm::{Exported, VmmError};

impl Service {
    pub(super) fn attach(&mut self, from: ConnectionId, session: Option<SessionId>, dest: String) -> Handled {
        let lacks_pages = self.live()?.fetching.is_some();
        if session.is_some() && lacks_pages {
            let why = "the guest's pages are still coming from where it ran before: it can be sent on when all have come";
            return Err(Failure::refused(why));
        }
        if let Some(other) = self.mover.filter(|m| *m != from) {
            let who = self.server.client_name(other);
            let why = format!("another mover ({who}) is attached: one migration at a time");
            return Err(Failure::new(FailureCode::Busy, why));
        }
        match session {
            Some(session) => {
                let superseded = self.change(|o| o.attach(session))?;
                self.attach_as(from, Attempt { session, epoch: 1 }, superseded, dest)
            }
            None => {
                let now_at = dest.clone();
                self.change_recorded(
                    move |o| {
                        o.redirect(&now_at);
                        o.reattach()
                    },
                    move |service, attempt| service.attach_as(from, attempt, None, dest),
                )
            }
        }
    }

    fn attach_as(
        &mut self,
        from: ConnectionId,
        attempt: Attempt,
        superseded: Option<Attempt>,
        dest: String,
    ) -> Handled {
        self.set_mover(from);
        self.make_record_ready();
        if !self.ownership.may_run() {
            // Taken back (REVOKED), the guest waits for this mover's word as it would have before.
            self.paused_by.leases.insert(from);
        }
        let dest = match &self.ownership {
            Ownership::Committed { dest, .. } => dest.clone(),
            _ => dest,
        };
        Reply::now(Attached { attempt, superseded, ownership: self.ownership.clone(), dest })
    }

    /// The machine, for the mover that is attached.
    fn attached(&mut self, from: ConnectionId) -> Result<&mut Hosted, Failure> {
        if self.mover != Some(from) {
            return Err(Failure::refused("this connection is not attached: attach comes first"));
        }
        self.live_mut()
    }

    pub(super) fn dirty_start(&mut self, from: ConnectionId) -> Handled {
        let hosted = self.attached(from)?;
        if let Some(share) = &hosted.dirty {
            return share.answer();
        }
        let (share, machine) = (DirtyShare::new(&hosted.machine)?, Arc::clone(&hosted.machine));
        self.start(Chore::DirtyStart, move || {
            let started = machine.dirty_start();
            Box::new(move |service: &mut Self| {
                started.map_err(|e| failed(e.to_string()))?;
                service.live_mut()?.dirty.insert(share).answer()
            })
        })
    }

    pub(super) fn kernel_image(&mut self, from: ConnectionId) -> Handled {
        let hosted = self.attached(from)?;
        hosted.dirty_share()?;
        // A vCPU has one job at a time.
        if matches!(hosted.activity, Activity::Exporting(_) | Activity::Importing) {
            return Err(Failure::new(FailureCode::Busy, "the guest is being saved or restored"));
        }
        let machine = Arc::clone(&hosted.machine);
        self.start(Chore::KernelImage, move || {
            let image = machine.kernel_image();
            Box::new(move |service: &mut Self| {
                let image =
                    image.map_err(|e| failed(format!("the guest's kernel is not to be found: {e}")))?;
                let pages = service.live_mut()?.share_pages(&image)?;
                Reply::now(DirtyPages { pages })
            })
        })
    }

    pub(super) fn dirty_take(&mut self, from: ConnectionId) -> Handled {
        let pages = self.attached(from)?.dirty_take()?;
        Reply::now(DirtyPages { pages })
    }

    pub(super) fn dirty_clear(&mut self, from: ConnectionId, first: PageIndex, pages: u64) -> Handled {
        self.attached(from)?.dirty_clear(first, pages)?;
        Reply::done()
    }

    pub(super) fn dirty_put_back(&mut self, from: ConnectionId) -> Handled {
        self.attached(from)?.dirty_put_back()?;
        Reply::done()
    }

    pub(super) fn dirty_stop(&mut self, from: ConnectionId) -> Handled {
        self.attached(from)?;
        self.stop_dirty_log(|_, stopped| stopped.and_then(|()| Reply::done()))
    }

    /// Turns the dirty log off, if it is on, and goes on with `then`.
    pub(super) fn stop_dirty_log(
        &mut self,
        then: impl FnOnce(&mut Self, Result<(), Failure>) -> Handled + Send + 'static,
    ) -> Handled {
        let Some(hosted) = self.hosted.as_mut().filter(|h| h.dirty.is_some()) else {
            return then(self, Ok(()));
        };
        hosted.dirty = None;
        let machine = Arc::clone(&hosted.machine);
        self.start(Chore::DirtyStop, move || {
            let stopped = machine.dirty_stop().map_err(|e| failed(e.to_string()));
            Box::new(move |service: &mut Self| then(service, stopped))
        })
    }

    pub(super) fn export(&mut self, from: ConnectionId) -> Handled {
        let hosted = self.attached(from)?;
        match hosted.activity {
            Activity::Parked => {}
            Activity::Exporting(_) => return Err(Failure::new(FailureCode::Busy, "an export is under way")),
            _ => return Err(Failure::refused("the guest is not paused: pause comes before export")),
        }
        hosted.activity = Activity::Exporting(Instant::now());
        hosted.machine.request_export();
        Ok(Reply::Later(Task::Export))
    }

    /// The machine has been saved, or could not be.
    pub(super) fn exported(&mut self, saved: Result<Exported, VmmError>) {
        let Some(hosted) = &mut self.hosted else { return };
        let Activity::Exporting(since) = hosted.activity else { return };
        hosted.activity = Activity::Parked;
        let export_us = since.elapsed().as_micros() as u64;
        let answer = saved.map_err(|e| failed(format!("export: {e}"))).and_then(|saved| {
            let Exported { state, first_touched } = saved;
            let first_touched = first_touched.into_iter().map(|page| page.0).collect();
            let blob = StateBlob { bytes: state.len() as u64, export_us, first_touched };
            let memfd = memfd::create_sealed(c"vmferry-state", blob.bytes);
            let written = memfd.and_then(|file| file.write_all_at(&state, 0).map(|()| file));
            let file = written.map_err(|e| failed(format!("cannot pass the saved state on: {e}")))?;
            hosted.exported = true;
            Ok((blob, file))
        });
        match answer {
            Ok((blob, file)) => self.finish_tasks(Task::Export, || Reply::with_fds(blob, vec![file.into()])),
            Err(failure) => self.finish_tasks(Task::Export, || Err(failure)),
        }
        let _ = self.settle();
    }

    pub(super) fn fence(&mut self, from: ConnectionId, attempt: Attempt, dest: &str) -> Handled {
        let hosted = self.attached(from)?;
        let still = hosted.activity == Activity::Parked && hosted.exported;
        if !still && self.ownership.may_run() {
            let why = "the fence is refused: the guest is not paused, or has run since it was exported, \
                       so that what was sent is old";
            return Err(Failure::refused(why));
        }
        self.change_recorded(|o| o.fence(attempt, dest), |_, _| Reply::done())
    }

    pub(super) fn peer_revoked(&mut self, from: ConnectionId, attempt: Attempt) -> Handled {
        self.attached(from)?;
        self.change(|o| o.peer_revoked(attempt))?;
        self.settle()?;
        Reply::done()
    }

    pub(super) fn release(&mut self, from: ConnectionId, attempt: Attempt, keep: bool) -> Handled {
        self.attached(from)?;
        self.stop_dirty_log(move |service, stopped| {
            stopped?;
            let dest = match &service.ownership {
                Ownership::Committed { dest, .. } => dest.clone(),
                _ => String::new(),
            };
            service.change(|o| o.released(attempt))?;
            if let Ok(hosted) = service.live() {
                hosted.machine.let_go();
            }
            service.emit("migrated", Some(format!("the guest runs at {dest}")));
            if !keep {
                service.ending.get_or_insert(Ending::Migrated { dest });
            }
            Reply::done()
        })
    }
}
