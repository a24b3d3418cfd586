//! vCPU threads: one for each, told what to do through a mailbox, kicked out of guest mode by a
//! signal.

mod group;
mod round;
mod thread;

pub use group::VcpuGroup;
pub use round::Round;
pub use thread::{Job, SavedVcpu};
