//! What a kind of device is to the transport.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use nix::poll::PollFlags;
use serde_json::Value;
use thiserror::Error;
use virtio_bindings::virtio_ids;

use super::{ConfigSpace, Io};
use crate::state::{self, SectionKind};

/// The kinds of devices that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A disk (virtio 1.2, section 5.2).
    Block,
    /// A network card (virtio 1.2, section 5.1).
    Net,
    /// A source of random numbers (virtio 1.2, section 5.4).
    Rng,
    /// Sockets between host and guest (virtio 1.2, section 5.10).
    Vsock,
}

impl Kind {
    /// Every kind.
    pub const ALL: &[Self] = &[Self::Block, Self::Net, Self::Rng, Self::Vsock];

    /// The device id of virtio 1.2, section 5.
    pub fn number(self) -> u32 {
        match self {
            Self::Block => virtio_ids::VIRTIO_ID_BLOCK,
            Self::Net => virtio_ids::VIRTIO_ID_NET,
            Self::Rng => virtio_ids::VIRTIO_ID_RNG,
            Self::Vsock => virtio_ids::VIRTIO_ID_VSOCK,
        }
    }

    /// Its name in machine descriptions.
    pub fn name(self) -> &'static str {
        match self {
            Self::Block => "virtio-block",
            Self::Net => "virtio-net",
            Self::Rng => "virtio-rng",
            Self::Vsock => "virtio-vsock",
        }
    }

    /// The kind with that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.name() == name)
    }

    /// The kind of section that its state is saved in.
    pub fn section(self) -> SectionKind {
        match self {
            Self::Block => SectionKind::VirtioBlock,
            Self::Net => SectionKind::VirtioNet,
            Self::Rng => SectionKind::VirtioRng,
            Self::Vsock => SectionKind::VirtioVsock,
        }
    }

    /// The version of its saved state that is written, and the newest that is read.
    pub fn version(self) -> u32 {
        match self {
            Self::Block => state::VIRTIO_BLOCK_VERSION,
            Self::Net => state::VIRTIO_NET_VERSION,
            Self::Rng => state::VIRTIO_RNG_VERSION,
            Self::Vsock => state::VIRTIO_VSOCK_VERSION,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a device cannot go on. The driver is told by DEVICE_NEEDS_RESET; for errors of the host that
/// a request can carry, a device answers the request instead.
#[derive(Debug, Error)]
#[allow(missing_docs)] // the messages say it
pub enum DeviceError {
    #[error("a queue cannot be used: {0}")]
    Queue(#[from] virtio_queue::Error),
    #[error("a request makes no sense: {0}")]
    Request(&'static str),
    #[error("a request's memory cannot be used: {0}")]
    Memory(std::io::Error),
}

/// A descriptor of the host that a device waits for.
pub struct Watch<'a> {
    /// What is polled.
    pub fd: BorrowedFd<'a>,
    /// For what.
    pub events: PollFlags,
    /// Given to [`Device::ready`].
    pub token: usize,
}

/// A device, as its thread drives it.
///
/// All calls are made on one thread, one after the other, but for those made before the device is
/// given to its thread. A call may wait for the host's disk, or for a page of guest RAM; it holds up
/// this device only, and the pause of the machine. A chain that is taken from a queue is used or put
/// back before the call returns: at a pause nothing is in flight but what is still in the queues,
/// and that goes with the guest's RAM.
///
/// From its opening to the first [`Device::resume`], and from each [`Device::pause`] to the next
/// resume, a device causes no effect outside of its guest (S5).
pub trait Device: Send {
    /// Its kind.
    fn kind(&self) -> Kind;

    /// The features that it offers beside those of the transport (virtio 1.2, section 2.2).
    fn features(&self) -> u64 {
        0
    }

    /// The largest size of each of its queues, powers of two. At most 64 queues.
    fn queue_sizes(&self) -> &[u16];

    /// Its configuration space: always the same one.
    fn config(&self) -> Arc<ConfigSpace>;

    /// What the guest can tell about it, by name: part of the machine's description. A machine that
    /// comes in is refused where the device opened for it says something else.
    fn properties(&self) -> BTreeMap<String, String> {
        BTreeMap::new()
    }

    /// A path beside which its thread makes and removes files; of all others it opens none.
    fn changes_beside(&self) -> Option<&Path> {
        None
    }

    /// The driver has set DRIVER_OK, having accepted `features`; or a device in that state has been
    /// restored.
    fn activate(&mut self, features: u64) {
        let _ = features;
    }

    /// The driver has reset the device: whatever it was told is forgotten.
    fn reset(&mut self) {}

    /// Queue `queue` may have new buffers. To be taken until there are none ([`Io::pop`]).
    fn queue_kicked(&mut self, queue: usize, io: &mut Io) -> Result<(), DeviceError>;

    /// What the device waits for now, beside its queues. Asked before each wait, and only while the
    /// machine runs.
    fn watches(&self) -> Vec<Watch<'_>> {
        Vec::new()
    }

    /// A watch with that token is ready.
    fn ready(&mut self, token: usize, io: &mut Io) -> Result<(), DeviceError> {
        let _ = (token, io);
        Ok(())
    }

    /// When [`Device::timeout`] is to be called, if nothing else happens. Asked before each wait.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// The deadline has passed.
    fn timeout(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        let _ = io;
        Ok(())
    }

    /// The machine is paused: what was accepted is brought to an end (a disk's writes are on the
    /// disk), and nothing happens from here on. An error does not keep the machine from pausing, but
    /// keeps it from being saved.
    fn pause(&mut self) -> Result<(), String> {
        Ok(())
    }

    /// The machine runs, here. `arrived` for the first time after a restore. Afterwards every queue
    /// is kicked, so that nothing that waits in it is forgotten.
    fn resume(&mut self, arrived: bool, io: &mut Io) -> Result<(), DeviceError> {
        let _ = (arrived, io);
        Ok(())
    }

    /// What has to be restored elsewhere, beside the transport's state; the schema is in
    /// [`crate::state`]. The device is paused. What it holds of the host is to be shared with the
    /// destination from here on, until it is resumed.
    fn save(&mut self) -> Result<Value, String>;

    /// Takes over what [`Device::save`] gave elsewhere; comes from a peer. The device is paused, and
    /// activated before, if it was. What it holds of the host may be shared with the source until it
    /// is resumed; where that cannot be had, this is the last chance to say so.
    fn restore(&mut self, state: Value) -> Result<(), String>;

    /// The guest runs elsewhere for good, and the machine stays here with its remains: what programs of
    /// the host have of it ends. The device is paused.
    fn let_go(&mut self) {}
}
