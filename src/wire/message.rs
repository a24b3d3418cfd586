//! Every frame that carries no pages, as a type.
//!
//! Structured payloads are JSON objects; fields that this version does not know are ignored, so
//! that later ones may be added (what changes the meaning of a frame needs a feature). RUN, REVOKE
//! and the like have no payload: the header says it all.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::FrameType;
use super::limits::max_payload;
use crate::switchover::Attempt;

/// A frame without pages.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// S→D, first on the main channel.
    Hello(Hello),
    /// D→S, the answer to HELLO.
    HelloAck(HelloAck),
    /// D→S, instead of an answer: no, and why.
    Refused(Refused),
    /// S→D, the machine: a `state::MachineDescription`.
    Machine(JsonBody),
    /// D→S, the machine is made and empty: send.
    Accepted,
    /// S→D, first on bulk channel `index` (from 1; the main channel is 0).
    Join {
        /// Which channel.
        index: u32,
    },
    /// D→S, the answer to JOIN.
    Joined {
        /// Which channel.
        index: u32,
    },
    /// S→D, on every channel that carried pages of `pass`: no more of it comes here.
    Barrier {
        /// The pass, from 1.
        pass: u32,
    },
    /// D→S, every page of a pass is placed.
    PassDone(PassDone),
    /// S→D, the saved state, which the mover does not look into.
    State(Vec<u8>),
    /// S→D, everything has been sent.
    End(End),
    /// D→S, restored, synchronised, and held.
    Ready(Ready),
    /// S→D, the source is fenced: run.
    Run,
    /// D→S, the guest runs.
    Running(Running),
    /// S→D, give the guest up if it does not run.
    Revoke,
    /// D→S, it never ran and never will.
    Revoked,
    /// Either way, while nothing is committed: this attempt is over.
    Abort(Abort),
    /// Either way, last: the counts that both must agree on.
    Done(Done),
    /// Either way: a sign of life.
    Ping {
        /// Anything; PONG gives it back.
        nonce: u64,
    },
    /// Either way: the answer to PING.
    Pong {
        /// The PING's.
        nonce: u64,
    },
}

/// S→D: who calls, and what it can do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The oldest version of this protocol that the source speaks.
    pub version_min: u32,
    /// The newest.
    pub version_max: u32,
    /// The source's release, for the log.
    pub release: String,
    /// The source host's name, for the log.
    pub host: String,
    /// The guest's uuid.
    pub vm_uuid: String,
    /// The guest's name.
    pub vm_name: String,
    /// The session of the header is under way and the connection was lost.
    pub resume: bool,
    /// The session before this one, which never was and never will be committed: a receiver that
    /// still holds it may drop it.
    pub superseded: Option<Attempt>,
    /// How many bulk channels will join; 0: pages come on the main channel.
    pub channels: u32,
    /// What the source can do, by name; `must:NAME` is refused where NAME is not known.
    pub features: Vec<String>,
    /// The digests of RAM will be compared.
    pub verify: bool,
    /// How long a silence the source takes for death, in milliseconds.
    pub peer_timeout_ms: u64,
}

/// D→S: what was agreed on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloAck {
    /// The version that is spoken from here on.
    pub version: u32,
    /// The features that both have.
    pub features: Vec<String>,
    /// With `resume`: how far the session of the header is here.
    pub resume_phase: Option<ResumePhase>,
    /// The destination's release, for the log.
    pub release: String,
    /// The destination host's name, for the log.
    pub host: String,
    /// How long a silence the destination takes for death, in milliseconds.
    pub peer_timeout_ms: u64,
}

/// How far a session is at the destination when the source comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResumePhase {
    /// The guest is being loaded.
    Loading,
    /// READY was said, and the source's word is waited for.
    InDoubt,
    /// The guest runs here (or ran, and has been sent on).
    Running,
    /// The guest never ran here and never will.
    Revoked,
    /// Nothing is known of the session.
    Unknown,
}

/// D→S: no.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Error)]
#[error("{message}")]
pub struct Refused {
    /// For programs.
    pub code: RefusedCode,
    /// For people: the whole sentence, with the cause.
    pub message: String,
    /// With [`RefusedCode::Unsuitable`] and [`RefusedCode::Feature`]: every reason.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Problem>,
}

/// The kinds of refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefusedCode {
    /// Another migration is under way here, or a guest is here already.
    Busy,
    /// No version in common.
    Version,
    /// A mandatory feature is missing here.
    Feature,
    /// This host cannot take the machine; `problems` says all that is in the way.
    Unsuitable,
    /// The session is not the one that is under way, or a channel does not belong to it.
    Session,
    /// The epoch is older than the newest that was seen.
    Stale,
    /// The frame does not belong here, or is malformed.
    Protocol,
    /// It was tried and failed here.
    Failed,
    /// A code of a later version.
    #[serde(other)]
    Other,
}

