//! The machine with what the service keeps about it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Instant;

use zerocopy::IntoBytes;

use super::postcopy::Fetching;
use super::{Handled, Reply};
use crate::control::{DirtyPages, Failure, FailureCode, RamLayout};
use crate::memory::{PageIndex, PageRun, PageSet};
use crate::sys::memfd;
use crate::vmm::{GuestExit, Machine, NoticeReceiver};

/// What the vCPUs are doing, as far as the service has been told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Activity {
    /// In guest mode or about to be.
    Running,
    /// Asked to park.
    Pausing,
    /// All parked, nothing under way.
    Parked,
    /// Parked, and being saved since then.
    Exporting(Instant),
    /// Parked, and being restored.
    Importing,
}

/// A machine and its state.
pub(super) struct Hosted {
    /// Shared with what is done beside the loop.
    pub machine: Arc<Machine>,
    pub notices: NoticeReceiver,
    pub activity: Activity,
    /// Saved since it last ran: what a fence needs.
    pub exported: bool,
    /// Restored and synchronised: what a promise needs. Machines that were booted are.
    pub synchronised: bool,
    pub ended: Option<GuestExit>,
    pub dirty: Option<DirtyShare>,
    /// Set while pages come after the guest.
    pub fetching: Option<Fetching>,
}

/// The dirty bitmap that is shared with a mover.
pub(super) struct DirtyShare {
    memfd: File,
    words: Vec<u64>,
    pages: u64,
}

impl Hosted {
    pub fn new(machine: Machine, notices: NoticeReceiver, synchronised: bool) -> Self {
        let activity = Activity::Parked;
        Self {
            machine: Arc::new(machine),
            notices,
            activity,
            exported: false,
            synchronised,
            ended: None,
            dirty: None,
            fetching: None,
        }
    }

    /// The RAM with a memfd for each region.
    pub fn ram(&self) -> Result<(RamLayout, Vec<OwnedFd>), Failure> {
        let ram = self.machine.ram();
        let fds = ram.memfds().map(|fd| fd.try_clone_to_owned()).collect::<io::Result<_>>();
        let fds = fds.map_err(|e| failed(format!("cannot duplicate a RAM memfd: {e}")))?;
        Ok((
            RamLayout { map: ram.map().clone(), vmm_addresses: ram.addresses().to_vec(), pages: ram.pages() },
            fds,
        ))
    }

    /// Writes the pages that were dirtied into the shared bitmap; gives their number.
    pub fn dirty_take(&mut self) -> Result<u64, Failure> {
        let share = self.dirty.as_mut().ok_or_else(dirty_log_off)?;
        let count = self.machine.dirty_take(&mut share.words).map_err(|e| failed(e.to_string()))?;
        if let Err(e) = share.memfd.write_all_at(share.words.as_bytes(), 0) {
            self.machine.dirty_put_back(&PageSet::from_words(share.words.clone(), share.pages));
            return Err(failed(format!("cannot write the dirty bitmap: {e}")));
        }
        Ok(count)
    }

    /// Writes `pages` into the shared bitmap; gives their number.
    pub fn share_pages(&mut self, pages: &PageSet) -> Result<u64, Failure> {
        let written = self.dirty_share()?.memfd.write_all_at(pages.words().as_bytes(), 0);
        written.map_err(|e| failed(format!("cannot write the dirty bitmap: {e}")))?;
        Ok(pages.count())
    }

    /// The bitmap that is shared with the mover.
    pub fn dirty_share(&mut self) -> Result<&mut DirtyShare, Failure> {
        self.dirty.as_mut().ok_or_else(dirty_log_off)
    }

    pub fn dirty_clear(&self, first: PageIndex, pages: u64) -> Result<(), Failure> {
        let share = self.dirty.as_ref().ok_or_else(dirty_log_off)?;
        if first.0.checked_add(pages).is_none_or(|end| end > share.pages) {
            let why = format!("{pages} pages from {first} on are not all RAM ({} pages)", share.pages);
            return Err(Failure::new(FailureCode::Usage, why));
        }
        if pages == 0 {
            return Ok(());
        }
        self.machine.dirty_clear(PageRun { first, pages }).map_err(|e| failed(e.to_string()))
    }

    /// ORs the shared bitmap back into the log.
    pub fn dirty_put_back(&mut self) -> Result<(), Failure> {
        let share = self.dirty.as_mut().ok_or_else(dirty_log_off)?;
        let mut words = vec![0u64; share.words.len()];
        let read = share.memfd.read_exact_at(words.as_mut_bytes(), 0);
        read.map_err(|e| failed(format!("cannot read the dirty bitmap: {e}")))?;
        self.machine.dirty_put_back(&PageSet::from_words(words, share.pages));
        Ok(())
    }
}

impl DirtyShare {
    /// A bitmap for all pages of `machine`, in a memfd.
    pub fn new(machine: &Machine) -> Result<Self, Failure> {
        let pages = machine.describe().ram.total_pages();
        let words = vec![0; pages.div_ceil(64) as usize];
        let memfd = memfd::create_sealed(c"vmferry-dirty", words.len() as u64 * 8)
            .map_err(|e| failed(format!("cannot make the dirty bitmap: {e}")))?;
        Ok(Self { memfd, words, pages })
    }

    /// The answer to a mover that turned the log on.
    pub fn answer(&self) -> Handled {
        let fd = self.memfd.try_clone().map_err(|e| failed(format!("cannot duplicate the bitmap: {e}")))?;
        Reply::with_fds(DirtyPages { pages: self.pages }, vec![fd.into()])
    }
}

pub(super) fn failed(why: impl Into<String>) -> Failure {
    Failure::new(FailureCode::Failed, why)
}

fn dirty_log_off() -> Failure {
    Failure::refused("the dirty log is off: dirty-start comes first")
}
