//! How a migration ended: what is counted, and the errors that say which side and who has the guest.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::state::Problem;

/// Which of the two hosts something happened on, as the message should name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The host that has the guest when it starts.
    Source,
    /// The host that takes it in.
    Destination,
    /// What lies between them.
    Link,
}

/// Who has the guest after a mover has ended. Each value has its exit code (`cli::exit`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ending {
    /// The destination runs it.
    Moved,
    /// It runs (or stays as it was) at the source; something failed.
    Failed,
    /// Refused before anything was sent; both sides untouched.
    Unsuitable,
    /// Precopy did not reach the downtime; the source runs.
    NotConverged,
    /// The link, the protocol or the peer failed; the source runs.
    PeerFailed,
    /// Interrupted in postcopy: the guest runs at the destination and lacks pages, which the source
    /// keeps; nothing is lost.
    Resumable,
    /// Both sides hold still: the destination may have run the guest, and cannot say.
    Unknown,
    /// The guest is lost.
    Lost,
    /// A signal (its number) was honoured; the source runs.
    Signalled(i32),
}

/// A migration that did not move the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
pub struct MigrateError {
    /// Who has the guest.
    pub ending: Ending,
    /// Where it went wrong.
    pub side: Side,
    /// What went wrong, in one line.
    pub cause: String,
    /// With [`Ending::Unsuitable`]: everything that does not fit.
    pub problems: Vec<Problem>,
}

impl MigrateError {
    /// An error without a list of problems.
    pub fn new(ending: Ending, side: Side, cause: impl fmt::Display) -> Self {
        Self { ending, side, cause: cause.to_string(), problems: Vec::new() }
    }
}

impl fmt::Display for MigrateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}; {})", self.cause, self.side, self.ending)?;
        self.problems.iter().try_for_each(|p| write!(f, "\n  - {}", p.text))
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "on the source",
            Self::Destination => "on the destination",
            Self::Link => "on the link",
        })
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Moved => "the destination has the guest",
            Self::Failed | Self::NotConverged | Self::PeerFailed | Self::Signalled(_) => {
                "the source has the guest"
            }
            Self::Unsuitable => "the source has the guest, untouched",
            Self::Resumable => "the destination has the guest, which lacks pages; `vmsend --resume` goes on",
            Self::Unknown => "nobody runs the guest, and the destination may have: decide with vmctl",
            Self::Lost => "the guest is lost",
        })
    }
}

/// How long the guest stood still, by part, as the source saw it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Downtime {
    /// From the request to all vCPUs parked.
    pub pause_ms: f64,
    /// Saving vCPUs and devices.
    pub export_ms: f64,
    /// The last dirty pages and the state, until the receiver has placed them.
    pub last_pass_ms: f64,
    /// Hashing RAM (`--verify`), as far as nothing else went on meanwhile.
    pub verify_ms: f64,
    /// The destination: reading the state and restoring devices.
    pub import_ms: f64,
    /// The destination: synchronising the vCPUs into KVM.
    pub sync_ms: f64,
    /// From the end of the last pass to READY, less `import` and `sync`: messages and recording.
    pub ready_ms: f64,
    /// Recording the fence.
    pub fence_ms: f64,
    /// From RUN to RUNNING.
    pub run_ms: f64,
    /// All of it.
    pub total_ms: f64,
}

/// What a finished migration has to show.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Who has the guest.
    pub ending: Ending,
    /// The session.
    pub session: String,
    /// From the start to the end.
    pub total_ms: f64,
    /// Passes over RAM, the last one (with the guest paused) included.
    pub passes: u32,
    /// Guest RAM.
    pub memory_bytes: u64,
    /// All bytes that went onto the wire, headers included.
    pub wire_bytes: u64,
    /// Pages sent with their content (a page that was sent twice counts twice).
    pub data_pages: u64,
    /// Pages told to be zero, holes included.
    pub zero_pages: u64,
    /// With postcopy: pages that went ahead of the guest while it ran at the source, in no pass over RAM.
    pub warm_up_pages: Option<u64>,
    /// With postcopy: pages that came after the guest.
    pub postcopy_pages: Option<u64>,
    /// With postcopy: how long the guest waited for pages, as the destination has measured it.
    pub latency: Option<serde_json::Value>,
    /// Bulk channels.
    pub channels: u32,
    /// BLAKE3 of RAM that both sides agree on, with `--verify`.
    pub digest: Option<String>,
    /// The downtime by part.
    pub downtime: Downtime,
}

/// A duration as milliseconds with a fraction.
pub fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// A failure of this host's own before the fence: the source goes on.
pub fn here(error: impl fmt::Display) -> MigrateError {
    MigrateError::new(Ending::Failed, Side::Source, error)
}
