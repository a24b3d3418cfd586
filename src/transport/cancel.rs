//! One call that ends every wait of an attempt.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::StreamError;

/// Cancels reads, writes, accepts and rate-limited waits that hold a clone of it: pipes know no
/// `shutdown(2)`, so every wait polls this as well. Once cancelled it stays so.
#[derive(Clone, Debug)]
pub struct CancelToken {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    event: EventFd,
    reason: OnceLock<String>,
}

impl CancelToken {
    /// A token that is not cancelled. Fails when no file descriptor is left.
    pub fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let event = EventFd::from_value_and_flags(0, flags)?;
        Ok(Self { inner: Arc::new(Inner { event, reason: OnceLock::new() }) })
    }

    /// Ends every wait, now and later, with [`StreamError::Cancelled`] and `reason`. The first
    /// reason stays.
    pub fn cancel(&self, reason: impl Into<String>) {
        let _ = self.inner.reason.set(reason.into());
        // Nobody reads the counter, so it stays readable for every poller; writing 1 cannot fail.
        let _ = self.inner.event.write(1);
    }

    /// The reason, once cancelled.
    pub fn reason(&self) -> Option<&str> {
        self.inner.reason.get().map(String::as_str)
    }

    /// An error once cancelled.
    pub fn check(&self) -> Result<(), StreamError> {
        match self.reason() {
            Some(reason) => Err(StreamError::Cancelled { reason: reason.to_owned() }),
            None => Ok(()),
        }
    }

    /// Waits until cancelled or `until`; whether it was cancelled.
    pub fn wait(&self, until: Instant) -> bool {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        let _ = poll_until(&mut fds, Some(until));
        self.reason().is_some()
    }

    /// Waits until `fd` is ready for `flags` (true) or `until` has come (false).
    pub(super) fn poll(
        &self,
        fd: BorrowedFd<'_>,
        flags: PollFlags,
        until: Option<Instant>,
    ) -> Result<bool, PollError> {
        let mut fds = [PollFd::new(fd, flags), PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        poll_until(&mut fds, until).map_err(PollError::Io)?;
        if let Some(reason) = self.reason() {
            return Err(PollError::Cancelled(StreamError::Cancelled { reason: reason.to_owned() }));
        }
        Ok(fds[0].any().unwrap_or(true))
    }
}

impl AsFd for CancelToken {
    /// Readable once cancelled, for the caller's own poll.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.event.as_fd()
    }
}

/// Why a poll gave nothing.
#[derive(Debug)]
pub(super) enum PollError {
    Cancelled(StreamError),
    Io(io::Error),
}

/// Polls until something is ready or `until` has come; signals do not end it.
fn poll_until(fds: &mut [PollFd<'_>], until: Option<Instant>) -> io::Result<()> {
    loop {
        let timeout = match until {
            None => PollTimeout::NONE,
            Some(until) => {
                let left = until.saturating_duration_since(Instant::now());
                // Rounded up, so that the last fraction of a millisecond is no busy loop.
                let ms = left.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32;
                PollTimeout::try_from(ms).unwrap_or(PollTimeout::MAX)
            }
        };
        match poll(fds, timeout) {
            Ok(0) if until.is_some_and(|u| Instant::now() < u) => {}
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}
