//! What is said on a control socket: one JSON object a line, both ways.
//!
//! A request is `{"id":7,"cmd":"pause","lease":true}`. Within 100 ms comes an answer with the same
//! id: `{"id":7,"ok":{…}}`, `{"id":7,"error":{"code":…,"message":…}}`, or
//! `{"id":7,"pending":"why"}`, after which the final answer follows when the thing has happened.
//! Lines with `"event"` and no id are for those who asked with `events`. File descriptors travel by
//! SCM_RIGHTS with the first byte of the line that says that they come (`"fds":N`).

use serde::{Deserialize, Serialize};

use super::told::{MoverReport, MoverState};
use crate::memory::{PageIndex, RamMap, RamPages, VmmAddr};
use crate::state::{MachineDescription, Problem};
use crate::switchover::{Attempt, Ownership, SessionId};

/// The version of this protocol; a client of another version is refused at `hello`.
pub const CONTROL_VERSION: u32 = 1;

/// The longest line either side accepts, in bytes.
pub const MAX_LINE_BYTES: usize = 4 << 20;

/// The most file descriptors that come with one line.
pub const MAX_LINE_FDS: usize = 32;

/// A request with its number.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Call<R = Request> {
    /// Chosen by the client; the answer carries it.
    pub id: u64,
    /// How many file descriptors come with the line.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub fds: u32,
    /// What is asked.
    #[serde(flatten)]
    pub request: R,
}

/// Everything that can be asked of a `vmrun`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "kebab-case")]
pub enum Request {
    /// First on every connection. Answer: [`Hello`].
    Hello {
        /// [`CONTROL_VERSION`] of the client.
        version: u32,
        /// Who asks, for the log: `vmctl`, `vmsend`, …
        client: String,
    },
    /// Answer: [`Status`].
    Status,
    /// From here on this connection gets [`Event`] lines. Answer: `{}`.
    Events,
    /// Answer: [`MachineDescription`].
    Machine,
    /// Answer: [`RamLayout`] with one read-only-usable memfd per region.
    Ram,
    /// A sender takes this connection for its session, which it names anew or resumes.
    /// Refused while another live connection has attached. Answer: [`Attached`].
    Attach {
        /// `Some`: a new session. `None`: the one that is under way, with its next epoch.
        session: Option<SessionId>,
        /// Where it is sent, for the record and the status; it may change within a session.
        dest: String,
    },
    /// Starts dirty logging. Answer: [`DirtyPages`] with a memfd that holds the bitmap
    /// (one bit a page in [`PageIndex`] order), written by `dirty-take` and read by `dirty-put-back`.
    DirtyStart,
    /// Writes the pages of the guest's kernel, its code and its data with a name, into the shared bitmap: `dirty-start`
    /// comes first. There may be none. Answer: [`DirtyPages`].
    KernelImage,
    /// Writes the pages dirtied since the last take into the shared bitmap. Answer: [`DirtyPages`].
    /// Pages that are not cleared by `dirty-clear` come with the next take as well.
    DirtyTake,
    /// Re-arms the log for pages that are about to be read. Answer: `{}`.
    DirtyClear {
        /// First page.
        first: PageIndex,
        /// How many.
        pages: u64,
    },
    /// ORs the shared bitmap back into the log: these were taken and not sent. Answer: `{}`.
    DirtyPutBack,
    /// Stops dirty logging. Answer: `{}`.
    DirtyStop,
    /// Parks all vCPUs. With `lease` the guest goes on by itself when this connection ends before a
    /// fence. Answer: [`Status`] once all are parked.
    Pause {
        /// Tie the pause to this connection.
        #[serde(default)]
        lease: bool,
    },
    /// Lets the vCPUs go on. Answer: [`Status`].
    Resume {
        /// `--force`
        #[serde(default)]
        force: bool,
        /// `--peer-fenced`
        #[serde(default)]
        peer_fenced: bool,
    },
    /// Saves the state of vCPUs and devices; the guest must be paused. Answer: [`StateBlob`] with a
    /// memfd.
    Export,
    /// Records that the guest is committed to the destination: it will not run here again without
    /// its word. Answer: `{}` after the record is on disk.
    Fence {
        /// The attempt.
        attempt: Attempt,
        /// Where it goes.
        dest: String,
    },
    /// The destination has answered REVOKED. Answer: `{}`; the guest is paused and may be resumed.
    PeerRevoked {
        /// The attempt.
        attempt: Attempt,
    },
    /// The destination runs and has everything. Answer: `{}`; vmrun then exits as "migrated", or
    /// stays with `keep`.
    Release {
        /// The attempt.
        attempt: Attempt,
        /// Stay, holding the paused remains.
        #[serde(default)]
        keep: bool,
    },
    /// Ends the machine and vmrun. Refused while the guest is in doubt or committed, unless forced.
    Quit {
        /// End it all the same.
        #[serde(default)]
        force: bool,
    },
    /// Incoming: make this machine, empty. Its lease is this connection: when it ends before
    /// `promise`, the machine is dropped. Answer: [`Prepared`] with the memfds.
    Prepare {
        /// The attempt that loads it.
        attempt: Attempt,
        /// What to make.
        machine: Box<MachineDescription>,
        /// Host ends of devices, by device id.
        #[serde(default)]
        remap: Vec<Remap>,
        /// Pages may come after the guest: unsuitable where that cannot be (no userfaultfd).
        #[serde(default)]
        postcopy: bool,
    },
    /// Incoming, before `import`: pages will come after the guest has begun to run. Registers all RAM
    /// with a userfaultfd, of which vmrun keeps a duplicate. Answer: [`Postcopy`] with the
    /// userfaultfd and the memfd of the set of present pages, all absent at first.
    PostcopyArm {
        /// The attempt.
        attempt: Attempt,
        /// Where the receiver listens, for one that has to take over from it.
        listen: String,
    },
    /// Incoming: a receiver takes over from one that has died. Answer: [`Postcopy`] with the
    /// userfaultfd, the present set and then one memfd per RAM region.
    PostcopyAdopt,
    /// Incoming: every page is present. The userfaultfd goes away. Answer: `{}`.
    PostcopyDone {
        /// The attempt.
        attempt: Attempt,
    },
    /// Incoming: restore devices and synchronise all vCPUs from the state in the memfd that comes
    /// along. RAM must be complete (or served). Answer: [`Imported`].
    Import {
        /// The attempt.
        attempt: Attempt,
        /// Bytes of state in the memfd.
        bytes: u64,
    },
    /// Incoming: READY is about to be sent; from here on only `run`, `revoke` or the operator's
    /// word end the wait. Answer: `{}` after the record is on disk.
    Promise {
        /// The attempt.
        attempt: Attempt,
        /// The guest was paused by an operator and stays so, once it runs here. Kept here, since
        /// another receiver may pass RUN on.
        #[serde(default)]
        paused: bool,
    },
    /// Incoming: RUN has come. Records the ownership, then lets the vCPUs go. Answer: [`Status`].
    Run {
        /// The attempt.
        attempt: Attempt,
    },
    /// Incoming: REVOKE or ABORT has come, or loading failed. Answer: `{}`, and the machine is
    /// dropped; refused when it runs.
    Revoke {
        /// The attempt.
        attempt: Attempt,
    },
    /// The mover that is attached, or loads the guest, tells where it stands: for the status, until it
    /// tells anew. Answer: `{}`, at once.
    Report {
        /// What it has to tell.
        report: Box<MoverReport>,
    },
    /// Incoming: the same session on a new connection. Answer: [`Status`].
    Renew {
        /// The attempt with its larger epoch.
        attempt: Attempt,
    },
}

