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
use super::payload::{Abort, Done, End, Hello, HelloAck, PageBitmap, PassDone, Ready, Refused, Running};

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
    /// S→D, everything has been sent, or will be after the guest has begun to run.
    End(End),
    /// S→D, before END: pages that come after the guest.
    Missing(PageBitmap),
    /// D→S: somebody waits for these pages, by index.
    PageRequest(Vec<u64>),
    /// D→S, on a connection that comes back: the pages that are there.
    Received(PageBitmap),
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
    /// Either way: the counts that both must agree on.
    Done(Done),
    /// S→D, last: the source has let its copy go, nobody comes back for it.
    Released,
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
            Self::Missing(_) => FrameType::Missing,
            Self::PageRequest(_) => FrameType::PageRequest,
            Self::Received(_) => FrameType::Received,
            Self::Ready(_) => FrameType::Ready,
            Self::Run => FrameType::Run,
            Self::Running(_) => FrameType::Running,
            Self::Revoke => FrameType::Revoke,
            Self::Revoked => FrameType::Revoked,
            Self::Abort(_) => FrameType::Abort,
            Self::Done(_) => FrameType::Done,
            Self::Released => FrameType::Released,
            Self::Ping { .. } => FrameType::Ping,
            Self::Pong { .. } => FrameType::Pong,
        }
    }

    /// The payload, within the limit of its type.
    pub fn encode(&self) -> Result<Vec<u8>, MessageError> {
        let kind = self.kind();
        let payload = match self {
            Self::Accepted | Self::Run | Self::Revoke | Self::Revoked | Self::Released => Vec::new(),
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
            Self::Missing(m) | Self::Received(m) => m.encode(),
            Self::PageRequest(pages) => pages.iter().flat_map(|page| page.to_le_bytes()).collect(),
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
            FrameType::Missing => Self::Missing(PageBitmap::decode(kind, p)?),
            FrameType::PageRequest => Self::PageRequest(words(kind, p)?),
            FrameType::Received => Self::Received(PageBitmap::decode(kind, p)?),
            FrameType::Ready => Self::Ready(parse(kind, p)?),
            FrameType::Run => empty(kind, p, Self::Run)?,
            FrameType::Running => Self::Running(parse(kind, p)?),
            FrameType::Revoke => empty(kind, p, Self::Revoke)?,
            FrameType::Revoked => empty(kind, p, Self::Revoked)?,
            FrameType::Abort => Self::Abort(parse(kind, p)?),
            FrameType::Done => Self::Done(parse(kind, p)?),
            FrameType::Released => empty(kind, p, Self::Released)?,
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

/// Little-endian 64-bit words that fill the payload.
pub(super) fn words(kind: FrameType, payload: &[u8]) -> Result<Vec<u64>, MessageError> {
    let (words, rest) = payload.as_chunks::<8>();
    if !rest.is_empty() {
        let cause = format!("{} bytes are no number of 64-bit words", payload.len());
        return Err(MessageError::Malformed { kind, cause });
    }
    Ok(words.iter().map(|w| u64::from_le_bytes(*w)).collect())
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
