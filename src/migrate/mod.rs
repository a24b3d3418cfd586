//! The movers: what `vmsend` and `vmrecv` do.
