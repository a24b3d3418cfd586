//! Guest memory as numbers: addresses that cannot be mixed up, the RAM map, sets of pages.
//!
//! Nothing here maps or touches memory; that is [`crate::sys`] and `vmm::memory`.

mod address;
mod atomic;
mod huge;
mod map;
mod pages;

pub use address::{GuestPhysAddr, LocalAddr, PAGE_BYTES, PageIndex, VmmAddr};
pub use atomic::AtomicPageSet;
pub use huge::{Granule, HUGE_PAGE_BYTES, RamPages};
pub use map::{MAX_REGIONS, RamMap, RamMapError, RamRegion};
pub use pages::{PageRun, PageSet};
