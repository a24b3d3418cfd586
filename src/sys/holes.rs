//! Which huge pages of a hugetlb file have memory behind them: its files know no SEEK_DATA, and
//! reading a hole through a mapping fills it.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::uffd::FaultFd;

/// A mapping that nobody reads. A userfaultfd in minor mode over it is asked to show a page: where
/// there is one, it does; a hole stays a hole, and is an error that says so (UFFDIO_CONTINUE).
#[derive(Debug)]
pub struct HoleProbe {
    faults: FaultFd,
    start: NonNull<std::ffi::c_void>,
    bytes: usize,
}

// SAFETY: the mapping is never read or written; only its addresses are used.
unsafe impl Send for HoleProbe {}
// SAFETY: as above.
unsafe impl Sync for HoleProbe {}

impl HoleProbe {
    /// For the first `bytes` bytes of `memfd`. An error where this process may have no userfaultfd, or
    /// the kernel's knows no minor faults for hugetlb (before Linux 5.13).
    pub fn new(memfd: impl AsFd, bytes: u64) -> io::Result<Self> {
        let length = usize::try_from(bytes).ok().and_then(NonZeroUsize::new);
        let length = length.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "nothing to map"))?;
        let faults = FaultFd::for_own_huge_pages()?;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory of ours.
        let start = unsafe { mmap(None, length, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, memfd, 0) }?;
        let probe = Self { faults, start, bytes: length.get() };
        probe.faults.register_minor(probe.address(), bytes)?;
        Ok(probe)
    }

    /// Whether the huge page of `page_bytes` bytes at `offset` has memory.
    pub fn has_memory(&self, offset: u64, page_bytes: u64) -> io::Result<bool> {
        self.faults.show(self.address() + offset, page_bytes)
    }

    fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }
}

impl Drop for HoleProbe {
    fn drop(&mut self) {
        // SAFETY: exactly the range that was mapped; nothing points into it.
        let _ = unsafe { munmap(self.start, self.bytes) };
    }
}
