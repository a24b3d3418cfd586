//! The movers: what `vmsend` and `vmrecv` do.

pub mod convergence;
pub mod outcome;
pub mod placer;
pub mod queue;
pub mod ram;
