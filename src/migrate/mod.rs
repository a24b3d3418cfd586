//! The movers: what `vmsend` and `vmrecv` do.

pub mod convergence;
pub mod ram;
pub mod outcome;
pub mod placer;
pub mod queue;
