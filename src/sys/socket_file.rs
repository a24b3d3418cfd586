//! The files of Unix sockets: made without being open to others at any time, the dead told from the
//! living, and never taken from whoever else has put one there.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, socket};
use nix::sys::stat::{Mode, fchmod};

/// What is at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occupant {
    /// Nothing.
    Nobody,
    /// A socket on which nobody listens: a program that was killed has left it.
    Dead,
    /// A socket on which a program listens; 0 where its process is not known.
    Live(i32),
    /// Something else.
    NoSocket,
}

/// Which file it is; another one at the same path differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    /// The file system's device.
    pub device: u64,
    /// Its number there.
    pub inode: u64,
    /// When it was made, in ns since 1970: numbers are used again.
    pub made_ns: i64,
}

impl FileId {
    /// That of the file at `path`, which is not followed if it is a link.
    pub fn of(path: &Path) -> io::Result<Self> {
        let meta = fs::symlink_metadata(path)?;
        let made_ns = meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec());
        Ok(Self { device: meta.dev(), inode: meta.ino(), made_ns })
    }
}

/// A stream socket that never blocks, to be bound: its file will be for its owner only, whatever the
/// umask is. (The mode of a socket before bind(2) is the most that its file gets on Linux.)
pub fn to_be_bound() -> Result<OwnedFd, Errno> {
    let fd = stream()?;
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
    Ok(fd)
}

/// Connects to `path`, without waiting and without ever blocking afterwards; EAGAIN where too many
/// others wait there.
pub fn connect_now(path: &Path) -> Result<OwnedFd, Errno> {
    let fd = stream()?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(fd)
}

/// Looks who is at `path`. One that lives notices a connection that ends at once.
pub fn occupant(path: &Path) -> io::Result<Occupant> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => {}
        Ok(_) => return Ok(Occupant::NoSocket),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Occupant::Nobody),
        Err(e) => return Err(e),
    }
    match connect_now(path) {
        Ok(fd) => Ok(Occupant::Live(getsockopt(&fd, PeerCredentials).map_or(0, |c| c.pid()))),
        // Its backlog is full: someone is there.
        Err(Errno::EAGAIN) => Ok(Occupant::Live(0)),
        Err(Errno::ECONNREFUSED) => Ok(Occupant::Dead),
        Err(Errno::ENOENT) => Ok(Occupant::Nobody),
        Err(e) => Err(e.into()),
    }
}

fn stream() -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(AddressFamily::Unix, SockType::Stream, flags, None)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use nix::sys::socket::{Backlog, bind, listen};

    use super::*;

    #[test]
    fn the_dead_are_told_from_the_living_and_from_what_is_no_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        assert_eq!(occupant(&path).unwrap(), Occupant::Nobody);
        let fd = to_be_bound().unwrap();
        bind(fd.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(occupant(&path).unwrap(), Occupant::Dead);
        listen(&fd, Backlog::new(1).unwrap()).unwrap();
        assert_eq!(occupant(&path).unwrap(), Occupant::Live(std::process::id() as i32));
        let before = FileId::of(&path).unwrap();
        fs::rename(&path, dir.path().join("t")).unwrap();
        assert_eq!(FileId::of(&dir.path().join("t")).unwrap(), before);
        drop(fd);
        fs::remove_file(dir.path().join("t")).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        assert_ne!(FileId::of(&path).unwrap(), before);
        assert_eq!(occupant(dir.path()).unwrap(), Occupant::NoSocket);
    }
}
