//! The thread of one device: waits for kicks, for what the device watches, and for orders.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde_json::Value;
use virtio_queue::{Queue, QueueState};

use super::{Device, DeviceError, Interrupt, Io};
use crate::sys::sandbox;
use crate::vmm::memory::TrackedMemory;

/// What a device's thread is told. The sender in an order is answered when it is done.
pub(super) enum Order {
    /// The driver has set DRIVER_OK: the features that it accepted, and its queues.
    Activate(u64, Vec<Option<Queue>>),
    /// Back to the start.
    Reset(Sender<()>),
    /// That queue is not to be touched any more.
    StopQueue(usize, Sender<()>),
    /// The machine is paused; called when the device holds still.
    Pause(Box<dyn FnOnce() + Send>),
    /// The machine runs.
    Resume,
    /// See [`Device::save`].
    Save(Sender<Result<Saved, String>>),
    /// See [`Device::restore`].
    Restore(Box<Restore>, Sender<Result<(), String>>),
    /// See [`Device::let_go`].
    LetGo,
    Quit,
}

/// What a device's thread knows of its state.
pub(super) struct Saved {
    /// The queues in use.
    pub queues: Vec<Option<QueueState>>,
    pub device: Value,
}

/// What a device's thread restores.
pub(super) struct Restore {
    /// As for [`Order::Activate`], if the device was in use.
    pub active: Option<(u64, Vec<Option<Queue>>)>,
    pub device: Value,
}

/// The rest of the program's end of the thread.
pub(super) struct Worker {
    inbox: Sender<Order>,
    attention: Arc<AtomicBool>,
    wake: Arc<EventFd>,
    /// Whether it holds still: it was paused, or has not been let run yet.
    still: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Worker {
    /// Starts the thread. `kicks` are the eventfds of the device's queues.
    pub fn start(
        device: Box<dyn Device>,
        memory: Arc<TrackedMemory>,
        interrupt: Arc<Interrupt>,
        kicks: Arc<Vec<EventFd>>,
        name: &str,
    ) -> io::Result<Self> {
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?);
        let attention = Arc::new(AtomicBool::new(false));
        let still = Arc::new(AtomicBool::new(true));
        let (inbox, orders) = mpsc::channel();
        let io = Io::new(memory, Arc::clone(&interrupt), Arc::clone(&attention), kicks.len());
        let body = Body {
            device,
            io,
            interrupt,
            kicks,
            orders,
            wake: Arc::clone(&wake),
            attention: Arc::clone(&attention),
            still: Arc::clone(&still),
            running: false,
            arrived: false,
            flaw: None,
        };
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || body.main())?;
        Ok(Self { inbox, attention, wake, still, thread: Mutex::new(Some(thread)) })
    }

    /// Gives an order, and waits for nothing.
    pub fn tell(&self, order: Order) {
        // The thread lives as long as this, unless its device has panicked.
        let _ = self.inbox.send(order);
        self.attention.store(true, Ordering::SeqCst);
        let _ = self.wake.write(1);
    }

    /// Gives an order and waits until it is done; `None` if the thread has died.
    pub fn ask<T>(&self, order: impl FnOnce(Sender<T>) -> Order) -> Option<T> {
        let (sender, receiver) = mpsc::channel();
        self.tell(order(sender));
        receiver.recv().ok()
    }

    /// Lets the device act.
    pub fn resume(&self) {
        self.still.store(false, Ordering::SeqCst);
        self.tell(Order::Resume);
    }

    pub fn is_still(&self) -> bool {
        self.still.load(Ordering::SeqCst)
    }

    /// Waits for the end of the thread, which has been told to quit, until `deadline`; one that sits
    /// on a page of guest RAM that nobody brings is left behind.
    pub fn join(&self, deadline: Instant) {
        let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        while !thread.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_micros(200));
        }
        match thread.is_finished() {
            true => drop(thread.join()),
            false => tracing::warn!("a device's thread does not end: it is left behind"),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.tell(Order::Quit);
    }
}

/// What the thread has.
pub(super) struct Body {
    device: Box<dyn Device>,
    io: Io,
    interrupt: Arc<Interrupt>,
    kicks: Arc<Vec<EventFd>>,
    orders: Receiver<Order>,
    wake: Arc<EventFd>,
    attention: Arc<AtomicBool>,
    still: Arc<AtomicBool>,
    /// The machine runs.
    running: bool,
    /// Restored, and has not run since.
    arrived: bool,
    /// Why it could not come to rest.
    flaw: Option<String>,
}

/// What has woken the thread.
#[derive(Default)]
struct Woken {
    queues: u64,
    tokens: Vec<usize>,
    timeout: bool,
}

impl Body {
    fn main(mut self) {
        sandbox::confine_worker(self.device.changes_beside());
        loop {
            // Before the orders are looked at: one that comes in between sets it again.
            self.attention.store(false, Ordering::SeqCst);
            let _ = self.wake.read();
            while let Ok(order) = self.orders.try_recv() {
                if !self.obey(order) {
                    return;
                }
            }
            let woken = self.wait();
            if self.running {
                self.work(woken);
            }
        }
    }

