//! A device's configuration space: read by vCPUs, changed by the device.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The bytes, with the generation that tells a driver that they changed under its hands (virtio 1.2,
/// section 2.5).
pub struct ConfigSpace(Mutex<Inner>);

struct Inner {
    bytes: Vec<u8>,
    writable: Range<usize>,
    generation: u32,
}

impl ConfigSpace {
    /// A space that begins with `bytes`; the driver may write those in `writable`.
    pub fn new(bytes: Vec<u8>, writable: Range<usize>) -> Self {
        Self(Mutex::new(Inner { bytes, writable, generation: 0 }))
    }

    /// The driver reads; what is beyond the end is zero.
    pub fn read(&self, offset: u64, into: &mut [u8]) {
        let inner = self.lock();
        for (n, byte) in into.iter_mut().enumerate() {
            *byte = place(offset, n).and_then(|at| inner.bytes.get(at)).copied().unwrap_or(0);
        }
    }

    /// The driver writes; what it may not write stays.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let mut inner = self.lock();
        for (n, byte) in bytes.iter().enumerate() {
            if let Some(at) = place(offset, n).filter(|at| inner.writable.contains(at))
                && let Some(place) = inner.bytes.get_mut(at)
            {
                *place = *byte;
            }
        }
    }

    /// The device changes what the driver sees. [`super::Io::config_changed`] tells the driver.
    pub fn update(&self, change: impl FnOnce(&mut [u8])) {
        let mut inner = self.lock();
        let before = inner.bytes.clone();
        change(&mut inner.bytes);
        if inner.bytes != before {
            inner.generation = inner.generation.wrapping_add(1);
        }
    }

    /// Changes whenever the device changes the space.
    pub fn generation(&self) -> u32 {
        self.lock().generation
    }

    /// The generation of a saved state.
    pub(super) fn set_generation(&self, generation: u32) {
        self.lock().generation = generation;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The place of the `n`th byte from `offset` on.
fn place(offset: u64, n: usize) -> Option<usize> {
    usize::try_from(offset).ok()?.checked_add(n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_writes_only_where_it_may_and_reads_zero_beyond_the_end() {
        let space = ConfigSpace::new(vec![1, 2, 3, 4], 2..3);
        space.write(0, &[9; 8]);
        let mut got = [7; 6];
        space.read(0, &mut got);
        assert_eq!(got, [1, 2, 9, 4, 0, 0]);
        space.read(u64::MAX, &mut got[..1]);
        space.write(u64::MAX, &[1]);
        assert_eq!(space.generation(), 0);
        space.update(|bytes| bytes[0] = 5);
        space.update(|_| ());
        assert_eq!(space.generation(), 1);
    }
}
