//! Stopping the guest at the source: what is left goes in a last pass, or is owed to the guest that
//! runs at the destination.

use std::sync::Arc;
use std::time::Instant;

use crate::control::RunState;
use crate::memory::{PageIndex, PageRun, PageSet};
use crate::wire::{self, Message};

use super::outcome::{MigrateError, here, ms};
use super::postcopy::owed::{Owed, take_ahead};
use super::postcopy::server::PageServer;
use super::precopy::{Bulk, Pass};
use super::queue::Chunk;
use super::source::{Finish, Migration};
use super::source_vm::Export;

/// What is left to send when the guest stands still.
struct Left {
    pages: PageSet,
    /// Those that it was writing to at last, and maybe others.
    hot: PageSet,
}

impl Migration<'_> {
    /// Pauses the guest, and sends all that is left or says what comes later. From here on the clock
    /// of the downtime runs.
    pub(super) fn stop(&mut self, finish: Finish) -> Result<(), MigrateError> {
        let Some(bulk) = self.bulk.clone() else { return Err(here("no channels")) };
        let mut clock = Instant::now();
        let mut lap = move || {
            let elapsed = clock.elapsed();
            clock = Instant::now();
            ms(elapsed)
        };
        // A guest that its operator has paused arrives paused.
        let stays_paused = self.vm.client.status().map_err(here)?.run_state == RunState::Paused;
        self.paused = true;
        self.vm.client.pause(true).map_err(here)?;
        self.downtime.pause_ms = lap();
        let Export { state, first_touched } = self.vm.export().map_err(here)?;
        self.downtime.export_ms = lap();
        // Saving may itself have dirtied pages: the last take comes after it (D1).
        let Left { mut pages, mut hot } = self.left(&bulk, &finish)?;
        self.say(&Message::State(state));
        let postcopy = matches!(finish, Finish::Postcopy { .. });
        let mut ahead = Vec::new();
        match finish {
            Finish::LastPass { number } => {
                self.last_pass(number, &pages, &bulk)?;
                self.downtime.last_pass_ms = lap();
                self.await_digest()?;
                self.downtime.verify_ms = lap();
            }
            Finish::Postcopy { .. } => {
                self.name_missing(&pages);
                hot.intersect(&pages);
                ahead = take_ahead(&first_touched, &hot, &mut pages);
                self.send_ahead(&ahead, &bulk)?;
                self.owe(pages, hot, &bulk);
                self.downtime.last_pass_ms = lap();
            }
        }
        let (pages, zero_pages) = bulk.counters.get();
        let (passes, digest) = (self.history.len() as u32 + u32::from(!postcopy), self.digest.clone());
        self.say(&Message::End(wire::End {
            passes,
            pages,
            zero_pages,
            digest,
            stays_paused,
            postcopy,
            ahead: ahead.iter().map(|page| page.0).collect(),
        }));
        Ok(())
    }

    /// What the destination has not, or has stale.
    fn left(&mut self, bulk: &Bulk, finish: &Finish) -> Result<Left, MigrateError> {
        let total = bulk.views.ram().map().total_pages();
        let dirty = self.vm.dirty_take(total).map_err(here)?;
        let mut pages = self.unsent.take().unwrap_or_else(|| PageSet::new(total));
        pages.union(&dirty);
        let hot = match (finish, self.last_set.take()) {
            // Postcopy at once: what was written to since the look, or since it was sent ahead.
            (Finish::Postcopy { at_once: true }, _) => dirty,
            // What was written to in two passes in a row, or in the one that was cut short.
            (_, Some(hot)) => hot,
            (_, None) => PageSet::new(total),
        };
        Ok(Left { pages, hot })
    }

    /// Names `pages` as missing at the destination, as far as that was not done before: most of them
    /// while the guest still runs, and only the rest while it stands still.
    pub(super) fn name_missing(&mut self, pages: &PageSet) {
        let mut new = pages.clone();
        if let Some(named) = &self.named {
            new.subtract(named);
        }
        let first = self.named.replace(pages.clone()).is_none();
        if first || !new.is_empty() {
            for part in wire::PageBitmap::sparse_parts(new.words()) {
                self.say(&Message::Missing(part));
            }
        }
    }

    /// Sends what the guest touches first, in order with END: when the state is imported, nobody waits
    /// for it.
    fn send_ahead(&self, ahead: &[PageIndex], bulk: &Bulk) -> Result<(), MigrateError> {
        let pages = ahead.iter().map(|first| PageRun { first: *first, pages: 1 }).collect();
        match &self.link {
            Some(link) => link.send_on_main(&Chunk { pages, zero: vec![] }, bulk),
            None => Ok(()),
        }
    }

    /// Sends the last pass while the guest stands still, hashing meanwhile if that is wanted.
    fn last_pass(&mut self, number: u32, set: &PageSet, bulk: &Bulk) -> Result<(), MigrateError> {
        if self.options.verify {
            let views = bulk.views.clone();
            self.hashing = Some(std::thread::spawn(move || views.ram().digest()));
        }
        let pass = Pass { number, set, guest_runs: false, first: false };
        bulk.run_pass(&pass, self).map(drop)
    }

    fn await_digest(&mut self) -> Result<(), MigrateError> {
        if let Some(hashing) = self.hashing.take() {
            let digest = hashing.join().map_err(|_| here("hashing RAM panicked"))?.map_err(here)?;
            self.digest = Some(digest);
        }
        Ok(())
    }

    /// From here on answers requests for the pages that come later.
    fn owe(&mut self, left: PageSet, hot: PageSet, bulk: &Bulk) {
        // The workers of the passes are done; the background push comes after RUNNING.
        bulk.queue.stop();
        let owed = Owed::new(left, hot);
        self.postcopy_pages = Some(owed.left());
        let server = Arc::new(PageServer::new(owed));
        if let Some(link) = &self.link {
            link.serve(&server, bulk);
        }
        self.server = Some(server);
    }
}
