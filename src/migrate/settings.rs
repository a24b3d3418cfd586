//! What the operator can change while a migration runs, and what the migration tells meanwhile.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::control::mover::MoverSettings;

use super::convergence::Policy;

/// The settings of a migration under way, shared with whoever may change them.
#[derive(Clone, Debug)]
pub struct Settings {
    live: Arc<Mutex<Live>>,
    /// The number of a signal that wants the migration to stop, 0 for none. Set from signal handlers.
    signal: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct Live {
    policy: Policy,
    bandwidth_limit: u64,
    cancelled: bool,
    refused_cancels: u64,
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
        let live = Live { policy, bandwidth_limit, cancelled: false, refused_cancels: 0, want_back: false };
        Self { live: Arc::new(Mutex::new(live)), signal: Arc::default() }
    }

    /// Where a signal handler puts its signal's number to stop the migration.
    pub fn signal_slot(&self) -> Arc<AtomicUsize> {
        self.signal.clone()
    }

    /// The policy as it is now.
    pub fn policy(&self) -> Policy {
        self.lock().policy
    }

    /// Changes the downtime that is wanted.
    pub fn set_downtime(&self, downtime: Duration) {
        self.lock().policy.downtime = downtime;
    }

    /// Switch over after the pass under way, whatever the downtime; where the rest may follow, that pass ends at once.
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

    /// Asks to stop.
    pub fn cancel(&self) {
        self.lock().cancelled = true;
    }

    /// Who asked to stop, if anybody has.
    pub fn cancelled(&self) -> Option<Stop> {
        match self.signal.load(Ordering::Relaxed) {
            0 => self.lock().cancelled.then_some(Stop::Operator),
            signal => Some(Stop::Signal(signal as i32)),
        }
    }

    /// Takes a wish to stop back, since it is too late for it.
    pub fn refuse_cancel(&self) -> Option<Stop> {
        let was = self.cancelled();
        self.signal.store(0, Ordering::Relaxed);
        let mut live = self.lock();
        live.cancelled = false;
        live.refused_cancels += u64::from(was.is_some());
        was
    }

    /// How often a wish to stop came too late.
    pub fn refused_cancels(&self) -> u64 {
        self.lock().refused_cancels
    }

    /// What the control socket tells of the settings.
    pub fn for_control(&self) -> MoverSettings {
        let live = self.lock();
        MoverSettings {
            downtime_ms: live.policy.downtime.as_millis() as u64,
            bandwidth_bytes_per_s: Some(live.bandwidth_limit).filter(|limit| *limit > 0),
        }
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
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
