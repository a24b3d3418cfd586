//! A set of pages as a bitmap, in the layout of KVM's dirty log (little-endian 64-bit words).

use super::PageIndex;
use super::atomic::words_of;

/// A run of consecutive pages, at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// The first page.
    pub first: PageIndex,
    /// How many pages.
    pub pages: u64,
}

/// A set over the pages `0..capacity`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PageSet {
    words: Vec<u64>,
    capacity: u64,
}

impl PageSet {
    /// The empty set over `0..capacity`.
    pub fn new(capacity: u64) -> Self {
        Self { words: vec![0; capacity.div_ceil(64) as usize], capacity }
    }

    /// Every page in `0..capacity`.
    pub fn full(capacity: u64) -> Self {
        Self::from_words(vec![u64::MAX; capacity.div_ceil(64) as usize], capacity)
    }

    /// Takes bits `0..capacity` of `words`; missing words count as zero, bits beyond are dropped.
    pub fn from_words(mut words: Vec<u64>, capacity: u64) -> Self {
        words.resize(capacity.div_ceil(64) as usize, 0);
        if !capacity.is_multiple_of(64)
            && let Some(last) = words.last_mut()
        {
            *last &= (1 << (capacity % 64)) - 1;
        }
        Self { words, capacity }
    }

    /// The bitmap, 64 pages a word, page 0 in bit 0 of word 0.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// One more than the largest page that the set can hold.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// How many pages are in the set.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|w| *w == 0)
    }

    /// Whether `page` is in the set; a page beyond the capacity is not.
    pub fn contains(&self, page: PageIndex) -> bool {
        page.0 < self.capacity && self.words[(page.0 / 64) as usize] >> (page.0 % 64) & 1 == 1
    }

    /// Adds `page` (no effect beyond the capacity).
    pub fn insert(&mut self, page: PageIndex) {
        if page.0 < self.capacity {
            self.words[(page.0 / 64) as usize] |= 1 << (page.0 % 64);
        }
    }

    /// Takes `page` out.
    pub fn remove(&mut self, page: PageIndex) {
        if page.0 < self.capacity {
            self.words[(page.0 / 64) as usize] &= !(1 << (page.0 % 64));
        }
    }

    /// Adds every page of `run` that is within the capacity.
    pub fn insert_run(&mut self, run: PageRun) {
        for (word, mask) in words_of(run, self.capacity) {
            self.words[word] |= mask;
        }
    }

    /// Takes every page of `run` out.
    pub fn remove_run(&mut self, run: PageRun) {
        for (word, mask) in words_of(run, self.capacity) {
            self.words[word] &= !mask;
        }
    }

    /// Takes every page of `run` out, and gives the runs of those that were in.
    pub fn take_runs(&mut self, run: PageRun) -> Vec<PageRun> {
        let mut runs: Vec<PageRun> = Vec::new();
        for (word, mask) in words_of(run, self.capacity) {
            let mut taken = self.words[word] & mask;
            self.words[word] &= !mask;
            while taken != 0 {
                let page = word as u64 * 64 + u64::from(taken.trailing_zeros());
                taken &= taken - 1;
                match runs.last_mut() {
                    Some(last) if last.first.0 + last.pages == page => last.pages += 1,
                    _ => runs.push(PageRun { first: PageIndex(page), pages: 1 }),
                }
            }
        }
        runs
    }

    /// The first page at or after `from` that is in the set.
    pub fn next_from(&self, from: PageIndex) -> Option<PageIndex> {
        self.next(from.0, true).map(PageIndex)
    }

    /// Adds every page of `other`, which has the same capacity.
    pub fn union(&mut self, other: &PageSet) {
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a |= b;
        }
    }

    /// Keeps only the pages that are in `other`, which has the same capacity, as well.
    pub fn intersect(&mut self, other: &PageSet) {
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a &= b;
        }
    }

    /// Takes every page of `other` out.
    pub fn subtract(&mut self, other: &PageSet) {
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a &= !b;
        }
    }

    /// The maximal runs in ascending order, starting at or after `from`.
    pub fn runs_from(&self, from: PageIndex) -> impl Iterator<Item = PageRun> + '_ {
        let mut at = from.0;
        std::iter::from_fn(move || {
            let first = self.next(at, true)?;
            let end = self.next(first, false).unwrap_or(self.capacity);
            at = end;
            Some(PageRun { first: PageIndex(first), pages: end - first })
        })
    }

    /// All maximal runs in ascending order.
    pub fn runs(&self) -> impl Iterator<Item = PageRun> + '_ {
        self.runs_from(PageIndex(0))
    }

    /// The first page at or after `from` that is (`wanted`) or is not in the set.
    fn next(&self, from: u64, wanted: bool) -> Option<u64> {
        if from >= self.capacity {
            return None;
        }
        let mut index = (from / 64) as usize;
        let mut mask = u64::MAX << (from % 64);
        loop {
            let word = if wanted { self.words[index] } else { !self.words[index] } & mask;
            if word != 0 {
                let page = index as u64 * 64 + u64::from(word.trailing_zeros());
                return (page < self.capacity).then_some(page);
            }
            index += 1;
            mask = u64::MAX;
            if index == self.words.len() {
                return None;
            }
        }
    }

    /// Adds the pages whose bits are set in `bits` of word `word`, which must be in range.
    pub(super) fn insert_word(&mut self, word: usize, bits: u64) {
        self.words[word] |= bits;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn run(first: u64, pages: u64) -> PageRun {
        PageRun { first: PageIndex(first), pages }
    }

    proptest! {
        #[test]
        fn behaves_like_a_set_of_numbers(
            capacity in 1u64..400,
            changes in prop::collection::vec((any::<bool>(), 0u64..500, 0u64..200), 0..30),
        ) {
            let mut set = PageSet::new(capacity);
            let mut model = BTreeSet::new();
            for (insert, first, pages) in changes {
                for p in first..(first + pages).min(capacity) {
                    if insert { model.insert(p); } else { model.remove(&p); }
                }
                if insert { set.insert_run(run(first, pages)) } else { set.remove_run(run(first, pages)) }
            }
            prop_assert_eq!(set.count(), model.len() as u64);
            let listed: Vec<u64> = set.runs().flat_map(|r| r.first.0..r.first.0 + r.pages).collect();
            prop_assert_eq!(listed, model.iter().copied().collect::<Vec<_>>());
            for p in 0..500 {
                prop_assert_eq!(set.contains(PageIndex(p)), model.contains(&p));
            }
            // Runs are maximal: two of them never touch.
            let runs: Vec<_> = set.runs().collect();
            prop_assert!(runs.windows(2).all(|w| w[0].first.0 + w[0].pages < w[1].first.0));
        }

        #[test]
        fn union_and_subtract_follow_the_words(a in prop::collection::vec(any::<u64>(), 3), b in prop::collection::vec(any::<u64>(), 3)) {
            let (x, y) = (PageSet::from_words(a, 150), PageSet::from_words(b, 150));
            let mut both = x.clone();
            both.union(&y);
            let mut rest = both.clone();
            rest.subtract(&y);
            for p in (0..160).map(PageIndex) {
                prop_assert_eq!(both.contains(p), x.contains(p) || y.contains(p));
                prop_assert_eq!(rest.contains(p), x.contains(p) && !y.contains(p));
            }
        }
    }

    #[test]
    fn full_stops_at_the_capacity() {
        let set = PageSet::full(70);
        assert_eq!(set.count(), 70);
        assert_eq!(set.runs().collect::<Vec<_>>(), vec![run(0, 70)]);
        assert_eq!(set.runs_from(PageIndex(69)).collect::<Vec<_>>(), vec![run(69, 1)]);
        assert_eq!(set.runs_from(PageIndex(70)).count(), 0);
    }
}
