//! What the sender tells of itself: to whoever watches, and to its `vmrun` for the status.

use std::time::{Duration, Instant};

use crate::control::mover::MoverProgress;
use crate::control::{LinkState, MoverReport, millis};
use crate::memory::PAGE_BYTES;

use super::convergence::expected_downtime;
use super::source::{FIXED_COST, Migration};

/// The connection is lost.
#[derive(Clone, Debug)]
pub struct LinkDown {
    since: Instant,
    why: String,
    tries: u32,
    next_try: Option<Instant>,
}

impl LinkDown {
    /// From now on, since `why`.
    pub fn now(why: &str) -> Self {
        Self { since: Instant::now(), why: why.to_owned(), tries: 0, next_try: None }
    }

    /// One more try to connect came to nothing; the next is made in `backoff`.
    pub fn failed(&mut self, why: &str, backoff: Duration) {
        why.clone_into(&mut self.why);
        (self.tries, self.next_try) = (self.tries + 1, Some(Instant::now() + backoff));
    }

    fn state(&self) -> LinkState {
        LinkState::Down {
            for_ms: millis(self.since.elapsed()),
            why: self.why.clone(),
            tries: Some(self.tries),
            next_try_ms: self.next_try.map(|at| millis(at.saturating_duration_since(Instant::now()))),
        }
    }
}

impl Migration<'_> {
    /// Shows where things stand.
    pub(super) fn tick_now(&mut self, pass: u32, left_pages: u64) {
        self.last_progress = Instant::now();
        let counters = self.bulk.as_ref().map(|b| b.counters.get()).unwrap_or_default();
        let seconds = self.pass_started.0.elapsed().as_secs_f64().max(1e-3);
        let bandwidth = (counters.0 - self.pass_started.1) as f64 * PAGE_BYTES as f64 / seconds;
        let last = self.history.last();
        let dirty_rate =
            last.map(|p| p.dirty_after_pages as f64 * PAGE_BYTES as f64 / p.elapsed.as_secs_f64());
        let link = self.link_down.as_ref().map_or(LinkState::Up, LinkDown::state);
        let progress = MoverProgress {
            phase: self.phase.to_owned(),
            dest: self.options.dest.to_string(),
            pass,
            sent_bytes: counters.0 * PAGE_BYTES,
            left_bytes: left_pages * PAGE_BYTES,
            dirty_bytes_per_s: dirty_rate.map(|rate| rate as u64),
            bandwidth_bytes_per_s: (bandwidth > 0.0).then_some(bandwidth as u64),
            expected_downtime_ms: expected_downtime(&self.history, FIXED_COST).map(|d| d.as_millis() as u64),
            elapsed_ms: self.started.elapsed().as_millis() as u64,
            attempt: Some(self.attempt),
            link: link.clone(),
            settings: self.settings.for_control(),
        };
        self.observer.progress(&progress);
        let report = MoverReport {
            phase: progress.phase,
            address: progress.dest,
            moved: self.moved,
            link,
            owed_pages: self.server.as_ref().map(|s| s.left()),
            requests: None,
        };
        // A vmrun that is gone is noticed elsewhere.
        let _ = self.vm.client.report(&report);
    }
}
