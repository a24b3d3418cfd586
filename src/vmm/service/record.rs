//! The session record: what a `vmrun` knows about the ownership of its guest, on disk.
//!
//! It lies beside the control socket (`SOCKET.session.json`) and is written before the change that
//! it describes is answered (S3). It is there for people: the guest itself lives only as long as its
//! `vmrun`, so no program goes on from a record. A record that an earlier `vmrun` left is moved to
//! `SOCKET.session.json.old` (`.old.1`, … when that is taken), and said.
//!
//! The guest stands still while a record is written. So a file for the next one lies ready
//! (`SOCKET.session.json.new`), with its blocks on disk: the record is written over them, and a disk takes that
//! in half the time of a new file and its directory. Only then it gets the record's name; where the power
//! is lost before that is on disk as well, the record is in the file that was ready, and found there.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::switchover::Ownership;

/// The version of [`SessionRecord`] that is written.
const RECORD_VERSION: u32 = 1;
/// The most records that are kept aside.
const MAX_OLD: u32 = 1000;
/// The largest record that is read.
const MAX_RECORD_BYTES: u64 = 64 << 10;
/// What lies ready for a record: more than one needs, as a rule.
const READY_BYTES: usize = 4 << 10;

/// What is in the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRecord {
    /// The form of the record.
    pub version: u32,
    /// The `vmrun` that wrote it.
    pub pid: u32,
    /// Milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// The guest's name.
    pub name: Option<String>,
    /// The guest's uuid.
    pub uuid: Option<String>,
    /// Who owns the guest.
    pub ownership: Ownership,
}

/// Where the record of this `vmrun` is.
#[derive(Clone, Debug)]
pub(super) struct RecordFile {
    path: PathBuf,
    /// No record is wanted any more. Held while a record takes its place.
    over: Arc<Mutex<bool>>,
    /// The file that lies ready, at `SOCKET.session.json.new`.
    ready: Arc<Mutex<Option<File>>>,
}

