//! Before postcopy: what the guest will want at once goes ahead, while it still runs here.
//!
//! That is its kernel, code and data: a vCPU whose kernel waits for a page does nothing else meanwhile, most of these
//! pages are not written to again, and of a large guest they are a small part. Then, once, the pages that it has
//! written to meanwhile: where it has just been it goes on.

use std::time::Instant;

use crate::control::ClientError;
use crate::memory::{PageIndex, PageRun, PageSet};

use super::outcome::{MigrateError, here};
use super::precopy::{Bulk, Conductor, Pass};
use super::ram::DataCursor;
use super::source::{Finish, Migration};

impl Migration<'_> {
    /// Turns the dirty log on, sends ahead what it pays to send, and names all else as missing.
    pub(super) fn warm_up(&mut self) -> Result<Finish, MigrateError> {
        self.phase = "warm-up";
        let Some(bulk) = self.bulk.clone() else { return Err(here("no channels")) };
        let total = bulk.views.ram().map().total_pages();
        self.vm.dirty_start().map_err(here)?;
        self.clear_dirty(PageRun { first: PageIndex(0), pages: total })?;
        // Which pages have memory is looked up while the guest runs. What gets some after that is in the dirty log.
        let mut left = PageSet::new(total);
        for run in bulk.views.ram().resident(PageIndex(0), total, &mut DataCursor::default()).map_err(here)? {
            left.insert_run(run);
        }
        if !self.options.warm_up.is_zero() {
            self.cut_at = Instant::now().checked_add(self.options.warm_up);
            self.send_warm(&bulk, &mut left)?;
        }
        self.name_missing(&left);
        self.unsent = Some(left);
        Ok(Finish::Postcopy { at_once: true })
    }

    /// Takes out of `left` what the destination has been sent.
    fn send_warm(&mut self, bulk: &Bulk, left: &mut PageSet) -> Result<(), MigrateError> {
        let mut kernel = self.kernel_image(left.capacity())?;
        kernel.intersect(left);
        if kernel.is_empty() || !self.send_once(1, &kernel, bulk, left)? {
            return Ok(());
        }
        let written = self.vm.dirty_take(left.capacity()).map_err(here)?;
        left.union(&written);
        // Of a guest that writes faster than that, most would be sent in vain.
        if !written.is_empty() && written.count() <= kernel.count() {
            self.send_once(2, &written, bulk, left)?;
        }
        Ok(())
    }

    /// Sends `pages`, and takes them out of `left`. Whether all have gone: it may be cut short.
    fn send_once(
        &mut self,
        number: u32,
        pages: &PageSet,
        bulk: &Bulk,
        left: &mut PageSet,
    ) -> Result<bool, MigrateError> {
        self.pass_started = (Instant::now(), bulk.counters.get().0);
        let pass = Pass { number, set: pages, guest_runs: true, first: false };
        let (report, unsent) = bulk.run_pass(&pass, self)?;
        self.warm_up_pages += report.pages;
        left.subtract(pages);
        left.union(&unsent);
        Ok(unsent.is_empty())
    }

    /// The pages of the guest's kernel; none where its `vmrun` cannot say.
    fn kernel_image(&mut self, total: u64) -> Result<PageSet, MigrateError> {
        match self.vm.kernel_image(total) {
            Err(ClientError::Refused { failure, .. }) => {
                self.observer.note(&format!("nothing goes ahead of the guest: {failure}"));
                Ok(PageSet::new(total))
            }
            image => image.map_err(here),
        }
    }
}
