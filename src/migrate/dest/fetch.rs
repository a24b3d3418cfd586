//! Postcopy: arming the pager, fetching on after a loss, taking over from a receiver that died.

use std::sync::Arc;

use crate::control::Postcopy;
use crate::memory::{PageIndex, PageSet};
use crate::migrate::host::Host;
use crate::migrate::outcome::{Ending, MigrateError, Side};
use crate::migrate::placer::Placer;
use crate::migrate::postcopy::pager::Pager;
use crate::migrate::ram::Ram;
use crate::switchover::{Attempt, DestStep, Ownership};
use crate::wire::limits::MAX_AHEAD_PAGES;
use crate::wire::{self, Message, PageBitmap};

use super::tell::Lost;
use super::{Arrival, Event, Session, failed};

/// What a receiver that died has left with its `vmrun`.
pub(super) struct TakenOver {
    attempt: Attempt,
    step: DestStep,
    uuid: String,
    name: String,
    /// Where the one before listened, as far as it was recorded.
    pub listen: Option<String>,
    fetched: Option<(Postcopy, Arc<Pager>, Arc<Ram>)>,
}

/// Takes the guest of a receiver that died: its ownership, and in postcopy its userfaultfd, its RAM
/// and the set of pages that are present.
pub(super) fn take_over(host: &mut Host) -> Result<TakenOver, MigrateError> {
    let status = host.client.status().map_err(failed)?;
    let step = match &status.ownership {
        Ownership::InDoubt { .. } => DestStep::InDoubt,
        Ownership::Sole { arrived: Some(_), .. } if status.missing_pages.is_some() => DestStep::Running,
        other => {
            return Err(failed(format!(
                "there is nothing to resume: the vmrun at {} {other}",
                host.path().display()
            )));
        }
    };
    let Some(attempt) = status.ownership.attempt() else {
        return Err(failed("there is nothing to resume: no migration brings this guest"));
    };
    let (name, uuid) = (status.name.unwrap_or_default(), status.uuid.unwrap_or_default());
    let mut taken = TakenOver { attempt, step, uuid, name, listen: None, fetched: None };
    if status.missing_pages.is_some() {
        let (postcopy, uffd, present, memfds) = host.client.postcopy_adopt().map_err(failed)?;
        let ram = Arc::new(Ram::writable(&postcopy.ram, memfds, true).map_err(failed)?);
        let pager = Pager::resume(&postcopy, ram.clone(), uffd, present).map_err(failed)?;
        taken.listen = Some(postcopy.listen.clone());
        taken.fetched = Some((postcopy, pager, ram));
    } else {
        host.client.renew(attempt).map_err(failed)?;
    }
    Ok(taken)
}

