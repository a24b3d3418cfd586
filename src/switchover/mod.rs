//! Who may run the guest: the pure heart of the project.
//!
//! [`Ownership`] is the state that each `vmrun` keeps (and writes to disk) about its copy of the
//! guest; it alone decides whether vCPUs may enter guest mode. [`SourceStep`] and [`DestStep`] are
//! what the movers do on each message, given the ownership of their own side. Nothing here does I/O, reads a
//! clock or holds a thread: the code that runs in production is the code that the tests explore.
//!
//! The rules (docs/switchover.md has the diagrams):
//!
//! - S1: the destination runs only after RUN for its session and a recorded `Owner`.
//! - S2: the source runs only while nothing is `Committed`, or after REVOKED from the destination.
//! - S3: `Committed` is recorded before the first byte of RUN, `Owner` before the first `KVM_RUN`.
//! - S4: the destination never decides alone: a time-out changes nothing once READY may be out.
//! - S6: a duplicate changes nothing, a stale message is refused.

mod dest;
#[cfg(test)]
mod model;
mod ownership;
mod source;

pub use dest::{DestAction, DestInput, DestStep};
pub use ownership::{Attempt, OperatorWord, Ownership, Refusal, SessionId};
pub use source::{SourceAction, SourceInput, SourceStep};
