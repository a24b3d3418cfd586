//! The source's page server: requests first, the rest in the background.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::memory::{AtomicPageSet, PageIndex, PageRun, PageSet};
use crate::transport::{RateLimiter, Sender};
use crate::wire::RunTable;

use crate::migrate::bulk::{Counters, Views, WorkError, send_chunk};
use crate::migrate::queue::Chunk;

/// Pages of one background frame: small, for an urgent page waits for at most one of them.
const PUSH_PAGES: u64 = 32;
/// Pages that go along with one that was asked for, if they are still owed.
const AROUND_PAGES: u64 = 8;

/// What is still owed to the destination.
#[derive(Debug)]
pub struct PageServer {
    owed: AtomicPageSet,
    left: AtomicU64,
    initially: u64,
    /// Requests that are being answered: the background yields to them.
    urgent: Mutex<usize>,
    /// No request is being answered any more.
    calm: Condvar,
    /// Where the background goes on: just behind the last page that was asked for.
    cursor: AtomicU64,
    total: u64,
}

impl PageServer {
    /// Owes `pages`.
    pub fn new(pages: &PageSet) -> Self {
        let owed = AtomicPageSet::new(pages.capacity());
        pages.runs().for_each(|run| {
            owed.insert_run(run);
        });
        Self {
            owed,
            left: AtomicU64::new(pages.count()),
            initially: pages.count(),
            urgent: Mutex::new(0),
            calm: Condvar::new(),
            cursor: AtomicU64::new(0),
            total: pages.capacity(),
        }
    }

    /// Pages that were owed at first.
    pub fn initially_owed(&self) -> u64 {
        self.initially
    }

    /// Pages that have not been sent.
    pub fn left(&self) -> u64 {
        self.left.load(Ordering::Acquire)
    }

    /// Answers a request on the urgent channel: the page, and a few behind it. What is not owed is
    /// on its way already, or is no page of the guest's.
    pub fn answer(
        &self,
        pages: &[u64],
        urgent: &Sender,
        views: &Views,
        counters: &Counters,
    ) -> Result<(), WorkError> {
        *self.urgent() += 1;
        let mut table = RunTable::new();
        let mut result = Ok(());
        for page in pages {
            let first = PageIndex(*page);
            let taken = self.take(PageRun { first, pages: 1 });
            if taken.is_empty() {
                continue;
            }
            let mut chunk = Chunk { pages: taken, zero: vec![] };
            chunk.pages.extend(
                self.take(PageRun { first: PageIndex(page.saturating_add(1)), pages: AROUND_PAGES - 1 }),
            );
            self.cursor.store(page.saturating_add(AROUND_PAGES), Ordering::Relaxed);
            result = send_chunk(&chunk, &mut table, urgent, views, counters, None);
            if result.is_err() {
                break;
            }
        }
        let mut urgent = self.urgent();
        *urgent -= 1;
        if *urgent == 0 {
            self.calm.notify_all();
        }
        result
    }

    /// Sends what is owed on `sender`, until nothing is left.
    pub fn push(
        &self,
        sender: &Sender,
        views: &Views,
        counters: &Counters,
        limit: &RateLimiter,
    ) -> Result<(), WorkError> {
        let mut table = RunTable::new();
        while self.left() > 0 {
            // Each frame is paid for before the next is taken, not while it is held: whoever asks
            // for a page that is taken already waits until it is out.
            limit.take(table.encoded_bytes() as u64 + table.data_bytes(), sender.cancel_token())?;
            drop(self.calm.wait_while(self.urgent(), |urgent| *urgent > 0));
            let Some(chunk) = self.next_chunk() else { break };
            send_chunk(&chunk, &mut table, sender, views, counters, None)?;
        }
        Ok(())
    }

    fn urgent(&self) -> MutexGuard<'_, usize> {
        self.urgent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next pages that are owed, from the cursor on and around the end.
    fn next_chunk(&self) -> Option<Chunk> {
        while self.left() > 0 {
            let at = self.cursor.load(Ordering::Relaxed);
            let Some(first) = self.owed.next_from(PageIndex(at)) else {
                if at == 0 {
                    return None;
                }
                // To the beginning, unless a request has moved it meanwhile.
                let _ = self.cursor.compare_exchange(at, 0, Ordering::Relaxed, Ordering::Relaxed);
                continue;
            };
            let pages = PUSH_PAGES.min(self.total - first.0);
            let _ = self.cursor.compare_exchange(at, first.0 + pages, Ordering::Relaxed, Ordering::Relaxed);
            let taken = self.take(PageRun { first, pages });
            if !taken.is_empty() {
                return Some(Chunk { pages: taken, zero: vec![] });
            }
        }
        None
    }

    /// Takes those pages of `run` that are owed: they are the caller's to send.
    fn take(&self, run: PageRun) -> Vec<PageRun> {
        let taken = self.owed.take_runs(run);
        let pages: u64 = taken.iter().map(|r| r.pages).sum();
        self.left.fetch_sub(pages, Ordering::AcqRel);
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(runs: &[(u64, u64)]) -> PageSet {
        let mut set = PageSet::new(1024);
        runs.iter()
            .for_each(|(first, pages)| set.insert_run(PageRun { first: PageIndex(*first), pages: *pages }));
        set
    }

    fn pages(chunk: &Chunk) -> Vec<u64> {
        chunk.pages.iter().flat_map(|r| r.first.0..r.first.0 + r.pages).collect()
    }

    #[test]
    fn every_page_goes_out_once_and_what_follows_a_request_first() {
        let server = PageServer::new(&set(&[(0, 100), (500, 100)]));
        server.cursor.store(540, Ordering::Relaxed);
        let first = server.next_chunk().unwrap();
        assert_eq!(pages(&first)[0], 540);
        let mut all = pages(&first);
        while let Some(chunk) = server.next_chunk() {
            assert!(pages(&chunk).len() as u64 <= PUSH_PAGES);
            all.extend(pages(&chunk));
        }
        all.sort_unstable();
        assert_eq!(all, (0..100).chain(500..600).collect::<Vec<_>>());
        assert_eq!(server.left(), 0);
    }

    #[test]
    fn a_request_beyond_the_ram_takes_nothing() {
        let server = PageServer::new(&set(&[(0, 4)]));
        assert!(server.take(PageRun { first: PageIndex(u64::MAX), pages: 1 }).is_empty());
        assert!(server.take(PageRun { first: PageIndex(5000), pages: 1 }).is_empty());
        assert_eq!(server.left(), 4);
    }
}
