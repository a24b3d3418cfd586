//! The pure deciders of postcopy, against models: what the source has heard and owes, what the
//! destination wants.

use std::collections::BTreeSet;

use vmferry::memory::{Granule, PageIndex, PageRun, PageSet};
use vmferry::migrate::postcopy::heard::Heard;
use vmferry::migrate::postcopy::owed::{Answer, Owed};
use vmferry::migrate::postcopy::wanted::{Fault, Wanted};
use vmferry::wire::PageBitmap;

use super::input::{Reader, Writer};

pub fn run(data: &[u8]) {
    let mut input = Reader(data);
    match input.u8() % 2 {
        0 => source(&mut input),
        _ => destination(&mut input),
    }
}

/// RAM of 64 to 4096 pages, as all RAM a multiple of 64.
fn total(input: &mut Reader<'_>) -> u64 {
    (u64::from(input.u8()) % 64 + 1) * 64
}

fn source(input: &mut Reader<'_>) {
    let total = total(input);
    let mut owed: Option<Owed> = None;
    // Each round is a connection.
    for _ in 0..4 {
        let fetching = input.u8() & 1 == 1;
        let mut heard = Heard::new(fetching, total);
        let mut asked = Vec::new();
        for _ in 0..input.u8() % 32 {
            match input.u8() % 3 {
                0 => {
                    let first = u64::from(input.u8()) * if input.u8() == 0 { u64::MAX / 255 } else { 64 };
                    let words: Vec<u64> = (0..input.u8() % 70).map(|_| input.u64()).collect();
                    heard.received(&PageBitmap { first, words });
                }
                1 => {
                    let pages: Vec<u64> = (0..input.u8() % 8).map(|_| page(input)).collect();
                    let now = heard.requested(pages.clone());
                    if heard.is_fetching() { asked.extend(pages) } else { assert_eq!(now, pages) }
                }
                _ => {
                    if let Ok(Some(begin)) = heard.whole() {
                        assert!(fetching && !heard.is_fetching());
                        assert_eq!((begin.received.capacity(), &begin.requests), (total, &asked));
                        let next = Owed::anew(&begin.received, owed.take());
                        assert_eq!(next.left(), total - begin.received.count());
                        owed = Some(serve(next, begin.requests, &begin.received, input));
                    }
                }
            }
        }
    }
}

fn page(input: &mut Reader<'_>) -> u64 {
    match input.u8() {
        0 => input.u64(),
        low => u64::from(low) + 256 * u64::from(input.u8()),
    }
}

/// Answers and pushes; each owed page goes once, what was pushed once more at most, and nothing else.
fn serve(mut owed: Owed, requests: Vec<u64>, received: &PageSet, input: &mut Reader<'_>) -> Owed {
    let mut sent = Sent {
        rest: (0..received.capacity()).filter(|page| !received.contains(PageIndex(*page))).collect(),
        pushed: BTreeSet::new(),
    };
    for page in requests {
        let answer = owed.answer(page);
        sent.answered(&owed, page, answer);
    }
    for _ in 0..input.u8() {
        if input.u8() & 1 == 1 {
            let page = page(input);
            let answer = owed.answer(page);
            sent.answered(&owed, page, answer);
        } else {
            let runs = owed.push();
            sent.pushed(&owed, runs);
        }
    }
    if input.u8() & 1 == 1 {
        loop {
            let runs = owed.push();
            let nothing = runs.is_empty();
            if sent.pushed(&owed, runs) {
                break;
            }
            assert!(!nothing, "pages are owed, and are not sent");
        }
    }
    owed
}

struct Sent {
    rest: BTreeSet<u64>,
    /// What the background has sent and nobody has asked for since.
    pushed: BTreeSet<u64>,
}

impl Sent {
    fn answered(&mut self, owed: &Owed, page: u64, answer: Answer) {
        let all = [answer.soon.clone(), answer.rest].concat();
        assert!(all.is_empty() || numbers(&answer.soon).any(|soon| soon == page), "page {page} has to wait");
        if !answer.again {
            self.first(owed, &all);
            return;
        }
        for page in numbers(&all) {
            assert!(self.pushed.remove(&page), "page {page} was not pushed, or went again before");
        }
    }

