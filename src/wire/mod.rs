//! The stream format: frames, messages, limits. No sockets in here.
//!
//! Everything is a frame: a [`Header`] and a payload. Pages of guest RAM travel in PAGES frames
//! ([`RunTable`] and raw data), everything else is a [`Message`]. docs/protocol.md describes the
//! whole byte by byte.

mod header;
mod hello;
pub mod limits;
mod message;
mod pages;
mod payload;

pub use header::{FrameType, HEADER_BYTES, Header, HeaderError, MAGIC};
pub use hello::{Agreed, MUST_PREFIX, Supported, VERSION, negotiate};
pub use message::{JsonBody, Message, MessageError};
pub use pages::{PAGES_HEAD_BYTES, RUN_BYTES, Run, RunKind, RunTable, TableError};
pub use payload::{
    Abort, Done, End, Hello, HelloAck, PageBitmap, PassDone, Problem, Ready, Refused, RefusedCode,
    ResumePhase, Running, Side,
};
