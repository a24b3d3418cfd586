//! A stand-in for `vmrun`: no machine, but RAM, a userfaultfd, and the real rules of ownership.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmferry::control::{
    Attached, DirtyPages, Failure, FailureCode, Imported, Incoming, Postcopy, Prepared, RamLayout, Request,
    RunState, Server, StateBlob, Status,
};
use vmferry::memory::{GuestPhysAddr, RamPages};
use vmferry::switchover::{OperatorWord, Ownership, Refusal};
use vmferry::sys::memfd;
use vmferry::sys::uffd::FaultFd;
use vmferry::vmm::GuestRam;

use super::messages::machine;

/// The most RAM that it makes.
const MOST_RAM: u64 = 4 << 20;
/// The RAM of its guest, when it has one from the start.
pub const RAM_BYTES: u64 = 1 << 20;
/// The page that it writes to while its kernel goes ahead.
const WRITTEN: u64 = 1 << 3;
/// The pages of its kernel, one bit each.
const KERNEL_IMAGE: u64 = 0xff01;
/// Of the requests that are told to fail, the one by which a guest is given up.
pub const REVOKE_FAILS: u16 = 1 << 7;
/// The one by which a source finds the guest's kernel.
pub const IMAGE_FAILS: u16 = 1 << 8;

/// A path for a socket of this process, which nobody else has.
pub fn socket_path() -> PathBuf {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("vmferry-fuzz-{}-{number}", std::process::id()))
}

/// It serves until it is dropped.
pub struct Vmrun {
    pub path: PathBuf,
    state: Arc<Mutex<Vm>>,
    thread: Option<JoinHandle<()>>,
    end: UnixStream,
}

/// What can be seen of it afterwards.
#[derive(Clone, Debug)]
pub struct Seen {
    pub ownership: Ownership,
    /// RUN was taken.
    pub has_run: bool,
    /// Its vCPUs stand still.
    pub paused: bool,
}

struct Vm {
    seen: Seen,
    /// Requests that fail, one bit each.
    faults: u16,
    ram: Option<GuestRam>,
    /// While pages are missing.
    uffd: Option<FaultFd>,
    /// What was dirtied was taken after the guest was saved, which may itself dirty pages (D1).
    is_last_set_taken: bool,
    /// The bitmap that a mover shares, while the dirty log is on.
    bitmap: Option<File>,
    /// The guest has written a page since its kernel was told.
    has_written: bool,
}

impl Vmrun {
    /// One that is empty.
    pub fn incoming(faults: u16) -> Self {
        Self::start(Vm {
            seen: Seen { ownership: Ownership::empty(), has_run: false, paused: true },
            faults,
            ram: None,
            uffd: None,
            is_last_set_taken: false,
            bitmap: None,
            has_written: false,
        })
    }

    /// One whose guest runs, with a few pages that are not zero.
    pub fn with_guest(faults: u16) -> Self {
        let ram = GuestRam::new(machine(RAM_BYTES).ram, "fuzz", RamPages::Small).expect("RAM can be made");
        for page in [0u64, 3, 4, 100] {
            ram.write(GuestPhysAddr(page << 12), &[page as u8 + 1; 4096]).expect("it is RAM");
        }
        let seen = Seen { ownership: Ownership::booted(), has_run: true, paused: false };
        Self::start(Vm {
            seen,
            faults,
            ram: Some(ram),
            uffd: None,
            is_last_set_taken: false,
            bitmap: None,
            has_written: false,
        })
    }

    fn start(vm: Vm) -> Self {
        let (path, state) = (socket_path(), Arc::new(Mutex::new(vm)));
        let server = Server::<Request>::bind(&path, "vmrun").expect("the control socket can be made");
        let (end, ended) = UnixStream::pair().expect("a pair of sockets can be made");
        let of_thread = Arc::clone(&state);
        let thread = Some(std::thread::spawn(move || serve(server, &ended, &of_thread)));
        Self { path, state, thread, end }
    }

    /// What has become of it.
    pub fn seen(&self) -> Seen {
        self.state.lock().expect("nobody panics").seen.clone()
    }
}

