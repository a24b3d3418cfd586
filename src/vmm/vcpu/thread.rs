//! What one vCPU thread does: park, run, save, load.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvm_ioctls::{VcpuExit, VcpuFd};

use super::group::{Common, Slot};
use super::round::Round;
use crate::state::{Section, SectionKind, VCPU_VERSION};
use crate::sys::kick::{self, KickGuard};
use crate::sys::sandbox::{self, Role};
use crate::vmm::devices::Bus;
use crate::vmm::x86::clock::TscRule;
use crate::vmm::x86::paging::{Paging, Sregs};
use crate::vmm::x86::restore::{FaultTrap, VcpuImage};
use crate::vmm::x86::save::{self, VcpuLayout};
use crate::vmm::x86::touched::Roots;
use crate::vmm::{GuestExit, VmmError};

/// How often a vCPU may come back with yet another piece of the same instruction (`rep outs` a
/// page long comes in pieces) before that is an error.
const MAX_PIECES: usize = 100_000;
/// Exit reasons that KVM gives for a guest's wish to end (KVM_EXIT_SYSTEM_EVENT).
const SYSTEM_EVENT_SHUTDOWN: u32 = 1;
const SYSTEM_EVENT_RESET: u32 = 2;

/// A vCPU that was read: its section of the saved state, and what leads to the pages it touches first.
pub type SavedVcpu = (Section, Roots);

/// Work for a vCPU that is not in guest mode.
pub enum Job {
    /// Reads all of its state.
    Save(Arc<VcpuLayout>, Arc<Round<SavedVcpu>>),
    /// Says how the guest's addresses are translated at this moment.
    Translation(Arc<Round<Option<Paging>>>),
    /// Puts a saved state into KVM.
    Load(Box<VcpuImage>, TscRule, Arc<FaultTrap>, Arc<Round<()>>),
}

/// What the mailbox asks for.
enum Order {
    Run,
    Job(Job),
    Quit,
}

pub(super) struct VcpuThread {
    number: u32,
    fd: VcpuFd,
    common: Arc<Common>,
    slot: Arc<Slot>,
    /// It has run, here or where it comes from.
    has_run: bool,
}

impl VcpuThread {
    pub fn new(number: u32, fd: VcpuFd, common: Arc<Common>) -> Self {
        let slot = Arc::clone(&common.slots[number as usize]);
        Self { number, fd, common, slot, has_run: false }
    }

    /// The thread's life, until it is told to quit.
    pub fn main(mut self) {
        let guard = match KickGuard::new(&mut self.fd) {
            Ok(guard) => guard,
            Err(e) => return self.common.end(GuestExit::Error(format!("vCPU {}: {e}", self.number))),
        };
        self.slot.thread.store(kick::this_thread(), Ordering::SeqCst);
        if let Err(e) = sandbox::confine_thread(Role::Vcpu) {
            return self.common.end(GuestExit::Error(format!("vCPU {}: sandbox: {e}", self.number)));
        }
        sandbox::try_forbidden("vcpu");
        loop {
            match self.next_order() {
                Order::Run => {
                    let ended = guard.allow().map(|()| self.run());
                    let ended = guard.forbid().and(ended);
                    let failed = |e| Some(GuestExit::Error(format!("vCPU {}: {e}", self.number)));
                    if let Some(exit) = ended.unwrap_or_else(failed) {
                        self.common.end(exit);
                    }
                }
                Order::Job(job) => self.work(job),
                Order::Quit => break,
            }
        }
        self.slot.thread.store(0, Ordering::SeqCst);
        drop(guard);
    }

