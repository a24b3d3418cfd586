//! The receiver's pager: faults in, requests out, pages into place.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};

use crate::control::Postcopy;
use crate::memory::{Granule, GuestPhysAddr, PAGE_BYTES, PageIndex, PageRun, PageSet, RamMap, VmmAddr};
use crate::migrate::ram::Ram;
use crate::sys::bitmap::SharedBitmap;
use crate::sys::schedule;
use crate::sys::uffd::{FaultFd, Placed};
use crate::transport::Sender;
use crate::wire::Message;
use crate::wire::limits::MAX_REQUESTED_PAGES;

use super::hidden::Hidden;
use super::latency::{Histogram, Latency};
use super::wanted::{Fault, Wanted};

/// How often the fault thread looks whether it is still wanted.
const STEP_MS: u16 = 200;

/// Serves the faults of a receiving `vmrun` until every page is present.
#[derive(Debug)]
pub struct Pager {
    pub(super) faults: FaultFd,
    pub(super) ram: Arc<Ram>,
    pub(super) granule: Granule,
    pub(super) hidden: Hidden,
    map: RamMap,
    addresses: Vec<VmmAddr>,
    /// What is here, and what was asked for and has not come.
    wanted: Mutex<Wanted<SharedBitmap, Instant>>,
    /// Where requests go while there is a connection.
    line: Mutex<Option<Sender>>,
    latency: Histogram,
    pub(super) data_pages: AtomicU64,
    pub(super) zero_pages: AtomicU64,
    pub(super) stop: AtomicBool,
    complete: OnceLock<Complete>,
}

/// What has come of marking pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Marked {
    /// A granule lacks nothing any more.
    pub is_whole: bool,
    /// The last missing page was among them.
    pub is_last: bool,
}

/// Whom to tell that every page is present.
struct Complete(Box<dyn Fn() + Send + Sync>);

impl std::fmt::Debug for Complete {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Complete")
    }
}

impl Pager {
    /// For RAM in which `missing` pages are to come, all others are present (or holes, which read as
    /// zero). Writes the present set down before anything else happens.
    pub fn new(
        postcopy: &Postcopy,
        ram: Arc<Ram>,
        uffd: OwnedFd,
        present: OwnedFd,
        missing: &PageSet,
    ) -> io::Result<Arc<Self>> {
        let map = &postcopy.ram.map;
        let present = SharedBitmap::new(present, map.total_pages())?;
        for (word, missing) in present.words().iter().zip(missing.words()) {
            word.store(!missing, Ordering::Release);
        }
        debug_assert!(map.total_pages().is_multiple_of(64), "RAM regions are multiples of 64 pages");
        Ok(Self::with(postcopy, ram, uffd, present, missing.count()))
    }

    /// For RAM whose present set an earlier receiver has kept.
    pub fn resume(
        postcopy: &Postcopy,
        ram: Arc<Ram>,
        uffd: OwnedFd,
        present: OwnedFd,
    ) -> io::Result<Arc<Self>> {
        let total = postcopy.ram.map.total_pages();
        let present = SharedBitmap::new(present, total)?;
        let there: u64 =
            present.words().iter().map(|w| u64::from(w.load(Ordering::Acquire).count_ones())).sum();
        Ok(Self::with(postcopy, ram, uffd, present, total.saturating_sub(there)))
    }

    fn with(
        postcopy: &Postcopy,
        ram: Arc<Ram>,
        uffd: OwnedFd,
        present: SharedBitmap,
        missing: u64,
    ) -> Arc<Self> {
        let granule = ram.pages().granule();
        Arc::new(Self {
            faults: FaultFd::from_fd(uffd),
            ram,
            granule,
            hidden: Hidden::default(),
            map: postcopy.ram.map.clone(),
            addresses: postcopy.ram.vmm_addresses.clone(),
            wanted: Mutex::new(Wanted::new(present, missing).seen_by(granule)),
            line: Mutex::new(None),
            latency: Histogram::default(),
            data_pages: AtomicU64::new(0),
            zero_pages: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            complete: OnceLock::new(),
        })
    }

