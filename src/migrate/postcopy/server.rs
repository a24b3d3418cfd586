//! The source's page server: requests first, the rest in the background.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::memory::{Granule, PageIndex, PageRun};
use crate::transport::{RateLimiter, Sender};
use crate::wire::RunTable;

use crate::migrate::bulk::{Counters, Views, WorkError, send_chunk};
use crate::migrate::queue::Chunk;

use super::owed::{Answer, Owed};

/// Pages of one frame of an answer, where many are asked for at once: whoever waits for a huge page waits
/// for all of them.
const ANSWER_PAGES: u64 = 64;

/// Sends what is owed to the destination. Each page is taken out of what is owed before it is sent.
#[derive(Debug)]
pub struct PageServer {
    owed: Mutex<Owed>,
    /// Requests that are being answered: the background yields to them.
    urgent: Mutex<usize>,
    /// No request is being answered any more.
    calm: Condvar,
    /// Pages that went a second time: what both sides compare has each page once.
    again: Counters,
}

impl PageServer {
    /// Owes `owed`.
    pub fn new(owed: Owed) -> Self {
        Self {
            owed: Mutex::new(owed),
            urgent: Mutex::new(0),
            calm: Condvar::new(),
            again: Counters::default(),
        }
    }

    /// Pages that have not been sent.
    pub fn left(&self) -> u64 {
        self.owed().left()
    }

    /// Pages that were never sent, on no connection.
    pub fn unsent(&self) -> u64 {
        self.owed().unsent()
    }

    /// What has not been sent, as it is now.
    pub fn owed_now(&self) -> Owed {
        self.owed().clone()
    }

    /// Answers a request on the urgent channel: each page, and some around it; what is asked of one huge
    /// page in few frames. What the background has sent already goes again, past all that waits in its
    /// channels.
    pub fn answer(
        &self,
        pages: &[u64],
        urgent: &Sender,
        views: &Views,
        counters: &Counters,
    ) -> Result<(), WorkError> {
        *self.urgent() += 1;
        let mut table = RunTable::new();
        let result = frames(
            pages,
            |page| self.owed().answer(page),
            |pages, again| {
                let counters = if again { &self.again } else { counters };
                send_chunk(&Chunk { pages, zero: vec![] }, &mut table, urgent, views, counters, None)
            },
        );
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
        loop {
            // Each frame is paid for before the next is taken, not while it is held: whoever asks
            // for a page that is taken already waits until it is out.
            limit.take(table.encoded_bytes() as u64 + table.data_bytes(), sender.cancel_token())?;
            drop(self.calm.wait_while(self.urgent(), |urgent| *urgent > 0));
            let chunk = Chunk { pages: self.owed().push(), zero: vec![] };
            if chunk.pages.is_empty() {
                return Ok(());
            }
            send_chunk(&chunk, &mut table, sender, views, counters, None)?;
        }
    }

    fn owed(&self) -> MutexGuard<'_, Owed> {
        self.owed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn urgent(&self) -> MutexGuard<'_, usize> {
        self.urgent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Collects the answers (`answer`) to `pages` into frames, which go out through `send` with whether they go again:
/// what is waited for first, and what goes along when all of that is out.
fn frames<E>(
    pages: &[u64],
    mut answer: impl FnMut(u64) -> Answer,
    mut send: impl FnMut(Vec<PageRun>, bool) -> Result<(), E>,
) -> Result<(), E> {
    let (mut bundle, mut rests) = (Bundle::default(), Vec::new());
    for page in pages {
        let Answer { again, soon, rest } = answer(*page);
        bundle.add(*page, soon, again, &mut send)?;
        rests.push((*page, rest, again));
    }
    bundle.send(&mut send)?;
    for (page, rest, again) in rests {
        bundle.add(page, rest, again, &mut send)?;
    }
    bundle.send(&mut send)
}

/// A frame that is being filled: one for each page that is asked for, but for pages of the same huge page as few as
/// [`ANSWER_PAGES`] allows.
#[derive(Default)]
struct Bundle {
    runs: Vec<PageRun>,
    held: u64,
    /// The first page of the huge page that they are asked for in, and whether they go again.
    about: (u64, bool),
}

impl Bundle {
    /// Adds what goes to who asked for `page`; sends what cannot go along with that.
    fn add<E>(
        &mut self,
        page: u64,
        runs: Vec<PageRun>,
        again: bool,
        send: &mut impl FnMut(Vec<PageRun>, bool) -> Result<(), E>,
    ) -> Result<(), E> {
        if runs.is_empty() {
            return Ok(());
        }
        let about = (Granule::HUGE.around(PageIndex(page)).first.0, again);
        if self.held >= ANSWER_PAGES || about != self.about {
            self.send(send)?;
        }
        self.about = about;
        self.held += runs.iter().map(|run| run.pages).sum::<u64>();
        self.runs.extend(runs);
        Ok(())
    }

    fn send<E>(&mut self, send: &mut impl FnMut(Vec<PageRun>, bool) -> Result<(), E>) -> Result<(), E> {
        self.held = 0;
        match std::mem::take(&mut self.runs) {
            nothing if nothing.is_empty() => Ok(()),
            runs => send(runs, self.about.1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::PageSet;

    fn sent(asked: &[u64]) -> Vec<u64> {
        let mut owed = Owed::new(PageSet::full(2048), PageSet::new(2048));
        let mut frames_of = Vec::new();
        let send = |runs: Vec<PageRun>, again: bool| {
            assert!(!again, "nothing was pushed");
            frames_of.push(runs.iter().map(|run| run.pages).sum());
            Ok::<(), ()>(())
        };
        frames(asked, |page| owed.answer(page), send).unwrap();
        frames_of
    }

    #[test]
    fn few_frames_for_a_huge_page_and_one_for_each_that_stands_alone() {
        let whole: Vec<u64> = (512..1024).collect();
        assert_eq!(sent(&whole), [64, 8, 76, 84, 84, 84, 84, 28]);
        // What is owed no more has no frame; what goes along with a page may be of the next huge page.
        assert_eq!(sent(&[3, 700, 1500, 1500]), [4; 6]);
        assert_eq!(sent(&[1020, 1023, 1024, 1100]), [4, 4 + 4, 4, 4 + 12]);
        assert_eq!(sent(&[]), [0; 0]);
    }

    #[test]
    fn what_is_waited_for_is_out_before_anything_that_goes_along() {
        let mut owed = Owed::new(PageSet::full(2048), PageSet::new(2048));
        owed.push();
        let mut sent = Vec::new();
        let send = |runs: Vec<PageRun>, again: bool| {
            sent.push((runs[0].first.0, runs[0].pages, again));
            Ok::<(), ()>(())
        };
        frames(&[5, 1601], |page| owed.answer(page), send).unwrap();
        assert_eq!(sent, [(5, 3, true), (1600, 4, false), (1604, 4, false)]);
    }
}
