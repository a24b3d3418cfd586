//! What clients ask: handled at once, or when a chore that is under way is done, or answered later.

use std::os::fd::OwnedFd;
use std::time::Instant;

use super::beside::{Chore, Finish};
use super::{Handled, PENDING_AFTER, Reply, Service};
use crate::control::{ConnectionId, Failure, FailureCode, Incoming, ReplyTo, Request};

/// More orders than these are not kept while a chore is under way.
const MAX_DEFERRED: usize = 1024;

/// What a client can wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Task {
    Pause,
    Export,
    Import,
    Chore(Chore),
}

/// A client that waits.
pub(super) struct Wait {
    pub reply: ReplyTo,
    task: Task,
    since: Instant,
    told: bool,
}

/// What came, and may have to wait for a chore.
pub(super) enum Deferred {
    Call { reply: ReplyTo, request: Request, fds: Vec<OwnedFd>, since: Instant, told: bool },
    Closed(ConnectionId),
}

impl Deferred {
    pub fn new(incoming: Incoming<Request>) -> Self {
        match incoming {
            Incoming::Call { reply, request, fds } => {
                Self::Call { reply, request, fds, since: Instant::now(), told: false }
            }
            Incoming::Closed(connection) => Self::Closed(connection),
        }
    }

    /// Whether it changes nothing, and so need not wait for anything.
    fn only_asks(&self) -> bool {
        matches!(
            self,
            Self::Call {
                request: Request::Hello { .. }
                    | Request::Status
                    | Request::Events
                    | Request::Report { .. }
                    | Request::Machine
                    | Request::Ram,
                ..
            }
        )
    }
}

impl Service {
    /// Handles what came, now or as soon as no chore is under way.
    pub(super) fn take_in(&mut self, came: Deferred) {
        if self.chores.is_empty() || came.only_asks() {
            return self.handle(came);
        }
        match came {
            Deferred::Call { reply, .. } if self.deferred.len() >= MAX_DEFERRED => {
                let why = format!("{MAX_DEFERRED} requests are waiting already");
                self.server.answer::<()>(reply, Err(Failure::new(FailureCode::Busy, why)), Vec::new());
            }
            came => self.deferred.push_back(came),
        }
    }

    fn handle(&mut self, came: Deferred) {
        match came {
            Deferred::Closed(connection) => self.connection_ended(connection),
            Deferred::Call { reply, request, fds, since, told } => {
                let outcome = self.decide(reply.connection, request, fds);
                self.conclude(reply, since, told, outcome);
            }
        }
    }

    /// Answers, or notes that the answer comes later.
    fn conclude(&mut self, reply: ReplyTo, since: Instant, told: bool, outcome: Handled) {
        match outcome {
            Ok(Reply::Now(value, fds)) => self.server.answer(reply, Ok(value), fds),
            Ok(Reply::Later(task)) => self.waits.push(Wait { reply, task, since, told }),
            Err(failure) => self.server.answer::<()>(reply, Err(failure), Vec::new()),
        }
    }

    /// Has `run` done beside the loop. What it gives is called on the loop when it is done, and
    /// answers the request that this was for. Until then orders wait.
    pub(super) fn start(&mut self, chore: Chore, run: impl FnOnce() -> Finish + Send + 'static) -> Handled {
        self.chores.push_back(chore);
        self.beside.give(chore, move || Some(run()));
        Ok(Reply::Later(Task::Chore(chore)))
    }

    /// Goes on with what is done beside the loop, then with what had to wait for it.
    pub(super) fn take_done(&mut self) {
        while let Some(done) = self.beside.next_done() {
            let Some(finish) = done else { continue };
            let chore = self.chores.pop_front();
            let outcome = finish(self);
            let wait = self.waits.iter().position(|w| chore.is_some_and(|c| w.task == Task::Chore(c)));
            if let Some(Wait { reply, since, told, .. }) = wait.map(|at| self.waits.remove(at)) {
                self.conclude(reply, since, told, outcome);
            }
            while self.chores.is_empty()
                && let Some(came) = self.deferred.pop_front()
            {
                self.handle(came);
            }
        }
    }

    /// Answers everyone who waits for `task`. The first who asked gets `reply`; nobody else can ask
    /// for the same export or import meanwhile, and a pause is told by a value.
    pub(super) fn finish_tasks(&mut self, task: Task, reply: impl FnOnce() -> Handled) {
        let (done, rest) = std::mem::take(&mut self.waits).into_iter().partition(|w: &Wait| w.task == task);
        self.waits = rest;
        let done: Vec<Wait> = done;
        if done.is_empty() {
            return;
        }
        let (outcome, fds) = match reply() {
            Ok(Reply::Now(value, fds)) => (Ok(value), fds),
            Ok(Reply::Later(_)) => return,
            Err(failure) => (Err(failure), Vec::new()),
        };
        let mut fds = Some(fds);
        for wait in done {
            self.server.answer(wait.reply, outcome.clone(), fds.take().unwrap_or_default());
        }
    }

    /// When somebody has to be told next that they have to wait.
    pub(super) fn next_pending(&self) -> Option<Instant> {
        let waits = self.waits.iter().filter(|w| !w.told).map(|w| w.since);
        let deferred = self.deferred.iter().filter_map(|came| match came {
            Deferred::Call { since, told: false, .. } => Some(*since),
            _ => None,
        });
        waits.chain(deferred).min().map(|since| since + PENDING_AFTER)
    }

    /// Tells those who have waited long enough that they have to wait.
    pub(super) fn tell_pending(&mut self) {
        let is_due = |w: &Wait| !w.told && w.since.elapsed() >= PENDING_AFTER;
        let pause = self.waits.iter().any(|w| is_due(w) && w.task == Task::Pause);
        let pause_awaited = if pause { self.pause_awaited() } else { String::new() };
        for wait in self.waits.iter_mut().filter(|w| is_due(w)) {
            wait.told = true;
            let awaited = match wait.task {
                Task::Pause => &pause_awaited,
                Task::Export => "the state of vCPUs and devices to be saved",
                Task::Import => "devices and vCPUs to be restored",
                Task::Chore(chore) => chore.awaited(),
            };
            self.server.pending(wait.reply, awaited);
        }
        let Some(under_way) = self.chores.front() else { return };
        for came in &mut self.deferred {
            if let Deferred::Call { reply, since, told: told @ false, .. } = came
                && since.elapsed() >= PENDING_AFTER
            {
                *told = true;
                self.server.pending(*reply, under_way.awaited());
            }
        }
    }
}
