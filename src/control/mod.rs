//! The control socket: JSON lines on a Unix stream socket, file descriptors by SCM_RIGHTS.
//!
//! This is where the programs meet: `vmctl`, `vmsend` and `vmrecv` are clients of `vmrun`, and
//! `vmsend` has a small socket of its own in the same manner.

mod message;

pub use message::*;
