//! Guest RAM as a mover holds it: the map and one memfd per region.
//!
//! Small pages are read and written through the files. Huge ones take a mapping for writing: write(2)
//! does not write hugetlb files, and makes no transparent huge pages.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek64};

use crate::control::RamLayout;
use crate::memory::{HUGE_PAGE_BYTES, PAGE_BYTES, PageIndex, PageRun, RamMap, RamPages, RamRegion};
use crate::sys::holes::HoleProbe;
use crate::sys::window::RamWindow;

/// RAM of a guest that a `vmrun` hosts.
#[derive(Debug)]
pub struct Ram {
    map: RamMap,
    pages: RamPages,
    files: Vec<File>,
    /// To be written through, where that is not done through the files.
    windows: Vec<RamWindow>,
    /// What knows the holes of a region, where its file does not tell. Without one they are read as
    /// zeros like any page.
    probes: Vec<Option<HoleProbe>>,
}

/// Remembers, while RAM is looked through in ascending order, how far the data just seen goes on.
/// The kernel finds the end of data page by page: asked anew for each part of a large extent, it
/// would walk all the rest of it every time.
#[derive(Clone, Debug, Default)]
pub struct DataCursor {
    /// Region, and the byte range in it that is data.
    known: Option<(usize, i64, i64)>,
}

/// A run of pages within one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The region.
    pub region: usize,
    /// Byte offset in the region's memfd.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

impl Ram {
    /// Puts `memfds` to the regions of `layout`, to be read; an error when they do not fit one another.
    pub fn new(layout: &RamLayout, memfds: Vec<OwnedFd>) -> io::Result<Self> {
        let (map, pages) = (layout.map.clone(), layout.pages);
        let files: Vec<File> = memfds.into_iter().map(File::from).collect();
        let wrong = |what: String| Err(io::Error::new(io::ErrorKind::InvalidData, what));
        if files.len() != map.regions().len() {
            return wrong(format!("{} memfds for {} RAM regions", files.len(), map.regions().len()));
        }
        if !pages.granule().fits(&map) {
            return wrong(format!("the RAM map does not fit pages of {pages}"));
        }
        for (file, region) in files.iter().zip(map.regions()) {
            let have = file.metadata()?.len();
            if have < region.bytes {
                return wrong(format!(
                    "the memfd of RAM region {} has {have} of {} bytes",
                    region.start, region.bytes
                ));
            }
        }
        let probe = |(file, region): (&File, &RamRegion)| match pages {
            RamPages::Huge => HoleProbe::new(file, region.bytes).ok(),
            RamPages::Small | RamPages::Transparent => None,
        };
        let probes = files.iter().zip(map.regions()).map(probe).collect();
        Ok(Self { map, pages, files, windows: Vec::new(), probes })
    }

    /// The same, to be written as well. `postcopy`: its pages may have to be there or missing one by one, which
    /// transparent huge pages do not allow.
    pub fn writable(layout: &RamLayout, memfds: Vec<OwnedFd>, postcopy: bool) -> io::Result<Self> {
        let mut ram = Self::new(layout, memfds)?;
        let mapped = match ram.pages {
            RamPages::Small => false,
            RamPages::Transparent => !postcopy,
            RamPages::Huge => true,
        };
        if mapped {
            let regions = ram.files.iter().zip(ram.map.regions());
            ram.windows =
                regions.map(|(file, r)| RamWindow::new(file, r.bytes)).collect::<io::Result<_>>()?;
        }
        if mapped && ram.pages == RamPages::Transparent {
            // A host that gives none gives small pages: as good, but slower.
            ram.windows.iter().try_for_each(RamWindow::advise_huge).unwrap_or_else(|error| {
                tracing::warn!("no transparent huge pages for the guest's RAM: {error}");
            });
        }
        Ok(ram)
    }

    /// What the host makes it of.
    pub fn pages(&self) -> RamPages {
        self.pages
    }

    /// The map.
    pub fn map(&self) -> &RamMap {
        &self.map
    }

    /// The memfds, in the order of the regions.
    pub fn files(&self) -> &[File] {
        &self.files
    }

    /// The part of `run` that lies in the region of its first page; `None` past the end.
    pub fn span(&self, run: PageRun) -> Option<Span> {
        let (region, offset) = self.map.locate(run.first)?;
        let left = self.map.regions()[region].bytes - offset;
        Some(Span { region, offset, bytes: run.pages.saturating_mul(PAGE_BYTES).min(left) })
    }

