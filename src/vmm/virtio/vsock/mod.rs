//! Sockets between host and guest: virtio-vsock (virtio 1.2, 5.10) on Unix sockets.

mod callers;
mod credit;
mod device;
mod door;
mod muxer;
mod packet;
mod spec;
mod stream;

pub use device::Vsock;
pub use muxer::{MAX_STREAMS, Muxer};
pub use packet::{HEADER_BYTES, Header, Op, Ports};
pub use spec::{NoVsockSpec, SocketPath, VsockSpec, guest_cid};
pub use stream::Stream;

/// The name of a guest's context id in [`super::Device::properties`].
pub const CID_PROPERTY: &str = "cid";
