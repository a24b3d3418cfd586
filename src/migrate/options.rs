//! What the movers are told to do.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use crate::transport::Address;

use super::convergence::{Mode, OnTimeout, Policy};
use super::host::HostOptions;
use super::postcopy::latency::Latency;

/// Everything that `vmsend` is told.
#[derive(Clone, Debug)]
pub struct SendOptions {
    /// The control socket of the `vmrun` that has the guest.
    pub vm: PathBuf,
    /// Where the guest goes.
    pub dest: Address,
    /// When taking a migration up again: where the destination is reached now, if no longer where it was.
    pub redirect: Option<Address>,
    /// Bulk channels; 0: pages go on the main channel.
    pub channels: u32,
    /// Compare the digests of RAM before the switchover (while the guest stands still).
    pub verify: bool,
    /// Leave the source's `vmrun` with the remains of the guest instead of ending it.
    pub keep_source: bool,
    /// How long a silence counts as death.
    pub peer_timeout: Duration,
    /// How long connecting may take.
    pub connect_timeout: Duration,
    /// How long to try to reach a destination that may or may not have taken the guest over; `None`:
    /// for ever once it is known to run there and pages are owed, a minute before that.
    pub recover_timeout: Option<Duration>,
    /// How long pages may go ahead of a guest that goes over in postcopy at once; zero: none do.
    pub warm_up: Duration,
    /// When to switch over.
    pub policy: Policy,
    /// Bytes per second over all channels, 0 for no limit.
    pub bandwidth_limit: u64,
}

impl SendOptions {
    /// Whether pages may come after the guest.
    pub fn wants_postcopy(&self) -> bool {
        self.policy.mode != Mode::Precopy || self.policy.on_timeout == OnTimeout::Postcopy
    }
}

/// Everything that `vmrecv` is told.
#[derive(Clone, Debug)]
pub struct ReceiveOptions {
    /// Where to wait for the source.
    pub listen: Address,
    /// How long a silence counts as death.
    pub peer_timeout: Duration,
    /// How long to wait for a source that was lost after the guest began to run here.
    pub linger: Duration,
    /// The `vmrun` that takes the guest.
    pub host: HostOptions,
}

/// What the receiver has to show in the end.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Arrived {
    /// The session.
    pub session: String,
    /// The guest's name.
    pub name: String,
    /// The control socket of the `vmrun` that hosts it now.
    pub control: PathBuf,
    /// From HELLO to the end.
    pub total_ms: f64,
    /// Pages placed with their content, repetitions included.
    pub data_pages: u64,
    /// Pages told to be zero, repetitions included.
    pub zero_pages: u64,
    /// After postcopy: how long the guest waited for pages.
    pub latency: Option<Latency>,
    /// BLAKE3 of RAM that both sides agree on, with `--verify`.
    pub digest: Option<String>,
}
