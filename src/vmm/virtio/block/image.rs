//! A disk's image on the host: opened, locked, handed over.
//!
//! Two bytes far beyond any data are locked with open-file-description locks: one for who writes the
//! image, one for who only reads it. A writer holds the first exclusively and wants nobody on the
//! second; a reader holds the second shared and wants nobody on the first. To hand an image over (S5)
//! the source makes its lock a shared one when it is saved, so that the destination can take the same
//! before it says READY: nobody else can come in between, and the two are kept apart by the ownership
//! of the guest. Whoever runs the guest makes its lock exclusive again as soon as the other has let
//! go.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;

use super::holder;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, PosixFadviseAdvice, fcntl, posix_fadvise};

/// The bytes that are locked: no file system has files so long.
const WRITER: i64 = i64::MAX - 16;
const READER: i64 = i64::MAX - 15;
/// What O_DIRECT is aligned to: every disk and file system of today takes it.
pub const DIRECT_BLOCK: u32 = 4096;
/// The unit of requests, and of files without O_DIRECT.
pub const SECTOR: u32 = 512;

/// What `--disk` says of the host: a path, and how it is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageConfig {
    /// A regular file or a block device.
    pub path: PathBuf,
    /// The guest may not write it.
    pub readonly: bool,
    /// Past the host's page cache (O_DIRECT).
    pub direct: bool,
}

impl ImageConfig {
    /// Reads `PATH[,readonly][,direct]`.
    pub fn parse(text: &str) -> Result<Self, String> {
        match Self::parse_with_id(text)? {
            (config, None) => Ok(config),
            (_, Some(_)) => Err("an id cannot be given here".into()),
        }
    }

    /// Reads `PATH[,readonly][,direct][,id=ID]`, the options in any order.
    pub fn parse_with_id(text: &str) -> Result<(Self, Option<String>), String> {
        let (mut readonly, mut direct, mut id) = (false, false, None);
        let mut path = text;
        while let Some((rest, option)) = path.rsplit_once(',') {
            match (option, option.strip_prefix("id=")) {
                ("readonly", _) => readonly = true,
                ("direct", _) => direct = true,
                (_, Some(wanted)) if id.is_none() && is_id(wanted) => id = Some(wanted.to_owned()),
                (_, Some(_)) => return Err("an id is one word of letters, digits, - and _".into()),
                _ => break, // part of the path
            }
            path = rest;
        }
        match path {
            "" => Err("it has no path".into()),
            path => Ok((Self { path: path.into(), readonly, direct }, id)),
        }
    }
}

/// Ids are in messages, `--remap` and GET_ID.
fn is_id(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
}

impl fmt::Display for ImageConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flag = |on, text| if on { text } else { "" };
        let (readonly, direct) = (flag(self.readonly, ",readonly"), flag(self.direct, ",direct"));
        write!(f, "{}{readonly}{direct}", self.path.display())
    }
}

/// An image that is open.
pub struct Image {
    /// The file or device.
    pub file: File,
    /// Its size in bytes, whole sectors.
    pub bytes: u64,
    /// What offsets, lengths and memory have to be multiples of.
    pub block_bytes: u32,
    /// Whether it is open for reading only.
    pub readonly: bool,
}

