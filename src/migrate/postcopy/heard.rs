//! What the destination has said, on one connection, of the pages that it has and waits for: pure.

use crate::memory::PageSet;
use crate::wire::{FrameType, PageBitmap};

/// The most requests that are kept until they can be answered; what is beyond comes in the background.
const MAX_KEPT: usize = 1 << 16;

/// Collects RECEIVED, and the requests that come before pages can be sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Heard {
    /// It has said that pages are missing, and not yet which.
    fetching: bool,
    words: Vec<u64>,
    /// How many of the words have been told: the parts follow one another.
    told: usize,
    requests: Vec<u64>,
    broken: Option<String>,
}

/// What a connection begins with, once RECEIVED is whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beginning {
    /// The pages that the destination has.
    pub received: PageSet,
    /// The pages that somebody waits for, in the order in which they were asked for.
    pub requests: Vec<u64>,
}

impl Heard {
    /// For a new connection to a destination of `total_pages`, which says whether pages are missing.
    pub fn new(fetching: bool, total_pages: u64) -> Self {
        Self { fetching, words: vec![0; total_pages.div_ceil(64) as usize], ..Self::default() }
    }

    /// Whether RECEIVED is awaited.
    pub fn is_fetching(&self) -> bool {
        self.fetching
    }

    /// A part of RECEIVED. What is wrong with it, [`Heard::whole`] tells.
    pub fn received(&mut self, part: &PageBitmap) {
        let due = (self.told * 64) as u64;
        if !self.fetching || part.first != due {
            let why = format!("RECEIVED from page {} on is not due", part.first);
            self.broken.get_or_insert(why);
            return;
        }
        match part.put_into(FrameType::Received, &mut self.words) {
            Ok(()) => self.told += part.words.len(),
            Err(error) => self.broken = Some(error.to_string()),
        }
    }

    /// Pages are asked for: gives back those that can be answered now, and keeps what cannot.
    pub fn requested(&mut self, mut pages: Vec<u64>) -> Vec<u64> {
        if !self.fetching {
            return pages;
        }
        pages.truncate(MAX_KEPT - self.requests.len());
        self.requests.append(&mut pages);
        pages
    }

    /// Once RECEIVED is whole: what to begin with. From then on nothing of it is awaited. An error
    /// when the destination does not keep to the protocol.
    pub fn whole(&mut self) -> Result<Option<Beginning>, String> {
        if let Some(why) = &self.broken {
            return Err(why.clone());
        }
        if !self.fetching || self.told < self.words.len() {
            return Ok(None);
        }
        self.fetching = false;
        let words = std::mem::take(&mut self.words);
        let total = words.len() as u64 * 64;
        let received = PageSet::from_words(words, total);
        Ok(Some(Beginning { received, requests: std::mem::take(&mut self.requests) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(first: u64, words: &[u64]) -> PageBitmap {
        PageBitmap { first, words: words.to_vec() }
    }

    #[test]
    fn it_begins_when_every_part_has_come() {
        let mut heard = Heard::new(true, 192);
        heard.received(&part(0, &[1, 2]));
        assert!(heard.requested(vec![7, 8]).is_empty());
        assert_eq!(heard.whole(), Ok(None));
        heard.received(&part(128, &[3]));
        let received = PageSet::from_words(vec![1, 2, 3], 192);
        assert_eq!(heard.whole(), Ok(Some(Beginning { received, requests: vec![7, 8] })));
        assert_eq!(heard.whole(), Ok(None));
        assert_eq!(heard.requested(vec![9]), [9]);
    }

    #[test]
    fn lies_are_errors_and_cost_no_more_than_the_truth() {
        let lies: &[&[PageBitmap]] = &[
            &[part(64, &[1])],
            &[part(0, &[1]), part(0, &[1])],
            &[part(0, &[1, 2, 3, 4])],
            &[part(u64::MAX / 64 * 64, &[1])],
            &[part(0, &[1, 2]), part(128, &[1, 2])],
        ];
        for lie in lies {
            let mut heard = Heard::new(true, 192);
            lie.iter().for_each(|part| heard.received(part));
            assert!(heard.whole().is_err(), "{lie:?}");
        }
        // Nobody has asked.
        let mut heard = Heard::new(false, 192);
        heard.received(&part(0, &[1, 2, 3]));
        assert!(heard.whole().is_err());
        let mut heard = Heard::new(true, 192);
        (0..100).for_each(|_| drop(heard.requested(vec![1; 4096])));
        assert_eq!(heard.requests.len(), MAX_KEPT);
    }
}
