//! The movers: what `vmsend` and `vmrecv` do.
//!
//! [`source`] and [`dest`] are mirror images. The way of a page: [`precopy`] hands out what a pass
//! has to send, a worker of [`bulk`] reads it and puts it on a channel of the [`link`]; at the other
//! end [`intake`] has let the channel in, its [`pump`] receives the page and the [`placer`] writes
//! it. When to stop is decided by [`convergence`], who runs by [`crate::switchover`].

mod backlog;
pub mod bulk;
pub mod convergence;
pub mod dest;
pub mod handover;
pub mod host;
pub mod intake;
mod leave;
pub mod link;
pub mod options;
pub mod outcome;
pub mod placer;
pub mod postcopy;
pub mod precopy;
pub mod pump;
pub mod queue;
pub mod ram;
mod reconnect;
pub mod report;
pub mod service;
mod serving;
pub mod settings;
pub mod source;
pub mod source_vm;
mod stop;
mod told;
mod warm_up;
pub mod wires;
