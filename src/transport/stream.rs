//! A byte stream over file descriptors of any kind, with deadlines.
//!
//! All descriptors are non-blocking. A wait is a poll for the descriptor, the deadline and the
//! [`CancelToken`]; a deadline only counts when there is nothing to read (or no room to write), so a
//! process that was itself stopped for a while does not take its own absence for the peer's death.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::PollFlags;
use nix::sys::socket::{Shutdown, shutdown};
use nix::sys::uio::{readv, writev};

use super::cancel::PollError;
use super::exec::Child;
use super::{CancelToken, StreamError};

/// The most buffers that one `readv` or `writev` takes.
const IOV_MAX: usize = 1024;

/// A connection, both ways.
#[derive(Debug)]
pub struct Stream {
    read: ReadHalf,
    write: WriteHalf,
}

/// The half that reads.
#[derive(Debug)]
pub struct ReadHalf {
    fd: OwnedFd,
    shared: Arc<Shared>,
}

/// The half that writes.
#[derive(Debug)]
pub struct WriteHalf {
    fd: Option<OwnedFd>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    peer: String,
    cancel: CancelToken,
    child: Option<Child>,
    /// File status flags to put back (stdin and stdout belong to others as well).
    restore: Vec<(OwnedFd, OFlag)>,
}

/// When a read gives up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// The longest silence.
    pub silence: Duration,
    /// When the whole must be there, and how long that is from its beginning.
    pub whole: Option<(Instant, Duration)>,
}

impl Stream {
    /// A socket: one descriptor for both ways. `peer` is how errors name it.
    pub fn from_socket(fd: OwnedFd, peer: String, cancel: CancelToken) -> io::Result<Self> {
        let read = fd.try_clone()?;
        Self::new(read, fd, peer, cancel, None)
    }

    /// Two pipes (or anything that can be polled).
    pub fn from_pipes(read: OwnedFd, write: OwnedFd, peer: String, cancel: CancelToken) -> io::Result<Self> {
        Self::new(read, write, peer, cancel, None)
    }

    pub(super) fn new(
        read: OwnedFd,
        write: OwnedFd,
        peer: String,
        cancel: CancelToken,
        child: Option<Child>,
    ) -> io::Result<Self> {
        for fd in [&read, &write] {
            set_nonblocking(fd)?;
        }
        let shared = Arc::new(Shared { peer, cancel, child, restore: Vec::new() });
        let read = ReadHalf { fd: read, shared: shared.clone() };
        Ok(Self { read, write: WriteHalf { fd: Some(write), shared } })
    }

    /// This process's standard input and output. Whether they block is put back at the end: the
    /// descriptions are shared with whoever started us.
    pub fn from_stdio(cancel: CancelToken) -> io::Result<Self> {
        let read = io::stdin().as_fd().try_clone_to_owned()?;
        let write = io::stdout().as_fd().try_clone_to_owned()?;
        let mut restore = Vec::new();
        for fd in [&read, &write] {
            restore.push((fd.try_clone()?, set_nonblocking(fd)?));
        }
        // Undone in the order of doing it backwards: both may be one description.
        restore.reverse();
        let peer = "the peer on stdin and stdout".to_owned();
        let shared = Arc::new(Shared { peer, cancel, child: None, restore });
        let read = ReadHalf { fd: read, shared: shared.clone() };
        Ok(Self { read, write: WriteHalf { fd: Some(write), shared } })
    }

    /// How errors name the peer.
    pub fn peer(&self) -> &str {
        &self.read.shared.peer
    }

    /// What ends every wait on this stream.
    pub fn cancel_token(&self) -> &CancelToken {
        &self.read.shared.cancel
    }

    /// The halves, for two threads.
    pub fn split(self) -> (ReadHalf, WriteHalf) {
        (self.read, self.write)
    }

    /// Ends all waits on this stream (and on all others with its token).
    pub fn shutdown(&self, reason: &str) {
        self.cancel_token().cancel(reason);
    }

    /// Fills `buf`; an error when that takes longer than `timeout`.
    pub fn read_exact_deadline(&mut self, buf: &mut [u8], timeout: Duration) -> Result<(), StreamError> {
        let limits = Limits { silence: timeout, whole: Some((Instant::now() + timeout, timeout)) };
        let mut filled = 0;
        self.read.read_exact(buf, &mut filled, limits).map_err(|e| match e {
            StreamError::TooSlow { peer, ms } if filled == 0 => StreamError::Silent { peer, ms },
            e => e,
        })
    }

    /// Writes all of `bufs`; an error when nothing is taken for `timeout`.
    pub fn write_all_vectored(&mut self, bufs: &[IoSlice<'_>], timeout: Duration) -> Result<(), StreamError> {
        self.write.write_all_vectored(bufs, timeout)
    }
}

impl Shared {
    /// How the child ended, in words with a leading `: `; empty where there is none.
    fn exit(&self) -> String {
        self.child.as_ref().map_or_else(String::new, |c| format!(": {}", c.describe()))
    }

    fn io(&self, doing: &'static str, error: impl Into<io::Error>) -> StreamError {
        let (peer, source) = (self.peer.clone(), error.into());
        match source.kind() {
            io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::NotConnected
            // TCP_USER_TIMEOUT and keepalive; a route that went away.
            | io::ErrorKind::TimedOut
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::NetworkDown => StreamError::Broken { peer, exit: self.exit(), source },
            _ => StreamError::Io { doing, peer, source },
        }
    }

