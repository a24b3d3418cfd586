//! What the mover has told of itself, and what a migration waits for.

use std::time::Instant;

use super::{Handled, Reply, Service};
use crate::control::{ConnectionId, Failure, LinkState, MoverReport, MoverState, RunState, millis, seconds};
use crate::switchover::Ownership;

/// The mover that is here, or that was here last.
#[derive(Debug, Default)]
pub(super) struct Told {
    program: String,
    last: Option<(MoverReport, Instant)>,
    /// Since when it has been gone.
    gone: Option<Instant>,
}

impl Told {
    /// It is not here any more.
    pub fn is_gone(&mut self) {
        self.gone.get_or_insert_with(Instant::now);
    }

    /// As it is now.
    fn state(&self) -> Option<MoverState> {
        let (report, at) = self.last.as_ref()?;
        let mut report = report.clone();
        let age = at.elapsed();
        if let Some(requests) = &mut report.requests {
            requests.for_ms = requests.for_ms.saturating_add(millis(age));
        }
        report.link = report.link.later(age);
        let age_ms = millis(self.gone.map_or(age, |since| since.elapsed()));
        Some(MoverState { program: self.program.clone(), age_ms, gone: self.gone.is_some(), report })
    }
}

impl Service {
    /// A mover takes this connection.
    pub(super) fn set_mover(&mut self, from: ConnectionId) {
        if self.mover != Some(from) {
            let program = self.server.client_name(from).to_owned();
            self.told = Told { program, ..Told::default() };
        }
        self.mover = Some(from);
    }

    pub(super) fn report(&mut self, from: ConnectionId, report: MoverReport) -> Handled {
        if self.mover != Some(from) {
            return Err(Failure::refused("only the mover that is attached may report"));
        }
        if let Some(fetching) = self.hosted.as_mut().and_then(|h| h.fetching.as_mut()) {
            // A receiver that took over may listen elsewhere.
            fetching.listen.clone_from(&report.address);
        }
        self.told.last = Some((report, Instant::now()));
        Reply::done()
    }

    pub(super) fn mover_state(&self) -> Option<MoverState> {
        self.told.state()
    }

    /// What is waited for.
    pub(super) fn awaited(&self) -> Option<String> {
        let missing = self
            .hosted
            .as_ref()
            .and_then(|h| h.fetching.as_ref().map(|f| f.missing_pages(h.machine.ram().map().total_pages())));
        let state = self.told.state();
        Situation {
            ownership: &self.ownership,
            run_state: self.run_state(),
            missing,
            attached: self.mover.is_some(),
            gone_ms: self.told.gone.map(|since| millis(since.elapsed())),
            report: state.as_ref().map(|s| &s.report),
            control: &self.control,
        }
        .awaited()
    }

    /// What a client that has asked for a pause waits for.
    pub(super) fn pause_awaited(&self) -> String {
        let is_fetching = self.hosted.as_ref().is_some_and(|h| h.fetching.is_some());
        match self.awaited().filter(|_| is_fetching) {
            Some(awaited) => format!("{awaited}; the pause stays asked for until resume"),
            None => "the vCPUs to leave guest mode".to_owned(),
        }
    }
}

/// What there is to know about who waits for whom.
struct Situation<'a> {
    ownership: &'a Ownership,
    run_state: RunState,
    /// Pages that have not come.
    missing: Option<u64>,
    /// Whether a mover is here.
    attached: bool,
    /// For how long the last one has been gone.
    gone_ms: Option<u64>,
    report: Option<&'a MoverReport>,
    /// This vmrun's control socket.
    control: &'a str,
}

