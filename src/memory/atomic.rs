//! A set of pages that several threads add to.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{PageIndex, PageRun, PageSet};

/// Like [`PageSet`], shared between threads. Each change of a word is atomic; a whole run is not.
#[derive(Debug)]
pub struct AtomicPageSet {
    words: Vec<AtomicU64>,
    capacity: u64,
}

impl AtomicPageSet {
    /// The empty set over `0..capacity`.
    pub fn new(capacity: u64) -> Self {
        Self { words: (0..capacity.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(), capacity }
    }

    /// Adds every page of `run` that is within the capacity; gives how many were new.
    pub fn insert_run(&self, run: PageRun) -> u64 {
        let mut new = 0;
        for (word, mask) in words_of(run, self.capacity) {
            let before = self.words[word].fetch_or(mask, Ordering::AcqRel);
            new += u64::from((mask & !before).count_ones());
        }
        new
    }

    /// Takes every page of `run` out, and gives those that were in.
    pub fn take_run(&self, run: PageRun) -> PageSet {
        let mut taken = PageSet::new(self.capacity);
        for (word, mask) in words_of(run, self.capacity) {
            let before = self.words[word].fetch_and(!mask, Ordering::AcqRel) & mask;
            taken.insert_word(word, before);
        }
        taken
    }

    /// Whether any page of `run` is in the set.
    pub fn intersects(&self, run: PageRun) -> bool {
        words_of(run, self.capacity).any(|(word, mask)| self.words[word].load(Ordering::Acquire) & mask != 0)
    }

    /// Whether `page` is in the set.
    pub fn contains(&self, page: PageIndex) -> bool {
        self.intersects(PageRun { first: page, pages: 1 })
    }

    /// The set as it is now.
    pub fn snapshot(&self) -> PageSet {
        PageSet::from_words(self.words.iter().map(|w| w.load(Ordering::Acquire)).collect(), self.capacity)
    }
}

/// The words that a run touches, each with the run's bits in it.
pub(super) fn words_of(run: PageRun, capacity: u64) -> impl Iterator<Item = (usize, u64)> {
    let end = run.first.0.saturating_add(run.pages).min(capacity);
    let mut at = run.first.0;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let upto = end.min((at / 64 + 1) * 64);
        let ones = upto - at;
        let mask = if ones == 64 { u64::MAX } else { ((1 << ones) - 1) << (at % 64) };
        let word = (at / 64) as usize;
        at = upto;
        Some((word, mask))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_what_is_new_and_gives_what_was_taken() {
        let set = AtomicPageSet::new(200);
        let run = |first, pages| PageRun { first: PageIndex(first), pages };
        assert_eq!(set.insert_run(run(60, 10)), 10);
        assert_eq!(set.insert_run(run(65, 10)), 5);
        assert_eq!(set.insert_run(run(195, u64::MAX)), 5);
        assert!(set.intersects(run(0, 61)) && !set.intersects(run(0, 60)));
        let taken = set.take_run(run(50, 20));
        assert_eq!(taken.runs().collect::<Vec<_>>(), vec![run(60, 10)]);
        assert_eq!(set.snapshot().runs().collect::<Vec<_>>(), vec![run(70, 5), run(195, 5)]);
    }
}
