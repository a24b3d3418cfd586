//! The saved state of virtio devices: the transport's part, which all have, and each kind's own.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The version of [`VirtioState`] with [`VirtioBlockState`] that is written.
pub const VIRTIO_BLOCK_VERSION: u32 = 1;
/// The version of [`VirtioState`] with [`VirtioNetState`] that is written.
pub const VIRTIO_NET_VERSION: u32 = 1;
/// The version of [`VirtioState`] with [`VirtioRngState`] that is written.
pub const VIRTIO_RNG_VERSION: u32 = 1;
/// The version of [`VirtioState`] with [`VirtioVsockState`] that is written.
pub const VIRTIO_VSOCK_VERSION: u32 = 1;

/// One device (section kinds `virtio-…`; the instance is its slot).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioState {
    /// Registers and queues.
    pub transport: VirtioTransportState,
    /// By the schema of its kind.
    pub device: Value,
}

/// The registers of virtio-mmio (virtio 1.2, section 4.2.2).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioTransportState {
    /// DeviceFeaturesSel.
    pub device_features_select: u32,
    /// DriverFeaturesSel.
    pub driver_features_select: u32,
    /// What the driver has accepted, all 64 bits.
    pub driver_features: u64,
    /// QueueSel.
    pub queue_select: u32,
    /// Status, with DEVICE_NEEDS_RESET.
    pub status: u32,
    /// InterruptStatus.
    pub interrupt_status: u32,
    /// ConfigGeneration.
    pub config_generation: u32,
    /// Every queue that the device has.
    pub queues: Vec<VirtioQueueState>,
}

/// One split virtqueue (virtio 1.2, section 2.7). What is in it is in guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioQueueState {
    /// QueueNum.
    pub size: u16,
    /// QueueReady.
    pub ready: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub available: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
    /// The index in the available ring that is taken next.
    pub next_available: u16,
    /// The index in the used ring that is filled next.
    pub next_used: u16,
}

/// A disk has no state but its image, which is flushed before: no request is in flight.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioBlockState {}
/// A network card. Its Ethernet address is in the machine's description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioNetState {
    /// IPv4 addresses that the guest was seen to use, the latest at the end.
    pub seen_v4: Vec<Ipv4Addr>,
    /// IPv6 addresses that the guest was seen to use, the latest at the end.
    pub seen_v6: Vec<Ipv6Addr>,
    /// The guest is asked to announce itself (VIRTIO_NET_S_ANNOUNCE), and has not yet.
    pub announce: bool,
}

/// A source of random numbers has no state of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioRngState {}

/// Sockets between host and guest. The guest's context id is in the machine's description; streams are
/// not moved, but reset.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioVsockState {
    /// The source's socket: a destination on the same host and path knows it from a stranger's.
    pub socket: Option<SocketFile>,
}

/// Which file a socket is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SocketFile {
    /// The file system's device.
    pub device: u64,
    /// Its number there.
    pub inode: u64,
    /// When it was made, in ns since 1970.
    pub made_ns: i64,
}
