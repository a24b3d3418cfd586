//! Serial input: a thread that reads the backend whenever the guest has room for it.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::sys::sandbox;

/// What the input thread is told. Every change is followed by [`Gate::ring`].
pub(super) struct Gate {
    bell: EventFd,
    open: AtomicBool,
    quit: AtomicBool,
}

impl Gate {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            bell: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
            open: AtomicBool::new(false),
            quit: AtomicBool::new(false),
        })
    }

    /// Wakes the thread: the gate moved, or the guest has room again.
    pub(super) fn ring(&self) {
        let _ = self.bell.write(1);
    }

    /// While closed, nothing is read: what is in the device's buffer is part of its saved state.
    pub(super) fn set_open(&self, open: bool) {
        self.open.store(open, Ordering::SeqCst);
        self.ring();
    }

    /// Whether input may reach the device. To be asked under the device's lock.
    pub(super) fn is_open(&self) -> bool {
        self.open.load(Ordering::SeqCst)
    }

    /// Ends the thread.
    pub(super) fn quit(&self) {
        self.quit.store(true, Ordering::SeqCst);
        self.ring();
    }
}

/// Starts the thread. `room` says how many bytes the device takes now; `deliver` hands them to it
/// and says how many it took.
pub(super) fn start(
    mut file: File,
    gate: Arc<Gate>,
    room: impl Fn() -> usize + Send + 'static,
    deliver: impl Fn(&[u8]) -> usize + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name("serial-in".into()).spawn(move || {
        sandbox::confine_worker(None);
        let mut pending: Vec<u8> = Vec::new();
        let mut ended = false;
        while !gate.quit.load(Ordering::SeqCst) {
            if !pending.is_empty() && gate.is_open() {
                let took = deliver(&pending);
                pending.drain(..took);
            }
            let wanted = if gate.is_open() && pending.is_empty() && !ended { room() } else { 0 };
            match wait(&file, &gate, wanted > 0) {
                Ok(true) => ended = !read_some(&mut file, wanted, &mut pending),
                Ok(false) => {}
                Err(_) => return,
            }
        }
    })
}

/// Waits for the bell, and for input if `reading`; says whether there is input.
fn wait(file: &File, gate: &Gate, reading: bool) -> nix::Result<bool> {
    let mut fds = vec![PollFd::new(gate.bell.as_fd(), PollFlags::POLLIN)];
    if reading {
        fds.push(PollFd::new(file.as_fd(), PollFlags::POLLIN));
    }
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(e) => return Err(e),
    }
    let _ = gate.bell.read();
    Ok(fds.get(1).and_then(PollFd::any).unwrap_or(false))
}

/// Reads at most `wanted` bytes; false at the end of the input.
fn read_some(file: &mut File, wanted: usize, pending: &mut Vec<u8>) -> bool {
    let mut buffer = vec![0; wanted];
    match file.read(&mut buffer) {
        Ok(0) => false,
        Ok(n) => {
            pending.extend_from_slice(&buffer[..n]);
            true
        }
        Err(e) => matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
    }
}
