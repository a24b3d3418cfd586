//! The session record: what a `vmrun` knows about the ownership of its guest, on disk.
//!
//! It lies beside the control socket (`SOCKET.session.json`) and is written before the change that
//! it describes is answered (S3). It is there for people: the guest itself lives only as long as its
//! `vmrun`, so no program goes on from a record. A record that an earlier `vmrun` left is moved to
//! `SOCKET.session.json.old` (`.old.1`, … when that is taken), and said.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::switchover::Ownership;

/// The version of [`SessionRecord`] that is written.
const RECORD_VERSION: u32 = 1;
/// The most records that are kept aside.
const MAX_OLD: u32 = 1000;
/// The largest record that is read.
const MAX_RECORD_BYTES: u64 = 64 << 10;

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
}

impl RecordFile {
    /// The record's place for the control socket `control`, and where a record that was found there
    /// is now, with what it says.
    pub fn open(control: &Path) -> io::Result<(Self, Option<String>)> {
        let mut path = control.as_os_str().to_owned();
        path.push(".session.json");
        let file = Self { path: path.into() };
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

    /// Writes the record so that it is on disk, whole, when this returns.
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
        let mut new = self.path.clone().into_os_string();
        new.push(".new");
        let new = PathBuf::from(new);
        // One left by a crash; never followed if it is a link.
        match fs::remove_file(&new) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
        let written = file.write_all(&text).and_then(|()| file.sync_all());
        let written = written.and_then(|()| fs::rename(&new, &self.path));
        if written.is_err() {
            let _ = fs::remove_file(&new);
        }
        written.and_then(|()| self.sync_directory())
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

fn read(path: &Path) -> io::Result<SessionRecord> {
    let meta = fs::symlink_metadata(path)?;
    if !meta.is_file() || meta.len() > MAX_RECORD_BYTES {
        return Err(io::Error::other("this is no session record"));
    }
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

#[cfg(test)]
mod tests {
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
        fs::write(dir.path().join("vm.sock.session.json"), "garbage").unwrap();
        let (_, left) = RecordFile::open(&control).unwrap();
        assert!(left.is_some_and(|l| l.contains("cannot be read")));
        let (file, _) = RecordFile::open(&control).unwrap();
        file.remove().unwrap();
        file.remove().unwrap();
    }
}
