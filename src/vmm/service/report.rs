//! What the service says: status and events.

use super::hosted::Activity;
use super::{Service, now_ms};
use crate::control::{Event, RunState, Status};
use crate::switchover::Ownership;
use crate::vmm::GuestExit;

impl Service {
    /// The status as it is now.
    pub(super) fn status(&self) -> Status {
        let description = self.hosted.as_ref().map(|h| h.machine.describe());
        let awaited = self.awaited();
        Status {
            run_state: self.run_state(),
            ownership: self.ownership.clone(),
            summary: self.summary(),
            name: description.map(|d| d.name.clone()),
            uuid: description.map(|d| d.uuid.clone()),
            vcpus: description.map_or(0, |d| d.vcpus),
            memory_bytes: description.map_or(0, |d| d.ram.total_bytes()),
            ram_pages: description.map(|d| d.ram_pages),
            dirty_log: self.hosted.as_ref().is_some_and(|h| h.dirty.is_some()),
            mover_attached: self.mover.is_some(),
            missing_pages: self.hosted.as_ref().and_then(|h| {
                h.fetching.as_ref().map(|f| f.missing_pages(h.machine.ram().map().total_pages()))
            }),
            // Of one that has gone there is something to tell while it is missed.
            mover: self.mover_state().filter(|mover| !mover.gone || awaited.is_some()),
            awaited,
            pid: std::process::id(),
        }
    }

    pub(super) fn run_state(&self) -> RunState {
        let Some(hosted) = &self.hosted else { return RunState::Empty };
        if hosted.ended.is_some() {
            return RunState::Ended;
        }
        match (&self.ownership, hosted.activity) {
            (Ownership::Loading { .. }, _) => RunState::Loading,
            (_, Activity::Running) => RunState::Running,
            (_, Activity::Pausing) => RunState::Pausing,
            (_, Activity::Parked | Activity::Exporting(_) | Activity::Importing) => RunState::Paused,
        }
    }

    /// One sentence that says who has the guest.
    fn summary(&self) -> String {
        let state = self.run_state();
        if let Some(exit) = self.hosted.as_ref().and_then(|h| h.ended.as_ref()) {
            return format!("the guest has ended: {}", describe_exit(exit));
        }
        match &self.ownership {
            Ownership::Empty { .. } => "no guest: waiting for one to come".into(),
            Ownership::Loading { .. } => "a guest is being loaded; it belongs to its source".into(),
            Ownership::InDoubt { .. } => {
                "a guest is loaded and held: it runs here only when its source says so".into()
            }
            Ownership::Committed { dest, .. } => {
                format!("the guest was committed to {dest} and may run there: this copy is held")
            }
            Ownership::Released { .. } => "the guest runs at its destination: these are its remains".into(),
            Ownership::Sole { .. } => self.sole_summary(state),
        }
    }

    fn sole_summary(&self, state: RunState) -> String {
        let doing = match state {
            RunState::Running => "the guest runs here",
            RunState::Pausing => "the guest is being paused here",
            _ if !self.paused_by.leases.is_empty() => "the guest is here, paused for its switchover",
            _ if self.paused_by.operator => "the guest is here, paused until it is resumed",
            _ => "the guest is here, paused",
        };
        let fetching = self.hosted.as_ref().and_then(|h| {
            let total = h.machine.ram().map().total_pages();
            h.fetching.as_ref().map(|f| f.summary(total, self.mover.is_some()))
        });
        match fetching {
            Some(fetching) => format!("{doing}; {fetching}"),
            None if self.mover.is_some() => format!("{doing}; a migration is under way"),
            None => doing.to_owned(),
        }
    }

    /// Tells everyone who asked for events.
    pub(super) fn emit(&mut self, event: &str, detail: Option<String>) {
        if self.listeners.is_empty() {
            return;
        }
        let event = Event { event: event.to_owned(), time_ms: now_ms(), status: self.status(), detail };
        for listener in &self.listeners {
            self.server.event(*listener, &event);
        }
    }
}

/// How the guest ended, for people.
pub(super) fn describe_exit(exit: &GuestExit) -> String {
    match exit {
        GuestExit::Shutdown => "it powered off".into(),
        GuestExit::Reset => "it asked for a reset".into(),
        GuestExit::TripleFault => "triple fault (a reset of last resort)".into(),
        GuestExit::Error(why) => format!("KVM cannot go on: {why}"),
    }
}
