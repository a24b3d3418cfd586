//! What a mover tells the `vmrun` that it drives about itself, so that whoever asks that one hears
//! what a migration waits for.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Where a mover stands, in its own words. Times count from when it said so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoverReport {
    /// What it does: of a vmsend as in [`super::mover::MoverProgress`], of a vmrecv `loading`,
    /// `in-doubt`, `postcopy` or `done`.
    pub phase: String,
    /// Where the other side is reached: DEST of a vmsend, the address at which a vmrecv listens.
    pub address: String,
    /// Whether the guest is known to have run at the destination.
    #[serde(default)]
    pub moved: bool,
    /// The connection between the two movers.
    pub link: LinkState,
    /// In postcopy, of a vmsend: the pages that it has not sent yet on this connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owed_pages: Option<u64>,
    /// In postcopy, of a vmrecv: the pages that were asked for and have not come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests: Option<PageRequests>,
}

/// The connection between two movers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum LinkState {
    /// It stands, or has not been tried yet.
    #[default]
    Up,
    /// It is lost, and has to come back.
    Down {
        /// For how long.
        for_ms: u64,
        /// What was wrong last.
        why: String,
        /// How often a vmsend has tried to connect since; a vmrecv is connected to.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tries: Option<u32>,
        /// When it tries again.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        next_try_ms: Option<u64>,
    },
}

/// Pages that somebody waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRequests {
    /// How many (huge pages, where the RAM is made of them).
    pub pages: u64,
    /// The guest-physical address of the one that is waited for longest.
    pub address: u64,
    /// For how long.
    pub for_ms: u64,
}

/// What a `vmrun` knows of its mover.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoverState {
    /// `vmsend` or `vmrecv`.
    pub program: String,
    /// How old the report is, or, where the mover is gone, how long it has been gone.
    pub age_ms: u64,
    /// Whether it has gone, and what is here is its last word.
    pub gone: bool,
    /// What it said last.
    pub report: MoverReport,
}

impl LinkState {
    /// Down for longer by `age`: what was true when it was said, as it is now.
    pub fn later(self, age: Duration) -> Self {
        let age = millis(age);
        match self {
            Self::Up => Self::Up,
            Self::Down { for_ms, why, tries, next_try_ms } => Self::Down {
                for_ms: for_ms.saturating_add(age),
                why,
                tries,
                next_try_ms: next_try_ms.map(|ms| ms.saturating_sub(age)),
            },
        }
    }
}

impl fmt::Display for LinkState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Down { for_ms, why, tries, next_try_ms } = self else { return f.write_str("up") };
        write!(f, "down for {} ({why})", seconds(*for_ms))?;
        if let Some(tries) = tries.filter(|n| *n > 0) {
            write!(f, ", {tries} tr{} to connect", if tries == 1 { "y" } else { "ies" })?;
        }
        match next_try_ms {
            Some(ms) => write!(f, ", the next in {}", seconds(*ms)),
            None => Ok(()),
        }
    }
}

impl fmt::Display for PageRequests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pages, address, for_ms } = self;
        let (plural, first) = if *pages == 1 { ("", "") } else { ("s", " the first") };
        write!(f, "{pages} page{plural},{first} at {address:#x} for {}", seconds(*for_ms))
    }
}

/// Milliseconds as seconds with one decimal.
pub fn seconds(ms: u64) -> String {
    format!("{}.{} s", ms / 1000, ms % 1000 / 100)
}

/// A duration in milliseconds, as far as they fit.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_said_as_it_is_now_and_in_words() {
        let down =
            LinkState::Down { for_ms: 11_700, why: "refused".into(), tries: Some(5), next_try_ms: Some(500) };
        let now = down.later(Duration::from_millis(600));
        assert_eq!(now.to_string(), "down for 12.3 s (refused), 5 tries to connect, the next in 0.0 s");
        assert_eq!(LinkState::Up.later(Duration::MAX), LinkState::Up);
        let waits = PageRequests { pages: 2, address: 0x40_1000, for_ms: 40 };
        assert_eq!(waits.to_string(), "2 pages, the first at 0x401000 for 0.0 s");
        let value = serde_json::to_value(&now).unwrap();
        assert_eq!(value["state"], "down");
    }
}