    fn poll(&self, fd: &OwnedFd, flags: PollFlags, until: Instant) -> Result<bool, StreamError> {
        self.cancel.poll(fd.as_fd(), flags, Some(until)).map_err(|e| match e {
            PollError::Cancelled(e) => e,
            PollError::Io(e) => self.io("waiting for", e),
        })
    }
}

impl ReadHalf {
    /// How errors name the peer.
    pub fn peer(&self) -> &str {
        &self.shared.peer
    }

    /// What ends every wait on this stream.
    pub fn cancel_token(&self) -> &CancelToken {
        &self.shared.cancel
    }

    /// Reads what there is into `bufs`, at least one byte; `Ok(0)` is the end.
    pub(super) fn read_some(
        &self,
        bufs: &mut [IoSliceMut<'_>],
        limits: Limits,
    ) -> Result<usize, StreamError> {
        let count = bufs.len().min(IOV_MAX);
        let begun = Instant::now();
        loop {
            self.shared.cancel.check()?;
            match readv(&self.fd, &mut bufs[..count]) {
                Ok(n) => return Ok(n),
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => {}
                Err(e) => return Err(self.shared.io("reading from", e)),
            }
            let silent = begun + limits.silence;
            let until = limits.whole.map_or(silent, |(whole, _)| whole.min(silent));
            if Instant::now() < until {
                self.shared.poll(&self.fd, PollFlags::POLLIN, until)?;
                continue;
            }
            let peer = self.shared.peer.clone();
            return Err(match limits.whole {
                Some((whole, bound)) if whole < silent => {
                    StreamError::TooSlow { peer, ms: bound.as_millis() as u64 }
                }
                _ => StreamError::Silent { peer, ms: limits.silence.as_millis() as u64 },
            });
        }
    }

    /// Waits until there is something to read (or the end of file); false when `until` comes first.
    pub(super) fn wait_readable(&self, until: Instant) -> Result<bool, StreamError> {
        self.shared.cancel.check()?;
        self.shared.poll(&self.fd, PollFlags::POLLIN, until)
    }

    /// Fills `buf` from `*filled` on, which keeps count also when this fails.
    pub(super) fn read_exact(
        &self,
        buf: &mut [u8],
        filled: &mut usize,
        limits: Limits,
    ) -> Result<(), StreamError> {
        while *filled < buf.len() {
            let n = self.read_some(&mut [IoSliceMut::new(&mut buf[*filled..])], limits)?;
            if n == 0 {
                return Err(self.ended());
            }
            *filled += n;
        }
        Ok(())
    }

    /// The end of file within a frame.
    pub(super) fn ended(&self) -> StreamError {
        StreamError::Truncated { peer: self.shared.peer.clone(), exit: self.shared.exit() }
    }

    /// The end of file between frames.
    pub(super) fn closed(&self) -> StreamError {
        StreamError::Closed { peer: self.shared.peer.clone(), exit: self.shared.exit() }
    }
}

impl WriteHalf {
    /// How errors name the peer.
    pub fn peer(&self) -> &str {
        &self.shared.peer
    }

    /// What ends every wait on this stream.
    pub fn cancel_token(&self) -> &CancelToken {
        &self.shared.cancel
    }

    /// Writes all of `bufs`; an error when nothing is taken for `timeout`.
    pub(super) fn write_all_vectored(
        &mut self,
        bufs: &[IoSlice<'_>],
        timeout: Duration,
    ) -> Result<(), StreamError> {
        let mut rest: Vec<IoSlice<'_>> = bufs.iter().filter(|b| !b.is_empty()).copied().collect();
        let mut rest = rest.as_mut_slice();
        let mut moved = Instant::now();
        while !rest.is_empty() {
            self.shared.cancel.check()?;
            let Some(fd) = &self.fd else {
                return Err(self.shared.io("writing to", Errno::EPIPE));
            };
            match writev(fd, &rest[..rest.len().min(IOV_MAX)]) {
                Ok(n) => {
                    IoSlice::advance_slices(&mut rest, n);
                    moved = Instant::now();
                    continue;
                }
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => {}
                Err(e) => return Err(self.shared.io("writing to", e)),
            }
            if moved.elapsed() >= timeout {
                let peer = self.shared.peer.clone();
                return Err(StreamError::Stuck { peer, ms: timeout.as_millis() as u64 });
            }
            self.shared.poll(fd, PollFlags::POLLOUT, moved + timeout)?;
        }
        Ok(())
    }

    /// Whether a write would take something now.
    pub(super) fn is_writable(&self) -> bool {
        let now = Instant::now();
        self.fd.as_ref().is_some_and(|fd| self.shared.poll(fd, PollFlags::POLLOUT, now).unwrap_or(true))
    }

    /// Tells the peer that nothing more comes; it reads what is under way, then the end of file.
    pub(super) fn close(&mut self) {
        if let Some(fd) = self.fd.take() {
            // Not a socket: closing the pipe says the same.
            let _ = shutdown(std::os::fd::AsRawFd::as_raw_fd(&fd), Shutdown::Write);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        for (fd, flags) in &self.restore {
            let _ = fcntl(fd, FcntlArg::F_SETFL(*flags));
        }
    }
}

/// Makes `fd` non-blocking; gives the flags that it had.
fn set_nonblocking(fd: &OwnedFd) -> io::Result<OFlag> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(flags)
}
