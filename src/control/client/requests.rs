//! The requests of a `vmrun` and of a `vmsend` as methods.

use std::os::fd::{AsFd, OwnedFd};

use serde::de::DeserializeOwned;

use super::{Client, ClientError};
use crate::control::mover::{MoverProgress, MoverRequest, MoverSettings};
use crate::control::{
    Attached, DirtyPages, Imported, Postcopy, Prepared, RamLayout, Remap, Request, StateBlob, Status,
};
use crate::memory::PageRun;
use crate::state::MachineDescription;
use crate::switchover::{Attempt, OperatorWord, SessionId};

/// An answer without content.
#[derive(Debug, serde::Deserialize)]
struct Nothing {}

/// What is asked of a `vmrun`; [`Request`] says what each does.
impl Client {
    fn ask<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T, ClientError> {
        self.call(request, &[]).map(|(value, _)| value)
    }

    fn tell(&mut self, request: &Request) -> Result<(), ClientError> {
        self.ask::<Nothing>(request).map(|_| ())
    }

    fn one_fd(&self, what: &str, mut fds: Vec<OwnedFd>) -> Result<OwnedFd, ClientError> {
        match (fds.pop(), fds.len()) {
            (Some(fd), 0) => Ok(fd),
            _ => Err(self.not_control(format!("its answer to {what} has not one file descriptor"))),
        }
    }

    fn fd_per_region(&self, ram: &RamLayout, fds: &[OwnedFd]) -> Result<(), ClientError> {
        let regions = ram.map.regions().len();
        if fds.len() == regions && ram.vmm_addresses.len() == regions {
            return Ok(());
        }
        let (fds, addresses) = (fds.len(), ram.vmm_addresses.len());
        Err(self.not_control(format!("{regions} RAM regions with {fds} memfds and {addresses} addresses")))
    }

    /// `status`
    pub fn status(&mut self) -> Result<Status, ClientError> {
        self.ask(&Request::Status)
    }

    /// `events` of a `vmrun`: from here on [`Client::next_event`] gives [`crate::control::Event`]s.
    pub fn subscribe(&mut self) -> Result<(), ClientError> {
        self.tell(&Request::Events)
    }

    /// `machine`
    pub fn machine(&mut self) -> Result<MachineDescription, ClientError> {
        self.ask(&Request::Machine)
    }

    /// `ram`: the layout and one memfd for each region.
    pub fn ram(&mut self) -> Result<(RamLayout, Vec<OwnedFd>), ClientError> {
        let (ram, fds) = self.call(&Request::Ram, &[])?;
        self.fd_per_region(&ram, &fds)?;
        Ok((ram, fds))
    }

    /// `attach`: `Some` for a new session, `None` to come back for the one under way.
    pub fn attach(&mut self, session: Option<SessionId>, dest: &str) -> Result<Attached, ClientError> {
        self.ask(&Request::Attach { session, dest: dest.to_owned() })
    }

    /// `dirty-start`: the memfd holds the bitmap that `dirty-take` writes.
    pub fn dirty_start(&mut self) -> Result<(DirtyPages, OwnedFd), ClientError> {
        let (pages, fds) = self.call(&Request::DirtyStart, &[])?;
        Ok((pages, self.one_fd("dirty-start", fds)?))
    }

    /// `kernel-image`
    pub fn kernel_image(&mut self) -> Result<DirtyPages, ClientError> {
        self.ask(&Request::KernelImage)
    }

    /// `dirty-take`
    pub fn dirty_take(&mut self) -> Result<DirtyPages, ClientError> {
        self.ask(&Request::DirtyTake)
    }

    /// `dirty-clear`
    pub fn dirty_clear(&mut self, run: PageRun) -> Result<(), ClientError> {
        self.tell(&Request::DirtyClear { first: run.first, pages: run.pages })
    }

    /// `dirty-put-back`
    pub fn dirty_put_back(&mut self) -> Result<(), ClientError> {
        self.tell(&Request::DirtyPutBack)
    }

    /// `dirty-stop`
    pub fn dirty_stop(&mut self) -> Result<(), ClientError> {
        self.tell(&Request::DirtyStop)
    }

    /// `pause`; returns when every vCPU is parked. With `lease` the guest goes on when this
    /// connection ends before a fence.
    pub fn pause(&mut self, lease: bool) -> Result<Status, ClientError> {
        self.ask(&Request::Pause { lease })
    }

    /// `resume`
    pub fn resume(&mut self, word: OperatorWord) -> Result<Status, ClientError> {
        self.ask(&Request::Resume { force: word.force, peer_fenced: word.peer_fenced })
    }

    /// `export`: the state is in the memfd.
    pub fn export(&mut self) -> Result<(StateBlob, OwnedFd), ClientError> {
        let (blob, fds) = self.call(&Request::Export, &[])?;
        Ok((blob, self.one_fd("export", fds)?))
    }

    /// `fence`: when this returns `Ok`, the record is on disk.
    pub fn fence(&mut self, attempt: Attempt, dest: &str) -> Result<(), ClientError> {
        self.tell(&Request::Fence { attempt, dest: dest.to_owned() })
    }

