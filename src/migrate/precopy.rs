//! The passes: RAM goes out while the guest runs, then what it dirtied meanwhile, and so on.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::memory::{PAGE_BYTES, PageIndex, PageRun, PageSet};

use super::bulk::{Counters, Views};
use super::convergence::PassReport;
use super::outcome::MigrateError;
use super::queue::{Chunk, PassQueue, Pushed};
use super::ram::DataCursor;

/// Pages in one frame, at most: what fits the CPU's cache on both sides.
const CHUNK_PAGES: u64 = 64;
/// Pages whose dirty log is re-armed at once, just before they are read: the shorter the time
/// between the two, the fewer pages are sent twice.
const WINDOW_PAGES: u64 = 4096;
/// Runs of zero pages in one frame, at most.
const CHUNK_RUNS: usize = 1024;
/// How long to wait for room in the queue before the conductor looks around.
const PUSH_PATIENCE: Duration = Duration::from_millis(20);

/// What a pass needs from whoever conducts the migration.
pub trait Conductor {
    /// Re-arms the dirty log for pages that are about to be read.
    fn clear_dirty(&mut self, run: PageRun) -> Result<(), MigrateError>;
    /// Called every few milliseconds: shows progress, and ends the pass when the operator, the link
    /// or the guest says so. `left_pages` have not been handed out yet.
    fn tick(&mut self, pass: u32, left_pages: u64) -> Result<(), MigrateError>;
    /// Whether a pass under way is to end before all of it is sent.
    fn is_cut_short(&self) -> bool;
    /// Waits for the receiver's word that it has placed all pages of `pass`.
    fn await_pass(&mut self, pass: u32) -> Result<(), MigrateError>;
    /// Why the channels stopped taking work.
    fn why_stopped(&mut self) -> MigrateError;
}

/// One pass over `set`.
#[derive(Debug)]
pub struct Pass<'a> {
    /// Counted from 1.
    pub number: u32,
    /// The pages to send.
    pub set: &'a PageSet,
    /// Whether the guest runs, so that the log has to be re-armed.
    pub guest_runs: bool,
    /// Whether nothing has been sent before, so that holes are told as zero without being read.
    pub first: bool,
}

/// The bulk channels as the passes see them.
#[derive(Clone, Debug)]
pub struct Bulk {
    /// Where work is put.
    pub queue: Arc<PassQueue>,
    /// The RAM that is sent.
    pub views: Arc<Views>,
    /// What has gone out.
    pub counters: Arc<Counters>,
}

impl Bulk {
    /// For the RAM that `views` shows, with room for `chunks` pieces of work.
    pub fn new(views: Views, chunks: usize) -> Self {
        Self {
            queue: Arc::new(PassQueue::new(chunks)),
            views: Arc::new(views),
            counters: Arc::new(Counters::default()),
        }
    }

    /// Sends one pass and waits until the receiver has placed it. Gives what it has shown, `dirty_after_pages` of which
    /// is for the caller to fill in, and the pages that were not sent: where the guest runs, a pass may be cut short.
    /// Even then the log is re-armed for all of it, and all holes are told.
    pub fn run_pass(
        &self,
        pass: &Pass,
        conductor: &mut impl Conductor,
    ) -> Result<(PassReport, PageSet), MigrateError> {
        let start = Instant::now();
        let (data_before, _) = self.counters.get();
        let total = pass.set.capacity();
        let mut left = Left { pages: pass.set.count(), read: 0, unsent: PageSet::new(total) };
        let mut cursor = pass.first.then(DataCursor::default);
        let mut end = 0;
        // Windows in which nothing is to be sent are passed over, however much RAM they are.
        while let Some(next) = pass.set.next_from(PageIndex(end)) {
            let window = next.0 / WINDOW_PAGES * WINDOW_PAGES;
            end = (window + WINDOW_PAGES).min(total);
            let runs: Vec<PageRun> = clip(pass.set, window, end).collect();
            if pass.guest_runs {
                conductor.clear_dirty(PageRun { first: PageIndex(window), pages: end - window })?;
            }
            self.hand_out(pass, &runs, cursor.as_mut(), window..end, &mut left, conductor)?;
            conductor.tick(pass.number, left.pages)?;
        }
        self.queue.seal(pass.number);
        conductor.await_pass(pass.number)?;
        let (data_after, _) = self.counters.get();
        let report = PassReport {
            pages: left.read,
            wire_bytes: (data_after - data_before) * PAGE_BYTES,
            elapsed: start.elapsed().max(Duration::from_micros(1)),
            dirty_after_pages: 0,
        };
        Ok((report, left.unsent))
    }

    /// Puts the runs of one window into the queue. The holes of the first pass are looked up only
    /// now, after the window's log was re-armed: a page that gets memory later is in the log.
    fn hand_out(
        &self,
        pass: &Pass,
        runs: &[PageRun],
        first_pass: Option<&mut DataCursor>,
        window: Range<u64>,
        left: &mut Left,
        conductor: &mut impl Conductor,
    ) -> Result<(), MigrateError> {
        let ram = self.views.ram();
        let resident = first_pass
            .map(|cursor| ram.resident(PageIndex(window.start), window.end - window.start, cursor))
            .transpose()
            .map_err(super::outcome::here)?;
        for mut chunk in chunks(runs, resident.as_deref()) {
            if pass.guest_runs && conductor.is_cut_short() {
                chunk.pages.drain(..).for_each(|run| left.unsent.insert_run(run));
            }
            left.read += chunk.pages.iter().map(|run| run.pages).sum::<u64>();
            if chunk != Chunk::default() {
                self.push(chunk, pass.number, &mut left.pages, conductor)?;
            }
        }
        Ok(())
    }

