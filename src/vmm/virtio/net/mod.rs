//! The network card: virtio-net (virtio 1.2, 5.1) on a tap.

pub mod announce;
mod spec;
pub mod tap;

pub use spec::{MacAddress, NetSpec, NoNetSpec, TapSpec};