    /// Those of the `pages` pages from `first` on that have memory behind them; all others are
    /// holes, which read as zero. A page that gets memory later is written later, and then is in
    /// the dirty log. One `cursor` is for ascending calls while no memory is given back: data stays
    /// data, so what it remembers stays right.
    pub fn resident(
        &self,
        first: PageIndex,
        pages: u64,
        cursor: &mut DataCursor,
    ) -> io::Result<Vec<PageRun>> {
        let mut runs = Vec::new();
        let mut rest = PageRun { first, pages };
        while rest.pages > 0
            && let Some(span) = self.span(rest)
        {
            let before = rest.first.0 - span.offset / PAGE_BYTES;
            for (from, to) in self.data_extents(span, cursor)? {
                let pages = to.div_ceil(PAGE_BYTES) - from / PAGE_BYTES;
                runs.push(PageRun { first: PageIndex(before + from / PAGE_BYTES), pages });
            }
            let done = span.bytes / PAGE_BYTES;
            rest = PageRun { first: PageIndex(rest.first.0 + done), pages: rest.pages - done };
        }
        Ok(runs)
    }

    /// The byte ranges of `span` that are no holes.
    fn data_extents(&self, span: Span, cursor: &mut DataCursor) -> io::Result<Vec<(u64, u64)>> {
        if let Some(probe) = &self.probes[span.region] {
            return probed_extents(probe, span);
        }
        let file = &self.files[span.region];
        let mut extents = Vec::new();
        let mut at = span.offset as i64;
        let end = (span.offset + span.bytes) as i64;
        while at < end {
            let (data, hole) = match cursor.known {
                Some((region, from, to)) if region == span.region && (from..to).contains(&at) => (at, to),
                _ => {
                    let Some(data) = next_data(file, at, end)? else { break };
                    (data, lseek64(file, data, Whence::SeekHole)?)
                }
            };
            cursor.known = Some((span.region, data, hole));
            at = hole.min(end);
            // Nothing, where the kernel began to join pages between the two questions: asked again.
            if data < at {
                extents.push((data as u64, at as u64));
            }
        }
        Ok(extents)
    }

    /// Writes `data` to `span`. Small pages through the file, not a mapping: a fresh page is then
    /// neither faulted in nor zeroed first, which is three times as fast.
    pub fn write(&self, span: Span, data: &[u8]) -> io::Result<()> {
        match self.windows.get(span.region) {
            Some(window) => window.write(span.offset, &data[..span.bytes as usize]),
            None => self.files[span.region].write_all_at(data, span.offset)?,
        }
        Ok(())
    }

    /// Makes `span` read as zero, and gives its memory back where that is wise: a page that went back
    /// to the pool of huge pages is not set aside for this guest any more, and giving back a part of
    /// a transparent one takes it apart.
    pub fn zero(&self, span: Span) -> io::Result<()> {
        let Some(window) = self.windows.get(span.region) else { return self.punch(span) };
        let end = span.offset + span.bytes;
        let (from, to) = match self.pages {
            RamPages::Transparent => inner(span.offset, end),
            RamPages::Small | RamPages::Huge => (end, end),
        };
        window.zero(span.offset, from - span.offset);
        if from < to {
            self.punch(Span { offset: from, bytes: to - from, ..span })?;
        }
        window.zero(to, end - to);
        Ok(())
    }

    /// Gives the huge page at the start of `span` memory where it is a hole; its content stays.
    pub fn touch(&self, span: Span) {
        if let Some(window) = self.windows.get(span.region) {
            window.touch(span.offset);
        }
    }

    /// Gives the memory of `span` back, for good: an error where the kernel has only zeroed it, which
    /// it does to a part of a transparent huge page that it cannot take apart.
    pub fn discard(&self, span: Span) -> io::Result<()> {
        self.punch(span)?;
        if self.data_extents(span, &mut DataCursor::default())?.is_empty() {
            return Ok(());
        }
        Err(io::Error::other("the kernel keeps memory that was given back"))
    }

    fn punch(&self, span: Span) -> io::Result<()> {
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        Ok(fallocate(&self.files[span.region], mode, span.offset as i64, span.bytes as i64)?)
    }

