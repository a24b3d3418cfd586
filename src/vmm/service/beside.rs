//! What may take long, beside the loop: one thread that does one chore after the other.
//!
//! A file system may keep a record waiting, and KVM a change of memslots or a new VM (it waits for
//! every vCPU of the host), for seconds where much is going on. The loop answers meanwhile: questions
//! at once, orders when the chore is done, in the order in which they came; whoever waits is told.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{Handled, Service};

/// What is done beside the loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chore {
    Record,
    ReadyRecord,
    Prepare,
    DirtyStart,
    DirtyStop,
    KernelImage,
    Confine,
}

impl Chore {
    /// What a client waits for, in words.
    pub fn awaited(self) -> &'static str {
        match self {
            Self::Record => "the session record to be on disk",
            Self::ReadyRecord => "a file for the session record",
            Self::Prepare => "the machine to be made",
            Self::DirtyStart => "the dirty log to be turned on",
            Self::DirtyStop => "the dirty log to be turned off",
            Self::KernelImage => "the guest's kernel to be found",
            Self::Confine => "a thread to be confined",
        }
    }
}

/// The rest of a chore, on the loop again.
pub(super) type Finish = Box<dyn FnOnce(&mut Service) -> Handled + Send>;

/// The chore itself, on the thread.
type Run = Box<dyn FnOnce() -> Option<Finish> + Send>;

/// The thread, and what it has been given.
pub(super) struct Beside {
    chores: Sender<(Chore, Run)>,
    done: Receiver<Option<Finish>>,
    wake: Arc<EventFd>,
    /// Chores that were given and are not done.
    open: usize,
}

impl Beside {
    /// Starts the thread; it ends with this.
    pub fn start() -> io::Result<Self> {
        let (chores, inbox) = mpsc::channel::<(Chore, Run)>();
        let (outbox, done) = mpsc::channel();
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?);
        let bell = Arc::clone(&wake);
        thread::Builder::new().name("beside".into()).spawn(move || {
            for (chore, run) in inbox {
                stall(chore);
                if outbox.send(run()).is_err() {
                    return;
                }
                let _ = bell.write(1);
            }
        })?;
        Ok(Self { chores, done, wake, open: 0 })
    }

    /// Readable when a chore is done.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Gives the thread a chore. What it gives back is for [`Beside::next_done`].
    pub fn give(&mut self, chore: Chore, run: impl FnOnce() -> Option<Finish> + Send + 'static) {
        // The thread lives as long as this does, unless a chore has panicked.
        if self.chores.send((chore, Box::new(run))).is_ok() {
            self.open += 1;
        }
    }

    /// The next chore that is done: `Some(None)` for one that nobody waits for.
    pub fn next_done(&mut self) -> Option<Option<Finish>> {
        let _ = self.wake.read();
        let done = self.done.try_recv().ok()?;
        self.open -= 1;
        Some(done)
    }

    /// Waits until all is done, for `limit` at most for each chore.
    pub fn drain(&mut self, limit: Duration) {
        while self.open > 0 && self.done.recv_timeout(limit).is_ok() {
            self.open -= 1;
        }
    }
}

/// Holds the thread up for tests, at the chore and the FIFO that VMFERRY_STALL names
/// (`record:PATH`), until somebody has opened the FIFO for writing and closed it.
#[cfg(feature = "fault-points")]
fn stall(chore: Chore) {
    let Ok(stall) = std::env::var("VMFERRY_STALL") else { return };
    let name = match chore {
        Chore::Record => "record",
        Chore::ReadyRecord => "ready-record",
        Chore::Prepare => "prepare",
        Chore::DirtyStart => "dirty-start",
        Chore::DirtyStop => "dirty-stop",
        Chore::KernelImage => "kernel-image",
        Chore::Confine => "confine",
    };
    if let Some(fifo) = stall.strip_prefix(name).and_then(|rest| rest.strip_prefix(':')) {
        let _ = std::fs::read(fifo);
    }
}

#[cfg(not(feature = "fault-points"))]
fn stall(_: Chore) {}
