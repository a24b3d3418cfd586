//! Postcopy on the receiving side: RAM whose pages come after the guest.
//!
//! `vmrun` registers the RAM and hands the userfaultfd to the receiver, but keeps a duplicate: when
//! the receiver dies, faults wait for the next one instead of finding zeros. The set of pages that
//! are present lives here too, for the same reason.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::Instant;

use super::hosted::{Activity, failed};
use super::{Handled, Reply, Service};
use crate::control::{ConnectionId, Failure, FailureCode, Postcopy};
use crate::memory::RamPages;
use crate::switchover::{Attempt, Ownership};
use crate::sys::bitmap::SharedBitmap;
use crate::sys::memfd;
use crate::sys::uffd::FaultFd;
use crate::vmm::memory::GuestRam;

/// Pages are missing, and somebody fetches them.
pub(super) struct Fetching {
    faults: FaultFd,
    memfd: File,
    present: SharedBitmap,
    /// Where its receiver listens, or has listened.
    pub listen: String,
    since: Instant,
}

impl Fetching {
    /// Pages that have not come.
    pub fn missing_pages(&self, total: u64) -> u64 {
        let present: u64 = self
            .present
            .words()
            .iter()
            .map(|w| u64::from(w.load(std::sync::atomic::Ordering::Acquire).count_ones()))
            .sum();
        total.saturating_sub(present)
    }

    /// What is waited for, for people. `attended`: a receiver is there.
    pub fn summary(&self, total: u64, attended: bool) -> String {
        let (missing, seconds) = (self.missing_pages(total), self.since.elapsed().as_secs());
        let who = if attended {
            format!("its receiver takes them at {}", self.listen)
        } else {
            "nobody takes them: start vmrecv --resume".to_owned()
        };
        format!("{missing} of its pages have yet to come, {seconds} s after its switchover; {who}")
    }
}

impl Service {
    /// Registers the RAM of a machine that is empty so far.
    pub(super) fn postcopy_arm(&mut self, from: ConnectionId, attempt: Attempt, listen: String) -> Handled {
        if self.mover != Some(from) {
            return Err(Failure::new(
                FailureCode::Busy,
                "only the receiver that loads the guest may arm postcopy",
            ));
        }
        self.ownership.clone().promise(attempt).map_err(|e| Failure::refused(e.to_string()))?;
        let hosted = self.live_mut()?;
        if hosted.activity != Activity::Parked || hosted.synchronised || hosted.fetching.is_some() {
            return Err(Failure::refused("postcopy can be armed once, before the import"));
        }
        let made = |what: &str, e: std::io::Error| failed(format!("cannot {what}: {e}"));
        let ram = hosted.machine.ram();
        let pages = ram.map().total_pages();
        let faults =
            watch(ram).map_err(|e| made("register the RAM with a userfaultfd (/dev/userfaultfd)", e))?;
        let memfd = memfd::create_sealed(c"vmferry-present", pages.div_ceil(64) * 8)
            .map_err(|e| made("make the set of present pages", e))?;
        let present =
            SharedBitmap::new(&memfd, pages).map_err(|e| made("map the set of present pages", e))?;
        hosted.fetching = Some(Fetching { faults, memfd, present, listen, since: Instant::now() });
        let (answer, fds) = self.postcopy_answer()?;
        Reply::with_fds(answer, fds)
    }

    /// Hands everything to a receiver that takes over.
    pub(super) fn postcopy_adopt(&mut self, from: ConnectionId) -> Handled {
        if let Some(other) = self.mover.filter(|m| *m != from) {
            let who = self.server.client_name(other);
            return Err(Failure::new(FailureCode::Busy, format!("another mover ({who}) is attached")));
        }
        if !matches!(self.ownership, Ownership::InDoubt { .. } | Ownership::Sole { .. }) {
            return Err(Failure::refused(format!(
                "there is nothing to take over: this vmrun {}",
                self.ownership
            )));
        }
        let (answer, mut fds) = self.postcopy_answer()?;
        let (_, memfds) = self.live()?.ram()?;
        fds.extend(memfds);
        self.set_mover(from);
        Reply::with_fds(answer, fds)
    }

    /// All pages are there: the guest's memory is its own again.
    pub(super) fn postcopy_done(&mut self, from: ConnectionId, attempt: Attempt) -> Handled {
        if self.mover != Some(from) {
            return Err(Failure::new(FailureCode::Busy, "only the receiver that fetches pages may end it"));
        }
        if self.ownership.attempt().is_none_or(|have| have.session != attempt.session) {
            return Err(Failure::refused("the end of postcopy is refused: it is for another session"));
        }
        let hosted = self.live_mut()?;
        let total = hosted.machine.ram().map().total_pages();
        let missing = hosted.fetching.as_ref().map_or(0, |f| f.missing_pages(total));
        if missing > 0 {
            return Err(Failure::refused(format!("{missing} pages are still missing")));
        }
        self.stop_fetching();
        self.emit("run-state", Some("every page has come".to_owned()));
        Reply::done()
    }

    /// Lets go of the userfaultfd; whoever waits for a page finds what is there.
    pub(super) fn stop_fetching(&mut self) {
        let Some(hosted) = &mut self.hosted else { return };
        let Some(fetching) = hosted.fetching.take() else { return };
        let ram = hosted.machine.ram();
        for (region, address) in ram.map().regions().iter().zip(ram.addresses()) {
            if let Err(e) = fetching.faults.unregister(address.0, region.bytes) {
                tracing::warn!("cannot unregister the RAM from userfaultfd: {e}");
            }
        }
        ram.join_pages(true);
    }

    fn postcopy_answer(&self) -> Result<(Postcopy, Vec<OwnedFd>), Failure> {
        let hosted = self.live()?;
        let Some(fetching) = &hosted.fetching else {
            return Err(Failure::refused("no pages are missing here: there is nothing to fetch"));
        };
        let Some(attempt) = self.ownership.attempt() else {
            return Err(Failure::refused("no migration brings this guest"));
        };
        let duplicate = |e| failed(format!("cannot duplicate a descriptor: {e}"));
        let fds = vec![
            fetching.faults.duplicate().map_err(duplicate)?,
            fetching.memfd.try_clone().map_err(duplicate)?.into(),
        ];
        let (ram, _) = hosted.ram()?;
        let (listen, ownership) = (fetching.listen.clone(), self.ownership.clone());
        Ok((Postcopy { ram, attempt, listen, ownership }, fds))
    }
}

/// Registers RAM in which pages are missing. Huge pages fill up in the file, where this process does not
/// see them, and are shown one by one when they are whole.
fn watch(ram: &GuestRam) -> std::io::Result<FaultFd> {
    let huge = ram.pages() == RamPages::Huge;
    let faults = if huge { FaultFd::for_huge_pages() } else { FaultFd::new() }?;
    for (region, address) in ram.map().regions().iter().zip(ram.addresses()) {
        match huge {
            true => faults.register_hidden(address.0, region.bytes)?,
            false => faults.register(address.0, region.bytes)?,
        }
    }
    if huge {
        ram.unmap()?;
    }
    Ok(faults)
}
