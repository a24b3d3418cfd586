//! Huge pages: what RAM is made of at its host, and which pages come and go together because of it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{PAGE_BYTES, PageIndex, PageRun, RamMap};

/// Bytes of a huge page on x86-64.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// What the host makes guest RAM of. The guest does not see the difference, and neither does the
/// dirty log, which stays at [`PAGE_BYTES`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum RamPages {
    /// Pages of 4 KiB.
    #[default]
    #[serde(rename = "4K")]
    Small,
    /// Pages of 2 MiB out of the host's pool (hugetlb), all set aside when the machine is made.
    #[serde(rename = "2M")]
    Huge,
    /// Pages of 4 KiB that the host is asked to join to 2 MiB where it can (shmem THP).
    #[serde(rename = "thp")]
    Transparent,
}

impl RamPages {
    /// The pages that are there or missing only together. A transparent huge page can be taken
    /// apart by the kernel, so its pages can be there one by one.
    pub fn granule(self) -> Granule {
        match self {
            Self::Small | Self::Transparent => Granule::SMALL,
            Self::Huge => Granule::HUGE,
        }
    }
}

impl fmt::Display for RamPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Small => "4K",
            Self::Huge => "2M",
            Self::Transparent => "thp",
        })
    }
}

impl FromStr for RamPages {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "4K" => Ok(Self::Small),
            "2M" => Ok(Self::Huge),
            "thp" => Ok(Self::Transparent),
            _ => Err(format!("{text:?} is no size of pages here: use 4K, 2M or thp")),
        }
    }
}

/// Pages that come and go together: regions of RAM are made of whole ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Granule {
    pages: u64,
}

impl Granule {
    /// One page of [`PAGE_BYTES`].
    pub const SMALL: Self = Self { pages: 1 };
    /// A page of [`HUGE_PAGE_BYTES`]: 512 small ones, 8 words of a bitmap.
    pub const HUGE: Self = Self { pages: HUGE_PAGE_BYTES / PAGE_BYTES };

    /// In pages.
    pub fn pages(self) -> u64 {
        self.pages
    }

    /// In bytes.
    pub fn bytes(self) -> u64 {
        self.pages * PAGE_BYTES
    }

    /// The one that `page` belongs to. Numbers are aligned like addresses where it [fits](Self::fits).
    pub fn around(self, page: PageIndex) -> PageRun {
        PageRun { first: PageIndex(page.0 - page.0 % self.pages), pages: self.pages }
    }

    /// `run`, cut where one ends and the next begins.
    pub fn parts(self, run: PageRun) -> impl Iterator<Item = PageRun> {
        let (mut at, end) = (run.first.0, run.first.0.saturating_add(run.pages));
        std::iter::from_fn(move || {
            let first = PageIndex(at);
            let whole = self.around(first);
            at = whole.first.0.saturating_add(whole.pages).min(end);
            (first.0 < end).then(|| PageRun { first, pages: at - first.0 })
        })
    }

    /// Whether every region of `map` begins and ends with one, so that page numbers and addresses
    /// are aligned alike.
    pub fn fits(self, map: &RamMap) -> bool {
        let whole = |n: u64| n.is_multiple_of(self.bytes());
        map.regions().iter().all(|r| whole(r.start.0) && whole(r.bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestPhysAddr, RamRegion};

    #[test]
    fn words_for_pages_are_read_as_they_are_shown() {
        for pages in [RamPages::Small, RamPages::Huge, RamPages::Transparent] {
            assert_eq!(pages.to_string().parse(), Ok(pages));
            assert_eq!(serde_json::to_value(pages).unwrap(), pages.to_string());
        }
        assert!("1G".parse::<RamPages>().unwrap_err().contains("2M"));
        assert_eq!(RamPages::Transparent.granule(), Granule::SMALL);
    }

    #[test]
    fn a_run_is_cut_where_granules_end() {
        let run = |first, pages| PageRun { first: PageIndex(first), pages };
        let parts = |granule: Granule, first, pages| granule.parts(run(first, pages)).collect::<Vec<_>>();
        assert_eq!(Granule::HUGE.around(PageIndex(1023)), run(512, 512));
        assert_eq!(Granule::SMALL.around(PageIndex(1023)), run(1023, 1));
        assert_eq!(parts(Granule::HUGE, 500, 600), [run(500, 12), run(512, 512), run(1024, 76)]);
        assert_eq!(parts(Granule::HUGE, 512, 512), [run(512, 512)]);
        assert_eq!(parts(Granule::SMALL, 5, 2), [run(5, 1), run(6, 1)]);
        assert_eq!(parts(Granule::HUGE, 5, 0), []);
        assert_eq!(parts(Granule::HUGE, u64::MAX - 1, 9), [run(u64::MAX - 1, 1)]);
    }

    #[test]
    fn regions_have_to_begin_and_end_with_a_granule() {
        let map = |start, bytes| RamMap::new(vec![RamRegion { start: GuestPhysAddr(start), bytes }]).unwrap();
        assert!(Granule::HUGE.fits(&map(4 << 30, 6 << 20)));
        assert!(!Granule::HUGE.fits(&map(1 << 20, 2 << 20)));
        assert!(!Granule::HUGE.fits(&map(0, 3 << 20)));
        assert!(Granule::SMALL.fits(&map(1 << 20, 3 << 20)));
    }
}
