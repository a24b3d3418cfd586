//! What the operator can change while a migration runs, and what the migration tells meanwhile.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::convergence::Policy;

/// The settings of a migration under way, shared with whoever may change them.
#[derive(Clone, Debug)]
pub struct Settings(Arc<Mutex<Live>>);

#[derive(Debug)]
struct Live {
    policy: Policy,
    bandwidth_limit: u64,
    cancel: Option<Stop>,
    want_back: bool,
}

/// Who wants to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// `vmctl … cancel`.
    Operator,
    /// A signal, by its number.
    Signal(i32),
}

impl Settings {
    /// `bandwidth_limit` in bytes per second over all channels, 0 for none.
    pub fn new(policy: Policy, bandwidth_limit: u64) -> Self {
        Self(Arc::new(Mutex::new(Live { policy, bandwidth_limit, cancel: None, want_back: false })))
    }

    /// The policy as it is now.
    pub fn policy(&self) -> Policy {
        self.lock().policy
    }

    /// Changes the downtime that is wanted.
    pub fn set_downtime(&self, downtime: Duration) {
        self.lock().policy.downtime = downtime;
    }

    /// Switch over after the pass under way, whatever the downtime.
    pub fn switch_now(&self) {
        self.lock().policy.switch_now = true;
    }

    /// Bytes per second over all channels, 0 for no limit.
    pub fn bandwidth_limit(&self) -> u64 {
        self.lock().bandwidth_limit
    }

    /// Changes the bandwidth limit.
    pub fn set_bandwidth_limit(&self, bytes_per_s: u64) {
        self.lock().bandwidth_limit = bytes_per_s;
    }

    /// Asks to stop; the first to ask is remembered.
    pub fn cancel(&self, who: Stop) {
        self.lock().cancel.get_or_insert(who);
    }

    /// Who asked to stop, if anybody has.
    pub fn cancelled(&self) -> Option<Stop> {
        self.lock().cancel
    }

    /// Takes a wish to stop back, after it was refused.
    pub fn forget_cancel(&self) -> Option<Stop> {
        self.lock().cancel.take()
    }

    /// Asks for a committed guest back (REVOKE).
    pub fn want_back(&self) {
        self.lock().want_back = true;
    }

    /// Whether a committed guest is wanted back.
    pub fn back_wanted(&self) -> bool {
        self.lock().want_back
    }

    fn lock(&self) -> MutexGuard<'_, Live> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