    /// BLAKE3 over every page that is not zero, with its number: the same on both sides when all
    /// pages are, whatever is a hole. The guest must stand still. Uses all CPUs.
    pub fn digest(&self) -> io::Result<String> {
        const SPAN_PAGES: u64 = 16 << 10;
        let spans = self.map.total_pages().div_ceil(SPAN_PAGES) as usize;
        let next = AtomicUsize::new(0);
        let hash_some = || -> io::Result<Vec<(usize, blake3::Hash)>> {
            let mut done = Vec::new();
            let mut cursor = DataCursor::default();
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= spans {
                    return Ok(done);
                }
                let first = i as u64 * SPAN_PAGES;
                done.push((i, self.hash_span(first, SPAN_PAGES, &mut cursor)?));
            }
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(spans);
        let mut hashes = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(hash_some)).collect();
            let mut all = Vec::new();
            for worker in workers {
                let part = worker.join().map_err(|_| io::Error::other("a hashing thread panicked"))?;
                all.extend(part?);
            }
            io::Result::Ok(all)
        })?;
        hashes.sort_by_key(|(i, _)| *i);
        let mut whole = blake3::Hasher::new();
        for (_, hash) in hashes {
            whole.update(hash.as_bytes());
        }
        Ok(whole.finalize().to_hex().to_string())
    }

    fn hash_span(&self, first: u64, pages: u64, cursor: &mut DataCursor) -> io::Result<blake3::Hash> {
        let mut hasher = blake3::Hasher::new();
        let mut page = [0u8; PAGE_BYTES as usize];
        for run in self.resident(PageIndex(first), pages, cursor)? {
            for index in run.first.0..run.first.0 + run.pages {
                let Some((region, offset)) = self.map.locate(PageIndex(index)) else { break };
                self.files[region].read_exact_at(&mut page, offset)?;
                if page.iter().any(|b| *b != 0) {
                    hasher.update(&index.to_le_bytes());
                    hasher.update(&page);
                }
            }
        }
        Ok(hasher.finalize())
    }
}

/// Where in `at..end` of `file` the first data is; a hole is looked at twice.
///
/// Before Linux 6.4 all of a huge page that the kernel makes of small ones (khugepaged, MADV_COLLAPSE) is a hole for
/// SEEK_DATA for as long as that takes. A read of its first byte, which is replaced first, waits until it is done; a huge
/// page is not made into one again. What was data at the first look stays data: it may be a hole for the second, where
/// the kernel began in between.
fn next_data(file: &File, at: i64, end: i64) -> io::Result<Option<i64>> {
    let seek = || match lseek64(file, at, Whence::SeekData) {
        Err(Errno::ENXIO) => Ok(end),
        found => found.map(|data| data.min(end)),
    };
    let mut data = seek()?;
    if data > at {
        let first = at as u64 - at as u64 % HUGE_PAGE_BYTES;
        for offset in (first..data as u64).step_by(HUGE_PAGE_BYTES as usize) {
            file.read_at(&mut [0], offset)?;
        }
        data = data.min(seek()?);
    }
    Ok((data < end).then_some(data))
}

/// The huge pages in `from..to`, as a range; empty, at `to`, where there is none.
fn inner(from: u64, to: u64) -> (u64, u64) {
    let first = from.next_multiple_of(HUGE_PAGE_BYTES);
    let last = to - to % HUGE_PAGE_BYTES;
    if first < last { (first, last) } else { (to, to) }
}

