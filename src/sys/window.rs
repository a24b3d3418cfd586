//! Guest RAM mapped for writing by a process that does not run the guest: what hugetlb files need,
//! which write(2) cannot write, and what makes transparent huge pages.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};

/// A shared, writable mapping of a memfd from its offset 0 on.
///
/// Nobody gets a reference to its bytes: others may map the same memory. Who may write when is the
/// caller's matter; a race harms the guest's memory, not this process's.
#[derive(Debug)]
pub struct RamWindow {
    start: NonNull<std::ffi::c_void>,
    bytes: usize,
}

// SAFETY: plain memory that stays mapped until drop; no references to it exist.
unsafe impl Send for RamWindow {}
// SAFETY: as above; every access is a raw copy of bytes, for which other processes' and threads'
// changes mean torn content at worst, and callers keep two writers off one page.
unsafe impl Sync for RamWindow {}

impl RamWindow {
    /// Maps `bytes` of `memfd`, which is sealed against shrinking, or nobody truncates it, and at least as large. Of a hugetlb
    /// file this sets aside what nobody else has, so that no page of it is ever lacking (SIGBUS): an
    /// error where the host's pool has too few.
    pub fn new(memfd: impl AsFd, bytes: u64) -> io::Result<Self> {
        let have = nix::sys::stat::fstat(memfd.as_fd())?.st_size;
        let length = usize::try_from(bytes).ok().and_then(NonZeroUsize::new);
        let length = length.filter(|l| l.get() as u64 <= have as u64).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, "nothing to map, or beyond the end")
        })?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory of ours.
        let start = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, memfd, 0) }?;
        Ok(Self { start, bytes: length.get() })
    }

    /// Asks for transparent huge pages, for what is touched through this mapping from here on. The
    /// host may not give any.
    pub fn advise_huge(&self) -> io::Result<()> {
        // SAFETY: exactly the range that is mapped; the advice changes no content.
        Ok(unsafe { madvise(self.start, self.bytes, MmapAdvise::MADV_HUGEPAGE) }?)
    }

    /// Has the kernel make huge pages of what is in the range, now (MADV_COLLAPSE, Linux 6.1).
    #[cfg(test)]
    pub(crate) fn join_now(&self, offset: u64, bytes: usize) -> io::Result<()> {
        let from = self.at(offset, bytes).cast();
        // SAFETY: `at` has checked that the range is mapped; its content stays as it is.
        let rc = unsafe { libc::madvise(from, bytes, libc::MADV_COLLAPSE) };
        if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Writes `data` at `offset`. Panics when it is not inside, which is the caller's error, never a
    /// peer's.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let to = self.at(offset, data.len());
        // SAFETY: `at` has checked that the range is mapped; `data` is ours, so it cannot overlap
        // with it: no slice of the mapping is ever made.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
    }

    /// Writes zeros. Panics like [`Self::write`].
    pub fn zero(&self, offset: u64, bytes: u64) {
        let to = self.at(offset, bytes as usize);
        // SAFETY: as for `write`.
        unsafe { std::ptr::write_bytes(to, 0, bytes as usize) };
    }

    /// Gives the page at `offset` memory where it is a hole, and changes nothing in it. Panics like
    /// [`Self::write`].
    pub fn touch(&self, offset: u64) {
        let from = self.at(offset, 1);
        // SAFETY: `at` has checked that the byte is mapped; any value is valid, and it is thrown away.
        let _ = unsafe { from.read_volatile() };
    }

    fn at(&self, offset: u64, bytes: usize) -> *mut u8 {
        let end = offset.checked_add(bytes as u64);
        assert!(end.is_some_and(|end| end <= self.bytes as u64), "range outside the RAM window");
        // SAFETY: the offset is inside the mapping, or at its end for an empty range.
        unsafe { self.start.cast::<u8>().as_ptr().add(offset as usize) }
    }
}

impl Drop for RamWindow {
    fn drop(&mut self) {
        // SAFETY: exactly the range that was mapped; nothing points into it.
        let _ = unsafe { munmap(self.start, self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::sys::memfd;

    #[test]
    fn what_is_written_is_in_the_file() {
        let file = memfd::create_sealed(c"test", 8192).unwrap();
        let window = RamWindow::new(&file, 8192).unwrap();
        window.write(4096, &[7; 4096]);
        window.zero(5000, 10);
        let mut back = [1; 8192];
        file.read_exact_at(&mut back, 0).unwrap();
        assert!(back[..4096].iter().all(|b| *b == 0));
        assert_eq!(back[4096..].iter().filter(|b| **b == 7).count(), 4086);
        assert!(RamWindow::new(&file, 8193).is_err());
    }

    #[test]
    #[should_panic(expected = "outside")]
    fn nothing_is_written_beyond_the_end() {
        let file = memfd::create_sealed(c"test", 4096).unwrap();
        RamWindow::new(&file, 4096).unwrap().write(1, &[0; 4096]);
    }
}