impl RecordFile {
    /// The record's place for the control socket `control`, and where a record that was found there
    /// is now, with what it says.
    pub fn open(control: &Path) -> io::Result<(Self, Option<String>)> {
        let file = Self { path: beside(control), over: Arc::default(), ready: Arc::default() };
        let new = file.new_path();
        match read(&new) {
            Ok(_) => fs::rename(&new, &file.path)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            // It lay ready, and was not needed.
            Err(_) => fs::remove_file(&new)?,
        }
        let left = match fs::symlink_metadata(&file.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(e),
            Ok(_) => Some(file.set_aside()?),
        };
        Ok((file, left))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    fn set_aside(&self) -> io::Result<String> {
        let said = match read(&self.path) {
            Ok(record) => format!(
                "process {}, guest {}, {}",
                record.pid,
                record.name.as_deref().unwrap_or("(none)"),
                record.ownership
            ),
            Err(e) => format!("it cannot be read: {e}"),
        };
        for n in 0..MAX_OLD {
            let mut old = self.path.clone().into_os_string();
            old.push(if n == 0 { ".old".to_owned() } else { format!(".old.{n}") });
            let old = PathBuf::from(old);
            // A hard link never overwrites.
            match fs::hard_link(&self.path, &old) {
                Ok(()) => {
                    fs::remove_file(&self.path)?;
                    return Ok(format!("{} ({said})", old.display()));
                }
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(e),
            }
        }
        Err(io::Error::other(format!("{MAX_OLD} old session records are there already")))
    }

    /// Lays a file ready for the next record, where none is. Whoever calls this has time.
    pub fn make_ready(&self) -> io::Result<()> {
        let mut ready = self.ready();
        if ready.is_none() {
            *ready = Some(self.make()?);
        }
        Ok(())
    }

    fn make(&self) -> io::Result<File> {
        let mut file = create(&self.new_path())?;
        file.write_all(&[b' '; READY_BYTES])?;
        file.sync_all()?;
        self.sync_directory()?;
        Ok(file)
    }

    /// Writes the record whole. When this returns it is on disk, too, unless it is a promise: a guest
    /// that was only promised has not run here, which is also what no record at all would say, and
    /// people wait for the promise while the guest stands still.
    pub fn write(&self, name: Option<&str>, uuid: Option<&str>, ownership: &Ownership) -> io::Result<()> {
        let record = SessionRecord {
            version: RECORD_VERSION,
            pid: std::process::id(),
            time_ms: super::now_ms(),
            name: name.map(str::to_owned),
            uuid: uuid.map(str::to_owned),
            ownership: ownership.clone(),
        };
        let mut text = serde_json::to_vec_pretty(&record)?;
        text.push(b'\n');
        match ownership {
            Ownership::InDoubt { .. } => self.write_promise(&text),
            _ => self.write_lasting(&text),
        }
    }

    fn write_lasting(&self, text: &[u8]) -> io::Result<()> {
        let ready = self.ready().take();
        let new = self.new_path();
        let write = |file: File| {
            file.write_all_at(text, 0)?;
            file.sync_data()?;
            self.put(&new)?;
            // The blanks behind it are for nobody; with them it is a record as well.
            let _ = file.set_len(text.len() as u64);
            Ok(())
        };
        // One that has lain there for long may have been tidied away.
        let written = match ready.map(write) {
            Some(Ok(())) => Ok(()),
            _ => self.make().and_then(write),
        };
        if written.is_err() {
            let _ = fs::remove_file(&new);
        }
        written
    }

    /// Leaves what lies ready for the record that follows.
    fn write_promise(&self, text: &[u8]) -> io::Result<()> {
        let promise = self.promise_path();
        let written =
            create(&promise).and_then(|mut file| file.write_all(text)).and_then(|()| self.put(&promise));
        if written.is_err() {
            let _ = fs::remove_file(&promise);
        }
        written
    }

    /// Gives the file at `from` the record's name.
    fn put(&self, from: &Path) -> io::Result<()> {
        match *self.over.lock().unwrap_or_else(PoisonError::into_inner) {
            true => Err(io::Error::other("this vmrun has ended")),
            false => fs::rename(from, &self.path),
        }
    }

    fn new_path(&self) -> PathBuf {
        with_suffix(&self.path, ".new")
    }

    fn promise_path(&self) -> PathBuf {
        with_suffix(&self.path, ".promise")
    }

    fn ready(&self) -> MutexGuard<'_, Option<File>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes the record for good: one that is being written does not take its place any more. It
    /// stays only where a file system holds on to that very step, and is told.
    pub fn end(&self) -> io::Result<()> {
        match self.over.try_lock() {
            Ok(mut over) => *over = true,
            Err(_) => return Err(io::Error::other("it is just being written, so it stays")),
        }
        self.clear();
        self.remove()
    }

    /// Removes what lies ready: the record stays, if there is one, and no other follows.
    pub fn clear(&self) {
        let _ = fs::remove_file(self.new_path());
        let _ = fs::remove_file(self.promise_path());
    }

    /// Removes the record; none there is no error.
    pub fn remove(&self) -> io::Result<()> {
        match fs::remove_file(&self.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    fn sync_directory(&self) -> io::Result<()> {
        let parent = self.path.parent().filter(|p| !p.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
    }
}

impl SessionRecord {
    /// The record beside the control socket `control`; `None` where there is none.
    pub fn of(control: &Path) -> io::Result<Option<Self>> {
        let path = beside(control);
        match read(&with_suffix(&path, ".new")).or_else(|_| read(&path)) {
            Ok(record) => Ok(Some(record)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }
}

fn beside(control: &Path) -> PathBuf {
    with_suffix(control, ".session.json")
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

/// A new file, in the place of one that a crash left; never followed if that is a link.
fn create(path: &Path) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

fn read(path: &Path) -> io::Result<SessionRecord> {
    let meta = fs::symlink_metadata(path)?;
    if !meta.is_file() || meta.len() > MAX_RECORD_BYTES {
        return Err(io::Error::other("this is no session record"));
    }
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;

    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

    use super::*;
    use crate::switchover::{Attempt, SessionId};

    #[test]
    fn a_record_is_replaced_whole_and_one_that_was_left_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let control = dir.path().join("vm.sock");
        let attempt = Attempt { session: SessionId([7; 16]), epoch: 1 };
        for (n, aside) in ["vm.sock.session.json.old", "vm.sock.session.json.old.1"].iter().enumerate() {
            let (file, left) = RecordFile::open(&control).unwrap();
            assert_eq!(left, None);
            file.write(Some("g"), None, &Ownership::InDoubt { attempt }).unwrap();
            let dest = format!("host{n}");
            file.write(Some("g"), None, &Ownership::Committed { attempt, dest }).unwrap();
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), n + 1);
            let (_, left) = RecordFile::open(&control).unwrap();
            let left = left.unwrap();
            assert!(left.contains(&format!("host{n}")) && left.contains(aside), "{left}");
        }
        let record = dir.path().join("vm.sock.session.json");
        fs::write(&record, "garbage").unwrap();
        let (file, left) = RecordFile::open(&control).unwrap();
        assert!(left.is_some_and(|l| l.contains("cannot be read")));
        // One that another user has put there, of a record of his own or of any size, is none.
        file.write(None, None, &Ownership::InDoubt { attempt }).unwrap();
        assert!(SessionRecord::of(&control).unwrap().is_some());
        assert_eq!(fs::metadata(&record).unwrap().permissions().mode() & 0o777, 0o600);
        let real = dir.path().join("real");
        fs::rename(&record, &real).unwrap();
        std::os::unix::fs::symlink(&real, &record).unwrap();
        assert!(SessionRecord::of(&control).is_err());
        let mut text = fs::read(&real).unwrap();
        text.resize(MAX_RECORD_BYTES as usize + 1, b' ');
        fs::remove_file(&record).unwrap();
        fs::write(&record, text).unwrap();
        assert!(SessionRecord::of(&control).is_err());
        let (file, _) = RecordFile::open(&control).unwrap();
        file.remove().unwrap();
        file.remove().unwrap();
    }

    /// The power may go between a record's way to the disk and its name's.
    #[test]
    fn a_record_that_has_not_its_name_yet_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let control = dir.path().join("vm.sock");
        let attempt = Attempt { session: SessionId([7; 16]), epoch: 1 };
        let (file, _) = RecordFile::open(&control).unwrap();
        file.write(None, None, &Ownership::InDoubt { attempt }).unwrap();
        file.make_ready().unwrap();
        let promised = SessionRecord::of(&control).unwrap().unwrap();
        assert_eq!(promised.ownership, Ownership::InDoubt { attempt });
        let blank = fs::read(file.new_path()).unwrap();
        let committed = Ownership::Committed { attempt, dest: "hostc".to_owned() };
        file.write(None, None, &committed).unwrap();
        let mut new = fs::read(&file.path).unwrap();
        new.extend_from_slice(&blank[new.len()..]);
        fs::write(file.new_path(), new).unwrap();
        fs::write(&file.path, serde_json::to_vec(&promised).unwrap()).unwrap();
        assert_eq!(SessionRecord::of(&control).unwrap().unwrap().ownership, committed);
        let (next, left) = RecordFile::open(&control).unwrap();
        assert!(left.is_some_and(|left| left.contains("hostc")));
        // What was ready and not needed is nothing to keep.
        next.make_ready().unwrap();
        assert_eq!(SessionRecord::of(&control).unwrap(), None);
        assert_eq!(RecordFile::open(&control).unwrap().1, None);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    /// How often the kernel is told to put something on disk while `change` is done. The system call is
    /// trapped on a thread of its own, and so does nothing.
    fn syncs(change: impl FnOnce() + Send) -> usize {
        let (mut caught, handler) = std::os::unix::net::UnixStream::pair().unwrap();
        caught.set_nonblocking(true).unwrap();
        let id = signal_hook::low_level::pipe::register(libc::SIGSYS, handler).unwrap();
        let syncs = [(libc::SYS_fsync, vec![]), (libc::SYS_fdatasync, vec![])].into();
        let filter = SeccompFilter::new(syncs, SeccompAction::Allow, SeccompAction::Trap, TargetArch::x86_64);
        let filter: BpfProgram = filter.unwrap().try_into().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                seccompiler::apply_filter(&filter).unwrap();
                change();
            });
        });
        signal_hook::low_level::unregister(id);
        caught.read(&mut [0; 16]).unwrap_or(0)
    }

