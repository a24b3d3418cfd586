//! The network card as a device: its queues, its tap, and what it does after a move.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use serde_json::Value;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};

use super::tap::MAX_FRAME_BYTES;
use super::{Delivery, MacAddress, SeenAddresses, Tap, commands, deliver, transmit};
use crate::state::VirtioNetState;
use crate::sys::tap::VNET_HEADER_BYTES;
use crate::vmm::virtio::{ConfigSpace, Device, DeviceError, Io, Kind, Watch};

/// The queues of one pair, and the control queue (virtio 1.2, 5.1.2).
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL: usize = 2;
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];

const FEATURES: &[u32] = &[
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
];

/// Where `status` is in the configuration (5.1.4): its low byte has all bits that are used.
const STATUS_AT: usize = 6;
const LINK_UP: u8 = VIRTIO_NET_S_LINK_UP as u8;
const ANNOUNCE: u8 = VIRTIO_NET_S_ANNOUNCE as u8;

/// How many frames are received before orders and other queues have their turn.
const RECEIVE_BATCH: usize = 256;
/// The most frames that are thrown away at a restore: a tap keeps 1000 unless it was told otherwise,
/// and where they come as fast as they are read, the rest is as good as new.
const MOST_STALE_FRAMES: usize = 10_000;
/// When the guest is announced, after it begins to run: the first ones may be lost while a bridge
/// learns that the port is up.
const ANNOUNCE_AT: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(50),
    Duration::from_millis(200),
    Duration::from_millis(450),
    Duration::from_millis(800),
];

/// The device.
pub struct Net {
    tap: Tap,
    mac: MacAddress,
    config: Arc<ConfigSpace>,
    /// What the driver has accepted, once it is ready.
    features: Option<u64>,
    /// A frame from the tap with its header, and its length if the guest has not got it yet.
    incoming: Vec<u8>,
    pending: Option<usize>,
    /// Whether the tap is listened to: the driver has buffers, as far as is known.
    listening: bool,
    outgoing: Vec<u8>,
    seen: SeenAddresses,
    /// When the guest began to run here, and which of [`ANNOUNCE_AT`] is next.
    announcing: Option<(Instant, usize)>,
}

impl Net {
    /// A card with that address on a tap that is open.
    pub fn new(tap: Tap, mac: MacAddress) -> Self {
        let config = [&mac.0[..], &[LINK_UP, 0]].concat();
        Self {
            tap,
            mac,
            config: Arc::new(ConfigSpace::new(config, 0..0)),
            features: None,
            incoming: vec![0; MAX_FRAME_BYTES],
            pending: None,
            listening: false,
            outgoing: vec![0; MAX_FRAME_BYTES],
            seen: SeenAddresses::default(),
            announcing: None,
        }
    }

    fn has(&self, feature: u32) -> bool {
        self.features.is_some_and(|all| all & 1 << feature != 0)
    }

    /// Frames from the tap to the guest, until there are none or the guest has no buffers.
    fn receive(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        let features = self.features.unwrap_or(0);
        let mut signal = false;
        self.listening = false;
        let mut left = RECEIVE_BATCH;
        let listening = loop {
            if left == 0 {
                break true;
            }
            left -= 1;
            // Before a frame is taken from the tap: where an order waits it stays there.
            let Some((memory, queue)) = io.lend(RECEIVE) else { break false };
            let bytes = match self.pending.take() {
                Some(bytes) => bytes,
                None => match self.tap.read(&mut self.incoming) {
                    Ok(Some(bytes)) if bytes > VNET_HEADER_BYTES => bytes,
                    Ok(Some(_)) => continue,
                    Ok(None) => break true,
                    // The interface is gone. Listening to it would give no rest: not before the driver
                    // puts out buffers again.
                    Err(e) => {
                        tracing::warn!("a network card's tap cannot be read: {e}");
                        break false;
                    }
                },
            };
            match deliver(memory, queue, &mut self.incoming[..bytes], features)? {
                Delivery::Done { signal: wanted } => signal |= wanted,
                Delivery::NoBuffers => {
                    self.pending = Some(bytes);
                    break false;
                }
                Delivery::TooLarge => tracing::debug!("a frame of {bytes} bytes is too large for the guest"),
            }
        };
        self.listening = listening;
        if signal {
            io.signal();
        }
        Ok(())
    }

    /// Frames from the guest to the tap.
    fn transmit(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        let Some((memory, queue)) = io.lend(TRANSMIT) else { return Ok(()) };
        let (tap, seen, mac) = (&self.tap, &mut self.seen, self.mac);
        let done = transmit(memory, queue, &mut self.outgoing, |frame| {
            seen.look(mac, &frame[VNET_HEADER_BYTES..]);
            if let Err(e) = tap.write(frame) {
                tracing::trace!("a frame is lost: {e}");
            }
        })?;
        if done.signal {
            io.signal();
        }
        if done.more {
            io.look_again(TRANSMIT);
        }
        Ok(())
    }

