//! What is said on the small socket of a `vmsend`: the same lines as on a `vmrun`'s, with other
//! requests. Its answer to `hello` has the program name `vmsend`.

use serde::{Deserialize, Serialize};

use super::ControlRequest;

/// Everything that can be asked of a `vmsend`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "kebab-case")]
pub enum MoverRequest {
    /// First on every connection. Answer: [`super::Hello`].
    Hello {
        /// [`super::CONTROL_VERSION`] of the client.
        version: u32,
        /// Who asks, for the log.
        client: String,
    },
    /// Answer: [`MoverProgress`].
    Progress,
    /// From here on this connection gets [`MoverEvent`] lines. Answer: `{}`.
    Events,
    /// Changes what is given, leaves the rest. Answer: [`MoverSettings`] as they are then.
    Set {
        /// The downtime to aim for.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        downtime_ms: Option<u64>,
        /// The most bytes a second to send; 0 for no limit.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bandwidth_bytes_per_s: Option<u64>,
    },
    /// Gives up; the source's guest goes on. Refused once the guest is committed.
    /// Answer: `{}` when it is certain that the source runs.
    Cancel,
    /// Switches over as soon as it can, whatever downtime that costs. Answer: `{}`.
    SwitchNow,
}

impl ControlRequest for MoverRequest {
    fn hello(&self) -> Option<(u32, &str)> {
        match self {
            Self::Hello { version, client } => Some((*version, client)),
            _ => None,
        }
    }
}

/// What can be changed while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoverSettings {
    /// The downtime to aim for.
    pub downtime_ms: u64,
    /// The most bytes a second to send; `None` for no limit.
    pub bandwidth_bytes_per_s: Option<u64>,
}

/// How far it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoverProgress {
    /// What is being done: `connect`, `precopy`, `warm-up`, `switchover`, `reconnect`, `postcopy`, `done`.
    pub phase: String,
    /// Where the guest goes.
    pub dest: String,
    /// Session and connection, once attached.
    pub attempt: Option<crate::switchover::Attempt>,
    /// The pass over memory, from 1; 0 before the first.
    pub pass: u32,
    /// Bytes of guest RAM sent with their content so far, repetitions included.
    pub sent_bytes: u64,
    /// Bytes of guest RAM that are still to be sent in this pass.
    pub left_bytes: u64,
    /// How fast the guest dirties memory, once it is known.
    pub dirty_bytes_per_s: Option<u64>,
    /// How fast pages go out now, once it is known.
    pub bandwidth_bytes_per_s: Option<u64>,
    /// The downtime if it switched over now, once it can be told.
    pub expected_downtime_ms: Option<u64>,
    /// The connection to the destination.
    #[serde(default)]
    pub link: super::LinkState,
    /// Time since the start.
    pub elapsed_ms: u64,
    /// The settings in force.
    pub settings: MoverSettings,
}

/// Something that happened, for those who asked with `events`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoverEvent {
    /// What: `progress`.
    pub event: String,
    /// Milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// How far it is after it.
    pub progress: MoverProgress,
}

#[cfg(test)]
mod tests {
    use super::super::Call;
    use super::*;

    #[test]
    fn a_setting_that_is_not_named_stays() {
        let call: Call<MoverRequest> =
            serde_json::from_str(r#"{"id":1,"cmd":"set","downtime_ms":50}"#).unwrap();
        assert_eq!(call.request, MoverRequest::Set { downtime_ms: Some(50), bandwidth_bytes_per_s: None });
    }
}
