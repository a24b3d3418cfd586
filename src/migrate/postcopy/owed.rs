//! What the source owes, and the order in which it goes: pure. The page server does what this says,
//! and the model of the recovery explores it.

use crate::memory::{PageIndex, PageRun, PageSet};

/// Pages of one background frame: few, since an urgent page waits for at most one of them.
const PUSH_PAGES: u64 = 32;
/// Pages that go along with one that was asked for, that one included, if they are still owed.
const AROUND_PAGES: u64 = 8;
/// Pages behind a request that the background sends before anything else: who faults there is likely
/// to go on there.
const NEAR_PAGES: u64 = 128;

/// The pages that the destination has neither been sent on this connection nor said to have.
///
/// The background goes first near the last request, then over the pages that the guest was writing to
/// when it was stopped, then over the rest.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Owed {
    pages: PageSet,
    /// Those that were written to most recently, a part of `pages`.
    hot: PageSet,
    left: u64,
    hot_left: u64,
    /// Where the background goes on: just behind the last page that was asked for.
    at: u64,
    /// How much of what is behind that comes before the hot pages.
    near: u64,
    /// Pages of a background frame.
    push_pages: u64,
}

impl Owed {
    /// Owes `pages`; of these, the ones in `hot` (of the same capacity) were written to most recently.
    pub fn new(pages: PageSet, mut hot: PageSet) -> Self {
        hot.intersect(&pages);
        let (left, hot_left) = (pages.count(), hot.count());
        Self { pages, hot, left, hot_left, at: 0, near: 0, push_pages: PUSH_PAGES }
    }

    /// After a lost connection: owes all that the destination has not `received`, whatever was sent
    /// before. What is hot stays so.
    pub fn anew(received: &PageSet, before: Option<Self>) -> Self {
        let total = received.capacity();
        let mut pages = PageSet::full(total);
        pages.subtract(received);
        let (hot, push_pages) =
            before.map_or((PageSet::new(total), PUSH_PAGES), |before| (before.hot, before.push_pages));
        Self { push_pages, ..Self::new(pages, hot) }
    }

    /// The same with smaller frames, so that a model with few pages has several of them.
    #[cfg(test)]
    pub fn with_frames_of(self, push_pages: u64) -> Self {
        Self { push_pages, ..self }
    }

    /// Pages that have not been sent.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// The answer to a request: the page, and a few behind it. Empty when it is not owed: then it is
    /// on its way already, or is no page of the guest's.
    pub fn answer(&mut self, page: u64) -> Vec<PageRun> {
        let mut runs = self.take(PageRun { first: PageIndex(page), pages: 1 });
        if !runs.is_empty() {
            let behind = PageRun { first: PageIndex(page.saturating_add(1)), pages: AROUND_PAGES - 1 };
            runs.extend(self.take(behind));
            (self.at, self.near) = (page.saturating_add(AROUND_PAGES), NEAR_PAGES);
        }
        runs
    }

    /// The next frame of the background; empty when nothing is left.
    pub fn push(&mut self) -> Vec<PageRun> {
        if let Some(runs) = self.push_near() {
            return runs;
        }
        if self.hot_left > 0 {
            return self.push_hot();
        }
        let Some(first) = self.next(|owed| &owed.pages) else { return Vec::new() };
        self.at = first + self.push_pages;
        self.take(PageRun { first: PageIndex(first), pages: self.push_pages })
    }

    fn push_near(&mut self) -> Option<Vec<PageRun>> {
        let end = self.at.saturating_add(std::mem::take(&mut self.near));
        let first = self.pages.next_from(PageIndex(self.at)).filter(|first| first.0 < end)?;
        let pages = self.push_pages.min(end - first.0);
        self.at = first.0 + pages;
        self.near = end - self.at;
        Some(self.take(PageRun { first, pages }))
    }

    fn push_hot(&mut self) -> Vec<PageRun> {
        let mut runs = Vec::new();
        let mut room = self.push_pages;
        while room > 0
            && let Some(first) = self.next(|owed| &owed.hot)
        {
            // One word of the bitmap at most: what lies between hot pages stays.
            let window = room.min(64 - first % 64);
            let taken = self.hot.take_runs(PageRun { first: PageIndex(first), pages: window });
            taken.iter().for_each(|run| self.pages.remove_run(*run));
            let pages = count(&taken);
            (self.left, self.hot_left, room) = (self.left - pages, self.hot_left - pages, room - pages);
            self.at = taken.last().map_or(first, |run| run.first.0 + run.pages);
            runs.extend(taken);
        }
        runs
    }

    /// The first page of a set from `at` on, or from the beginning.
    fn next(&self, of: impl Fn(&Self) -> &PageSet) -> Option<u64> {
        let set = of(self);
        set.next_from(PageIndex(self.at)).or_else(|| set.next_from(PageIndex(0))).map(|page| page.0)
    }

    /// Takes those pages of `run` that are owed: they are the caller's to send.
    fn take(&mut self, run: PageRun) -> Vec<PageRun> {
        let taken = self.pages.take_runs(run);
        self.left -= count(&taken);
        if self.hot_left > 0 {
            self.hot_left -= count(&self.hot.take_runs(run));
        }
        taken
    }
}

fn count(runs: &[PageRun]) -> u64 {
    runs.iter().map(|run| run.pages).sum()
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

    fn pages(runs: &[PageRun]) -> Vec<u64> {
        runs.iter().flat_map(|r| r.first.0..r.first.0 + r.pages).collect()
    }

    fn push_all(owed: &mut Owed) -> Vec<u64> {
        let mut all = Vec::new();
        loop {
            let frame = pages(&owed.push());
            assert!(frame.len() as u64 <= PUSH_PAGES);
            if frame.is_empty() {
                assert_eq!((owed.left(), owed.hot_left), (0, 0));
                return all;
            }
            all.extend(frame);
        }
    }

    #[test]
    fn near_a_request_first_then_what_is_hot_then_the_rest_and_each_page_once() {
        let mut owed = Owed::new(set(&[(0, 100), (500, 300)]), set(&[(90, 5), (490, 20), (640, 70)]));
        assert_eq!(pages(&owed.answer(520)), (520..528).collect::<Vec<_>>());
        let all = push_all(&mut owed);
        let near = 528..528 + NEAR_PAGES;
        let hot = (656..710).chain(90..95).chain(500..510);
        let rest = (510..520).chain(710..800).chain(0..90).chain(95..100);
        assert_eq!(all, near.chain(hot).chain(rest).collect::<Vec<_>>());
    }

    #[test]
    fn what_was_sent_and_not_received_is_owed_again() {
        let mut owed = Owed::new(set(&[(0, 64)]), set(&[(60, 4)]));
        assert_eq!(pages(&owed.push())[..4], [60, 61, 62, 63]);
        push_all(&mut owed);
        let mut received = PageSet::full(1024);
        received.remove_run(PageRun { first: PageIndex(10), pages: 2 });
        assert_eq!(push_all(&mut Owed::anew(&received, Some(owed))), [10, 11]);
        assert_eq!(push_all(&mut Owed::anew(&received, None)), [10, 11]);
    }

    #[test]
    fn a_request_for_what_is_not_owed_or_no_page_takes_nothing() {
        let mut owed = Owed::new(set(&[(0, 4)]), set(&[]));
        for page in [4, 5000, u64::MAX] {
            assert_eq!(owed.answer(page), []);
        }
        assert_eq!(owed.left(), 4);
        assert_eq!(pages(&owed.answer(3)), [3]);
        assert_eq!(owed.answer(3), []);
    }
}