    /// Serves faults on a thread of its own until [`Pager::stop`]; calls `complete` when the last
    /// missing page has come (at once when none is missing).
    pub fn start(self: &Arc<Self>, complete: Box<dyn Fn() + Send + Sync>) -> io::Result<()> {
        let _ = self.complete.set(Complete(complete));
        self.tell_if_complete();
        let pager = self.clone();
        let serve = move || {
            if let Err(error) = pager.serve() {
                tracing::error!("page faults cannot be served any more: {error}");
            }
        };
        std::thread::Builder::new().name("pager".to_owned()).spawn(serve)?;
        if self.granule == Granule::SMALL {
            return Ok(());
        }
        let pager = self.clone();
        std::thread::Builder::new().name("show".to_owned()).spawn(move || pager.show_present()).map(drop)
    }

    /// Ends the fault thread.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        *self.line() = None;
    }

    /// How many pages have not come.
    pub fn missing_pages(&self) -> u64 {
        self.wanted().missing()
    }

    /// How long was waited so far.
    pub fn latency(&self) -> Latency {
        self.latency.read()
    }

    /// Data pages and zero pages placed, each once however often it came.
    pub fn counts(&self) -> (u64, u64) {
        (self.data_pages.load(Ordering::Relaxed), self.zero_pages.load(Ordering::Relaxed))
    }

    /// The present set, for RECEIVED.
    pub fn present_words(&self) -> Vec<u64> {
        self.wanted().marks().words().iter().map(|w| w.load(Ordering::Acquire)).collect()
    }

    /// A connection stands: requests go to `line`, those first that wait since before.
    pub fn connect(&self, line: Sender) {
        *self.line() = Some(line);
        let mut waits: Vec<(u64, Instant)> = self.wanted().waits().collect();
        waits.sort_by_key(|(_, since)| *since);
        self.request(waits.into_iter().flat_map(|(page, _)| self.lacking_around(page)).collect());
    }

    /// The connection is gone: requests wait for the next.
    pub fn disconnect(&self) {
        *self.line() = None;
    }

    /// Lets everyone who waits fault again, so that faults which an earlier receiver had read, and
    /// took with it, are told of anew.
    pub fn wake_all(&self) -> io::Result<()> {
        for (region, address) in self.map.regions().iter().zip(&self.addresses) {
            self.faults.wake(address.0, region.bytes)?;
        }
        Ok(())
    }

    /// Puts `data` to the pages of `run`, each page whole and only where it is missing.
    pub fn place(&self, run: PageRun, data: &[u8]) -> io::Result<()> {
        if self.granule != Granule::SMALL {
            return self.fill(run, Some(data));
        }
        let lacking = self.wanted().lacking(run);
        for part in lacking {
            let mut rest = part;
            while rest.pages > 0 {
                let (address, room) = self.address(rest.first)?;
                let from = ((rest.first.0 - run.first.0) * PAGE_BYTES) as usize;
                let bytes = (rest.pages.min(room) * PAGE_BYTES) as usize;
                let pages = match self.faults.copy(address, &data[from..from + bytes])? {
                    Placed::Bytes(bytes) => (bytes / PAGE_BYTES).max(1),
                    // There already, though not marked: its receiver died between the two.
                    Placed::Exists => 1,
                };
                self.arrived(PageRun { first: rest.first, pages }, &self.data_pages);
                rest = PageRun { first: PageIndex(rest.first.0 + pages), pages: rest.pages - pages };
            }
        }
        Ok(())
    }

    /// Makes the pages of `run` zero where they are missing.
    pub fn place_zero(&self, run: PageRun) -> io::Result<()> {
        if self.granule != Granule::SMALL {
            return self.fill(run, None);
        }
        let lacking = self.wanted().lacking(run);
        for page in lacking.iter().flat_map(|part| part.first.0..part.first.0 + part.pages) {
            let first = PageIndex(page);
            self.faults.zero(self.address(first)?.0)?;
            self.arrived(PageRun { first, pages: 1 }, &self.zero_pages);
        }
        Ok(())
    }

    /// Notes pages that were placed, and ends the waits for them.
    fn arrived(&self, run: PageRun, count: &AtomicU64) {
        if self.mark(run, count).is_last {
            self.tell_if_complete();
        }
    }

    /// Marks pages that were placed, of one huge page or small ones; adds those to `count` that were
    /// missing.
    pub(super) fn mark(&self, run: PageRun, count: &AtomicU64) -> Marked {
        let mut marked = Marked::default();
        let mut wanted = self.wanted();
        for page in run.first.0..run.first.0 + run.pages {
            let arrival = wanted.arrived(page);
            count.fetch_add(u64::from(arrival.is_new), Ordering::Relaxed);
            arrival.waited_since.into_iter().for_each(|since| self.latency.add(since.elapsed()));
            marked.is_whole |= arrival.is_whole;
            marked.is_last |= arrival.is_last;
        }
        marked
    }

    pub(super) fn tell_if_complete(&self) {
        if self.missing_pages() == 0
            && let Some(complete) = self.complete.get()
        {
            complete.0();
        }
    }

    fn serve(&self) -> io::Result<()> {
        schedule::log_unchanged("the pager", schedule::be_prompt());
        while !self.stop.load(Ordering::Acquire) {
            let mut fds = [PollFd::new(self.faults.as_fd(), PollFlags::POLLIN)];
            match nix::poll::poll(&mut fds, STEP_MS) {
                Ok(0) | Err(nix::errno::Errno::EINTR) => continue,
                Ok(_) => {}
                Err(errno) => return Err(errno.into()),
            }
            if fds[0].revents().is_some_and(|r| r.intersects(PollFlags::POLLERR | PollFlags::POLLHUP)) {
                return Ok(());
            }
            let mut wanted = Vec::new();
            for address in self.faults.read_faults()? {
                if let Some(page) = self.page_at(address)
                    && self.is_wanted(page, address)?
                {
                    wanted.extend(self.lacking_around(page));
                }
            }
            self.request(wanted);
        }
        Ok(())
    }

    /// Whether a fault needs a page from the source that was not asked for yet.
    fn is_wanted(&self, page: u64, address: u64) -> io::Result<bool> {
        let fault = self.wanted().fault(page, Instant::now());
        if self.granule != Granule::SMALL {
            if fault == Fault::Present {
                self.show(PageIndex(page))?;
            }
            return Ok(fault == Fault::Ask);
        }
        // A hole is made zero here; what has come this moment is there, and its waker may have been
        // before us.
        if fault == Fault::Present && self.faults.zero(address)? == Placed::Exists {
            self.faults.wake(address, PAGE_BYTES)?;
        }
        Ok(fault == Fault::Ask)
    }

    /// The pages that are missing of the granule of `page`.
    fn lacking_around(&self, page: u64) -> Vec<u64> {
        let lacking = self.wanted().lacking(self.granule.around(PageIndex(page)));
        lacking.iter().flat_map(|run| run.first.0..run.first.0 + run.pages).collect()
    }

    /// Asks the source. Without a connection, or on one that fails, the next asks again.
    fn request(&self, pages: Vec<u64>) {
        let line = self.line().clone();
        let Some(line) = line else { return };
        for some in pages.chunks(MAX_REQUESTED_PAGES) {
            if line.send(&Message::PageRequest(some.to_vec())).is_err() {
                return;
            }
        }
    }

    /// Where `vmrun` has a page, and how many pages follow in its region, itself included.
    pub(super) fn address(&self, page: PageIndex) -> io::Result<(u64, u64)> {
        let found = self.map.locate(page).and_then(|(region, offset)| {
            let room = (self.map.regions()[region].bytes - offset) / PAGE_BYTES;
            self.addresses.get(region).map(|address| (address.0 + offset, room))
        });
        found.ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("{page} is beyond the RAM map"))
        })
    }

    fn page_at(&self, address: u64) -> Option<u64> {
        let mut regions = self.map.regions().iter().zip(&self.addresses);
        let (region, start) = regions.find(|(r, a)| address >= a.0 && address - a.0 < r.bytes)?;
        self.map.page_of(GuestPhysAddr(region.start.0 + (address - start.0))).map(|page| page.0)
    }

    pub(super) fn wanted(&self) -> MutexGuard<'_, Wanted<SharedBitmap, Instant>> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn line(&self) -> MutexGuard<'_, Option<Sender>> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many pages (huge ones where the RAM is made of them) somebody waits for now, which of them has
    /// been waited for longest, and for how long.
    pub fn waits(&self) -> (u64, Option<(PageIndex, Duration)>) {
        let wanted = self.wanted();
        let first = wanted.waits().min_by_key(|(_, since)| *since);
        let first = first.map(|(page, since)| (PageIndex(page), since.elapsed()));
        (wanted.waits().count() as u64, first)
    }
}
