//! What goes wrong with streams and channels. Every text names the peer and the cause.

use std::io;

use thiserror::Error;

use crate::switchover::SessionId;
use crate::wire::{FrameType, HeaderError, MessageError, TableError};

/// A byte stream failed.
#[derive(Debug, Error)]
pub enum StreamError {
    /// End of file between frames.
    #[error("{peer} closed the connection{exit}")]
    Closed {
        /// Who.
        peer: String,
        /// For a child process: how it ended, in words with a leading `: `.
        exit: String,
    },
    /// End of file within a frame.
    #[error("{peer} closed the connection in the middle of a frame{exit}")]
    Truncated {
        /// Who.
        peer: String,
        /// As in `Closed`.
        exit: String,
    },
    /// The connection was broken off: reset, or its reader is gone.
    #[error("the connection to {peer} broke ({source}){exit}")]
    Broken {
        /// Who.
        peer: String,
        /// As in `Closed`.
        exit: String,
        /// The system's error.
        source: io::Error,
    },
    /// No byte came for too long.
    #[error("{peer} has been silent for {ms} ms")]
    Silent {
        /// Who.
        peer: String,
        /// How long, in milliseconds.
        ms: u64,
    },
    /// No byte was taken for too long.
    #[error("{peer} has taken no byte for {ms} ms")]
    Stuck {
        /// Who.
        peer: String,
        /// How long, in milliseconds.
        ms: u64,
    },
    /// A frame dripped in more slowly than it may.
    #[error("{peer} took more than {ms} ms to send one frame")]
    TooSlow {
        /// Who.
        peer: String,
        /// How long it may take, in milliseconds.
        ms: u64,
    },
    /// Ended by a [`super::CancelToken`].
    #[error("cancelled: {reason}")]
    Cancelled {
        /// What the one who cancelled said.
        reason: String,
    },
    /// A connection cannot be made.
    #[error("cannot connect to {peer}: {cause}")]
    Connect {
        /// Where to.
        peer: String,
        /// Why not.
        cause: String,
    },
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {cause}")]
    Listen {
        /// Where.
        address: String,
        /// Why not.
        cause: String,
    },
    /// Something else.
    #[error("{doing} {peer}: {source}")]
    Io {
        /// What was done, as in "reading from".
        doing: &'static str,
        /// With whom.
        peer: String,
        /// The system's error.
        source: io::Error,
    },
}

/// A channel failed: the stream under it, or what the peer said on it.
#[derive(Debug, Error)]
pub enum ChannelError {
    /// The stream failed.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// A header that is none.
    #[error("from {peer}: {cause}")]
    Header {
        /// Who sent it.
        peer: String,
        /// What is wrong.
        cause: HeaderError,
    },
    /// A payload that is none, or one of ours that cannot be sent.
    #[error("with {peer}: {cause}")]
    Message {
        /// The peer.
        peer: String,
        /// What is wrong.
        cause: MessageError,
    },
    /// A page table that is none.
    #[error("with {peer}: {cause}")]
    Table {
        /// The peer.
        peer: String,
        /// What is wrong.
        cause: TableError,
    },
    /// A frame of another migration.
    #[error("{peer} sent a {kind} frame of session {got}; the session here is {have}")]
    WrongSession {
        /// Who.
        peer: String,
        /// The frame.
        kind: FrameType,
        /// What it carries.
        got: SessionId,
        /// What is under way.
        have: SessionId,
    },
    /// A frame of an older or a newer connection of the same migration.
    #[error("{peer} sent a {kind} frame of epoch {got}; the epoch here is {have}")]
    WrongEpoch {
        /// Who.
        peer: String,
        /// The frame.
        kind: FrameType,
        /// What it carries.
        got: u32,
        /// What is under way.
        have: u32,
    },
    /// A frame is missing, or came twice.
    #[error("{peer} sent frame {got} where frame {expected} was due")]
    OutOfOrder {
        /// Who.
        peer: String,
        /// The number that came.
        got: u64,
        /// The number that was due.
        expected: u64,
    },
    /// A frame that does not belong here.
    #[error("{peer} sent {got} where {expected} was due")]
    Unexpected {
        /// Who.
        peer: String,
        /// What came.
        got: FrameType,
        /// What was waited for.
        expected: String,
    },
    /// Page data that the caller left in the stream, or asked for beyond its end: an error in this
    /// program.
    #[error("internal error: {0}")]
    Misuse(&'static str),
    /// The channel failed before; what it was came from the call that noticed.
    #[error("the channel to {peer} failed before: {cause}")]
    Dead {
        /// Who.
        peer: String,
        /// The first error.
        cause: String,
    },
}

impl ChannelError {
    /// Whether the peer broke the rules, as against the link (or the peer's life) having ended.
    pub fn is_protocol(&self) -> bool {
        !matches!(self, Self::Stream(_) | Self::Dead { .. } | Self::Misuse(_))
    }

    /// Whether a [`super::CancelToken`] ended it.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Stream(StreamError::Cancelled { .. }))
    }
}
