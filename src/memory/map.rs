//! The RAM map: which guest-physical ranges are RAM, and how their pages are numbered.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{GuestPhysAddr, PAGE_BYTES, PageIndex};

/// The most regions a map may have; x86 microVMs need two (below and above the hole under 4 GiB).
pub const MAX_REGIONS: usize = 16;

/// Regions are multiples of this, so that a region's part of a bitmap starts on a word.
const REGION_ALIGN: u64 = 64 * PAGE_BYTES;

/// The largest amount of RAM that a map may describe: 64 TiB, far below where sums could overflow.
const MAX_RAM_BYTES: u64 = 1 << 46;

/// One range of guest RAM, backed by one memfd from its offset 0 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RamRegion {
    /// Where the guest sees the region's first byte.
    pub start: GuestPhysAddr,
    /// Length in bytes, a multiple of 256 KiB.
    pub bytes: u64,
}

/// All guest RAM, in ascending order without overlap. Built only by [`RamMap::new`], so one that
/// came from a peer has been checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<RamRegion>", into = "Vec<RamRegion>")]
pub struct RamMap {
    regions: Vec<RamRegion>,
}

/// Why a list of regions is no RAM map.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RamMapError {
    /// No region at all.
    #[error("the RAM map is empty")]
    Empty,
    /// More than [`MAX_REGIONS`].
    #[error("the RAM map has {0} regions, more than {MAX_REGIONS}")]
    TooMany(usize),
    /// Start or length not a multiple of 256 KiB, or length zero.
    #[error("RAM region at {0} of {1} bytes is not a non-empty multiple of 256 KiB")]
    Unaligned(GuestPhysAddr, u64),
    /// A region begins before the one before it ends.
    #[error("RAM region at {0} overlaps or precedes the one before it")]
    Overlap(GuestPhysAddr),
    /// The end of a region, or the sum of all, is beyond 64 TiB.
    #[error("RAM region at {0} ends beyond 64 TiB")]
    TooLarge(GuestPhysAddr),
}

impl RamMap {
    /// Checks `regions` and makes them a map.
    pub fn new(regions: Vec<RamRegion>) -> Result<Self, RamMapError> {
        if regions.is_empty() {
            return Err(RamMapError::Empty);
        }
        if regions.len() > MAX_REGIONS {
            return Err(RamMapError::TooMany(regions.len()));
        }
        let mut end = 0;
        for r in &regions {
            if r.bytes == 0 || r.bytes % REGION_ALIGN != 0 || r.start.0 % REGION_ALIGN != 0 {
                return Err(RamMapError::Unaligned(r.start, r.bytes));
            }
            if r.start.0 < end {
                return Err(RamMapError::Overlap(r.start));
            }
            end = match r.start.0.checked_add(r.bytes) {
                Some(end) if end <= MAX_RAM_BYTES => end,
                _ => return Err(RamMapError::TooLarge(r.start)),
            };
        }
        Ok(Self { regions })
    }

    /// The regions, ascending.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// All RAM in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.regions.iter().map(|r| r.bytes).sum()
    }

    /// All RAM in pages of [`PAGE_BYTES`].
    pub fn total_pages(&self) -> u64 {
        self.total_bytes() / PAGE_BYTES
    }

    /// The region that holds `page`, and the page's byte offset in it; `None` past the end.
    pub fn locate(&self, page: PageIndex) -> Option<(usize, u64)> {
        let mut offset = page.0.checked_mul(PAGE_BYTES)?;
        for (i, r) in self.regions.iter().enumerate() {
            if offset < r.bytes {
                return Some((i, offset));
            }
            offset -= r.bytes;
        }
        None
    }

    /// The index of the page that holds `address`; `None` when it is not RAM.
    pub fn page_of(&self, address: GuestPhysAddr) -> Option<PageIndex> {
        let mut before = 0;
        for r in &self.regions {
            if address.0 >= r.start.0 && address.0 - r.start.0 < r.bytes {
                return Some(PageIndex((before + (address.0 - r.start.0)) / PAGE_BYTES));
            }
            before += r.bytes;
        }
        None
    }

    /// Where the guest sees `page`; `None` past the end.
    pub fn address_of(&self, page: PageIndex) -> Option<GuestPhysAddr> {
        self.locate(page).map(|(i, offset)| GuestPhysAddr(self.regions[i].start.0 + offset))
    }

    /// The index of the first page of region `i` (which must exist).
    pub fn first_page(&self, i: usize) -> PageIndex {
        let before: u64 = self.regions[..i].iter().map(|r| r.bytes).sum();
        PageIndex(before / PAGE_BYTES)
    }
}

impl TryFrom<Vec<RamRegion>> for RamMap {
    type Error = RamMapError;
    fn try_from(regions: Vec<RamRegion>) -> Result<Self, Self::Error> {
        Self::new(regions)
    }
}

impl From<RamMap> for Vec<RamRegion> {
    fn from(map: RamMap) -> Self {
        map.regions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(start: u64, bytes: u64) -> RamRegion {
        RamRegion { start: GuestPhysAddr(start), bytes }
    }

    #[test]
    fn pages_are_numbered_densely_over_the_gap() {
        let map = RamMap::new(vec![region(0, 1 << 20), region(4 << 30, 1 << 20)]).unwrap();
        assert_eq!(map.total_pages(), 512);
        assert_eq!(map.page_of(GuestPhysAddr(4 << 30)), Some(PageIndex(256)));
        assert_eq!(map.page_of(GuestPhysAddr(2 << 30)), None);
        assert_eq!(map.address_of(PageIndex(257)), Some(GuestPhysAddr((4 << 30) + 4096)));
        assert_eq!(map.address_of(PageIndex(512)), None);
        assert_eq!(map.locate(PageIndex(u64::MAX)), None);
        assert_eq!(map.first_page(1), PageIndex(256));
    }

    #[test]
    fn a_bad_map_is_named() {
        assert_eq!(RamMap::new(vec![]), Err(RamMapError::Empty));
        assert!(matches!(RamMap::new(vec![region(0, 4096)]), Err(RamMapError::Unaligned(..))));
        assert!(matches!(
            RamMap::new(vec![region(0, 1 << 20), region(1 << 18, 1 << 20)]),
            Err(RamMapError::Overlap(_))
        ));
        assert!(matches!(RamMap::new(vec![region(u64::MAX << 18, 1 << 20)]), Err(RamMapError::TooLarge(_))));
        assert!(matches!(RamMap::new(vec![region(0, 1 << 20); 17]), Err(RamMapError::TooMany(17))));
    }
}