/// One reason why a host cannot take a machine. Preflight lists them all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What it concerns, for machines: `ram`, `vcpus`, `cpuid`, `msr`, `capability`, `tsc`, `xsave`, `device`.
    pub topic: String,
    /// The whole sentence, for people: what is missing, by name, and on which side.
    pub text: String,
}

/// D→S: a pass is placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassDone {
    /// The pass of the BARRIERs.
    pub pass: u32,
    /// Pages placed in this pass, zero pages included.
    pub pages_placed: u64,
    /// Bytes received for it on all channels.
    pub bytes: u64,
    /// From the first frame of the pass to the last page placed, in microseconds.
    pub elapsed_us: u64,
}

/// S→D: everything has been sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// How many passes there were.
    pub passes: u32,
    /// Data pages sent in all, repetitions included.
    pub pages: u64,
    /// Zero pages sent in all, repetitions included.
    pub zero_pages: u64,
    /// With `verify`: the digest of RAM, in hexadecimal.
    pub digest: Option<String>,
}

/// D→S: restored, synchronised, held.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// Reading the state and restoring the devices, in microseconds.
    pub import_us: u64,
    /// Synchronising the vCPUs into KVM, in microseconds.
    pub sync_us: u64,
    /// With `verify`: the digest of RAM before the import, in hexadecimal.
    pub digest: Option<String>,
}

/// D→S: the guest runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// From RUN received to the vCPUs going, in microseconds; 0 when it had been running before.
    pub run_us: u64,
}

/// Which of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The one that has the guest when it starts.
    Source,
    /// The one that takes it in.
    Destination,
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}

/// Either way: this attempt is over, and nothing was committed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Error)]
#[error("the {side} gave up: {reason}")]
pub struct Abort {
    /// Where the cause lies.
    pub side: Side,
    /// For people: the cause.
    pub reason: String,
}

/// Either way, last: what was sent, or what was placed. Both sides compare (D4).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// Data pages, repetitions included.
    pub pages: u64,
    /// Zero pages, repetitions included.
    pub zero_pages: u64,
    /// With `verify`: the digest of RAM, in hexadecimal.
    pub digest: Option<String>,
}

/// A JSON document that this layer carries and does not look into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JsonBody(Vec<u8>);

impl JsonBody {
    /// `value` as JSON.
    pub fn of<T: Serialize>(value: &T) -> Result<Self, MessageError> {
        let bytes = serde_json::to_vec(value)
            .map_err(|e| MessageError::Unwritable { kind: FrameType::Machine, cause: e.to_string() })?;
        Ok(Self(bytes))
    }

    /// The value in it; an error that names the place where it does not fit.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, MessageError> {
        serde_json::from_slice(&self.0)
            .map_err(|e| MessageError::Malformed { kind: FrameType::Machine, cause: e.to_string() })
    }
}

/// Why a payload is no message.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MessageError {
    /// The payload does not fit the type.
    #[error("a {kind} frame is malformed: {cause}")]
    Malformed {
        /// The frame's type.
        kind: FrameType,
        /// What is wrong, and where.
        cause: String,
    },
    /// The checksum of the payload does not fit.
    #[error("a {0} frame is damaged (the checksum of its payload does not fit)")]
    Damaged(FrameType),
    /// A message of ours that cannot be written down.
    #[error("a {kind} frame cannot be written: {cause}")]
    Unwritable {
        /// The frame's type.
        kind: FrameType,
        /// What is wrong.
        cause: String,
    },
    /// A message of ours that is over the limit.
    #[error("a {kind} frame of {bytes} bytes would be over its limit of {limit}")]
    TooLarge {
        /// The frame's type.
        kind: FrameType,
        /// What it would have.
        bytes: usize,
        /// What it may have.
        limit: u32,
    },
}

#[derive(Serialize, Deserialize)]
struct Index {
    index: u32,
}

#[derive(Serialize, Deserialize)]
struct Pass {
    pass: u32,
}

impl Message {
    /// The type of the frame.
    pub fn kind(&self) -> FrameType {
        match self {
            Self::Hello(_) => FrameType::Hello,
            Self::HelloAck(_) => FrameType::HelloAck,
            Self::Refused(_) => FrameType::Refused,
            Self::Machine(_) => FrameType::Machine,
            Self::Accepted => FrameType::Accepted,
            Self::Join { .. } => FrameType::Join,
            Self::Joined { .. } => FrameType::Joined,
            Self::Barrier { .. } => FrameType::Barrier,
            Self::PassDone(_) => FrameType::PassDone,
            Self::State(_) => FrameType::State,
            Self::End(_) => FrameType::End,
            Self::Ready(_) => FrameType::Ready,
            Self::Run => FrameType::Run,
            Self::Running(_) => FrameType::Running,
            Self::Revoke => FrameType::Revoke,
            Self::Revoked => FrameType::Revoked,
            Self::Abort(_) => FrameType::Abort,
            Self::Done(_) => FrameType::Done,
            Self::Ping { .. } => FrameType::Ping,
            Self::Pong { .. } => FrameType::Pong,
        }
    }