/// A new host end for a device (`--remap ID=VALUE`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remap {
    /// The device's id.
    pub id: String,
    /// What it is backed by on this host.
    pub value: String,
}

/// The answer to one request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Answer {
    /// The request's number.
    pub id: u64,
    /// How many file descriptors come with the line.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub fds: u32,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What came of a request.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Done; the value is the type that the request names.
    Ok(serde_json::Value),
    /// Under way; the final answer follows. The text says what is waited for.
    Pending(String),
    /// Not done.
    Error(Failure),
}

/// Why a request was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// For programs.
    pub code: FailureCode,
    /// For people: the whole sentence.
    pub message: String,
    /// With [`FailureCode::Unsuitable`]: every reason.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Problem>,
}

/// The kinds of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureCode {
    /// No such command, or arguments that do not fit it.
    Usage,
    /// The state of the machine or of its ownership does not allow it now.
    Refused,
    /// Another connection has what was asked for.
    Busy,
    /// This host cannot take the machine (preflight).
    Unsuitable,
    /// It was tried and failed.
    Failed,
}

/// Something that happened, for those who asked with `events`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// What: `run-state`, `ownership`, `guest-exit`, `migrated`.
    pub event: String,
    /// Milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// The state after it.
    pub status: Status,
    /// More, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// Answer to `hello`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`CONTROL_VERSION`] of the server.
    pub version: u32,
    /// `vmrun` or `vmsend`.
    pub program: String,
    /// Its release.
    pub release: String,
    /// Its process.
    pub pid: u32,
}