impl Image {
    /// Opens it, and locks nothing.
    pub fn open(config: &ImageConfig) -> io::Result<Self> {
        let flags = if config.direct { OFlag::O_DIRECT } else { OFlag::empty() } | OFlag::O_NONBLOCK;
        let mut options = OpenOptions::new();
        options.read(true).write(!config.readonly).custom_flags(flags.bits());
        let mut file = options.open(&config.path)?;
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::other("it is neither a regular file nor a block device"));
        }
        let bytes = file.seek(SeekFrom::End(0))?;
        let block_bytes = if config.direct { DIRECT_BLOCK } else { SECTOR };
        if bytes == 0 || !bytes.is_multiple_of(block_bytes.into()) {
            return Err(io::Error::other(format!("its {bytes} bytes are not whole blocks of {block_bytes}")));
        }
        Ok(Self { file, bytes, block_bytes, readonly: config.readonly })
    }

    /// Takes the lock of a machine that boots.
    pub fn lock(&self) -> io::Result<()> {
        match self.readonly {
            true => self.join(),
            false => {
                self.set(libc::F_WRLCK, WRITER)?;
                self.nobody(READER, WRITER, "only reads it")
            }
        }
    }

    /// Takes what can be had beside the source: the lock of a machine that comes in.
    pub fn join(&self) -> io::Result<()> {
        let (own, other, how) = match self.readonly {
            true => (READER, WRITER, "writes it"),
            false => (WRITER, READER, "only reads it"),
        };
        self.set(libc::F_RDLCK, own)?;
        self.nobody(other, own, how)
    }

    /// Lets the destination in beside this machine.
    pub fn share(&self) -> io::Result<()> {
        if self.readonly { Ok(()) } else { self.set(libc::F_RDLCK, WRITER) }
    }

    /// Whether this machine has the image to itself now.
    pub fn reclaim(&self) -> bool {
        self.readonly || self.set(libc::F_WRLCK, WRITER).is_ok()
    }

    /// Puts what was written onto the disk.
    pub fn flush(&self) -> io::Result<()> {
        if self.readonly { Ok(()) } else { self.file.sync_data() }
    }

    /// Drops what the host's cache may have of an image that another host has written since.
    pub fn forget_cache(&self) {
        let _ = posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }

    fn set(&self, kind: libc::c_int, at: i64) -> io::Result<()> {
        match fcntl(&self.file, FcntlArg::F_OFD_SETLK(&byte(kind, at))) {
            Ok(_) => Ok(()),
            Err(Errno::EAGAIN | Errno::EACCES) => Err(self.in_use("has it open")),
            Err(e) => Err(io::Error::other(format!("it cannot be locked: {e}"))),
        }
    }

    /// Whether the byte that excludes the one at `own` is free; gives `own` back if not.
    fn nobody(&self, at: i64, own: i64, how: &str) -> io::Result<()> {
        let mut lock = byte(libc::F_WRLCK, at);
        fcntl(&self.file, FcntlArg::F_OFD_GETLK(&mut lock))?;
        if i32::from(lock.l_type) == libc::F_UNLCK {
            return Ok(());
        }
        self.set(libc::F_UNLCK, own)?;
        Err(self.in_use(how))
    }

    fn in_use(&self, how: &str) -> io::Error {
        let who = holder::of(&self.file).map_or_else(String::new, |pid| format!(" (process {pid})"));
        io::Error::other(format!("another machine {how}{who}"))
    }
}

/// A lock on the byte at `at`.
fn byte(kind: libc::c_int, at: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: at,
        l_len: 1,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &std::path::Path, readonly: bool) -> Image {
        Image::open(&ImageConfig { path: path.into(), readonly, direct: false }).unwrap()
    }

    #[test]
    fn text_and_back() {
        let (config, id) = ImageConfig::parse_with_id("/a,b.img,direct,id=root,readonly").unwrap();
        assert_eq!((config.path.to_str(), config.readonly, config.direct), (Some("/a,b.img"), true, true));
        assert_eq!(id.as_deref(), Some("root"));
        assert_eq!(ImageConfig::parse(&config.to_string()), Ok(config));
        for bad in ["", ",readonly", "x,id=", "x,id=a b", "x,id=a,id=b"] {
            assert!(ImageConfig::parse_with_id(bad).is_err(), "{bad}");
        }
        assert!(ImageConfig::parse("x,id=a").is_err());
    }

    #[test]
    fn only_an_image_of_whole_sectors_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("disk");
        let fails = |path: &std::path::Path| {
            let config = ImageConfig { path: path.into(), readonly: true, direct: false };
            Image::open(&config).err().unwrap().to_string()
        };
        assert!(fails(&file).contains("No such file"));
        assert!(fails(dir.path()).contains("neither"));
        for bytes in [0, 511] {
            std::fs::write(&file, vec![0; bytes]).unwrap();
            assert!(fails(&file).contains("whole blocks"));
        }
        std::fs::write(&file, [0; 1024]).unwrap();
        assert_eq!(open(&file, true).bytes, 1024);
    }

    #[test]
    fn one_writer_or_many_readers() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [0; 512]).unwrap();
        let (first, second) = (open(file.path(), false), open(file.path(), false));
        let (reader, another) = (open(file.path(), true), open(file.path(), true));
        first.lock().unwrap();
        assert!(second.lock().unwrap_err().to_string().contains("has it open"));
        assert!(reader.lock().unwrap_err().to_string().contains("writes"));
        drop(first);
        // The reader that was refused keeps nothing.
        second.lock().unwrap();
        drop(second);
        reader.lock().unwrap();
        another.lock().unwrap();
        let writer = open(file.path(), false);
        assert!(writer.lock().unwrap_err().to_string().contains("only reads"));
    }

    #[test]
    fn an_image_is_handed_over_to_one_and_no_third() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [0; 512]).unwrap();
        let image = || open(file.path(), false);
        let (source, dest) = (image(), image());
        source.lock().unwrap();
        assert!(dest.join().is_err(), "before the source is saved");
        source.share().unwrap();
        dest.join().unwrap();
        assert!(image().lock().is_err() && !source.reclaim() && !dest.reclaim());
        drop(source);
        assert!(dest.reclaim());
        assert!(image().join().is_err());
    }
}
