//! A read-only look at guest RAM that another process is writing.

use std::io::{self, IoSlice};
use std::os::fd::AsFd;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};

/// A shared, read-only mapping of a memfd from its offset 0 on.
///
/// The memory changes under us while the guest runs. So no `&[u8]` to it is ever handed to code
/// that could rely on it: what leaves this type are zero tests made with volatile reads, and
/// [`IoSlice`]s whose bytes only the kernel reads.
#[derive(Debug)]
pub struct RamView {
    start: NonNull<std::ffi::c_void>,
    bytes: usize,
}

// SAFETY: the mapping is plain memory that stays in place until drop, and every access through a
// shared reference is a read that tolerates concurrent change.
unsafe impl Send for RamView {}
// SAFETY: as above.
unsafe impl Sync for RamView {}

impl RamView {
    /// Maps `bytes` of `memfd`, which must be sealed against shrinking, or truncated by nobody: a page
    /// beyond the end of file would be a SIGBUS. Nothing is read yet.
    pub fn new(memfd: impl AsFd, bytes: u64) -> io::Result<Self> {
        let length = usize::try_from(bytes)
            .ok()
            .and_then(std::num::NonZeroUsize::new)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "nothing to map"))?;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory of ours.
        let start = unsafe { mmap(None, length, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, memfd, 0) }?;
        Ok(Self { start, bytes: length.get() })
    }

    /// Fills the page tables for a range that holds data, so that reading it takes no fault a page.
    /// Only advice: what it cannot do, it leaves. Do not call it on holes: it would allocate them.
    pub fn populate(&self, offset: u64, bytes: u64) {
        if let Some(start) = self.at(offset, bytes) {
            // SAFETY: the range lies inside the mapping; populating for read changes no content.
            let _ = unsafe { madvise(start, bytes as usize, MmapAdvise::MADV_POPULATE_READ) };
        }
    }

    /// Whether `bytes` (a multiple of 8) at `offset` are all zero at this moment. Panics when the
    /// range is not inside the mapping, which is the caller's error, never a peer's.
    pub fn is_zero(&self, offset: u64, bytes: u64) -> bool {
        const STEP: usize = 16;
        let start = self.at(offset, bytes).expect("range inside the RAM view").cast::<u64>();
        let words = bytes as usize / 8;
        let word = |i: usize| {
            // SAFETY: `at` has checked that the range is inside the mapping, and offsets are page
            // aligned, so the read is in bounds and aligned; volatile, as the guest may write it.
            unsafe { start.add(i).read_volatile() }
        };
        let mut i = 0;
        while i + STEP <= words {
            if (i..i + STEP).fold(0, |or, j| or | word(j)) != 0 {
                return false;
            }
            i += STEP;
        }
        (i..words).all(|j| word(j) == 0)
    }

    /// The range as a buffer for `writev`. Panics like [`Self::is_zero`].
    pub fn io_slice(&self, offset: u64, bytes: u64) -> IoSlice<'_> {
        let start = self.at(offset, bytes).expect("range inside the RAM view").cast::<u8>();
        // SAFETY: in bounds for as long as `self` lives. The bytes may change while the kernel
        // copies them, which it tolerates; nothing in this process reads them through the slice
        // (callers pass it to writev), and a page that changes is dirty and is sent again.
        IoSlice::new(unsafe { std::slice::from_raw_parts(start.as_ptr(), bytes as usize) })
    }

    fn at(&self, offset: u64, bytes: u64) -> Option<NonNull<std::ffi::c_void>> {
        let end = offset.checked_add(bytes)?;
        if end > self.bytes as u64 {
            return None;
        }
        // SAFETY: offset is at most the mapping's length.
        Some(unsafe { self.start.byte_add(offset as usize) })
    }
}

impl Drop for RamView {
    fn drop(&mut self) {
        // SAFETY: exactly the range that was mapped; no slice outlives `self`.
        let _ = unsafe { munmap(self.start, self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn zero_pages_are_told_from_pages_with_one_byte() {
        let mut file = tempfile::tempfile().unwrap();
        let mut content = vec![0u8; 3 * 4096];
        content[2 * 4096 - 1] = 1;
        file.write_all(&content).unwrap();
        let view = RamView::new(&file, 3 * 4096).unwrap();
        assert_eq!([0, 1, 2].map(|p| view.is_zero(p * 4096, 4096)), [true, false, true]);
        assert_eq!(&view.io_slice(4096, 4096)[..], &content[4096..8192]);
    }
}