    /// The payload, within the limit of its type.
    pub fn encode(&self) -> Result<Vec<u8>, MessageError> {
        let kind = self.kind();
        let payload = match self {
            Self::Accepted | Self::Run | Self::Revoke | Self::Revoked => Vec::new(),
            Self::Ping { nonce } | Self::Pong { nonce } => nonce.to_le_bytes().to_vec(),
            Self::State(bytes) => bytes.clone(),
            Self::Machine(body) => body.0.clone(),
            Self::Hello(m) => json(kind, m)?,
            Self::HelloAck(m) => json(kind, m)?,
            Self::Refused(m) => json(kind, m)?,
            Self::Join { index } | Self::Joined { index } => json(kind, &Index { index: *index })?,
            Self::Barrier { pass } => json(kind, &Pass { pass: *pass })?,
            Self::PassDone(m) => json(kind, m)?,
            Self::End(m) => json(kind, m)?,
            Self::Ready(m) => json(kind, m)?,
            Self::Running(m) => json(kind, m)?,
            Self::Abort(m) => json(kind, m)?,
            Self::Done(m) => json(kind, m)?,
        };
        let limit = max_payload(kind);
        if payload.len() > limit as usize {
            return Err(MessageError::TooLarge { kind, bytes: payload.len(), limit });
        }
        Ok(payload)
    }

    /// Reads the payload of a frame of type `kind`, which is not PAGES.
    pub fn decode(kind: FrameType, payload: Vec<u8>) -> Result<Self, MessageError> {
        let p = payload.as_slice();
        Ok(match kind {
            FrameType::Hello => Self::Hello(parse(kind, p)?),
            FrameType::HelloAck => Self::HelloAck(parse(kind, p)?),
            FrameType::Refused => Self::Refused(parse(kind, p)?),
            FrameType::Machine => Self::Machine(JsonBody(payload)),
            FrameType::Accepted => empty(kind, p, Self::Accepted)?,
            FrameType::Join => Self::Join { index: parse::<Index>(kind, p)?.index },
            FrameType::Joined => Self::Joined { index: parse::<Index>(kind, p)?.index },
            FrameType::Barrier => Self::Barrier { pass: parse::<Pass>(kind, p)?.pass },
            FrameType::PassDone => Self::PassDone(parse(kind, p)?),
            FrameType::State => Self::State(payload),
            FrameType::End => Self::End(parse(kind, p)?),
            FrameType::Ready => Self::Ready(parse(kind, p)?),
            FrameType::Run => empty(kind, p, Self::Run)?,
            FrameType::Running => Self::Running(parse(kind, p)?),
            FrameType::Revoke => empty(kind, p, Self::Revoke)?,
            FrameType::Revoked => empty(kind, p, Self::Revoked)?,
            FrameType::Abort => Self::Abort(parse(kind, p)?),
            FrameType::Done => Self::Done(parse(kind, p)?),
            FrameType::Ping => Self::Ping { nonce: nonce(kind, p)? },
            FrameType::Pong => Self::Pong { nonce: nonce(kind, p)? },
            FrameType::Pages => {
                let cause = "pages are no message".to_owned();
                return Err(MessageError::Malformed { kind, cause });
            }
        })
    }
}

fn json<T: Serialize>(kind: FrameType, value: &T) -> Result<Vec<u8>, MessageError> {
    serde_json::to_vec(value).map_err(|e| MessageError::Unwritable { kind, cause: e.to_string() })
}

fn parse<T: DeserializeOwned>(kind: FrameType, payload: &[u8]) -> Result<T, MessageError> {
    serde_json::from_slice(payload).map_err(|e| MessageError::Malformed { kind, cause: e.to_string() })
}

fn empty(kind: FrameType, payload: &[u8], message: Message) -> Result<Message, MessageError> {
    if payload.is_empty() {
        return Ok(message);
    }
    let cause = format!("{} bytes where none belong", payload.len());
    Err(MessageError::Malformed { kind, cause })
}

fn nonce(kind: FrameType, payload: &[u8]) -> Result<u64, MessageError> {
    payload.try_into().map(u64::from_le_bytes).map_err(|_| MessageError::Malformed {
        kind,
        cause: format!("{} bytes where 8 belong", payload.len()),
    })
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
