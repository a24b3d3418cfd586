//! What the destination has and what it waits for: pure. The pager does what this says, and the model
//! of the recovery explores it.

use std::collections::BTreeMap;

use crate::memory::{Granule, PageIndex, PageRun, PageSet};
use crate::sys::bitmap::SharedBitmap;

/// The set of pages that are present: it outlives the receiver.
pub trait Marks {
    /// Whether `page` is present.
    fn is_set(&self, page: u64) -> bool;
    /// Marks `page` as present; whether it was not before.
    fn set(&mut self, page: u64) -> bool;
}

impl Marks for SharedBitmap {
    fn is_set(&self, page: u64) -> bool {
        self.get(page)
    }

    fn set(&mut self, page: u64) -> bool {
        SharedBitmap::set(self, page)
    }
}

impl Marks for PageSet {
    fn is_set(&self, page: u64) -> bool {
        self.contains(PageIndex(page))
    }

    fn set(&mut self, page: u64) -> bool {
        let was_clear = !self.contains(PageIndex(page));
        self.insert(PageIndex(page));
        was_clear && page < self.capacity()
    }
}

/// The marks, and the waits for pages that have none; `T` is a time.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Wanted<M, T> {
    marks: M,
    missing: u64,
    /// What is seen only when all of it is present.
    granule: Granule,
    /// By the first page of the granule.
    waits: BTreeMap<u64, T>,
}

/// What a fault needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// What is missing of the page's granule is to be asked for.
    Ask,
    /// It was asked for, and comes.
    Asked,
    /// All of its granule counts as present: it came this moment, or is a hole of the source's and so
    /// zero, or is there and was not seen so far.
    Present,
}

/// What an arrival ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival<T> {
    /// The page was missing.
    pub is_new: bool,
    /// Since when somebody had waited for the granule that is whole now.
    pub waited_since: Option<T>,
    /// Nothing of the page's granule is missing: it may be seen.
    pub is_whole: bool,
    /// It was the last missing page.
    pub is_last: bool,
}

impl<M: Marks, T: Copy> Wanted<M, T> {
    /// With `marks`, in which `missing` pages have none.
    pub fn new(marks: M, missing: u64) -> Self {
        Self { marks, missing, granule: Granule::SMALL, waits: BTreeMap::new() }
    }

    /// For memory of which whole granules are seen or not.
    pub fn seen_by(self, granule: Granule) -> Self {
        Self { granule, ..self }
    }

    /// How many pages are missing.
    pub fn missing(&self) -> u64 {
        self.missing
    }

    /// The marks.
    pub fn marks(&self) -> &M {
        &self.marks
    }

    /// Somebody waits for `page`. It is asked for once in a connection, however many wait.
    pub fn fault(&mut self, page: u64, now: T) -> Fault {
        let whole = self.granule.around(PageIndex(page));
        if self.is_whole(whole) {
            return Fault::Present;
        }
        match self.waits.insert(whole.first.0, now) {
            None => Fault::Ask,
            Some(since) => {
                self.waits.insert(whole.first.0, since);
                Fault::Asked
            }
        }
    }

    /// Whether nothing of `run` is missing. From behind: pages mostly come in ascending order, and the
    /// last of them is the likeliest to be missing.
    pub fn is_whole(&self, run: PageRun) -> bool {
        (run.first.0..run.first.0 + run.pages).rev().all(|page| self.marks.is_set(page))
    }

    /// Those of the pages of `run` that are missing: only these are placed.
    pub fn lacking(&self, run: PageRun) -> Vec<PageRun> {
        let mut runs: Vec<PageRun> = Vec::new();
        for page in (run.first.0..run.first.0 + run.pages).filter(|page| !self.marks.is_set(*page)) {
            match runs.last_mut() {
                Some(last) if last.first.0 + last.pages == page => last.pages += 1,
                _ => runs.push(PageRun { first: PageIndex(page), pages: 1 }),
            }
        }
        runs
    }