    /// Waits until there is room, but not deaf: the operator is heard, and progress shown, also where
    /// the bandwidth limit is so low that one window takes minutes.
    fn push(
        &self,
        mut chunk: Chunk,
        pass: u32,
        left: &mut u64,
        conductor: &mut impl Conductor,
    ) -> Result<(), MigrateError> {
        let pages: u64 = chunk.pages.iter().chain(&chunk.zero).map(|r| r.pages).sum();
        loop {
            chunk = match self.queue.push(chunk, PUSH_PATIENCE) {
                Pushed::Done => break,
                Pushed::Stopped => return Err(conductor.why_stopped()),
                Pushed::Full(chunk) => chunk,
            };
            conductor.tick(pass, *left)?;
        }
        *left -= pages;
        Ok(())
    }
}

/// What of a pass has not been handed out, and what has.
struct Left {
    /// How many pages, those that will not be among them.
    pages: u64,
    /// How many were, holes excepted.
    read: u64,
    /// The pages that will not be: the pass was cut short.
    unsent: PageSet,
}

/// The runs of one window in pieces of work, by what has memory (`resident`; all of it without that list) and what not.
fn chunks(runs: &[PageRun], resident: Option<&[PageRun]>) -> Vec<Chunk> {
    let (mut all, mut chunk, mut chunk_pages) = (Vec::new(), Chunk::default(), 0);
    for (part, is_hole) in runs.iter().flat_map(|run| split_by(*run, resident)) {
        let mut rest = part;
        while !is_hole && rest.pages > 0 {
            let now = rest.pages.min(CHUNK_PAGES - chunk_pages);
            chunk.pages.push(PageRun { first: rest.first, pages: now });
            chunk_pages += now;
            rest = PageRun { first: PageIndex(rest.first.0 + now), pages: rest.pages - now };
            if chunk_pages == CHUNK_PAGES {
                all.push(std::mem::take(&mut chunk));
                chunk_pages = 0;
            }
        }
        if is_hole {
            chunk.zero.push(part);
        }
        if chunk.zero.len() >= CHUNK_RUNS {
            all.push(std::mem::take(&mut chunk));
            chunk_pages = 0;
        }
    }
    if chunk != Chunk::default() {
        all.push(chunk);
    }
    all
}

/// The runs of `set` within `from..to`.
fn clip(set: &PageSet, from: u64, to: u64) -> impl Iterator<Item = PageRun> + '_ {
    set.runs_from(PageIndex(from))
        .take_while(move |r| r.first.0 < to)
        .map(move |r| PageRun { first: r.first, pages: r.pages.min(to - r.first.0) })
}

/// The parts of `run` with memory behind them (`resident`, ascending) and those without, in order;
/// without that list all of it counts as having memory.
fn split_by(run: PageRun, resident: Option<&[PageRun]>) -> Vec<(PageRun, bool)> {
    let Some(resident) = resident else { return vec![(run, false)] };
    let end = run.first.0 + run.pages;
    let mut parts = Vec::new();
    let mut at = run.first.0;
    for data in resident {
        let (from, to) = (data.first.0.max(at), (data.first.0 + data.pages).min(end));
        if from >= to {
            continue;
        }
        let data = PageRun { first: PageIndex(from), pages: to - from };
        if data.first.0 > at {
            parts.push((PageRun { first: PageIndex(at), pages: data.first.0 - at }, true));
        }
        parts.push((data, false));
        at = data.first.0 + data.pages;
    }
    if at < end {
        parts.push((PageRun { first: PageIndex(at), pages: end - at }, true));
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, pages: u64) -> PageRun {
        PageRun { first: PageIndex(first), pages }
    }

    #[test]
    fn holes_and_data_alternate_and_cover_the_run() {
        let resident = [run(10, 5), run(20, 30)];
        assert_eq!(
            split_by(run(12, 20), Some(&resident)),
            vec![(run(12, 3), false), (run(15, 5), true), (run(20, 12), false)]
        );
        assert_eq!(split_by(run(60, 5), Some(&resident)), vec![(run(60, 5), true)]);
        assert_eq!(split_by(run(60, 5), None), vec![(run(60, 5), false)]);
    }

    #[test]
    fn a_window_is_cut_into_pieces_that_fit_a_frame() {
        let resident = [run(10, 70), run(100, 100)];
        let pieces = chunks(&[run(0, 90), run(95, 205)], Some(&resident));
        let pages: Vec<u64> = pieces.iter().map(|c| c.pages.iter().map(|r| r.pages).sum()).collect();
        assert_eq!(pages, [CHUNK_PAGES, CHUNK_PAGES, 170 - 2 * CHUNK_PAGES]);
        let zero: Vec<PageRun> = pieces.iter().flat_map(|c| c.zero.clone()).collect();
        assert_eq!(zero, [run(0, 10), run(80, 10), run(95, 5), run(200, 100)]);
        // Many holes fill a frame as well.
        let holes: Vec<PageRun> = (0..CHUNK_RUNS as u64 + 1).map(|n| run(2 * n, 1)).collect();
        let lengths: Vec<usize> = chunks(&holes, Some(&[])).iter().map(|c| c.zero.len()).collect();
        assert_eq!(lengths, [CHUNK_RUNS, 1]);
        assert_eq!(chunks(&[], None), []);
    }

    #[test]
    fn clipping_keeps_what_is_inside() {
        let mut set = PageSet::new(100);
        set.insert_run(run(5, 20));
        set.insert_run(run(30, 5));
        assert_eq!(clip(&set, 10, 32).collect::<Vec<_>>(), vec![run(10, 15), run(30, 2)]);
    }
}