/// Whether the vCPUs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// No machine yet (`--incoming`).
    Empty,
    /// A guest is being loaded.
    Loading,
    /// vCPUs are in guest mode or about to be.
    Running,
    /// vCPUs are asked to stop, not all have.
    Pausing,
    /// All vCPUs are parked.
    Paused,
    /// The guest has ended.
    Ended,
}

/// Answer to `status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Whether the vCPUs run.
    pub run_state: RunState,
    /// Who owns the guest, as this vmrun sees it.
    pub ownership: Ownership,
    /// One sentence of both for people.
    pub summary: String,
    /// The guest's name, when there is one.
    pub name: Option<String>,
    /// Its uuid.
    pub uuid: Option<String>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// What this host makes it of: `4K`, `2M` or `thp`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ram_pages: Option<RamPages>,
    /// Whether the dirty log is on.
    pub dirty_log: bool,
    /// Whether a live mover is attached.
    pub mover_attached: bool,
    /// Pages that have not come yet, while some come after the guest (postcopy).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missing_pages: Option<u64>,
    /// What the mover has told of itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mover: Option<MoverState>,
    /// What is waited for, for people; nothing, or nothing in particular, when it is not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub awaited: Option<String>,
    /// The vmrun process.
    pub pid: u32,
}

/// Answer to `attach`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attached {
    /// The session and its epoch now.
    pub attempt: Attempt,
    /// The session that was under way before and never will be committed.
    pub superseded: Option<Attempt>,
    /// Ownership as it stands: `Committed` means that RUN has to be said again.
    pub ownership: Ownership,
    /// Where a committed guest went (when resuming).
    pub dest: String,
}

/// Answer to `ram`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RamLayout {
    /// The regions; the memfds come in the same order.
    pub map: RamMap,
    /// Where vmrun has each region mapped.
    pub vmm_addresses: Vec<VmmAddr>,
    /// What the host makes it of.
    #[serde(default)]
    pub pages: RamPages,
}

/// Answer to `prepare`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prepared {
    /// The RAM; the memfds come along.
    pub ram: RamLayout,
}

/// Answer to `postcopy-arm` and `postcopy-adopt`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Postcopy {
    /// The RAM as vmrun has it mapped: what the userfaultfd speaks of.
    pub ram: RamLayout,
    /// The attempt that brings the guest.
    pub attempt: Attempt,
    /// Where the receiver listens.
    pub listen: String,
    /// Whose guest it is.
    pub ownership: Ownership,
}

/// Answer to `dirty-start` and `dirty-take`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirtyPages {
    /// How many pages the bitmap holds.
    pub pages: u64,
}

/// Answer to `export`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateBlob {
    /// Bytes of state in the memfd.
    pub bytes: u64,
    /// How long saving took.
    pub export_us: u64,
    /// Pages of RAM (dense numbers, [`PageIndex`]) that restoring the state touches, then those that
    /// the vCPUs touch first.
    #[serde(default)]
    pub first_touched: Vec<u64>,
}

/// Answer to `import`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Imported {
    /// Reading the state and restoring the devices.
    pub import_us: u64,
    /// Synchronising the vCPUs into KVM.
    pub sync_us: u64,
}

impl super::ControlRequest for Request {
    fn hello(&self) -> Option<(u32, &str)> {
        match self {
            Self::Hello { version, client } => Some((*version, client)),
            _ => None,
        }
    }
}

impl Failure {
    /// A failure of `code` that says `message`.
    pub fn new(code: FailureCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), problems: Vec::new() }
    }

    /// The state does not allow it.
    pub fn refused(message: impl Into<String>) -> Self {
        Self::new(FailureCode::Refused, message)
    }
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde wants a reference
fn is_zero(n: &u32) -> bool {
    *n == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_what_the_documentation_says() {
        let call: Call = serde_json::from_str(r#"{"id":7,"cmd":"pause","lease":true}"#).unwrap();
        assert_eq!((call.id, call.request), (7, Request::Pause { lease: true }));
        let answer = Answer { id: 7, fds: 0, outcome: Outcome::Pending("vcpu 1".into()) };
        assert_eq!(serde_json::to_string(&answer).unwrap(), r#"{"id":7,"pending":"vcpu 1"}"#);
        let answer: Answer =
            serde_json::from_str(r#"{"id":7,"error":{"code":"refused","message":"no"}}"#).unwrap();
        assert!(matches!(answer.outcome, Outcome::Error(f) if f.code == FailureCode::Refused));
    }
}
