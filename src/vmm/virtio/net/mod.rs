//! The network card: virtio-net (virtio 1.2, 5.1) on a tap.

mod announce;
mod control;
mod device;
mod receive;
mod spec;
mod tap;
mod transmit;

pub use announce::{SeenAddresses, gratuitous_arp, rarp, unsolicited_advertisement};
pub use control::{Commands, commands};
pub use device::Net;
pub use receive::{Delivery, deliver};
pub use spec::{MacAddress, NetSpec, NoNetSpec, TapSpec};
pub use tap::{MAX_FRAME_BYTES, Tap, TapError};
pub use transmit::{Transmitted, transmit};

/// The name of a card's address in [`super::Device::properties`].
pub const MAC_PROPERTY: &str = "mac";

#[cfg(test)]
mod device_tests;
#[cfg(test)]
mod namespace;
#[cfg(test)]
mod queue_tests;
