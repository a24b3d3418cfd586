//! All vCPUs of a machine, as the service thread drives them.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;

use super::thread::{Job, VcpuThread};
use crate::sys::kick;
use crate::vmm::devices::Bus;
use crate::vmm::{GuestExit, Notice, NoticeSender, VmmError};

/// The longest that the end waits for vCPU threads. One that sits in a page fault that nobody
/// serves is left behind: it ends with the process.
const STOP_WAIT: Duration = Duration::from_secs(1);

/// What one vCPU thread is told.
#[derive(Default)]
pub(super) struct Mailbox {
    /// Whether it is to be in guest mode.
    pub run: bool,
    /// Whether it counts as running: from the order to run until it has parked.
    pub counted: bool,
    pub job: Option<Job>,
    pub quit: bool,
}

/// One vCPU's mailbox, and the means to get its attention.
#[derive(Default)]
pub(super) struct Slot {
    mailbox: Mutex<Mailbox>,
    pub wake: Condvar,
    /// Set when the mailbox changed: read between two entries into guest mode.
    pub attention: AtomicBool,
    /// The kernel's number of the thread, 0 before it has started.
    pub thread: AtomicI32,
}

impl Slot {
    pub fn lock(&self) -> MutexGuard<'_, Mailbox> {
        self.mailbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the mailbox and sees to it that the thread notices, wherever it is. Never waits for
    /// guest code: the thread holds the mailbox for a look only.
    fn tell(&self, change: impl FnOnce(&mut Mailbox)) {
        let mut mailbox = self.lock();
        change(&mut mailbox);
        self.attention.store(true, Ordering::SeqCst);
        drop(mailbox);
        self.wake.notify_one();
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            kick::kick(thread);
        }
    }
}

/// What the threads share.
pub(super) struct Common {
    pub slots: Vec<Arc<Slot>>,
    pub bus: Arc<Bus>,
    pub notices: NoticeSender,
    parking: Mutex<Parking>,
}

#[derive(Default)]
struct Parking {
    running: usize,
    pause_wanted: bool,
    ended: bool,
}

impl Common {
    fn parking(&self) -> MutexGuard<'_, Parking> {
        self.parking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A thread has parked.
    pub fn parked(&self) {
        let mut parking = self.parking();
        parking.running -= 1;
        if parking.running == 0 && std::mem::take(&mut parking.pause_wanted) {
            drop(parking);
            self.pause_devices();
        }
    }

    /// No vCPU is in guest mode: the devices come to rest, and then the machine is paused.
    fn pause_devices(&self) {
        let notices = self.notices.clone();
        self.bus.virtio.pause(move || notices.send(Notice::Paused));
    }

    /// The guest has ended: said once, and no vCPU enters guest mode again.
    pub fn end(&self, exit: GuestExit) {
        if !std::mem::replace(&mut self.parking().ended, true) {
            self.bus.serial.disconnect();
            self.bus.virtio.pause(|| ());
            self.slots.iter().for_each(|slot| slot.tell(|mailbox| mailbox.run = false));
            self.notices.send(Notice::Exit(exit));
        }
    }
}

/// The vCPUs of a machine.
pub struct VcpuGroup {
    common: Arc<Common>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl VcpuGroup {
    /// Starts a parked thread for each vCPU. `keep` is whatever has to live as long as the vCPUs.
    pub fn start<K: Clone + Send + 'static>(
        vcpus: Vec<VcpuFd>,
        bus: Arc<Bus>,
        notices: NoticeSender,
        keep: K,
    ) -> Result<Self, VmmError> {
        kick::install_handler().map_err(VmmError::Thread)?;
        let slots = vcpus.iter().map(|_| Arc::default()).collect();
        let common = Arc::new(Common { slots, bus, notices, parking: Mutex::default() });
        let group = Self { common: Arc::clone(&common), threads: Mutex::default() };
        for (number, fd) in vcpus.into_iter().enumerate() {
            let thread = VcpuThread::new(number as u32, fd, Arc::clone(&common));
            let keep = keep.clone();
            let started = thread::Builder::new().name(format!("vcpu{number}")).spawn(move || {
                thread.main();
                drop(keep);
            });
            group.threads().push(started.map_err(VmmError::Thread)?);
        }
        Ok(group)
    }

    /// Lets every vCPU enter guest mode.
    pub fn run(&self) -> Result<(), VmmError> {
        let mut parking = self.common.parking();
        if parking.ended {
            return Err(VmmError::WrongState("at its end"));
        }
        parking.pause_wanted = false;
        for slot in &self.common.slots {
            let mut mailbox = slot.lock();
            mailbox.run = true;
            if !std::mem::replace(&mut mailbox.counted, true) {
                parking.running += 1;
            }
            drop(mailbox);
            slot.wake.notify_one();
        }
        Ok(())
    }

    /// Asks every vCPU to park; `Notice::Paused` follows when the last has.
    pub fn request_pause(&self) {
        let mut parking = self.common.parking();
        if parking.running == 0 {
            drop(parking);
            return self.common.pause_devices();
        }
        parking.pause_wanted = true;
        drop(parking);
        self.common.slots.iter().for_each(|slot| slot.tell(|mailbox| mailbox.run = false));
    }

    /// Whether no vCPU is in guest mode.
    pub fn is_parked(&self) -> bool {
        self.common.parking().running == 0
    }

    /// Gives each vCPU a job, made for its number. Only while they are parked.
    pub fn assign(&self, mut job: impl FnMut(u32) -> Job) {
        for (number, slot) in self.common.slots.iter().enumerate() {
            let job = job(number as u32);
            let mut mailbox = slot.lock();
            mailbox.job = Some(job);
            drop(mailbox);
            slot.wake.notify_one();
        }
    }

    /// Gives each vCPU a job at once: one in guest mode leaves it for that, and goes back.
    pub fn interrupt(&self, mut job: impl FnMut() -> Job) {
        self.common.slots.iter().for_each(|slot| slot.tell(|mailbox| mailbox.job = Some(job())));
    }

    /// A handle for [`VcpuGroup::assign`] on another thread.
    pub fn assigner(&self) -> impl FnOnce(Vec<Job>) + Send + 'static {
        let common = Arc::clone(&self.common);
        move |jobs| {
            for (slot, job) in common.slots.iter().zip(jobs) {
                slot.lock().job = Some(job);
                slot.wake.notify_one();
            }
        }
    }

    /// Ends all threads and closes the vCPUs.
    pub fn stop(&self) {
        self.common.bus.serial.disconnect();
        let quit = |slot: &Arc<Slot>| {
            slot.tell(|mailbox| {
                mailbox.run = false;
                mailbox.quit = true;
            });
        };
        self.common.slots.iter().for_each(quit);
        let deadline = Instant::now() + STOP_WAIT;
        for thread in self.threads().drain(..) {
            while !thread.is_finished() && Instant::now() < deadline {
                thread::sleep(Duration::from_micros(200));
            }
            match thread.is_finished() {
                true => drop(thread.join()),
                false => tracing::warn!("a vCPU thread does not end: it is left behind"),
            }
        }
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for VcpuGroup {
    fn drop(&mut self) {
        self.stop();
    }
}
