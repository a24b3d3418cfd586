//! The registers of virtio-mmio version 2 (virtio 1.2, section 4.2.2), without any effect: what a
//! write means is told by [`Effect`].

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueState};

use crate::state::{VirtioQueueState, VirtioTransportState};

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "VMFY": no vendor has it.
const VENDOR: u32 = 0x5946_4d56;
/// What every device here offers.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// The bits of Status that a driver writes.
const DRIVER_STATUS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_FAILED;
/// Bits of InterruptStatus that exist.
const INTERRUPT_BITS: u32 = VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG;

/// What has to follow a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    /// Status became zero.
    Reset,
    /// DRIVER_OK was set.
    Activate,
    /// A queue of a device that is in use is to be left alone.
    StopQueue(usize),
    /// A queue was kicked.
    Kick(u32),
    /// InterruptACK.
    Acknowledge(u32),
}

/// The registers of one device.
pub(super) struct Registers {
    offered: u64,
    maxima: Vec<u16>,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    status: u32,
    queues: Vec<VirtioQueueState>,
}

impl Registers {
    /// After a reset, for a device with these features and largest queue sizes.
    pub fn new(features: u64, maxima: &[u16]) -> Self {
        let mut registers = Self {
            offered: features | TRANSPORT_FEATURES,
            maxima: maxima.to_vec(),
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            status: 0,
            queues: Vec::new(),
        };
        registers.reset();
        registers
    }

    /// Back to the start.
    pub fn reset(&mut self) {
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.status = 0;
        let fresh = |size: &u16| VirtioQueueState { size: *size, ..VirtioQueueState::default() };
        self.queues = self.maxima.iter().map(fresh).collect();
    }

    pub fn driver_features(&self) -> u64 {
        self.driver_features
    }

    /// Whether the driver has set DRIVER_OK.
    pub fn is_live(&self) -> bool {
        self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0
    }

    /// A register that needs nobody else; `None` for the others, and for what is none.
    pub fn read(&self, offset: u64) -> Option<u32> {
        let offered = self.offered;
        Some(match u32::try_from(offset).ok()? {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => half(offered, self.device_features_select),
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.maxima.get(self.selected()).copied().unwrap_or(0).into(),
            VIRTIO_MMIO_QUEUE_READY => self.queues.get(self.selected()).is_some_and(|q| q.ready).into(),
            VIRTIO_MMIO_STATUS => self.status,
            // There is no shared memory: its length is all ones.
            VIRTIO_MMIO_SHM_LEN_LOW | VIRTIO_MMIO_SHM_LEN_HIGH => u32::MAX,
            VIRTIO_MMIO_SHM_BASE_LOW | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => return None,
        })
    }