impl Drop for Vmrun {
    fn drop(&mut self) {
        let _ = self.end.write_all(&[0]);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(mut server: Server<Request>, ended: &UnixStream, vm: &Mutex<Vm>) {
    loop {
        let mut fds =
            [PollFd::new(server.as_fd(), PollFlags::POLLIN), PollFd::new(ended.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::NONE).expect("it can be polled");
        if fds[1].any() == Some(true) {
            return;
        }
        for came in server.dispatch().expect("the server serves") {
            if let Incoming::Call { reply, request, .. } = came {
                match vm.lock().expect("nobody panics").answer(&request) {
                    Ok((value, fds)) => server.answer(reply, Ok(value), fds),
                    Err(failure) => server.answer::<()>(reply, Err(failure), Vec::new()),
                }
            }
        }
    }
}

type Answered = Result<(serde_json::Value, Vec<OwnedFd>), Failure>;

impl Vm {
    fn answer(&mut self, request: &Request) -> Answered {
        let number = match request {
            Request::Prepare { .. } | Request::Export => 0,
            Request::Import { .. } | Request::DirtyStart => 1,
            Request::Promise { .. } | Request::DirtyTake => 2,
            Request::Run { .. } | Request::Pause { .. } => 3,
            Request::Renew { .. } | Request::Release { .. } => 4,
            Request::PostcopyArm { .. } | Request::Fence { .. } => 5,
            Request::PostcopyDone { .. } | Request::Attach { session: None, .. } => 6,
            Request::Revoke { .. } => 7,
            Request::KernelImage => 8,
            _ => 15,
        };
        if number != 15 && self.faults & 1 << number != 0 {
            return Err(Failure::new(FailureCode::Failed, "it was told to fail"));
        }
        match request {
            Request::Machine
            | Request::Ram
            | Request::Attach { .. }
            | Request::DirtyStart
            | Request::KernelImage
            | Request::DirtyTake
            | Request::Pause { .. }
            | Request::Resume { .. }
            | Request::Export
            | Request::Fence { .. }
            | Request::PeerRevoked { .. }
            | Request::Release { .. } => self.as_source(request),
            _ => self.as_destination(request),
        }
    }

    fn as_source(&mut self, request: &Request) -> Answered {
        let owner = &mut self.seen.ownership;
        match request {
            Request::Machine => said(&machine(RAM_BYTES), Vec::new()),
            Request::Ram => {
                let ram = self.ram()?;
                said(&layout(ram), memfds(ram))
            }
            Request::Attach { session, dest } => {
                let (attempt, superseded) = match session {
                    Some(session) => {
                        let superseded = allowed(owner.attach(*session))?;
                        (owner.attempt().expect("it was attached"), superseded)
                    }
                    None => (allowed(owner.reattach())?, None),
                };
                let (ownership, dest) = (owner.clone(), dest.clone());
                said(&Attached { attempt, superseded, ownership, dest }, Vec::new())
            }
            Request::DirtyStart => {
                let pages = self.ram()?.map().total_pages();
                let bitmap =
                    memfd::create_sealed(c"dirty", pages.div_ceil(64) * 8).expect("a memfd can be made");
                self.bitmap = Some(bitmap.try_clone().expect("a memfd can be shared"));
                said(&DirtyPages { pages }, vec![bitmap.into()])
            }
            Request::KernelImage => {
                self.share(KERNEL_IMAGE)?;
                self.has_written = true;
                said(&DirtyPages { pages: KERNEL_IMAGE.count_ones().into() }, Vec::new())
            }
            // Nothing else is ever dirtied.
            Request::DirtyTake => {
                self.is_last_set_taken = true;
                let written = if std::mem::take(&mut self.has_written) { WRITTEN } else { 0 };
                self.share(written)?;
                said(&DirtyPages { pages: 0 }, Vec::new())
            }
            Request::Pause { .. } => {
                self.seen.paused = true;
                said(&self.status(), Vec::new())
            }
            Request::Resume { force, peer_fenced } => {
                allowed(owner.resume(OperatorWord { force: *force, peer_fenced: *peer_fenced }))?;
                self.seen.paused = false;
                said(&self.status(), Vec::new())
            }
            Request::Export => {
                self.is_last_set_taken = false;
                let mut state = memfd::create_sealed(c"state", 8).expect("a memfd can be made");
                state.write_all(b"VMSTATE1").expect("it has room");
                said(&StateBlob { bytes: 8, export_us: 1, first_touched: vec![3, 200] }, vec![state.into()])
            }
            Request::Fence { attempt, dest } => {
                allowed(owner.fence(*attempt, dest))?;
                assert!(self.is_last_set_taken, "the last set was taken before the guest was saved");
                nothing()
            }
            Request::PeerRevoked { attempt } => {
                allowed(owner.peer_revoked(*attempt))?;
                nothing()
            }
            Request::Release { attempt, .. } => {
                allowed(owner.released(*attempt))?;
                nothing()
            }
            _ => said(&self.status(), Vec::new()),
        }
    }

    /// Writes the first word of the bitmap that is shared with the mover.
    fn share(&self, word: u64) -> Result<(), Failure> {
        let bitmap = self.bitmap.as_ref().ok_or_else(|| Failure::refused("the dirty log is off"))?;
        bitmap.write_all_at(&word.to_le_bytes(), 0).expect("it has room");
        Ok(())
    }

    fn as_destination(&mut self, request: &Request) -> Answered {
        let owner = &mut self.seen.ownership;
        match request {
            Request::Prepare { attempt, machine, .. } => {
                if machine.ram.total_bytes() > MOST_RAM {
                    return Err(Failure::new(FailureCode::Unsuitable, "so much RAM is not here"));
                }
                allowed(owner.prepare(*attempt))?;
                let ram = GuestRam::new(machine.ram.clone(), "fuzz", RamPages::Small);
                let ram = self.ram.insert(ram.map_err(|e| Failure::refused(e.to_string()))?);
                said(&Prepared { ram: layout(ram) }, memfds(ram))
            }
            Request::PostcopyArm { attempt, listen } => {
                let ownership = owner.clone();
                let failed = |e: std::io::Error| Failure::refused(e.to_string());
                let ram = self.ram()?;
                let uffd = FaultFd::new().map_err(failed)?;
                for (region, address) in ram.map().regions().iter().zip(ram.addresses()) {
                    uffd.register(address.0, region.bytes).map_err(failed)?;
                }
                let present = memfd::create_sealed(c"present", ram.map().total_pages().div_ceil(64) * 8);
                let fds = vec![uffd.duplicate().map_err(failed)?, present.map_err(failed)?.into()];
                let (ram, attempt, listen) = (layout(ram), *attempt, listen.clone());
                self.uffd = Some(uffd);
                said(&Postcopy { ram, attempt, listen, ownership }, fds)
            }
            Request::PostcopyDone { .. } => {
                self.uffd = None;
                nothing()
            }
            Request::Import { .. } => said(&Imported { import_us: 1, sync_us: 1 }, Vec::new()),
            Request::Promise { attempt, .. } => {
                allowed(owner.promise(*attempt))?;
                nothing()
            }
            Request::Run { attempt } => {
                allowed(owner.run(*attempt))?;
                (self.seen.has_run, self.seen.paused) = (true, false);
                said(&self.status(), Vec::new())
            }
            Request::Revoke { attempt } => {
                allowed(owner.give_up(*attempt))?;
                (self.ram, self.uffd) = (None, None);
                nothing()
            }
            Request::Renew { attempt } => {
                allowed(owner.renew(*attempt))?;
                said(&self.status(), Vec::new())
            }
            Request::Status => said(&self.status(), Vec::new()),
            _ => nothing(),
        }
    }

    fn ram(&self) -> Result<&GuestRam, Failure> {
        self.ram.as_ref().ok_or_else(|| Failure::refused("there is no machine"))
    }

    fn status(&self) -> Status {
        Status {
            run_state: if self.seen.paused { RunState::Paused } else { RunState::Running },
            ownership: self.seen.ownership.clone(),
            summary: String::new(),
            name: None,
            uuid: None,
            vcpus: 1,
            memory_bytes: 0,
            ram_pages: None,
            dirty_log: false,
            mover_attached: true,
            mover: None,
            awaited: None,
            missing_pages: None,
            pid: 1,
        }
    }
}

fn allowed<T>(changed: Result<T, Refusal>) -> Result<T, Failure> {
    changed.map_err(|e| Failure::refused(e.to_string()))
}

fn layout(ram: &GuestRam) -> RamLayout {
    let (map, vmm_addresses) = (ram.map().clone(), ram.addresses().to_vec());
    RamLayout { map, vmm_addresses, pages: RamPages::Small }
}

fn memfds(ram: &GuestRam) -> Vec<OwnedFd> {
    ram.memfds().map(|fd| fd.try_clone_to_owned().expect("it can be passed on")).collect()
}

fn nothing() -> Answered {
    said(&serde_json::json!({}), Vec::new())
}

fn said(value: &impl serde::Serialize, fds: Vec<OwnedFd>) -> Answered {
    Ok((serde_json::to_value(value).expect("it can be written"), fds))
}