/// The parts of `span` in huge pages that have memory.
fn probed_extents(probe: &HoleProbe, span: Span) -> io::Result<Vec<(u64, u64)>> {
    let mut extents: Vec<(u64, u64)> = Vec::new();
    let mut at = span.offset;
    let end = span.offset + span.bytes;
    while at < end {
        let page = at - at % HUGE_PAGE_BYTES;
        let upto = end.min(page + HUGE_PAGE_BYTES);
        if probe.has_memory(page, HUGE_PAGE_BYTES)? {
            match extents.last_mut() {
                Some(last) if last.1 == at => last.1 = upto,
                _ => extents.push((at, upto)),
            }
        }
        at = upto;
    }
    Ok(extents)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestPhysAddr;

    fn ram() -> Ram {
        ram_of(RamPages::Small)
    }

    fn ram_of(pages: RamPages) -> Ram {
        let map = RamMap::new(vec![
            RamRegion { start: GuestPhysAddr(0), bytes: 1 << 20 },
            RamRegion { start: GuestPhysAddr(4 << 30), bytes: 1 << 20 },
        ])
        .unwrap();
        let fds = (0..2)
            .map(|_| {
                let fd = nix::sys::memfd::memfd_create(c"test-ram", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
                    .unwrap();
                nix::unistd::ftruncate(&fd, 1 << 20).unwrap();
                fd
            })
            .collect();
        Ram::writable(&RamLayout { map, vmm_addresses: vec![], pages }, fds, false).unwrap()
    }

    fn run(first: u64, pages: u64) -> PageRun {
        PageRun { first: PageIndex(first), pages }
    }

    #[test]
    fn spans_stop_at_the_end_of_a_region() {
        let ram = ram();
        assert_eq!(ram.span(run(255, 2)), Some(Span { region: 0, offset: 255 << 12, bytes: 4096 }));
        assert_eq!(ram.span(run(256, 2)), Some(Span { region: 1, offset: 0, bytes: 8192 }));
        assert_eq!(ram.span(run(512, 1)), None);
    }

    #[test]
    fn holes_zero_pages_and_data_are_told_apart() {
        let (a, b) = (ram(), ram());
        let mut cursor = DataCursor::default();
        assert!(a.resident(PageIndex(0), 512, &mut cursor).unwrap().is_empty());
        a.write(a.span(run(300, 1)).unwrap(), &[7; 4096]).unwrap();
        a.write(a.span(run(3, 2)).unwrap(), &[0; 8192]).unwrap();
        assert_eq!(a.resident(PageIndex(0), 512, &mut cursor).unwrap(), vec![run(3, 2), run(300, 1)]);
        let part = a.resident(PageIndex(4), 297, &mut cursor).unwrap();
        assert_eq!(part, vec![run(4, 1), run(300, 1)]);
        // Page by page with one cursor gives the same, over the border of the regions too.
        let mut cursor = DataCursor::default();
        let single = |page| a.resident(PageIndex(page), 1, &mut cursor).unwrap();
        let found: Vec<PageRun> = (0..512).flat_map(single).collect();
        assert_eq!(found, vec![run(3, 1), run(4, 1), run(300, 1)]);
        assert_ne!(a.digest().unwrap(), b.digest().unwrap());
        b.write(b.span(run(300, 1)).unwrap(), &[7; 4096]).unwrap();
        assert_eq!(a.digest().unwrap(), b.digest().unwrap());
        b.write(b.span(run(10, 1)).unwrap(), &[1; 4096]).unwrap();
        b.zero(b.span(run(10, 1)).unwrap()).unwrap();
        assert_eq!(a.digest().unwrap(), b.digest().unwrap());
        // The same bytes on another page are another memory.
        b.write(b.span(run(301, 1)).unwrap(), &[7; 4096]).unwrap();
        b.zero(b.span(run(300, 1)).unwrap()).unwrap();
        assert_ne!(a.digest().unwrap(), b.digest().unwrap());
    }

    #[test]
    fn memory_is_no_hole_while_the_kernel_makes_a_huge_page_of_it() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: this needs root, to mount a tmpfs");
            return;
        }
        let file = crate::sys::tmpfs::create("test", 2 * HUGE_PAGE_BYTES).unwrap();
        let window = RamWindow::new(&file, 2 * HUGE_PAGE_BYTES).unwrap();
        let huge = HUGE_PAGE_BYTES as i64;
        for round in 0..200 {
            let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(&file, mode, 0, huge).unwrap();
            let first = if round % 2 == 0 { 0 } else { 10 << 12 };
            for offset in (first..huge as u64).step_by(4096) {
                file.write_all_at(&[7; 4096], offset).unwrap();
            }
            let joining = std::sync::atomic::AtomicBool::new(true);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    // A kernel before 6.1 does not know how, and one whose memory is in pieces cannot.
                    let _ = window.join_now(0, HUGE_PAGE_BYTES as usize);
                    joining.store(false, Ordering::Release);
                });
                while joining.load(Ordering::Acquire) {
                    let data = next_data(&file, 0, huge).unwrap();
                    assert!(data.is_some_and(|at| at <= first as i64), "round {round}: data at {data:?}");
                }
            });
        }
    }

    #[test]
    fn whole_huge_pages_are_given_back_and_the_rest_is_zeroed() {
        const M: u64 = 1 << 20;
        assert_eq!(inner(0, 4 * M), (0, 4 * M));
        assert_eq!(inner(M, 5 * M), (2 * M, 4 * M));
        assert_eq!(inner(M, 3 * M), (3 * M, 3 * M));
        assert_eq!(inner(2 * M, 3 * M), (3 * M, 3 * M));
        // Through a mapping all is as through the file.
        let (a, b) = (ram(), ram_of(RamPages::Transparent));
        for ram in [&a, &b] {
            ram.write(ram.span(run(300, 3)).unwrap(), &[7; 3 * 4096]).unwrap();
            ram.zero(ram.span(run(301, 1)).unwrap()).unwrap();
        }
        assert_eq!(a.digest().unwrap(), b.digest().unwrap());
        b.discard(b.span(run(300, 3)).unwrap()).unwrap();
        assert_eq!(b.digest().unwrap(), ram().digest().unwrap());
    }
}
