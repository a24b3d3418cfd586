//! Where the receiver puts pages.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::memory::{AtomicPageSet, Granule, PageIndex, PageRun, PageSet};

use super::postcopy::pager::Pager;
use super::ram::Ram;

/// Writes what arrives into the guest's RAM and keeps count. Shared by all channels; that two of
/// them never write one page at once is the source's duty (it waits at the end of each pass), and
/// a source that breaks it harms its own guest only.
#[derive(Debug)]
pub struct Placer {
    ram: Arc<Ram>,
    /// Pages whose memory may hold something other than zero.
    written: AtomicPageSet,
    /// Pages of which the source has told the content at least once.
    covered: AtomicPageSet,
    covered_pages: AtomicU64,
    data_pages: AtomicU64,
    zero_pages: AtomicU64,
    /// From the switchover of a postcopy on: the guest can see its RAM, and pages appear whole.
    pager: OnceLock<Arc<Pager>>,
}

impl Placer {
    /// For RAM that is fresh: every page reads as zero.
    pub fn new(ram: Arc<Ram>) -> Self {
        let pages = ram.map().total_pages();
        Self {
            ram,
            written: AtomicPageSet::new(pages),
            covered: AtomicPageSet::new(pages),
            covered_pages: AtomicU64::new(0),
            data_pages: AtomicU64::new(0),
            zero_pages: AtomicU64::new(0),
            pager: OnceLock::new(),
        }
    }

    /// From here on every page is put into place by `pager`.
    pub fn page_with(&self, pager: Arc<Pager>) {
        let _ = self.pager.set(pager);
    }

    /// Throws away what was placed of `pages`: they come again. Huge pages of the pool stay: `vmrun` does not see
    /// one before all that is missing of it has been written over.
    pub fn discard(&self, pages: &PageSet) -> io::Result<()> {
        if self.ram.pages().granule() != Granule::SMALL {
            return Ok(());
        }
        for run in pages.runs().filter(|run| self.written.intersects(reach(*run))) {
            self.for_spans(run, |span| self.ram.discard(span))?;
        }
        Ok(())
    }

    /// The RAM.
    pub fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    /// Puts `data` (whole pages) to the pages from `run.first` on; `data` fills `run` exactly, and
    /// `run` is inside the RAM map.
    pub fn place(&self, run: PageRun, data: &[u8]) -> io::Result<()> {
        if let Some(pager) = self.pager.get() {
            return pager.place(run, data);
        }
        self.written.insert_run(run);
        let mut rest = data;
        self.for_spans(run, |span| {
            let (now, later) = rest.split_at(span.bytes as usize);
            rest = later;
            self.ram.write(span, now)
        })?;
        self.cover(run);
        self.data_pages.fetch_add(run.pages, Ordering::Relaxed);
        Ok(())
    }

    /// Makes the pages of `run` zero; costs nothing where nothing was written before.
    pub fn place_zero(&self, run: PageRun) -> io::Result<()> {
        if let Some(pager) = self.pager.get() {
            return pager.place_zero(run);
        }
        if self.written.intersects(run) {
            for stale in self.written.take_run(run).runs() {
                self.for_spans(stale, |span| self.ram.zero(span))?;
            }
        }
        self.cover(run);
        self.zero_pages.fetch_add(run.pages, Ordering::Relaxed);
        Ok(())
    }

    /// Data pages and zero pages placed so far, repetitions included.
    pub fn counts(&self) -> (u64, u64) {
        (self.data_pages.load(Ordering::Relaxed), self.zero_pages.load(Ordering::Relaxed))
    }

    /// How many pages of RAM have never been told.
    pub fn missing(&self) -> u64 {
        self.ram.map().total_pages() - self.covered_pages.load(Ordering::Acquire)
    }

    fn cover(&self, run: PageRun) {
        self.covered_pages.fetch_add(self.covered.insert_run(run), Ordering::AcqRel);
    }

    /// Calls `f` for the parts of `run` region by region.
    fn for_spans(
        &self,
        run: PageRun,
        mut f: impl FnMut(super::ram::Span) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut rest = run;
        while rest.pages > 0 {
            let span = self.ram.span(rest).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
            f(span)?;
            let pages = span.bytes / crate::memory::PAGE_BYTES;
            rest.first.0 += pages;
            rest.pages -= pages;
        }
        Ok(())
    }
}

/// Where what was written may have given `run` memory: a host that makes huge pages on its own account makes one
/// around each page that is written, and all others in it are there then, and zero.
fn reach(run: PageRun) -> PageRun {
    let most = Granule::HUGE.pages() - 1;
    let first = run.first.0.saturating_sub(most);
    PageRun { first: PageIndex(first), pages: run.first.0 - first + run.pages + most }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::RamLayout;
    use crate::memory::{GuestPhysAddr, PAGE_BYTES, RamMap, RamPages, RamRegion};
    use crate::sys::tmpfs;

    // As on a host whose shmem_enabled is `always`.
    #[test]
    fn nothing_is_left_of_a_huge_page_that_the_host_made_of_one_page() {
        let bytes = 8 << 20;
        let Ok(file) = tmpfs::create_with("always", "test", bytes) else {
            eprintln!("skipped: this needs root, to mount a tmpfs");
            return;
        };
        let map = RamMap::new(vec![RamRegion { start: GuestPhysAddr(0), bytes }]).unwrap();
        let layout = RamLayout { map, vmm_addresses: Vec::new(), pages: RamPages::Transparent };
        let ram = Arc::new(Ram::writable(&layout, vec![file.into()], true).unwrap());
        let placer = Placer::new(ram.clone());
        let run = |first, pages| PageRun { first: PageIndex(first), pages };
        placer.place(run(515, 1), &[7; PAGE_BYTES as usize]).unwrap();
        let has = |wanted: PageRun| {
            let found = ram.resident(wanted.first, wanted.pages, &mut Default::default()).unwrap();
            found.iter().map(|r| r.pages).sum::<u64>()
        };
        assert_eq!(has(run(512, 512)), 512, "no huge page was made");
        let mut owed = PageSet::new(ram.map().total_pages());
        owed.insert_run(run(0, 514));
        owed.insert_run(run(600, 3));
        owed.insert_run(run(1023, 2));
        placer.discard(&owed).unwrap();
        assert_eq!([run(0, 514), run(600, 3), run(1023, 2)].map(has), [0, 0, 0]);
        assert!(has(run(514, 86)) == 86);
    }
}
