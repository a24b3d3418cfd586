//! A device without its thread, for the fuzzer: the same registers and the same work, done when the
//! caller says.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::mpsc;

use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_STATUS};
use virtio_queue::QueueT;

use super::net::{Net, Tap};
use super::registers::{Effect, Registers};
use super::worker::{Body, Order, Restore};
use super::{ConfigSpace, Device, Interrupt};
use crate::memory::{GuestPhysAddr, RamMap, RamPages, RamRegion};
use crate::state::VirtioState;
use crate::vmm::GuestRam;
use crate::vmm::memory::TrackedMemory;

/// RAM from 0 on.
pub struct GuestMemory(GuestRam);

impl GuestMemory {
    /// Of so many bytes, a multiple of 256 KiB.
    pub fn new(bytes: u64) -> Self {
        let map = RamMap::new(vec![RamRegion { start: GuestPhysAddr(0), bytes }]).expect("a map");
        Self(GuestRam::new(map, "driven", RamPages::Small).expect("RAM can be made"))
    }

    /// The driver writes; what is beyond the RAM is left out.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        let _ = self.0.write(GuestPhysAddr(at), bytes);
    }
}

/// What a network card is connected to instead of a tap.
pub struct Wire {
    ours: UnixDatagram,
    cards: OwnedFd,
}

impl Wire {
    /// A wire with two ends.
    pub fn new() -> Self {
        let (ours, cards) = UnixDatagram::pair().expect("a pair of sockets can be made");
        for end in [&ours, &cards] {
            end.set_nonblocking(true).expect("it is a socket");
        }
        Self { ours, cards: cards.into() }
    }

    /// A card at the other end.
    pub fn card(&self) -> Box<dyn Device> {
        let socket = self.cards.try_clone().expect("a descriptor can be made");
        Box::new(Net::new(Tap::of_socket(socket), "52:54:00:12:34:56".parse().expect("an address")))
    }

    /// A frame with its header for the guest.
    pub fn send(&self, frame: &[u8]) {
        let _ = self.ours.send(frame);
    }

    /// Takes what the guest has sent.
    pub fn drain(&self) {
        let mut frame = [0; 16];
        while self.ours.recv(&mut frame).is_ok() {}
    }
}

impl Default for Wire {
    fn default() -> Self {
        Self::new()
    }
}

/// The device in its place.
pub struct DrivenDevice {
    registers: Registers,
    config: Arc<ConfigSpace>,
    interrupt: Arc<Interrupt>,
    memory: Arc<TrackedMemory>,
    body: Body,
}

impl DrivenDevice {
    /// Puts it into its place, still.
    pub fn new(device: Box<dyn Device>, memory: &GuestMemory) -> Self {
        let kick = |_: &u16| EventFd::from_flags(EfdFlags::EFD_NONBLOCK).expect("an eventfd can be made");
        let kicks: Arc<Vec<EventFd>> = Arc::new(device.queue_sizes().iter().map(kick).collect());
        let registers = Registers::new(device.features(), device.queue_sizes());
        let (config, interrupt) = (device.config(), Arc::new(Interrupt::with_line(|_| ())));
        let memory = Arc::new(memory.0.memory().clone());
        let body = Body::idle(device, Arc::clone(&memory), Arc::clone(&interrupt), kicks);
        Self { registers, config, interrupt, memory, body }
    }

    /// The driver reads a register of 32 bits.
    pub fn read(&self, offset: u64) -> u32 {
        if let Some(offset) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            let mut bytes = [0; 4];
            self.config.read(offset, &mut bytes);
            return u32::from_le_bytes(bytes);
        }
        let value = self.registers.read(offset).unwrap_or(0);
        match offset == u64::from(VIRTIO_MMIO_STATUS) && self.interrupt.needs_reset() {
            true => value | VIRTIO_CONFIG_S_NEEDS_RESET,
            false => value,
        }
    }

    /// The driver writes a register of 32 bits. As in [`super::Slot`].
    pub fn write(&mut self, offset: u64, value: u32) {
        if let Some(offset) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            return self.config.write(offset, &value.to_le_bytes());
        }
        let (done, _) = mpsc::channel();
        match self.registers.write(offset, value) {
            Effect::None => {}
            Effect::Kick(queue) => self.body.kick(queue as usize),
            Effect::Acknowledge(bits) => self.interrupt.acknowledge(bits),
            Effect::Reset => {
                self.body.obey(Order::Reset(done));
                self.registers.reset();
                self.interrupt.reset();
            }
            Effect::StopQueue(queue) => drop(self.body.obey(Order::StopQueue(queue, done))),
            Effect::Activate => match self.queues() {
                Ok(queues) => drop(self.body.obey(Order::Activate(self.registers.driver_features(), queues))),
                Err(_) => {
                    self.interrupt.set_needs_reset();
                    self.interrupt.config_changed();
                }
            },
        }
    }

    /// Does what there is to do, as the thread would.
    pub fn work(&mut self) {
        self.body.turn();
    }

    /// The machine is paused.
    pub fn pause(&mut self) {
        self.body.obey(Order::Pause(Box::new(|| ())));
    }

    /// The machine runs.
    pub fn resume(&mut self) {
        self.body.obey(Order::Resume);
    }

    /// The state, of a device that holds still.
    pub fn save(&mut self) -> Result<VirtioState, String> {
        let (answer, saved) = mpsc::channel();
        self.body.obey(Order::Save(answer));
        let saved = saved.recv().map_err(|e| e.to_string())??;
        let mut transport = self.registers.save();
        for (queue, used) in transport.queues.iter_mut().zip(saved.queues) {
            if let Some(used) = used {
                (queue.next_available, queue.next_used) = (used.next_avail, used.next_used);
            }
        }
        transport.status |= if self.interrupt.needs_reset() { VIRTIO_CONFIG_S_NEEDS_RESET } else { 0 };
        transport.interrupt_status = self.interrupt.status();
        transport.config_generation = self.config.generation();
        Ok(VirtioState { transport, device: saved.device })
    }

    /// Takes a state over, of a device that holds still.
    pub fn restore(&mut self, state: VirtioState) -> Result<(), String> {
        self.registers.restore(&state.transport)?;
        let needs_reset = state.transport.status & VIRTIO_CONFIG_S_NEEDS_RESET != 0;
        self.interrupt.restore(state.transport.interrupt_status, needs_reset);
        self.config.set_generation(state.transport.config_generation);
        let live = self.registers.is_live() && !needs_reset;
        let features = self.registers.driver_features();
        let active = live.then(|| self.queues()).transpose()?.map(|queues| (features, queues));
        let (answer, restored) = mpsc::channel();
        self.body.obey(Order::Restore(Box::new(Restore { active, device: state.device }), answer));
        restored.recv().map_err(|e| e.to_string())?
    }

    fn queues(&self) -> Result<Vec<Option<virtio_queue::Queue>>, String> {
        let queues = self.registers.queues().map_err(|e| e.to_string())?;
        match queues.iter().flatten().all(|queue| queue.is_valid(&*self.memory)) {
            true => Ok(queues),
            false => Err("a queue is not all in RAM".into()),
        }
    }
}
