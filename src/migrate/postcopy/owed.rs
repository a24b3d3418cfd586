//! What the source owes, and the order in which it goes: pure. The page server does what this says,
//! and the model of the recovery explores it.

use crate::memory::{PageIndex, PageRun, PageSet};
use crate::wire::limits::MAX_AHEAD_PAGES;

/// Pages of one background frame: few, since an urgent page waits for at most one of them.
const PUSH_PAGES: u64 = 32;
/// Of an answer, the pages around the one that was asked for that go at once, in a frame of their own: what goes along
/// would keep whoever waits waiting, by the time that it takes to read, send and place it.
const SOON_PAGES: u64 = 4;
/// The first answer for an area: so many pages around the one that was asked for, if they are still owed. A
/// guest goes back as often as it goes on, so they lie around it (aligned), not behind it.
const AROUND_PAGES: u64 = 8;
/// How often the answer doubles, up to a background frame: where pages are asked for again and again most of what
/// is there is used, and what an answer carries in vain costs less than another wait.
const DOUBLINGS: u8 = 2;
/// What counts as one area.
const AREA_PAGES: u64 = 512;
/// Pages from the beginning of the largest answer on that the background sends before anything else: who faults
/// there is likely to go on there.
const NEAR_PAGES: u64 = 160;

/// How many of the hot pages go ahead of the guest.
const HOT_AHEAD_PAGES: usize = 64;

/// Takes those of the pages that are `left` which go ahead of the guest: what it touches `first`, then from
/// what it was writing to (`hot`) the ends of each run. What is written again and again is mostly in
/// short runs (stacks, counters, queues), and whoever writes one page after the other is at an end.
pub fn take_ahead(first: &[u64], hot: &PageSet, left: &mut PageSet) -> Vec<PageIndex> {
    let ends = hot.runs().flat_map(|run| [run.first, PageIndex(run.first.0 + run.pages - 1)]);
    let pages = first.iter().map(|page| PageIndex(*page)).chain(ends.take(HOT_AHEAD_PAGES));
    let is_taken = |page: &PageIndex| {
        let is_left = left.contains(*page);
        left.remove(*page);
        is_left
    };
    pages.filter(is_taken).take(MAX_AHEAD_PAGES).collect()
}

/// What goes to who asked for a page; nothing when it was asked for before, or is no page of the guest's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// These are pages that the background has sent on this connection; they go a second and last time.
    pub again: bool,
    /// What is waited for.
    pub soon: Vec<PageRun>,
    /// What goes along with it, behind it.
    pub rest: Vec<PageRun>,
}

/// The pages that the destination has neither been sent on this connection nor said to have.
///
/// The background goes first near the last request, then over the pages that the guest was writing to
/// when it was stopped, then over the rest.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Owed {
    pages: PageSet,
    /// Those that were written to most recently, a part of `pages`.
    hot: PageSet,
    /// Those that the background has sent and nobody has asked for since.
    pushed: PageSet,
    /// Those that were never sent on any connection: nobody can have them.
    unsent: PageSet,
    left: u64,
    hot_left: u64,
    /// Where the background goes on: near the last page that was asked for.
    at: u64,
    /// How much of what is behind that comes before the hot pages.
    near: u64,
    /// Pages of a background frame.
    push_pages: u64,
    /// Pages of the first answer for an area.
    around_pages: u64,
    /// How often the answer has doubled, by area.
    doubled: Vec<u8>,
}

impl Owed {
    /// Owes `pages`; of these, the ones in `hot` (of the same capacity) were written to most recently.
    pub fn new(pages: PageSet, mut hot: PageSet) -> Self {
        hot.intersect(&pages);
        let (left, hot_left, unsent) = (pages.count(), hot.count(), pages.clone());
        let pushed = PageSet::new(pages.capacity());
        let doubled = vec![0; pages.capacity().div_ceil(AREA_PAGES) as usize];
        let (push_pages, around_pages) = (PUSH_PAGES, AROUND_PAGES);
        Self { pages, hot, pushed, unsent, left, hot_left, at: 0, near: 0, push_pages, around_pages, doubled }
    }

    /// After a lost connection: owes all that the destination has not `received`, whatever was sent
    /// before. What is hot stays so. What a sender before this one has sent (`before` is `None`) is not
    /// known: then any of it may have come.
    pub fn anew(received: &PageSet, before: Option<Self>) -> Self {
        let total = received.capacity();
        let mut pages = PageSet::full(total);
        pages.subtract(received);
        let nothing = || PageSet::new(total);
        let Some(before) = before else { return Self { unsent: nothing(), ..Self::new(pages, nothing()) } };
        let Self { hot, unsent, push_pages, around_pages, .. } = before;
        Self { unsent, push_pages, around_pages, ..Self::new(pages, hot) }
    }

