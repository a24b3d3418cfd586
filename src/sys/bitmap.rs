//! A bitmap in a memfd that two processes share.

use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// Bits that outlive the process that sets them, as long as somebody holds the memfd.
#[derive(Debug)]
pub struct SharedBitmap {
    words: NonNull<AtomicU64>,
    count: usize,
}

// SAFETY: plain memory that stays mapped until drop, accessed through atomics only.
unsafe impl Send for SharedBitmap {}
// SAFETY: as above.
unsafe impl Sync for SharedBitmap {}

impl SharedBitmap {
    /// Maps the first `bits` bits of `memfd`, which is sealed against shrinking and at least as large.
    pub fn new(memfd: impl AsFd, bits: u64) -> io::Result<Self> {
        let count = usize::try_from(bits.div_ceil(64)).map_err(io::Error::other)?;
        let length =
            std::num::NonZeroUsize::new(count * 8).ok_or_else(|| io::Error::other("an empty bitmap"))?;
        let have = nix::sys::stat::fstat(memfd.as_fd())?.st_size;
        if (have as u64) < length.get() as u64 {
            return Err(io::Error::other(format!("a bitmap of {have} bytes for {bits} bits")));
        }
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory of ours.
        let start = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, memfd, 0) }?;
        Ok(Self { words: start.cast(), count })
    }

    /// The words, bit 0 in the lowest place of the first.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: `count` words are mapped, page aligned, for as long as `self` lives; any bit
        // pattern is valid, and changes by others are what atomics are for.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr(), self.count) }
    }

    /// Whether bit `n` is set; one beyond the end is not.
    pub fn get(&self, n: u64) -> bool {
        self.words().get((n / 64) as usize).is_some_and(|w| w.load(Ordering::Acquire) >> (n % 64) & 1 == 1)
    }

    /// Sets bit `n`; whether it was clear before.
    pub fn set(&self, n: u64) -> bool {
        let bit = 1 << (n % 64);
        self.words().get((n / 64) as usize).is_some_and(|w| w.fetch_or(bit, Ordering::AcqRel) & bit == 0)
    }
}

impl Drop for SharedBitmap {
    fn drop(&mut self) {
        // SAFETY: exactly what was mapped; no borrow outlives `self`.
        let _ = unsafe { munmap(self.words.cast(), self.count * 8) };
    }
}