    /// Whether nothing is left.
    fn pushed(&mut self, owed: &Owed, runs: Vec<PageRun>) -> bool {
        self.pushed.extend(numbers(&runs));
        self.first(owed, &runs)
    }

    fn first(&mut self, owed: &Owed, runs: &[PageRun]) -> bool {
        for page in numbers(runs) {
            assert!(self.rest.remove(&page), "page {page} is not owed");
        }
        assert_eq!(owed.left(), self.rest.len() as u64);
        self.rest.is_empty()
    }
}

fn numbers(runs: &[PageRun]) -> impl Iterator<Item = u64> {
    runs.iter().flat_map(|run| run.first.0..run.first.0 + run.pages)
}

fn destination(input: &mut Reader<'_>) {
    let huge = input.u8() & 1 == 1;
    let granule = if huge { Granule::HUGE } else { Granule::SMALL };
    let total = if huge { 1024 } else { total(input) };
    let words: Vec<u64> = (0..total / 64).map(|_| input.u64()).collect();
    let marks = PageSet::from_words(words, total);
    let mut missing: BTreeSet<u64> = (0..total).filter(|page| !marks.contains(PageIndex(*page))).collect();
    let mut wanted = Wanted::new(marks, missing.len() as u64).seen_by(granule);
    let around = |page: u64| {
        let run = granule.around(PageIndex(page));
        run.first.0..run.first.0 + run.pages
    };
    let mut time = 0u32;
    while !input.is_empty() {
        time += 1;
        let (what, page) = (input.u8(), u64::from(input.u16()) % total);
        let lacks = |missing: &BTreeSet<u64>| missing.range(around(page)).next().is_some();
        let waits =
            |wanted: &Wanted<PageSet, u32>| wanted.waits().any(|(first, _)| around(page).contains(&first));
        if what & 1 == 1 {
            let waited = waits(&wanted);
            let expected = match (lacks(&missing), waited) {
                (false, _) => Fault::Present,
                (true, false) => Fault::Ask,
                (true, true) => Fault::Asked,
            };
            assert_eq!(wanted.fault(page, time), expected);
        } else {
            let run = PageRun { first: PageIndex(page), pages: (u64::from(what) / 2).min(total - page) };
            for part in wanted.lacking(run) {
                for page in part.first.0..part.first.0 + part.pages {
                    assert!(missing.remove(&page), "page {page} is there already");
                    let arrival = wanted.arrived(page);
                    assert_eq!(arrival.is_last, missing.is_empty());
                    assert_eq!(arrival.is_whole, missing.range(around(page)).next().is_none());
                }
            }
            assert!(missing.range(run.first.0..run.first.0 + run.pages).next().is_none());
        }
        assert_eq!(wanted.missing(), missing.len() as u64);
        assert!(lacks(&missing) || !waits(&wanted), "somebody waits for what is there");
    }
}

pub fn seeds() -> Vec<(String, Vec<u8>)> {
    // A connection that lacks every second page: all of RECEIVED, a request, and the pages.
    let received = |input: Writer| {
        (0..4).fold(input.u8(0).u8(0).u8(1).u8(4), |input, _| input.u64(0x5555_5555_5555_5555))
    };
    let source = received(Writer::default().u8(0).u8(3).u8(1).u8(3));
    let source = source.u8(1).u8(2).u8(9).u8(0).u8(10).u8(0).u8(2).u8(3).u8(0).u8(1).u8(77).u8(0).u8(0).u8(1);
    let small = (0..4).fold(Writer::default().u8(1).u8(0).u8(3), |input, _| input.u64(0xff00_ff00_ff00_ff00));
    let small = small.u8(1).u16(3).u8(64).u16(0).u8(1).u16(200).u8(255).u16(100);
    let huge = (0..16).fold(Writer::default().u8(1).u8(1), |input, _| input.u64(u64::MAX - 1));
    let huge = huge.u8(1).u16(600).u8(255).u16(0).u8(255).u16(127).u8(255).u16(500).u8(255).u16(620);
    vec![("source".into(), source.0), ("small".into(), small.0), ("huge".into(), huge.0)]
}
