//! The Unix socket at which programs of the host ask for the guest. Its file belongs to whoever runs
//! the guest: until then it has another name.

use std::fs;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::sys::socket::{Backlog, UnixAddr, bind, listen};

use crate::sys::socket_file::{self, FileId, Occupant};

/// How often the path may change hands while it is being taken.
const ATTEMPTS: usize = 5;
/// The bytes by which the other name is longer than the path.
pub(super) const ASIDE_BYTES: usize = ".0123abcd".len();

/// A socket that listens.
pub struct Door {
    listener: UnixListener,
    path: PathBuf,
    /// Its name while the path is not its own.
    aside: Option<PathBuf>,
    id: FileId,
}

impl Door {
    /// Makes one for `path`, beside which it gets its other name. `source` is where the guest's is that
    /// comes in: if it is the same path, a program that listens there may be the source itself.
    pub fn new(path: &Path, source: Option<&Path>) -> io::Result<Self> {
        match socket_file::occupant(path)? {
            Occupant::NoSocket => return Err(no_socket()),
            Occupant::Live(pid) if source != Some(path) => return Err(taken(pid)),
            _ => {}
        }
        let fd = socket_file::to_be_bound()?;
        let aside = other_name(path);
        bind(fd.as_raw_fd(), &UnixAddr::new(&aside)?)?;
        let id = FileId::of(&aside)?;
        let door = Self { listener: fd.into(), path: path.into(), aside: Some(aside), id };
        listen(&door.listener, Backlog::MAXCONN)?;
        Ok(door)
    }

    /// Which file it is.
    pub fn id(&self) -> FileId {
        self.id
    }

    /// Whether the path is its own, as far as is known.
    pub fn is_open(&self) -> bool {
        self.aside.is_none()
    }

    /// Whether the path can be had: nobody else has it, but the source of the guest that comes in.
    pub fn may_open(&self, source: Option<FileId>) -> io::Result<()> {
        self.look(source).map(|_| ())
    }

    /// Takes the path: in one step, over a socket that is dead or the source's. Whatever else is there
    /// stays as it is.
    pub fn open(&mut self, source: Option<FileId>) -> io::Result<()> {
        if FileId::of(&self.path).is_ok_and(|there| there == self.id) {
            return Ok(());
        }
        if self.aside.is_none() {
            // Somebody has removed or replaced its file: it needs a new one.
            *self = Self::new(&self.path, None)?;
        }
        let Some(aside) = self.aside.clone() else { return Ok(()) };
        for _ in 0..ATTEMPTS {
            let Some(there) = self.look(source)? else {
                match rename(&aside, &self.path, RenameFlags::RENAME_NOREPLACE) {
                    Err(Errno::EEXIST) => continue,
                    done => done?,
                }
                self.aside = None;
                return Ok(());
            };
            match rename(&aside, &self.path, RenameFlags::RENAME_EXCHANGE) {
                Err(Errno::ENOENT) => continue,
                done => done?,
            }
            if FileId::of(&aside)? == there {
                self.aside = None;
                return fs::remove_file(&aside);
            }
            // Not the one that was looked at: a stranger's, which gets its place back.
            rename(&aside, &self.path, RenameFlags::RENAME_EXCHANGE)?;
        }
        Err(io::Error::other("it changes hands all the time"))
    }

