//! What a machine tells the service: the ends of what it was asked to do, and its own end.

use std::io;
use std::sync::Arc;
use std::sync::mpsc;

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::VmmError;
use crate::memory::PageIndex;

/// News from a machine's threads.
#[derive(Debug)]
pub enum Notice {
    /// Every vCPU is out of guest mode, with its last I/O completed. Answers `request_pause`.
    Paused,
    /// What was saved, or why it could not be. Answers `request_export`.
    Exported(Result<Exported, VmmError>),
    /// Devices are restored and every vCPU is in KVM, or why not. Answers `request_import`.
    Synchronised(Result<SyncTimes, VmmError>),
    /// The guest has ended; no vCPU enters guest mode again.
    Exit(GuestExit),
}

/// What an export gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    /// The saved state ([`crate::state::write_sections`]).
    pub state: Vec<u8>,
    /// The pages that restoring it touches, then those that the vCPUs touch first.
    pub first_touched: Vec<PageIndex>,
}

/// How long an import took, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyncTimes {
    /// Reading and checking the saved state, and restoring devices and clock.
    pub import_us: u64,
    /// Setting all vCPUs, in parallel.
    pub sync_us: u64,
}

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestExit {
    /// It powered off.
    Shutdown,
    /// It asked for a reset, and machines here do not start again by themselves.
    Reset,
    /// A triple fault: the way of last resort to reset, and how some small guests end.
    TripleFault,
    /// KVM cannot go on with it; the text says why.
    Error(String),
}

/// The machine's end of the channel: every send makes the event descriptor readable.
#[derive(Clone)]
pub struct NoticeSender {
    sender: mpsc::Sender<Notice>,
    wake: Arc<EventFd>,
}

/// The service's end.
pub struct NoticeReceiver {
    /// Where the notices come out; to be drained after each wake-up.
    pub receiver: mpsc::Receiver<Notice>,
    /// Readable when there may be notices; non-blocking, to be read before they are drained.
    pub wake: Arc<EventFd>,
}

impl NoticeSender {
    /// A new channel.
    pub fn channel() -> io::Result<(Self, NoticeReceiver)> {
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?);
        let (sender, receiver) = mpsc::channel();
        Ok((Self { sender, wake: Arc::clone(&wake) }, NoticeReceiver { receiver, wake }))
    }

    /// Sends, and wakes the service. A service that is gone is no error.
    pub fn send(&self, notice: Notice) {
        let _ = self.sender.send(notice);
        let _ = self.wake.write(1);
    }
}
