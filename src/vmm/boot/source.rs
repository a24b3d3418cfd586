//! Where a kernel or an initrd comes from, read piece by piece.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::BootError;
use crate::memory::GuestPhysAddr;
use crate::vmm::VmmError;
use crate::vmm::memory::GuestRam;

/// A kernel to boot. As text: a path, or `builtin:NAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KernelSource {
    /// A file: PVH ELF or bzImage.
    File(PathBuf),
    /// One that is part of this program.
    Builtin(String),
}

impl FromStr for KernelSource {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text.strip_prefix("builtin:") {
            Some(name) => Self::Builtin(name.into()),
            None => Self::File(text.into()),
        })
    }
}

/// Pieces in which files are copied into the guest.
const CHUNK_BYTES: u64 = 1 << 20;

/// A file or bytes, with a name for messages.
pub(super) struct Image {
    name: String,
    content: Content,
}

enum Content {
    File(File),
    Bytes(&'static [u8]),
}

impl Image {
    pub(super) fn of_kernel(source: &KernelSource) -> Result<Self, BootError> {
        match source {
            KernelSource::File(path) => Self::open("kernel", path),
            KernelSource::Builtin(name) => match crate::vmm::boot::builtin_kernel(name) {
                Some(bytes) => Ok(Self::of_bytes(format!("kernel builtin:{name}"), bytes)),
                None => Err(BootError::UnknownBuiltin {
                    name: name.clone(),
                    known: crate::vmm::boot::BUILTIN_NAMES.join(", "),
                }),
            },
        }
    }

    pub(super) fn of_bytes(name: String, bytes: &'static [u8]) -> Self {
        Self { name, content: Content::Bytes(bytes) }
    }

    pub(super) fn open(what: &str, path: &Path) -> Result<Self, BootError> {
        let name = format!("{what} {}", path.display());
        let fail = |source| BootError::Read { what: name.clone(), source };
        // A FIFO would block the open, and a device has no length: regular files only.
        if !std::fs::metadata(path).map_err(fail)?.is_file() {
            return Err(fail(io::Error::other("it is not a regular file")));
        }
        let file = File::open(path).map_err(fail)?;
        Ok(Self { name, content: Content::File(file) })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn bytes(&self) -> Result<u64, BootError> {
        match &self.content {
            Content::File(file) => file.metadata().map(|m| m.len()).map_err(|e| self.unreadable(e)),
            Content::Bytes(bytes) => Ok(bytes.len() as u64),
        }
    }

    /// Reads at `offset` until `into` is full or the end comes; gives the number of bytes.
    pub(super) fn read_up_to(&self, offset: u64, into: &mut [u8]) -> Result<usize, BootError> {
        let mut got = 0;
        while got < into.len() {
            let at = offset.saturating_add(got as u64);
            let n = match &self.content {
                Content::File(file) => file.read_at(&mut into[got..], at).map_err(|e| self.unreadable(e))?,
                Content::Bytes(bytes) => {
                    let rest = bytes.get(at as usize..).unwrap_or_default();
                    let n = rest.len().min(into.len() - got);
                    into[got..got + n].copy_from_slice(&rest[..n]);
                    n
                }
            };
            if n == 0 {
                break;
            }
            got += n;
        }
        Ok(got)
    }

    /// Reads exactly `into.len()` bytes at `offset`; `what` says what is cut off if they are not there.
    pub(super) fn read_at(&self, offset: u64, into: &mut [u8], what: &str) -> Result<(), BootError> {
        match self.read_up_to(offset, into)? == into.len() {
            true => Ok(()),
            false => Err(self.bad(format!("the file ends in the middle of {what}"))),
        }
    }

    /// Copies `bytes` from `offset` to guest memory at `address`.
    pub(super) fn copy_to(
        &self,
        ram: &GuestRam,
        offset: u64,
        address: u64,
        bytes: u64,
    ) -> Result<(), VmmError> {
        let mut chunk = vec![0; bytes.min(CHUNK_BYTES) as usize];
        let mut done = 0;
        while done < bytes {
            let n = (bytes - done).min(CHUNK_BYTES) as usize;
            self.read_at(offset.saturating_add(done), &mut chunk[..n], "what is to be loaded")?;
            ram.write(GuestPhysAddr(address + done), &chunk[..n])?;
            done += n as u64;
        }
        Ok(())
    }

    pub(super) fn bad(&self, reason: impl Into<String>) -> BootError {
        BootError::BadKernel { kernel: self.name.clone(), reason: reason.into() }
    }

    fn unreadable(&self, source: io::Error) -> BootError {
        BootError::Read { what: self.name.clone(), source }
    }
}