impl Arrival<'_> {
    /// Goes on where a receiver that died has stopped: the source will come back by itself.
    pub(super) fn adopt(&mut self, taken: TakenOver) -> Result<(), MigrateError> {
        let hello = wire::Hello::unknown(taken.uuid, taken.name);
        let mut session = Session::new(taken.attempt, hello);
        session.lost = Some(Lost { since: self.started, why: "its receiver was killed".to_owned() });
        self.step = taken.step;
        if let Some((_, pager, ram)) = taken.fetched {
            let placer = Placer::new(ram);
            placer.page_with(pager.clone());
            let _ = session.placer.set(Some(placer));
            self.observer.note(&format!("{} pages have yet to come", pager.missing_pages()));
            self.start_pager(&pager)?;
            // Faults that the one before us had read are told of anew.
            pager.wake_all().map_err(failed)?;
            session.pager = Some(pager);
        }
        self.session = Some(session);
        Ok(())
    }

    /// A part of the set of pages that come after the guest. The first comes while the guest still runs
    /// elsewhere: what faults need is made ready then.
    pub(super) fn on_missing(&mut self, part: &PageBitmap) -> Result<(), MigrateError> {
        let Some(session) = &mut self.session else { return Ok(()) };
        if !session.hello.wants_postcopy() {
            // Neither the host was asked whether it can, nor is the memory made for it.
            return self.fail("MISSING, and HELLO has not said that pages may come after the guest");
        }
        let Some(total) = session.machine().map(|p| p.ram().map().total_pages()) else {
            return self.fail("MISSING before the machine was accepted");
        };
        let words = session.missing.get_or_insert_with(|| vec![0; total.div_ceil(64) as usize]);
        if let Err(error) = part.add_to(wire::FrameType::Missing, words) {
            return self.fail(error);
        }
        if session.armed.is_none() {
            let listen = self.address.to_string();
            match self.host.client.postcopy_arm(session.attempt, &listen) {
                Ok(armed) => session.armed = Some(armed),
                Err(error) => return self.fail(error),
            }
        }
        Ok(())
    }

    /// Before the import: what was dirtied since it was sent is thrown away (D2), faults are served
    /// from here on. The pages `ahead` came after they had been named as missing.
    pub(super) fn page(&mut self, ahead: &[u64]) -> Result<(), MigrateError> {
        let Some(session) = &mut self.session else { return Ok(()) };
        let (Some(missing), Some((postcopy, uffd, present))) = (session.missing.take(), session.armed.take())
        else {
            return Err(failed("END promises pages and no MISSING has come"));
        };
        let Some(placer) = session.placer.get().and_then(Option::as_ref) else {
            return Err(failed("END before the machine was accepted"));
        };
        if ahead.len() > MAX_AHEAD_PAGES {
            return Err(failed(format!("END names {} pages as sent ahead", ahead.len())));
        }
        let mut missing = PageSet::from_words(missing, placer.ram().map().total_pages());
        for page in ahead.iter().map(|page| PageIndex(*page)) {
            if !missing.contains(page) {
                return Err(failed(format!("{page} came ahead and was not named as missing")));
            }
            missing.remove(page);
        }
        placer.discard(&missing).map_err(|e| failed(format!("stale pages cannot be thrown away: {e}")))?;
        let pager = Pager::new(&postcopy, placer.ram().clone(), uffd, present, &missing).map_err(failed)?;
        placer.page_with(pager.clone());
        if let Some(main) = &session.main {
            pager.connect(main.sender().clone());
        }
        session.pager = Some(pager.clone());
        self.start_pager(&pager)
    }

    /// Without postcopy: nothing may be registered, since nobody would serve its faults.
    pub(super) fn disarmed(&self) -> Result<(), MigrateError> {
        match self.session.as_ref().is_some_and(|s| s.armed.is_some()) {
            true => Err(failed("MISSING has come, and END says that nothing is missing")),
            false => Ok(()),
        }
    }

    fn start_pager(&self, pager: &Arc<Pager>) -> Result<(), MigrateError> {
        let events = self.events.clone();
        pager.start(Box::new(move || drop(events.send(Event::AllPresent)))).map_err(failed)
    }

    /// The source has come back: it hears what is waited for, and what is here. In this order: when
    /// RECEIVED is whole it begins to push, and what is waited for has to come before that.
    pub(super) fn fetch_on(&mut self) {
        let Some(session) = &self.session else { return };
        let (Some(pager), Some(main)) = (&session.pager, &session.main) else { return };
        if pager.missing_pages() == 0 {
            return;
        }
        pager.connect(main.sender().clone());
        for part in PageBitmap::parts(&pager.present_words()) {
            // A line that fails is noticed by its pump.
            if main.send(&Message::Received(part)).is_err() {
                return;
            }
        }
    }

    /// The last page has come: nothing of the fault handling stays, and the source hears it.
    pub(super) fn on_all_present(&mut self) -> Result<(), MigrateError> {
        let Some(session) = &self.session else { return Ok(()) };
        let Some(pager) = session.pager.as_ref().filter(|p| p.missing_pages() == 0) else { return Ok(()) };
        if self.step != DestStep::Running {
            // Seen again when it runs.
            return Ok(());
        }
        // Until then holes are made zero by the pager: a receiver that takes over goes on with that.
        self.host.client.postcopy_done(session.attempt).map_err(|error| {
            let what =
                format!("all pages of the guest that runs here have come, but vmrun waits on: {error}");
            MigrateError::new(Ending::Unknown, Side::Destination, what)
        })?;
        pager.stop();
        let (pages, zero_pages) = session.counts();
        let latency = Some(serde_json::to_value(pager.latency()).unwrap_or_default());
        let done = wire::Done { pages, zero_pages, digest: None, latency };
        self.say(&Message::Done(done))
    }
}