    /// Without a thread, for the fuzzer.
    #[cfg(any(fuzzing, test))]
    pub fn idle(
        device: Box<dyn Device>,
        memory: Arc<TrackedMemory>,
        interrupt: Arc<Interrupt>,
        kicks: Arc<Vec<EventFd>>,
    ) -> Self {
        let attention = Arc::new(AtomicBool::new(false));
        let io = Io::new(memory, Arc::clone(&interrupt), Arc::clone(&attention), kicks.len());
        let (_, orders) = mpsc::channel();
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).expect("an eventfd can be made"));
        // It never sleeps.
        wake.write(1).expect("it has room");
        let still = Arc::new(AtomicBool::new(true));
        let (running, arrived, flaw) = (false, false, None);
        Self { device, io, interrupt, kicks, orders, wake, attention, still, running, arrived, flaw }
    }

    /// One round of [`Body::main`] without orders.
    #[cfg(any(fuzzing, test))]
    pub fn turn(&mut self) {
        let woken = self.wait();
        if self.running {
            self.work(woken);
        }
    }

    /// The driver kicks.
    #[cfg(any(fuzzing, test))]
    pub fn kick(&self, queue: usize) {
        if let Some(kick) = self.kicks.get(queue) {
            let _ = kick.write(1);
        }
    }

    /// Whether the thread goes on.
    pub fn obey(&mut self, order: Order) -> bool {
        match order {
            Order::Activate(features, queues) => {
                self.io.start(queues);
                self.device.activate(features);
                // What was added before DRIVER_OK may have been kicked for, or not.
                self.io.look_at_all();
            }
            Order::Reset(done) => {
                self.io.stop_all();
                self.device.reset();
                let _ = done.send(());
            }
            Order::StopQueue(queue, done) => {
                self.io.stop(queue);
                let _ = done.send(());
            }
            Order::Pause(done) => {
                if std::mem::take(&mut self.running) {
                    self.flaw = self.device.pause().err();
                }
                self.still.store(true, Ordering::SeqCst);
                done();
            }
            Order::Resume => self.resume(),
            Order::Save(answer) => {
                let _ = answer.send(self.save());
            }
            Order::Restore(state, answer) => {
                let _ = answer.send(self.restore(*state));
            }
            Order::LetGo => self.device.let_go(),
            Order::Quit => return false,
        }
        true
    }

    fn resume(&mut self) {
        self.running = true;
        let arrived = std::mem::take(&mut self.arrived);
        if arrived {
            self.interrupt.refresh();
        }
        let resumed = self.device.resume(arrived, &mut self.io);
        self.note(resumed);
        if arrived && self.io.any_active() {
            // Whether the driver has been told of the last used buffers is not in a saved state.
            self.interrupt.used();
        }
        self.io.look_at_all();
    }

    fn save(&mut self) -> Result<Saved, String> {
        if self.running {
            return Err("it is not paused".into());
        }
        if let Some(flaw) = &self.flaw {
            return Err(flaw.clone());
        }
        Ok(Saved { queues: self.io.queue_states(), device: self.device.save()? })
    }

    fn restore(&mut self, state: Restore) -> Result<(), String> {
        if let Some((features, queues)) = state.active {
            self.io.start(queues);
            self.device.activate(features);
        }
        self.arrived = true;
        self.device.restore(state.device)
    }

    /// Sleeps until there is something to do.
    fn wait(&mut self) -> Woken {
        let mut woken = Woken { queues: 0, ..Woken::default() };
        let again = self.running && self.io.wants_again();
        if again {
            woken.queues = self.io.take_again();
        }
        let queues: Vec<usize> =
            (0..self.kicks.len()).filter(|q| self.running && self.io.is_active(*q)).collect();
        let watches = if self.running { self.device.watches() } else { Vec::new() };
        let deadline = self.device.deadline().filter(|_| self.running);
        let mut fds = vec![PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
        fds.extend(queues.iter().map(|q| PollFd::new(self.kicks[*q].as_fd(), PollFlags::POLLIN)));
        fds.extend(watches.iter().map(|watch| PollFd::new(watch.fd, watch.events)));
        let timeout = if again { PollTimeout::ZERO } else { until(deadline) };
        if poll(&mut fds, timeout).is_err() {
            return woken; // EINTR: looked at again
        }
        let mut fired = fds[1..].iter().map(|fd| fd.any().unwrap_or(false));
        for queue in queues {
            if fired.next() == Some(true) {
                woken.queues |= 1 << queue;
            }
        }
        woken.tokens = watches.iter().zip(fired).filter(|(_, fired)| *fired).map(|(w, _)| w.token).collect();
        woken.timeout = deadline.is_some_and(|at| at <= Instant::now());
        woken
    }

    fn work(&mut self, woken: Woken) {
        for queue in (0..self.kicks.len()).filter(|q| woken.queues & 1 << q != 0) {
            let _ = self.kicks[queue].read();
            if self.io.is_active(queue) {
                let done = self.device.queue_kicked(queue, &mut self.io);
                self.note(done);
            }
        }
        for token in woken.tokens {
            let done = self.device.ready(token, &mut self.io);
            self.note(done);
        }
        if woken.timeout {
            let done = self.device.timeout(&mut self.io);
            self.note(done);
        }
    }

    /// A device that cannot go on says so to its driver (virtio 1.2, section 2.1.2).
    fn note(&mut self, done: Result<(), DeviceError>) {
        if let Err(e) = done
            && !self.interrupt.needs_reset()
        {
            tracing::warn!("{} device: {e}", self.device.kind());
            self.io.stop_all();
            self.interrupt.set_needs_reset();
            self.interrupt.config_changed();
        }
    }
}

fn until(deadline: Option<Instant>) -> PollTimeout {
    let Some(at) = deadline else { return PollTimeout::NONE };
    let left = at.saturating_duration_since(Instant::now());
    PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX)
}
