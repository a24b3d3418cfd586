//! The control socket: JSON lines on a Unix stream socket, file descriptors by SCM_RIGHTS.
//!
//! This is where the programs meet: `vmctl`, `vmsend` and `vmrecv` are clients of `vmrun`, and
//! `vmsend` has a small socket of its own in the same manner ([`mover`]).
//!
//! Only the same user (or root) may speak; whoever may, may do everything with the guest.

mod client;
mod connection;
mod lines;
mod listen;
mod message;
pub mod mover;
mod server;
mod told;

#[cfg(any(fuzzing, test))]
pub(crate) use connection::Connection;

pub use client::{Client, ClientError, DEFAULT_TIMEOUT};
pub use listen::BindError;
pub use message::*;
pub use server::{ConnectionId, ControlRequest, Incoming, MAX_CONNECTIONS, ReplyTo, Server};
pub use told::{LinkState, MoverReport, MoverState, PageRequests, millis, seconds};
