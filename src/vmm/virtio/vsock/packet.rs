//! The header of a packet (virtio 1.2, 5.10.6): plain data, little-endian.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The context id of the host, whose port a guest speaks to.
pub const HOST_CID: u64 = 2;
/// The port that is none: no service of the host has it.
pub const NO_PORT: u32 = u32::MAX;
/// VIRTIO_VSOCK_TYPE_STREAM, the one type that is offered.
pub const TYPE_STREAM: u16 = 1;
/// Flags of a shutdown: the sender of the packet receives, or sends, no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// See [`SHUTDOWN_RECEIVE`].
pub const SHUTDOWN_SEND: u32 = 2;
/// Both of them: the connection is at its end.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
#[allow(missing_docs)] // VIRTIO_VSOCK_OP_, by the names of the specification
pub enum Op {
    Request = 1,
    Response = 2,
    Rst = 3,
    Shutdown = 4,
    Rw = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Op {
    fn from_u16(op: u16) -> Option<Self> {
        use Op::*;
        [Request, Response, Rst, Shutdown, Rw, CreditUpdate, CreditRequest]
            .into_iter()
            .find(|o| *o as u16 == op)
    }
}

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs)] // by the names of the specification
pub struct Header {
    pub src_cid: U64,
    pub dst_cid: U64,
    pub src_port: U32,
    pub dst_port: U32,
    pub len: U32,
    pub kind: U16,
    pub op: U16,
    pub flags: U32,
    pub buf_alloc: U32,
    pub fwd_cnt: U32,
}

/// The bytes of a [`Header`].
pub const HEADER_BYTES: usize = size_of::<Header>();
const _: () = assert!(HEADER_BYTES == 44);

impl Header {
    /// What the packet is for, if that is known.
    pub fn op(&self) -> Option<Op> {
        Op::from_u16(self.op.get())
    }
}

/// The two ports of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ports {
    /// On the host.
    pub host: u32,
    /// In the guest.
    pub guest: u32,
}

impl Ports {
    /// Those of a packet that the guest has sent.
    pub fn of(header: &Header) -> Self {
        Self { host: header.dst_port.get(), guest: header.src_port.get() }
    }

    /// A packet to the guest.
    pub fn to_guest(self, cid: u64, op: Op) -> Header {
        Header {
            src_cid: HOST_CID.into(),
            dst_cid: cid.into(),
            src_port: self.host.into(),
            dst_port: self.guest.into(),
            kind: TYPE_STREAM.into(),
            op: (op as u16).into(),
            ..Header::default()
        }
    }
}