    /// Pages that the destination cannot have: they were never sent.
    pub fn unsent(&self) -> u64 {
        self.unsent.count()
    }

    /// How many of those it says to have `received`.
    pub fn unsent_of(&self, received: &PageSet) -> u64 {
        let mut claimed = self.unsent.clone();
        claimed.intersect(received);
        claimed.count()
    }

    /// The same with smaller frames, so that a model with few pages has several of them.
    #[cfg(test)]
    pub fn with_frames_of(self, pages: u64) -> Self {
        Self { push_pages: pages, around_pages: pages, ..self }
    }

    /// Pages that have not been sent.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// The answer to a request: the page, and those around it, the more the oftener something is asked for there.
    pub fn answer(&mut self, page: u64) -> Answer {
        let (owed, pushed) = (self.pages.contains(PageIndex(page)), self.pushed.contains(PageIndex(page)));
        if !owed && !pushed {
            return Answer::default();
        }
        let (soon, around) = (aligned(page, SOON_PAGES.min(self.around_pages)), self.around(page));
        if owed {
            (self.at, self.near) = (aligned(page, self.around_pages << DOUBLINGS).first.0, NEAR_PAGES);
            return Answer { again: false, soon: self.take(soon), rest: self.take(around) };
        }
        // It has been sent, and may sit in a long queue of pages that nobody waits for, behind those before it.
        let from = |run: PageRun| PageRun { first: PageIndex(page), pages: run.first.0 + run.pages - page };
        let (soon, rest) = (self.pushed.take_runs(from(soon)), self.pushed.take_runs(from(around)));
        Answer { again: true, soon, rest }
    }

    /// What goes along with `page`; it doubles for the next that is asked for near it.
    fn around(&mut self, page: u64) -> PageRun {
        let doubled = &mut self.doubled[(page / AREA_PAGES) as usize];
        let around = aligned(page, self.around_pages << *doubled);
        *doubled = DOUBLINGS.min(*doubled + 1);
        around
    }

    /// The next frame of the background; empty when nothing is left.
    pub fn push(&mut self) -> Vec<PageRun> {
        let runs = self.choose();
        runs.iter().for_each(|run| self.pushed.insert_run(*run));
        runs
    }

    fn choose(&mut self) -> Vec<PageRun> {
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
            for run in &taken {
                self.pages.remove_run(*run);
                self.unsent.remove_run(*run);
            }
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
        taken.iter().for_each(|run| self.unsent.remove_run(*run));
        self.left -= count(&taken);
        if self.hot_left > 0 {
            self.hot_left -= count(&self.hot.take_runs(run));
        }
        taken
    }
}

