//! What the destination has and what it waits for: pure. The pager does what this says, and the model
//! of the recovery explores it.

use std::collections::BTreeMap;

use crate::memory::{PageIndex, PageRun, PageSet};
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
    waits: BTreeMap<u64, T>,
}

/// What a fault needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The page is to be asked for.
    Ask,
    /// It was asked for, and comes.
    Asked,
    /// It counts as present: it came this moment, or is a hole of the source's and so zero.
    Present,
}

/// What an arrival ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival<T> {
    /// Since when somebody had waited for the page.
    pub waited_since: Option<T>,
    /// It was the last missing page.
    pub is_last: bool,
}

impl<M: Marks, T: Copy> Wanted<M, T> {
    /// With `marks`, in which `missing` pages have none.
    pub fn new(marks: M, missing: u64) -> Self {
        Self { marks, missing, waits: BTreeMap::new() }
    }

    /// How many pages are missing.
    pub fn missing(&self) -> u64 {
        self.missing
    }

    /// The marks.
    pub fn marks(&self) -> &M {
        &self.marks
    }

    /// Somebody waits for `page`. A page is asked for once in a connection, however many wait.
    pub fn fault(&mut self, page: u64, now: T) -> Fault {
        if self.marks.is_set(page) {
            return Fault::Present;
        }
        match self.waits.insert(page, now) {
            None => Fault::Ask,
            Some(since) => {
                self.waits.insert(page, since);
                Fault::Asked
            }
        }
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
    /// what is marked in memory, or else a hole.
    pub fn arrived(&mut self, page: u64) -> Arrival<T> {
        let was_missing = self.marks.set(page);
        self.missing -= u64::from(was_missing);
        Arrival { waited_since: self.waits.remove(&page), is_last: was_missing && self.missing == 0 }
    }

    /// The pages that are waited for, and since when.
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
        assert_eq!(wanted.arrived(2), Arrival { waited_since: None, is_last: false });
        assert_eq!(wanted.waits().collect::<Vec<_>>(), [(1, 2)]);
        assert_eq!(wanted.arrived(1), Arrival { waited_since: Some(2), is_last: true });
        // Again, and pages that are none: nothing happens twice.
        assert_eq!(wanted.arrived(1), Arrival { waited_since: None, is_last: false });
        assert_eq!(wanted.arrived(4), Arrival { waited_since: None, is_last: false });
        assert_eq!((wanted.missing(), wanted.waits().count()), (0, 0));
    }
}
