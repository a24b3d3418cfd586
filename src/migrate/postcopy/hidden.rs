//! The pager's part for huge pages out of the pool: they fill up where the guest does not see them.
//!
//! Pages of 4 KiB come one by one, are written through a mapping of the receiver's, and are marked. When
//! the last one of a huge page is marked, `vmrun` is shown the whole (UFFDIO_CONTINUE). Nothing that was
//! sent before the switchover has to be thrown away or sent again, and a receiver that dies at any point
//! leaves marks that are true: what is marked is written, what is shown is marked.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::memory::{PAGE_BYTES, PageIndex, PageRun};

use super::pager::Pager;

/// Huge pages with the same remainder share a lock.
const LOCKS: usize = 16;

/// Held over "is it missing? then write it, mark it, show it": a channel that is late must not write to
/// a page that the guest has been shown meanwhile.
#[derive(Debug, Default)]
pub struct Hidden([Mutex<()>; LOCKS]);

impl Hidden {
    fn hold(&self, whole: PageRun) -> MutexGuard<'_, ()> {
        let lock = &self.0[(whole.first.0 / whole.pages) as usize % LOCKS];
        lock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pager {
    /// Writes the pages of `run` that are missing: what `data` (of the whole run) has for them, or zeros.
    pub(super) fn fill(&self, run: PageRun, data: Option<&[u8]>) -> io::Result<()> {
        for part in self.granule.parts(run) {
            let held = self.hidden.hold(self.granule.around(part.first));
            let lacking = self.wanted().lacking(part);
            let (mut is_whole, mut is_last) = (false, false);
            for some in lacking {
                let span = self.ram.span(some).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
                match data {
                    Some(data) => {
                        let from = ((some.first.0 - run.first.0) * PAGE_BYTES) as usize;
                        self.ram.write(span, &data[from..from + span.bytes as usize])?;
                    }
                    None => self.ram.zero(span)?,
                }
                let count = if data.is_some() { &self.data_pages } else { &self.zero_pages };
                let marked = self.mark(some, count);
                is_whole |= marked.is_whole;
                is_last |= marked.is_last;
            }
            if is_whole {
                self.show(part.first)?;
            }
            drop(held);
            // Only now: who hears it unregisters the memory.
            if is_last {
                self.tell_if_complete();
            }
        }
        Ok(())
    }

    /// Shows `vmrun` the huge page of `page`, all of which is present, and wakes whoever waits for it.
    pub(super) fn show(&self, page: PageIndex) -> io::Result<()> {
        let whole = self.granule.around(page);
        match self.show_whole(whole) {
            // Then it may be registered no more; whoever waited was woken by that.
            Err(_) if self.missing_pages() == 0 => Ok(()),
            result => result,
        }
    }

    fn show_whole(&self, whole: PageRun) -> io::Result<()> {
        let (address, bytes) = (self.address(whole.first)?.0, self.granule.bytes());
        if !self.faults.show(address, bytes)? {
            // A hole of the source's: zero.
            if let Some(span) = self.ram.span(whole) {
                self.ram.touch(span);
            }
            if !self.faults.show(address, bytes)? {
                return Err(io::Error::other("a huge page that was just touched is a hole"));
            }
        }
        // Who came while it was shown by somebody else.
        self.faults.wake(address, bytes)
    }

    /// Shows all that is present from the start, holes excepted, so that nobody has to wait for it.
    pub(super) fn show_present(&self) {
        for whole in self.granule.parts(self.all()) {
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            if !self.wanted().is_whole(whole) {
                continue;
            }
            let shown =
                self.address(whole.first).and_then(|(at, _)| self.faults.show(at, self.granule.bytes()));
            if let Err(error) = shown {
                // Each will be shown when it is touched.
                tracing::debug!("present huge pages are not shown ahead: {error}");
                return;
            }
        }
    }

    fn all(&self) -> PageRun {
        PageRun { first: PageIndex(0), pages: self.ram.map().total_pages() }
    }
}