impl Situation<'_> {
    fn awaited(&self) -> Option<String> {
        match self.ownership {
            Ownership::Committed { dest, .. } => Some(self.of_a_committed_guest(dest)),
            Ownership::InDoubt { .. } => Some(match (self.attached, self.link()) {
                (false, _) => self.of_nobody("vmrecv", "vmrecv --resume --control", " LISTEN"),
                (true, Some(link)) => format!("the source to come back to {}: {link}", self.address()),
                (true, None) => "the source's word: RUN, or that it takes the guest back".to_owned(),
            }),
            Ownership::Sole { .. } => match (self.missing, self.run_state) {
                (Some(missing), RunState::Pausing) => Some(format!(
                    "the vCPUs and devices to stop: one that stands at a page stops when that is there; {}",
                    self.of_missing_pages(missing)
                )),
                (Some(missing), _) => Some(self.of_missing_pages(missing)),
                (None, RunState::Pausing) => Some("the vCPUs and devices to stop".to_owned()),
                (None, _) => None,
            },
            Ownership::Empty { .. } | Ownership::Loading { .. } | Ownership::Released { .. } => None,
        }
    }

    fn of_a_committed_guest(&self, dest: &str) -> String {
        if !self.attached {
            return self.of_nobody("vmsend", "vmsend --resume --vm", "");
        }
        let moved = self.report.is_some_and(|r| r.moved);
        match (self.link(), self.report.and_then(|r| r.owed_pages)) {
            (Some(link), _) => format!("the connection to {}: {link}", self.address()),
            (None, _) if !moved => format!("{dest} to say whether it runs the guest"),
            (None, None) => format!("{dest}, where the guest runs, to say which pages it lacks"),
            (None, Some(0)) => format!("{dest} to say that every page has come"),
            (None, Some(pages)) => format!("{pages} pages to be sent to {dest}, where the guest runs"),
        }
    }

    fn of_missing_pages(&self, missing: u64) -> String {
        if !self.attached {
            let nobody = self.of_nobody("vmrecv", "vmrecv --resume --control", "");
            return format!("{nobody} and takes the {missing} pages that are missing");
        }
        let needed = match self.report.and_then(|r| r.requests).filter(|r| r.pages > 0) {
            Some(requests) => format!("needed now: {requests}"),
            None => "none is needed right now".to_owned(),
        };
        match self.link() {
            Some(link) => {
                format!(
                    "the source to come back to {} with {missing} pages ({needed}): {link}",
                    self.address()
                )
            }
            None => format!("{missing} pages from the source ({needed})"),
        }
    }

    /// Nobody is here who could go on.
    fn of_nobody(&self, program: &str, command: &str, rest: &str) -> String {
        let gone =
            self.gone_ms.map(|ms| format!(" (the last one went {} ago)", seconds(ms))).unwrap_or_default();
        format!("a {program}{gone}: `{command} {}{rest}` goes on", self.control)
    }

    /// The link, where it is down.
    fn link(&self) -> Option<&LinkState> {
        self.report.map(|r| &r.link).filter(|link| **link != LinkState::Up)
    }

    fn address(&self) -> &str {
        self.report.map_or("it", |r| &r.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::PageRequests;
    use crate::switchover::{Attempt, SessionId};

    const ATTEMPT: Attempt = Attempt { session: SessionId([7; 16]), epoch: 2 };

    fn report(moved: bool, down: bool) -> MoverReport {
        let why = "refused".to_owned();
        let down_link = LinkState::Down { for_ms: 12_000, why, tries: Some(3), next_try_ms: Some(400) };
        let requests = Some(PageRequests { pages: 1, address: 0x5000, for_ms: 11_000 });
        MoverReport {
            phase: "postcopy".into(),
            address: "tcp:b:7".into(),
            moved,
            link: if down { down_link } else { LinkState::Up },
            owed_pages: Some(90),
            requests,
        }
    }

    fn said(ownership: &Ownership, missing: Option<u64>, report: Option<&MoverReport>) -> String {
        let (attached, run_state, control) = (report.is_some(), RunState::Running, "b.sock");
        let gone_ms = (!attached).then_some(3000);
        let situation = Situation { ownership, run_state, missing, attached, gone_ms, report, control };
        situation.awaited().unwrap_or_default()
    }

    #[test]
    fn at_the_source_it_says_what_the_destination_or_an_operator_has_to_do() {
        let committed = Ownership::Committed { attempt: ATTEMPT, dest: "tcp:b:7".into() };
        let at = |report: Option<&MoverReport>| said(&committed, None, report);
        assert_eq!(at(Some(&report(false, false))), "tcp:b:7 to say whether it runs the guest");
        assert_eq!(at(Some(&report(true, false))), "90 pages to be sent to tcp:b:7, where the guest runs");
        let down = at(Some(&report(true, true)));
        assert_eq!(
            down,
            "the connection to tcp:b:7: down for 12.0 s (refused), 3 tries to connect, the next in 0.4 s"
        );
        assert_eq!(at(None), "a vmsend (the last one went 3.0 s ago): `vmsend --resume --vm b.sock` goes on");
    }

    #[test]
    fn at_the_destination_it_says_which_page_is_needed_and_who_has_to_come() {
        let sole = Ownership::Sole { arrived: Some(ATTEMPT), sending: None };
        let at = |report: Option<&MoverReport>| said(&sole, Some(90), report);
        assert_eq!(
            at(Some(&report(true, false))),
            "90 pages from the source (needed now: 1 page, at 0x5000 for 11.0 s)"
        );
        let down = at(Some(&report(true, true)));
        assert!(
            down.starts_with("the source to come back to tcp:b:7 with 90 pages (needed now: 1 page,"),
            "{down}"
        );
        assert!(down.contains("down for 12.0 s (refused)"), "{down}");
        let nobody = at(None);
        assert!(
            nobody.contains("vmrecv --resume --control b.sock") && nobody.contains("90 pages"),
            "{nobody}"
        );
        assert_eq!(said(&sole, None, Some(&report(true, false))), "");
    }

    #[test]
    fn a_held_guest_waits_for_its_sources_word() {
        let held = Ownership::InDoubt { attempt: ATTEMPT };
        assert!(said(&held, None, Some(&report(false, false))).contains("RUN"));
        assert!(said(&held, None, Some(&report(false, true))).contains("come back to tcp:b:7"));
        assert!(said(&held, None, None).contains("vmrecv --resume --control b.sock LISTEN"));
        assert_eq!(said(&Ownership::empty(), None, None), "");
    }
}