    /// What the driver wants to be done.
    fn obey(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        let may_announce = self.has(VIRTIO_NET_F_GUEST_ANNOUNCE);
        let Some((memory, queue)) = io.lend(CONTROL) else { return Ok(()) };
        let done = commands(memory, queue, may_announce)?;
        if done.announced {
            self.ask_to_announce(false);
        }
        if done.signal {
            io.signal();
        }
        if done.more {
            io.look_again(CONTROL);
        }
        Ok(())
    }

    /// Whether the guest is asked to announce itself (5.1.6.5.4).
    fn ask_to_announce(&self, wanted: bool) {
        self.config.update(|bytes| {
            if let Some(status) = bytes.get_mut(STATUS_AT) {
                *status = if wanted { *status | ANNOUNCE } else { *status & !ANNOUNCE };
            }
        });
    }

    fn is_asked_to_announce(&self) -> bool {
        let mut status = [0];
        self.config.read(STATUS_AT as u64, &mut status);
        status[0] & ANNOUNCE != 0
    }

    /// Sends the announcements whose time has come, once.
    fn announce(&mut self) {
        let Some((began, next)) = self.announcing else { return };
        for frame in self.seen.announcements(self.mac) {
            if let Err(e) = self.tap.write_plain(&frame) {
                tracing::debug!("an announcement is lost: {e}");
            }
        }
        let passed = began.elapsed();
        let after = (next + 1..ANNOUNCE_AT.len()).find(|n| ANNOUNCE_AT[*n] > passed);
        self.announcing = after.map(|n| (began, n));
    }
}

impl Device for Net {
    fn kind(&self) -> Kind {
        Kind::Net
    }

    fn features(&self) -> u64 {
        FEATURES.iter().fold(0, |all, feature| all | 1 << feature)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn properties(&self) -> BTreeMap<String, String> {
        BTreeMap::from([(super::MAC_PROPERTY.to_owned(), self.mac.to_string())])
    }

    fn activate(&mut self, features: u64) {
        self.features = Some(features);
        // A restore tries again, and tells.
        if let Err(e) = self.tap.set_offloads(features) {
            tracing::warn!("{e}");
        }
    }

    fn reset(&mut self) {
        (self.features, self.pending, self.listening) = (None, None, false);
        self.ask_to_announce(false);
        if let Err(e) = self.tap.set_offloads(0) {
            tracing::warn!("{e}");
        }
    }

    fn queue_kicked(&mut self, queue: usize, io: &mut Io) -> Result<(), DeviceError> {
        match queue {
            RECEIVE => self.receive(io),
            TRANSMIT => self.transmit(io),
            _ => self.obey(io),
        }
    }

    fn watches(&self) -> Vec<Watch<'_>> {
        let tap = || Watch { fd: self.tap.as_fd(), events: PollFlags::POLLIN, token: RECEIVE };
        self.listening.then(tap).into_iter().collect()
    }

    fn ready(&mut self, _: usize, io: &mut Io) -> Result<(), DeviceError> {
        self.receive(io)
    }

    fn deadline(&self) -> Option<Instant> {
        self.announcing.map(|(began, next)| began + ANNOUNCE_AT[next])
    }

    fn timeout(&mut self, _: &mut Io) -> Result<(), DeviceError> {
        self.announce();
        Ok(())
    }

    fn resume(&mut self, arrived: bool, io: &mut Io) -> Result<(), DeviceError> {
        // A guest that does not use the card has no address in the network.
        if !arrived || self.features.is_none() {
            return Ok(());
        }
        self.announcing = Some((Instant::now(), 0));
        self.announce();
        if self.has(VIRTIO_NET_F_GUEST_ANNOUNCE) {
            self.ask_to_announce(true);
            io.config_changed();
        }
        Ok(())
    }

    fn save(&mut self) -> Result<Value, String> {
        let state = VirtioNetState {
            seen_v4: self.seen.v4().to_vec(),
            seen_v6: self.seen.v6().to_vec(),
            announce: self.is_asked_to_announce(),
        };
        serde_json::to_value(state).map_err(|e| e.to_string())
    }

    fn restore(&mut self, state: Value) -> Result<(), String> {
        let state: VirtioNetState = serde_json::from_value(state).map_err(|e| e.to_string())?;
        let seen = SeenAddresses::new(&state.seen_v4, &state.seen_v6);
        if seen.v4() != state.seen_v4 || seen.v6() != state.seen_v6 {
            return Err("the addresses of the guest are too many, twice there, or nobody's".into());
        }
        if state.announce && self.features.is_some() && !self.has(VIRTIO_NET_F_GUEST_ANNOUNCE) {
            return Err("the guest is asked to announce itself, which it has not accepted".into());
        }
        self.tap.set_offloads(self.features.unwrap_or(0)).map_err(|e| e.to_string())?;
        self.seen = seen;
        if state.announce {
            // Not a change that the driver has not heard of: the saved generation stays.
            let generation = self.config.generation();
            self.ask_to_announce(true);
            self.config.set_generation(generation);
        }
        // Sent while the guest ran elsewhere, where it has got them or not: too old by now.
        for _ in 0..MOST_STALE_FRAMES {
            if !matches!(self.tap.read(&mut self.incoming), Ok(Some(_))) {
                break;
            }
        }
        Ok(())
    }
}