/// The `pages` pages around `page` that begin at a multiple of as many, a power of two.
fn aligned(page: u64, pages: u64) -> PageRun {
    PageRun { first: PageIndex(page & !(pages - 1)), pages }
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

    fn run(first: u64, pages: u64) -> PageRun {
        PageRun { first: PageIndex(first), pages }
    }

    fn first(soon: &[PageRun], rest: &[PageRun]) -> Answer {
        Answer { again: false, soon: soon.to_vec(), rest: rest.to_vec() }
    }

    fn nothing() -> Answer {
        Answer::default()
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
        assert_eq!(owed.answer(525), first(&[run(524, 4)], &[run(520, 4)]));
        let all = push_all(&mut owed);
        let near = (512..520).chain(528..512 + NEAR_PAGES);
        let hot = (672..710).chain(90..95).chain(500..510);
        let rest = (510..512).chain(710..800).chain(0..90).chain(95..100);
        assert_eq!(all, near.chain(hot).chain(rest).collect::<Vec<_>>());
    }

    #[test]
    fn what_goes_along_lies_around_the_page_and_doubles_where_more_is_asked_for() {
        let mut owed = Owed::new(set(&[(0, 1020)]), set(&[]));
        assert_eq!(owed.answer(5), first(&[run(4, 4)], &[run(0, 4)]));
        assert_eq!(owed.answer(100), first(&[run(100, 4)], &[run(96, 4), run(104, 8)]));
        assert_eq!(owed.answer(110), nothing());
        assert_eq!(owed.answer(300), first(&[run(300, 4)], &[run(288, 12), run(304, 16)]));
        assert_eq!(owed.answer(8), first(&[run(8, 4)], &[run(12, 20)]));
        // Elsewhere it begins anew, and so it does on the next connection.
        assert_eq!(owed.answer(1019), first(&[run(1016, 4)], &[]));
        let mut received = PageSet::full(1024);
        received.remove_run(run(64, 64));
        assert_eq!(Owed::anew(&received, Some(owed)).answer(70), first(&[run(68, 4)], &[run(64, 4)]));
    }

    #[test]
    fn what_is_touched_first_goes_ahead_and_then_the_ends_of_what_is_hot() {
        let (mut left, hot) = (set(&[(0, 1000)]), set(&[(10, 1), (20, 2), (30, 100), (500, 3)]));
        left.remove(PageIndex(500));
        let numbers = |pages: Vec<PageIndex>| pages.iter().map(|page| page.0).collect::<Vec<_>>();
        let first = [700, 1001, 20, 700, u64::MAX];
        assert_eq!(numbers(take_ahead(&first, &hot, &mut left)), [700, 20, 10, 21, 30, 129, 502]);
        assert_eq!(left.count(), 1000 - 1 - 7);
        // Neither is without bounds, and what does not go ahead is left.
        let all: Vec<u64> = (0..1024).collect();
        let scattered: Vec<_> = (0..300).map(|n| (3 * n, 1)).collect();
        let mut left = set(&[(0, 1024)]);
        assert_eq!(
            numbers(take_ahead(&[], &set(&scattered), &mut left)),
            (0..32).map(|n| 3 * n).collect::<Vec<_>>()
        );
        assert_eq!(left.count(), 1024 - 32);
        assert_eq!(take_ahead(&all, &hot, &mut left).len(), MAX_AHEAD_PAGES);
        assert_eq!(left.count(), 1024 - 32 - MAX_AHEAD_PAGES as u64);
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
    fn nobody_has_what_was_never_sent() {
        let mut owed = Owed::new(set(&[(0, 100)]), set(&[(90, 4)]));
        assert_eq!(owed.answer(10), first(&[run(8, 4)], &[run(12, 4)]));
        assert_eq!(pages(&owed.push()), (0..8).chain(16..32).collect::<Vec<_>>());
        let sent = 32;
        assert_eq!(owed.unsent(), 100 - sent);
        let received = |first, pages| {
            let mut all = PageSet::full(1024);
            all.remove_run(PageRun { first: PageIndex(0), pages: 100 });
            all.insert_run(PageRun { first: PageIndex(first), pages });
            all
        };
        assert_eq!((owed.unsent_of(&received(0, sent)), owed.unsent_of(&received(31, 2))), (0, 1));
        // On the next connection it is the same, whatever came of the first.
        let mut next = Owed::anew(&received(10, 4), Some(owed));
        assert_eq!((next.left(), next.unsent()), (96, 100 - sent));
        push_all(&mut next);
        assert_eq!(next.unsent(), 0);
        assert_eq!(Owed::anew(&received(10, 4), None).unsent(), 0);
    }

    #[test]
    fn a_request_for_what_is_not_owed_or_no_page_takes_nothing() {
        let mut owed = Owed::new(set(&[(0, 4)]), set(&[]));
        for page in [4, 5000, u64::MAX] {
            assert_eq!(owed.answer(page), nothing());
        }
        assert_eq!(owed.left(), 4);
        assert_eq!(owed.answer(3), first(&[run(0, 4)], &[]));
        assert_eq!(owed.answer(3), nothing());
    }

    #[test]
    fn what_the_background_has_sent_goes_once_more_to_who_waits_for_it_and_never_a_third_time() {
        let again = |soon: &[PageRun], rest: &[PageRun]| Answer { again: true, ..first(soon, rest) };
        let mut owed = Owed::new(set(&[(0, 40)]), set(&[]));
        assert_eq!(pages(&owed.push()), (0..32).collect::<Vec<_>>());
        assert_eq!(owed.answer(29), again(&[run(29, 3)], &[]));
        assert_eq!(owed.answer(30), nothing());
        assert_eq!(owed.answer(32), first(&[run(32, 4)], &[run(36, 4)]));
        // What went before it comes before it.
        assert_eq!(owed.answer(18), again(&[run(18, 2)], &[run(20, 9)]));
        // An answer is on nobody's heels.
        assert_eq!(owed.answer(33), nothing());
        assert_eq!(owed.left(), 0);
    }
}
