//! The movers: what `vmsend` and `vmrecv` do.

pub mod convergence;
pub mod ram;