    /// Writes a register. What the driver may not write, or not now, stays.
    pub fn write(&mut self, offset: u64, value: u32) -> Effect {
        let Ok(offset) = u32::try_from(offset) else { return Effect::None };
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES if self.status & VIRTIO_CONFIG_S_FEATURES_OK == 0 => {
                set_half(&mut self.driver_features, self.driver_features_select, value);
            }
            VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => return Effect::Kick(value),
            VIRTIO_MMIO_INTERRUPT_ACK => return Effect::Acknowledge(value),
            VIRTIO_MMIO_STATUS => return self.write_status(value),
            VIRTIO_MMIO_QUEUE_READY => return self.write_ready(value),
            _ => self.write_queue(offset, value),
        }
        Effect::None
    }

    fn selected(&self) -> usize {
        self.queue_select as usize
    }

    fn write_status(&mut self, value: u32) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        // A driver never takes a bit back, and FEATURES_OK stays only if the features are acceptable.
        let mut new = (value & DRIVER_STATUS) & !self.status;
        let agreed =
            self.driver_features & !self.offered == 0 && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0;
        if new & VIRTIO_CONFIG_S_FEATURES_OK != 0 && !agreed {
            new &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if (self.status | new) & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            new &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        self.status |= new;
        match new & VIRTIO_CONFIG_S_DRIVER_OK {
            0 => Effect::None,
            _ => Effect::Activate,
        }
    }

    /// Queues are made ready before DRIVER_OK, and only then.
    fn write_ready(&mut self, value: u32) -> Effect {
        let (live, at) = (self.is_live(), self.selected());
        let Some(queue) = self.queues.get_mut(at) else { return Effect::None };
        match (value & 1 == 1, queue.ready) {
            (true, false) if !live => queue.ready = true,
            (false, true) => {
                queue.ready = false;
                if live {
                    return Effect::StopQueue(at);
                }
            }
            _ => {}
        }
        Effect::None
    }

    fn write_queue(&mut self, offset: u32, value: u32) {
        let at = self.selected();
        let maximum = self.maxima.get(at).copied().unwrap_or(0);
        let Some(queue) = self.queues.get_mut(at).filter(|q| !q.ready) else { return };
        match offset {
            VIRTIO_MMIO_QUEUE_NUM => {
                if let Ok(size) = u16::try_from(value)
                    && size.is_power_of_two()
                    && size <= maximum
                {
                    queue.size = size;
                }
            }
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_half(&mut queue.descriptors, 0, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_half(&mut queue.descriptors, 1, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_half(&mut queue.available, 0, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_half(&mut queue.available, 1, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_half(&mut queue.used, 0, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_half(&mut queue.used, 1, value),
            _ => {}
        }
    }

    /// The queues to begin with, `None` for those that are not ready; an error where one makes no
    /// sense.
    pub fn queues(&self) -> Result<Vec<Option<Queue>>, virtio_queue::Error> {
        let event_idx_enabled = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let make = |(q, max): (&VirtioQueueState, &u16)| {
            let state = QueueState {
                max_size: *max,
                next_avail: q.next_available,
                next_used: q.next_used,
                event_idx_enabled,
                size: q.size,
                ready: q.ready,
                desc_table: q.descriptors,
                avail_ring: q.available,
                used_ring: q.used,
            };
            q.ready.then(|| Queue::try_from(state)).transpose()
        };
        self.queues.iter().zip(&self.maxima).map(make).collect()
    }

    /// The state, but for what belongs to the interrupt, the configuration and the queues in use.
    pub fn save(&self) -> VirtioTransportState {
        VirtioTransportState {
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            status: self.status,
            interrupt_status: 0,
            config_generation: 0,
            queues: self.queues.clone(),
        }
    }

    /// Takes over a saved state, which comes from a peer: whatever no driver can have brought about
    /// is an error.
    pub fn restore(&mut self, state: &VirtioTransportState) -> Result<(), String> {
        let foreign = state.driver_features & !self.offered;
        let live = state.status & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        let agreed = state.status & VIRTIO_CONFIG_S_FEATURES_OK != 0;
        if state.queues.len() != self.maxima.len() {
            return Err(format!("it has {} queues, not {}", state.queues.len(), self.maxima.len()));
        }
        if agreed && foreign != 0 {
            return Err(format!("its driver uses features {foreign:#x}, which are not offered here"));
        }
        if agreed && state.driver_features & 1 << VIRTIO_F_VERSION_1 == 0 || live && !agreed {
            return Err(format!("status {:#x} cannot be", state.status));
        }
        if state.status & !(DRIVER_STATUS | VIRTIO_CONFIG_S_NEEDS_RESET) != 0
            || state.interrupt_status & !INTERRUPT_BITS != 0
        {
            return Err(format!(
                "unknown bits: status {:#x}, interrupts {:#x}",
                state.status, state.interrupt_status
            ));
        }
        for (n, (q, max)) in state.queues.iter().zip(&self.maxima).enumerate() {
            let open = q.next_available.wrapping_sub(q.next_used);
            if !q.size.is_power_of_two() || q.size > *max || open > q.size {
                return Err(format!("queue {n} of {} entries with {open} open cannot be", q.size));
            }
        }
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.driver_features = state.driver_features;
        self.queue_select = state.queue_select;
        self.status = state.status & DRIVER_STATUS;
        self.queues = state.queues.clone();
        Ok(())
    }
}

/// One half of 64 bits, as a selector chooses it; there are two.
fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(value: &mut u64, select: u32, half: u32) {
    match select {
        0 => *value = *value & !0xffff_ffff | u64::from(half),
        1 => *value = *value & 0xffff_ffff | u64::from(half) << 32,
        _ => {}
    }
}
