//! What the receiver tells its `vmrun` of itself, for the status.

use std::time::{Duration, Instant};

use crate::control::{LinkState, MoverReport, PageRequests, millis};
use crate::switchover::DestStep;

use super::{Arrival, Session};

/// How often it tells, at most.
const TELL_EVERY: Duration = Duration::from_millis(200);

/// The connection to the source is lost.
#[derive(Clone, Debug)]
pub(super) struct Lost {
    pub since: Instant,
    pub why: String,
}

impl Lost {
    /// From now on, since `why`.
    pub fn now(why: &str) -> Self {
        Self { since: Instant::now(), why: why.to_owned() }
    }
}

impl Arrival<'_> {
    /// Tells where things stand, now and then; nothing before there is a machine.
    pub(super) fn tell(&mut self) {
        if self.told_at.is_some_and(|at| at.elapsed() < TELL_EVERY) {
            return;
        }
        let Some(session) = self.session.as_ref().filter(|s| s.machine().is_some()) else { return };
        self.told_at = Some(Instant::now());
        let report = MoverReport {
            phase: self.phase(session).to_owned(),
            address: self.address.to_string(),
            moved: self.step == DestStep::Running,
            link: session.lost.as_ref().map_or(LinkState::Up, |lost| LinkState::Down {
                for_ms: millis(lost.since.elapsed()),
                why: lost.why.clone(),
                tries: None,
                next_try_ms: None,
            }),
            owed_pages: None,
            requests: session.requests(),
        };
        // A vmrun that is gone is noticed elsewhere.
        let _ = self.host.client.report(&report);
    }

    fn phase(&self, session: &Session) -> &'static str {
        match self.step {
            DestStep::Loading | DestStep::Refused => "loading",
            DestStep::InDoubt => "in-doubt",
            DestStep::Running if session.fetching() > 0 => "postcopy",
            DestStep::Running => "done",
        }
    }
}

impl Session {
    /// The pages that somebody waits for.
    fn requests(&self) -> Option<PageRequests> {
        let pager = self.pager.as_ref()?;
        let (pages, first) = pager.waits();
        let Some((page, waited)) = first else { return Some(PageRequests::default()) };
        let address = self.machine()?.ram().map().address_of(page)?.0;
        Some(PageRequests { pages, address, for_ms: millis(waited) })
    }
}
