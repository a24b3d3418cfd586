//! The socket file: made without ever being open to others, never taken from a live server,
//! removed by the one who made it.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{Backlog, UnixAddr, bind, getsockopt, listen};
use thiserror::Error;

use crate::sys::socket_file::{self, Occupant};

/// How long to wait for another program that is about to make its socket in the same directory.
const DIRECTORY_LOCK_WAIT: Duration = Duration::from_secs(2);

/// Why there is no socket at the path that was asked for. The path is left as it was.
#[derive(Debug, Error)]
pub enum BindError {
    /// Someone listens there.
    #[error("control socket {path}: taken by a live program (process {pid})")]
    Taken {
        /// The path.
        path: PathBuf,
        /// Who listens.
        pid: i32,
    },
    /// A file, a directory, …
    #[error("control socket {0}: exists and is no socket; it is left as it is")]
    NotASocket(PathBuf),
    /// unix(7) allows 107 bytes.
    #[error("control socket {0}: the path is longer than the 107 bytes that a Unix socket allows")]
    TooLong(PathBuf),
    /// Anything else.
    #[error("control socket {path}: cannot {what}: {source}")]
    Io {
        /// The path.
        path: PathBuf,
        /// What failed.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// A listening Unix socket and its file, which goes when this goes.
#[derive(Debug)]
pub(super) struct ListenSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file that this process made.
    file: (u64, u64),
}

/// A peer that may speak, or why it may not.
#[derive(Debug)]
pub(super) enum Accepted {
    /// Same user, or root.
    Peer(UnixStream),
    /// Another user.
    Foreign(u32),
    /// Nobody is waiting.
    Nobody,
}

impl ListenSocket {
    /// Makes the socket with mode 0600 and listens. A file left by a dead server is replaced.
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        let io = |what, source: io::Error| BindError::Io { path: path.to_owned(), what, source };
        let address = UnixAddr::new(path).map_err(|e| match e {
            Errno::ENAMETOOLONG => BindError::TooLong(path.to_owned()),
            e => io("use the path", e.into()),
        })?;
        let fd = socket_file::to_be_bound().map_err(|e| io("open a socket", e.into()))?;
        // Between bind and listen a socket looks dead, and two programs could both replace the same
        // dead one: one at a time in this directory.
        let lock = lock_directory(path).map_err(|e| io("open its directory", e))?;
        match bind(fd.as_raw_fd(), &address) {
            Ok(()) => {}
            Err(Errno::EADDRINUSE) => {
                if lock.is_none() {
                    return Err(io(
                        "replace it",
                        io::Error::other("its directory stays locked by another program"),
                    ));
                }
                clear_dead(path)?;
                bind(fd.as_raw_fd(), &address).map_err(|e| io("bind", e.into()))?;
            }
            Err(e) => return Err(io("bind", e.into())),
        }
        let meta = fs::symlink_metadata(path).map_err(|e| io("find it after bind", e))?;
        let socket = Self { listener: fd.into(), path: path.to_owned(), file: (meta.dev(), meta.ino()) };
        listen(&socket.listener, Backlog::MAXCONN).map_err(|e| io("listen", e.into()))?;
        Ok(socket)
    }

    /// Takes the next peer, whose credentials are checked (SO_PEERCRED).
    pub fn accept(&self) -> io::Result<Accepted> {
        use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) if matches!(e.kind(), WouldBlock | ConnectionAborted | Interrupted) => {
                return Ok(Accepted::Nobody);
            }
            Err(e) => return Err(e),
        };
        stream.set_nonblocking(true)?;
        let peer = getsockopt(&stream, PeerCredentials)?;
        if peer.uid() == nix::unistd::geteuid().as_raw() || peer.uid() == 0 {
            Ok(Accepted::Peer(stream))
        } else {
            Ok(Accepted::Foreign(peer.uid()))
        }
    }
}

impl AsFd for ListenSocket {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for ListenSocket {
    fn drop(&mut self) {
        // Only the file that we made: someone may have put another in its place.
        if fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.file) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Removes the socket file at `path` when nobody listens there.
fn clear_dead(path: &Path) -> Result<(), BindError> {
    let io = |what, source| BindError::Io { path: path.to_owned(), what, source };
    match socket_file::occupant(path).map_err(|e| io("ask who is there", e))? {
        Occupant::Nobody => Ok(()),
        Occupant::NoSocket => Err(BindError::NotASocket(path.to_owned())),
        Occupant::Live(pid) => Err(BindError::Taken { path: path.to_owned(), pid }),
        Occupant::Dead => {
            fs::remove_file(path).map_err(|e| io("replace the one that a dead program left", e))
        }
    }
}

/// Locks the directory that `path` is in; `None` when someone else holds the lock too long.
fn lock_directory(path: &Path) -> io::Result<Option<Flock<File>>> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut directory = File::open(parent)?;
    let until = Instant::now() + DIRECTORY_LOCK_WAIT;
    loop {
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(Some(lock)),
            Err((_, e)) if e != Errno::EWOULDBLOCK => return Err(e.into()),
            Err(_) if Instant::now() > until => return Ok(None),
            Err((back, _)) => directory = back,
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