    /// Takes the next program that knocks; `None` where there is none. It never blocks.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
        match self.listener.accept() {
            Ok((socket, _)) => socket.set_nonblocking(true).map(|()| Some(socket)),
            Err(e) if matches!(e.kind(), WouldBlock | ConnectionAborted | Interrupted) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The file at the path that is to be replaced, if there is one; an error where it may not be.
    fn look(&self, source: Option<FileId>) -> io::Result<Option<FileId>> {
        let there = FileId::of(&self.path).ok();
        match socket_file::occupant(&self.path)? {
            Occupant::Nobody => Ok(None),
            Occupant::NoSocket => Err(no_socket()),
            Occupant::Live(pid) if there.is_none() || there != source => Err(taken(pid)),
            _ => Ok(there),
        }
    }
}

impl AsFd for Door {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for Door {
    /// Removes its own file, and none that has come into its place.
    fn drop(&mut self) {
        if let Some(aside) = &self.aside {
            let _ = fs::remove_file(aside);
            return;
        }
        let ours = |path: &Path| FileId::of(path).is_ok_and(|there| there == self.id);
        let aside = other_name(&self.path);
        // The guest's new host may take the path between the look and the step: it gets it back then.
        if !ours(&self.path) || rename(&self.path, &aside, RenameFlags::RENAME_NOREPLACE).is_err() {
            return;
        }
        match ours(&aside) {
            true => drop(fs::remove_file(&aside)),
            false => drop(rename(&aside, &self.path, RenameFlags::RENAME_NOREPLACE)),
        }
    }
}

/// A name in the same directory that nobody has.
fn other_name(path: &Path) -> PathBuf {
    let random = RandomState::new().build_hasher().finish() as u32;
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{random:08x}"));
    name.into()
}

fn rename(from: &Path, to: &Path, flags: RenameFlags) -> nix::Result<()> {
    renameat2(AT_FDCWD, from, AT_FDCWD, to, flags)
}

fn no_socket() -> io::Error {
    io::Error::other("it exists and is no socket: it is left as it is")
}

fn taken(pid: i32) -> io::Error {
    io::Error::other(format!("a program listens there (process {pid})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scene() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        (dir, path)
    }

    /// What is in the directory, by name.
    fn names(dir: &tempfile::TempDir) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn complaint(result: io::Result<impl Sized>) -> String {
        result.err().unwrap().to_string()
    }

    #[test]
    fn the_path_is_taken_when_it_is_asked_for_and_given_back() {
        let (dir, path) = scene();
        let mut door = Door::new(&path, None).unwrap();
        assert!(!path.exists() && !door.is_open());
        assert_eq!(names(&dir)[0].len(), "v.sock".len() + ASIDE_BYTES);
        door.open(None).unwrap();
        assert_eq!((names(&dir), door.is_open()), (vec!["v.sock".to_owned()], true));
        assert!(door.accept().unwrap().is_none());
        let _caller = UnixStream::connect(&path).unwrap();
        assert!(door.accept().unwrap().is_some());
        // Somebody has tidied up.
        fs::remove_file(&path).unwrap();
        door.open(None).unwrap();
        assert_eq!(FileId::of(&path).unwrap(), door.id());
        drop(door);
        drop(Door::new(&path, None).unwrap());
        assert_eq!(names(&dir), Vec::<String>::new());
    }

    #[test]
    fn a_dead_socket_is_replaced_and_nothing_else() {
        let (dir, path) = scene();
        drop(UnixListener::bind(&path).unwrap());
        let mut door = Door::new(&path, None).unwrap();
        door.open(None).unwrap();
        assert_eq!(names(&dir), ["v.sock"]);
        assert!(complaint(Door::new(&path, None)).contains(&format!("process {}", std::process::id())));
        drop(door);

        // A stranger that came after the door was made.
        let mut door = Door::new(&path, None).unwrap();
        let stranger = UnixListener::bind(&path).unwrap();
        assert!(complaint(door.open(None)).contains("listens"));
        let of_another = FileId { made_ns: 0, ..FileId::of(&path).unwrap() };
        assert!(complaint(door.may_open(Some(of_another))).contains("listens"));
        drop(stranger);
        door.open(None).unwrap();
        drop(door);

        fs::write(&path, "precious").unwrap();
        assert!(complaint(Door::new(&path, None)).contains("no socket"));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn the_sources_is_taken_over_and_the_source_leaves_it_alone() {
        let (dir, path) = scene();
        let mut source = Door::new(&path, None).unwrap();
        source.open(None).unwrap();
        let mut dest = Door::new(&path, Some(&path)).unwrap();
        assert!(dest.may_open(None).is_err());
        dest.may_open(Some(source.id())).unwrap();
        dest.open(Some(source.id())).unwrap();
        drop(source);
        assert_eq!((names(&dir), FileId::of(&path).unwrap()), (vec!["v.sock".to_owned()], dest.id()));
        // A source that takes its guest back.
        let mut back = Door::new(&path, Some(&path)).unwrap();
        assert!(complaint(back.open(None)).contains("listens"));
        drop(dest);
        back.open(None).unwrap();
    }

    #[test]
    fn a_directory_that_is_not_there_is_told() {
        let (_dir, path) = scene();
        assert!(complaint(Door::new(&path.join("x"), None)).contains("os error"));
    }
}