    #[test]
    fn what_must_outlive_a_crash_is_synced_and_what_lies_ready_spares_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let (file, _) = RecordFile::open(&dir.path().join("vm.sock")).unwrap();
        let attempt = Attempt { session: SessionId([7; 16]), epoch: 1 };
        let committed = Ownership::Committed { attempt, dest: "there".into() };
        let promised = Ownership::InDoubt { attempt };
        let write = |ownership: &Ownership| syncs(|| file.write(None, None, ownership).unwrap());
        assert_eq!(write(&promised), 0);
        assert_eq!(write(&committed), 3, "its file, that one's name, and the record");
        assert_eq!(syncs(|| file.make_ready().unwrap()), 2, "the file, and its name");
        assert_eq!(syncs(|| file.make_ready().unwrap()), 0);
        assert_eq!(write(&promised), 0, "it leaves what lies ready");
        assert_eq!(write(&committed), 1, "the record");
        file.make_ready().unwrap();
        fs::remove_file(file.new_path()).unwrap();
        file.write(None, None, &committed).unwrap();
        assert_eq!(SessionRecord::of(&dir.path().join("vm.sock")).unwrap().unwrap().ownership, committed);
    }

    /// A disk may take longer than a vmrun that has nothing to keep.
    #[test]
    fn a_record_that_is_still_being_written_at_the_end_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (file, _) = RecordFile::open(&dir.path().join("vm.sock")).unwrap();
        let attempt = Attempt { session: SessionId([7; 16]), epoch: 1 };
        let late = file.clone();
        file.write(None, None, &Ownership::Released { attempt }).unwrap();
        fs::write(file.new_path(), "half of it").unwrap();
        file.end().unwrap();
        assert!(late.write(None, None, &Ownership::Released { attempt }).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