    /// Waits at the mailbox. A thread that finds no order to run has parked.
    fn next_order(&self) -> Order {
        let mut mailbox = self.slot.lock();
        loop {
            if !mailbox.run && std::mem::take(&mut mailbox.counted) {
                drop(mailbox);
                self.common.parked();
                mailbox = self.slot.lock();
                continue;
            }
            if mailbox.quit {
                return Order::Quit;
            }
            if let Some(job) = mailbox.job.take() {
                return Order::Job(job);
            }
            if mailbox.run {
                self.slot.attention.store(false, Ordering::SeqCst);
                return Order::Run;
            }
            mailbox = self.slot.wake.wait(mailbox).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    /// Runs guest code until the mailbox wants attention, or the guest has ended.
    fn run(&mut self) -> Option<GuestExit> {
        if std::mem::replace(&mut self.has_run, true) {
            // Tells the guest that it was paused, lest its watchdogs bark. It is refused where the
            // guest has no kvmclock, which is as well (KVM API 4.81).
            let _ = self.fd.kvmclock_ctrl();
        }
        loop {
            if self.slot.attention.load(Ordering::SeqCst) {
                return self.complete();
            }
            match enter(&mut self.fd, &self.common.bus) {
                Entry::Again => {}
                Entry::Kicked => self.fd.set_kvm_immediate_exit(0),
                Entry::Ended(exit) => {
                    // Completed too, so that the state may still be looked at; it has ended anyhow.
                    let _ = self.complete();
                    return Some(exit);
                }
            }
        }
    }

    /// Finishes the instruction of the last I/O exit, whose result is still to be taken over by the
    /// guest: with `immediate_exit`, KVM_RUN does that and returns EINTR (KVM API, section 5).
    fn complete(&mut self) -> Option<GuestExit> {
        let mut ended = None;
        for _ in 0..MAX_PIECES {
            self.fd.set_kvm_immediate_exit(1);
            match enter(&mut self.fd, &self.common.bus) {
                Entry::Again => {}
                Entry::Kicked => {
                    self.fd.set_kvm_immediate_exit(0);
                    return ended;
                }
                Entry::Ended(exit @ GuestExit::Error(_)) => return Some(exit),
                Entry::Ended(exit) => ended = Some(exit),
            }
        }
        Some(GuestExit::Error(format!("vCPU {}: an instruction does not come to its end", self.number)))
    }

    fn work(&mut self, job: Job) {
        match job {
            Job::Save(layout, round) => round.bring(self.number, self.save(&layout)),
            Job::Translation(round) => {
                let sregs = self.fd.get_sregs().map_err(VmmError::kvm("KVM_GET_SREGS"));
                round.bring(self.number, sregs.map(|sregs| Sregs::from(sregs).paging()));
            }
            Job::Load(image, tsc, trap, round) => {
                self.has_run = true;
                round.bring(self.number, image.restore(&self.fd, &tsc, &trap));
            }
        }
    }

    fn save(&self, layout: &VcpuLayout) -> Result<SavedVcpu, VmmError> {
        let state = save::save(self.number, &self.fd, layout)?;
        let body = serde_json::to_vec(&state).map_err(|e| VmmError::Content {
            section: format!("vcpu {}", self.number),
            reason: e.to_string(),
        })?;
        let section = Section { kind: SectionKind::Vcpu, instance: self.number, version: VCPU_VERSION, body };
        Ok((section, Roots::of(&state)))
    }
}

/// What came of one KVM_RUN.
enum Entry {
    /// An exit that was dealt with.
    Again,
    /// A signal, or `immediate_exit`.
    Kicked,
    /// The guest is at its end.
    Ended(GuestExit),
}

/// KVM_RUN (KVM API 4.10), and the exit dealt with.
fn enter(fd: &mut VcpuFd, bus: &Bus) -> Entry {
    let ended = match fd.run() {
        Ok(VcpuExit::IoOut(port, bytes)) => bus.write(port, bytes),
        Ok(VcpuExit::IoIn(port, into)) => {
            bus.read(port, into);
            None
        }
        Ok(VcpuExit::MmioRead(address, into)) => {
            bus.virtio.read(address, into);
            None
        }
        Ok(VcpuExit::MmioWrite(address, bytes)) => {
            bus.virtio.write(address, bytes);
            None
        }
        Ok(VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IoapicEoi(_)) => None,
        Ok(VcpuExit::Shutdown) => Some(GuestExit::TripleFault),
        Ok(VcpuExit::SystemEvent(SYSTEM_EVENT_SHUTDOWN, _)) => Some(GuestExit::Shutdown),
        Ok(VcpuExit::SystemEvent(SYSTEM_EVENT_RESET, _)) => Some(GuestExit::Reset),
        Ok(other) => {
            let what = format!("{other:?}");
            Some(GuestExit::Error(format!("KVM cannot go on: {what}{}", place(fd))))
        }
        Err(e) if e.errno() == libc::EINTR => return Entry::Kicked,
        // A vCPU that waits for its start-up IPI, and was woken.
        Err(e) if e.errno() == libc::EAGAIN => None,
        Err(e) => Some(GuestExit::Error(format!("KVM_RUN: {e}{}", place(fd)))),
    };
    ended.map_or(Entry::Again, Entry::Ended)
}

/// Where the guest is, for messages.
fn place(fd: &VcpuFd) -> String {
    match fd.get_regs() {
        Ok(regs) => format!(" (guest at rip {:#x}, rsp {:#x})", regs.rip, regs.rsp),
        Err(_) => String::new(),
    }
}