    /// `peer-revoked`
    pub fn peer_revoked(&mut self, attempt: Attempt) -> Result<(), ClientError> {
        self.tell(&Request::PeerRevoked { attempt })
    }

    /// `release`
    pub fn release(&mut self, attempt: Attempt, keep: bool) -> Result<(), ClientError> {
        self.tell(&Request::Release { attempt, keep })
    }

    /// `quit`
    pub fn quit(&mut self, force: bool) -> Result<(), ClientError> {
        self.tell(&Request::Quit { force })
    }

    /// `prepare`: the empty RAM of the new machine, one memfd for each region.
    pub fn prepare(
        &mut self,
        attempt: Attempt,
        machine: &MachineDescription,
        remap: Vec<Remap>,
        postcopy: bool,
    ) -> Result<(Prepared, Vec<OwnedFd>), ClientError> {
        let request = Request::Prepare { attempt, machine: Box::new(machine.clone()), remap, postcopy };
        let (prepared, fds): (Prepared, _) = self.call(&request, &[])?;
        self.fd_per_region(&prepared.ram, &fds)?;
        Ok((prepared, fds))
    }

    /// `postcopy-arm`: the userfaultfd and the memfd of the present set.
    pub fn postcopy_arm(
        &mut self,
        attempt: Attempt,
        listen: &str,
    ) -> Result<(Postcopy, OwnedFd, OwnedFd), ClientError> {
        let request = Request::PostcopyArm { attempt, listen: listen.to_owned() };
        let (postcopy, fds): (Postcopy, _) = self.call(&request, &[])?;
        match <[OwnedFd; 2]>::try_from(fds) {
            Ok([uffd, present]) => Ok((postcopy, uffd, present)),
            Err(fds) => {
                Err(self.not_control(format!("its answer to postcopy-arm has {} descriptors", fds.len())))
            }
        }
    }

    /// `postcopy-adopt`: the userfaultfd, the memfd of the present set, one memfd for each region.
    pub fn postcopy_adopt(&mut self) -> Result<(Postcopy, OwnedFd, OwnedFd, Vec<OwnedFd>), ClientError> {
        let (postcopy, mut fds): (Postcopy, Vec<OwnedFd>) = self.call(&Request::PostcopyAdopt, &[])?;
        if fds.len() < 2 {
            return Err(
                self.not_control(format!("its answer to postcopy-adopt has {} descriptors", fds.len()))
            );
        }
        let memfds = fds.split_off(2);
        self.fd_per_region(&postcopy.ram, &memfds)?;
        match <[OwnedFd; 2]>::try_from(fds) {
            Ok([uffd, present]) => Ok((postcopy, uffd, present, memfds)),
            Err(_) => Err(self.not_control("its answer to postcopy-adopt lacks descriptors".to_owned())),
        }
    }

    /// `postcopy-done`
    pub fn postcopy_done(&mut self, attempt: Attempt) -> Result<(), ClientError> {
        self.tell(&Request::PostcopyDone { attempt })
    }

    /// `import`: `state` is a memfd with `bytes` bytes of state.
    pub fn import(
        &mut self,
        attempt: Attempt,
        state: impl AsFd,
        bytes: u64,
    ) -> Result<Imported, ClientError> {
        self.call(&Request::Import { attempt, bytes }, &[state.as_fd()]).map(|(value, _)| value)
    }

    /// `promise`: when this returns `Ok`, the record is on disk and READY may be sent. `paused`: an
    /// operator had paused the guest, and it stays so.
    pub fn promise(&mut self, attempt: Attempt, paused: bool) -> Result<(), ClientError> {
        self.tell(&Request::Promise { attempt, paused })
    }

    /// `run`
    pub fn run(&mut self, attempt: Attempt) -> Result<Status, ClientError> {
        self.ask(&Request::Run { attempt })
    }

    /// `revoke`
    pub fn revoke(&mut self, attempt: Attempt) -> Result<(), ClientError> {
        self.tell(&Request::Revoke { attempt })
    }

    /// `renew`
    pub fn renew(&mut self, attempt: Attempt) -> Result<Status, ClientError> {
        self.ask(&Request::Renew { attempt })
    }
}

/// What is asked of a `vmsend`; [`MoverRequest`] says what each does.
impl Client {
    /// `progress`
    pub fn mover_progress(&mut self) -> Result<MoverProgress, ClientError> {
        self.call(&MoverRequest::Progress, &[]).map(|(value, _)| value)
    }

    /// `set`; what is `None` stays.
    pub fn mover_set(
        &mut self,
        downtime_ms: Option<u64>,
        bandwidth_bytes_per_s: Option<u64>,
    ) -> Result<MoverSettings, ClientError> {
        self.call(&MoverRequest::Set { downtime_ms, bandwidth_bytes_per_s }, &[]).map(|(value, _)| value)
    }

    /// `cancel`
    pub fn mover_cancel(&mut self) -> Result<(), ClientError> {
        self.call::<_, Nothing>(&MoverRequest::Cancel, &[]).map(|_| ())
    }

    /// `switch-now`
    pub fn mover_switch_now(&mut self) -> Result<(), ClientError> {
        self.call::<_, Nothing>(&MoverRequest::SwitchNow, &[]).map(|_| ())
    }
}