    /// `page` has been put into place. Only now it is marked (D2): whoever takes over from here finds
    /// what is marked in memory, or else a hole. And it is marked before its granule is seen: nobody
    /// writes to a page that is marked, so what the guest changes is never overwritten.
    pub fn arrived(&mut self, page: u64) -> Arrival<T> {
        let was_missing = self.marks.set(page);
        self.missing -= u64::from(was_missing);
        let whole = self.granule.around(PageIndex(page));
        let is_whole = self.is_whole(whole);
        let waited_since = if is_whole { self.waits.remove(&whole.first.0) } else { None };
        Arrival { is_new: was_missing, waited_since, is_whole, is_last: was_missing && self.missing == 0 }
    }

    /// What is waited for, by the first pages of the granules, and since when.
    pub fn waits(&self) -> impl Iterator<Item = (u64, T)> {
        self.waits.iter().map(|(page, since)| (*page, *since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_asked_for_once_and_its_first_wait_counts() {
        let mut wanted = Wanted::new(PageSet::from_words(vec![0b1001], 4), 2);
        assert_eq!(wanted.fault(0, 1), Fault::Present);
        assert_eq!(wanted.fault(1, 2), Fault::Ask);
        assert_eq!(wanted.fault(1, 3), Fault::Asked);
        let all = PageRun { first: PageIndex(0), pages: 4 };
        assert_eq!(wanted.lacking(all), [PageRun { first: PageIndex(1), pages: 2 }]);
        let nothing = Arrival { is_new: false, waited_since: None, is_whole: true, is_last: false };
        assert_eq!(wanted.arrived(2), Arrival { is_new: true, ..nothing });
        assert_eq!(wanted.waits().collect::<Vec<_>>(), [(1, 2)]);
        let last = Arrival { is_new: true, waited_since: Some(2), is_last: true, ..nothing };
        assert_eq!(wanted.arrived(1), last);
        // Again, and pages that are none: nothing happens twice.
        assert_eq!(wanted.arrived(1), nothing);
        assert_eq!(wanted.arrived(4), Arrival { is_whole: false, ..nothing });
        assert_eq!((wanted.missing(), wanted.waits().count()), (0, 0));
    }

    #[test]
    fn a_huge_page_is_waited_for_until_the_last_of_its_pages_has_come() {
        // Of the second huge page three are missing, of the first none.
        let mut marks = PageSet::full(1024);
        [600, 700, 701].into_iter().for_each(|page| marks.remove(PageIndex(page)));
        let mut wanted = Wanted::new(marks, 3).seen_by(Granule::HUGE);
        assert_eq!(wanted.fault(5, 1), Fault::Present);
        // Present, but not to be seen yet.
        assert_eq!(wanted.fault(512, 2), Fault::Ask);
        assert_eq!(wanted.fault(700, 3), Fault::Asked);
        let run = |first, pages| PageRun { first: PageIndex(first), pages };
        assert_eq!(wanted.lacking(Granule::HUGE.around(PageIndex(700))), [run(600, 1), run(700, 2)]);
        let held = Arrival { is_new: true, waited_since: None, is_whole: false, is_last: false };
        assert_eq!(wanted.arrived(701), held);
        assert_eq!(wanted.arrived(600), held);
        // What the next receiver finds is marked: the rest is asked for again, and nothing more.
        let (marks, missing) = (wanted.marks().clone(), wanted.missing());
        let mut next = Wanted::new(marks, missing).seen_by(Granule::HUGE);
        assert_eq!(next.fault(512, 9), Fault::Ask);
        assert_eq!(next.lacking(Granule::HUGE.around(PageIndex(512))), [run(700, 1)]);
        for mut wanted in [wanted, next] {
            let since = wanted.waits().map(|(_, since)| since).next();
            let last = Arrival { is_new: true, waited_since: since, is_whole: true, is_last: true };
            assert_eq!(wanted.arrived(700), last);
            assert_eq!((wanted.fault(700, 10), wanted.waits().count()), (Fault::Present, 0));
        }
    }
}
