//! Unix stream sockets: connecting, and listening at a path that may be left over from before.

use std::fs::{self, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, Socket, Type};

use super::{CancelToken, Stream, StreamError};

const BACKLOG: i32 = 64;

/// Connects to the socket at `path`. A listener whose queue is full counts as a failure.
pub(super) fn connect(path: &Path, cancel: &CancelToken) -> Result<Stream, StreamError> {
    let name = format!("unix:{}", path.display());
    let failed = |e: io::Error| StreamError::Connect { peer: name.clone(), cause: e.to_string() };
    cancel.check()?;
    let socket = try_connect(path).map_err(failed)?;
    Stream::from_socket(socket.into(), name.clone(), cancel.clone()).map_err(failed)
}

fn try_connect(path: &Path) -> io::Result<Socket> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.connect(&SockAddr::unix(path)?)?;
    Ok(socket)
}

/// A listening socket; its file goes when it is dropped, if it is still ours.
#[derive(Debug)]
pub(super) struct Unix {
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode of our file.
    file: (u64, u64),
}

impl Unix {
    /// Listens at `path`, for the owner only (mode 0600). A socket that nobody listens on any more
    /// is replaced; one that is in use, or another kind of file, is left as it is.
    pub(super) fn listen(path: &Path) -> Result<Self, StreamError> {
        let failed =
            |cause: String| StreamError::Listen { address: format!("unix:{}", path.display()), cause };
        match fs::symlink_metadata(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(failed(e.to_string())),
            Ok(found) if !found.file_type().is_socket() => {
                return Err(failed("a file that is not a socket is there".into()));
            }
            Ok(_) => match try_connect(path) {
                Err(e) if e.kind() == ErrorKind::ConnectionRefused => {
                    fs::remove_file(path).map_err(|e| failed(e.to_string()))?;
                }
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) if e.kind() != ErrorKind::WouldBlock => return Err(failed(e.to_string())),
                // A full queue has a listener as well.
                _ => return Err(failed("another process listens there".into())),
            },
        }
        Self::bind(path).map_err(|e| failed(e.to_string()))
    }

    fn bind(path: &Path) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.bind(&SockAddr::unix(path)?)?;
        let found = fs::symlink_metadata(path)?;
        let file = (found.dev(), found.ino());
        // Before `listen`, so that nobody gets in by the mode that the umask gave.
        fs::set_permissions(path, Permissions::from_mode(0o600))?;
        socket.listen(BACKLOG)?;
        socket.set_nonblocking(true)?;
        let owned: OwnedFd = socket.into();
        Ok(Self { socket: owned.into(), path: path.to_owned(), file })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Takes the next caller, if one is waiting.
    pub(super) fn accept(&self) -> io::Result<(OwnedFd, String)> {
        let (stream, _) = self.socket.accept()?;
        stream.set_nonblocking(true)?;
        Ok((stream.into(), format!("the caller on unix:{}", self.path.display())))
    }
}

impl Drop for Unix {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.file) {
            let _ = fs::remove_file(&self.path);
        }
    }
}
