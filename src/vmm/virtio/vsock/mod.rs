//! Sockets between host and guest: virtio-vsock (virtio 1.2, 5.10) on Unix sockets.

mod credit;
mod muxer;
mod packet;
mod stream;

pub use muxer::Muxer;
