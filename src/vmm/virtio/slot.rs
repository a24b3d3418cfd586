//! One device at its place: what its registers do.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kvm_ioctls::VmFd;
use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_STATUS,
};
use virtio_queue::{Queue, QueueT};

use super::registers::{Effect, Registers};
use super::worker::{Order, Restore, Worker};
use super::{ConfigSpace, Device, Interrupt, Kind, slot_address};
use crate::state::{VirtioState, VirtioTransportState};
use crate::sys::kvm_ext;
use crate::vmm::VmmError;
use crate::vmm::memory::TrackedMemory;

/// A device with its registers.
pub struct Slot {
    id: String,
    kind: Kind,
    registers: Mutex<Registers>,
    config: Arc<ConfigSpace>,
    interrupt: Arc<Interrupt>,
    memory: Arc<TrackedMemory>,
    kicks: Arc<Vec<EventFd>>,
    worker: Worker,
}

impl Slot {
    /// Puts a device into its place and starts its thread; it holds still until
    /// [`Slot::resume`]. `id` names it in messages.
    pub fn new(
        id: &str,
        device: Box<dyn Device>,
        memory: Arc<TrackedMemory>,
        interrupt: Arc<Interrupt>,
    ) -> Result<Self, VmmError> {
        let fail = |e: std::io::Error| VmmError::Device { id: id.to_owned(), reason: e.to_string() };
        let kick = |_: &u16| EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
        let kicks = device.queue_sizes().iter().map(kick).collect::<Result<_, _>>();
        let kicks: Arc<Vec<EventFd>> = Arc::new(kicks.map_err(|e: nix::Error| fail(e.into()))?);
        let registers = Mutex::new(Registers::new(device.features(), device.queue_sizes()));
        let (kind, config) = (device.kind(), device.config());
        let worker =
            Worker::start(device, Arc::clone(&memory), Arc::clone(&interrupt), Arc::clone(&kicks), id)
                .map_err(fail)?;
        Ok(Self { id: id.to_owned(), kind, registers, config, interrupt, memory, kicks, worker })
    }

    /// Has KVM turn a write to QueueNotify of slot number `slot` into a kick (KVM_IOEVENTFD, KVM API
    /// 4.59), with no exit to this process.
    pub fn wire(&self, vm: &VmFd, slot: usize) -> Result<(), VmmError> {
        let at = slot_address(slot) + u64::from(VIRTIO_MMIO_QUEUE_NOTIFY);
        for (queue, kick) in (0u32..).zip(self.kicks.iter()) {
            kvm_ext::ioeventfd(vm, kick.as_fd(), at, queue).map_err(VmmError::kvm("KVM_IOEVENTFD"))?;
        }
        Ok(())
    }

    /// Its kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// A vCPU reads. Registers are 32 bits wide, the configuration any width.
    pub fn read(&self, offset: u64, into: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            return self.config.read(offset, into);
        }
        let value = match u32::try_from(offset).unwrap_or(u32::MAX) {
            VIRTIO_MMIO_DEVICE_ID => self.kind.number(),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            VIRTIO_MMIO_CONFIG_GENERATION => self.config.generation(),
            VIRTIO_MMIO_STATUS => self.registers().read(offset).unwrap_or(0) | self.needs_reset(),
            _ => self.registers().read(offset).unwrap_or(0),
        };
        match into {
            [_, _, _, _] if offset.is_multiple_of(4) => into.copy_from_slice(&value.to_le_bytes()),
            _ => into.fill(0),
        }
    }

    /// A vCPU writes.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        if let Some(offset) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            return self.config.write(offset, bytes);
        }
        let ([a, b, c, d], true) = (bytes, offset.is_multiple_of(4)) else { return };
        let mut registers = self.registers();
        match registers.write(offset, u32::from_le_bytes([*a, *b, *c, *d])) {
            Effect::None => {}
            Effect::Kick(queue) => {
                if let Some(kick) = self.kicks.get(queue as usize) {
                    let _ = kick.write(1);
                }
            }
            Effect::Acknowledge(bits) => self.interrupt.acknowledge(bits),
            // For these two the driver may take its memory back at once.
            Effect::Reset => {
                self.worker.ask(Order::Reset);
                registers.reset();
                self.interrupt.reset();
            }
            Effect::StopQueue(queue) => {
                self.worker.ask(|done| Order::StopQueue(queue, done));
            }
            Effect::Activate => match self.queues(&registers) {
                Ok(queues) => self.worker.tell(Order::Activate(registers.driver_features(), queues)),
                Err(e) => {
                    tracing::warn!("device {}: {e}", self.id);
                    self.interrupt.set_needs_reset();
                    self.interrupt.config_changed();
                }
            },
        }
    }

    /// Has the device come to rest, and `done` called when it has.
    pub fn pause(&self, done: impl FnOnce() + Send + 'static) {
        self.worker.tell(Order::Pause(Box::new(done)));
    }

    /// Lets the device act.
    pub fn resume(&self) {
        self.worker.resume();
    }

    /// Whether the device holds still.
    pub fn is_still(&self) -> bool {
        self.worker.is_still()
    }

    /// The state of a device that holds still.
    pub fn save(&self) -> Result<VirtioState, VmmError> {
        let saved = self.worker.ask(Order::Save).unwrap_or_else(|| Err("its thread has died".into()));
        let saved = saved.map_err(|reason| self.flaw(reason))?;
        let mut transport = self.registers().save();
        for (queue, used) in transport.queues.iter_mut().zip(saved.queues) {
            if let Some(used) = used {
                (queue.next_available, queue.next_used) = (used.next_avail, used.next_used);
            }
        }
        transport.status |= self.needs_reset();
        transport.interrupt_status = self.interrupt.status();
        transport.config_generation = self.config.generation();
        Ok(VirtioState { transport, device: saved.device })
    }

    /// Checks a state and takes it over; the device holds still until it is let run.
    pub fn restore(&self, state: VirtioState) -> Result<(), VmmError> {
        let VirtioState { transport, device } = state;
        let active = self.restore_registers(&transport).map_err(|reason| self.flaw(reason))?;
        let restore = Box::new(Restore { active, device });
        let answer = self.worker.ask(|answer| Order::Restore(restore, answer));
        answer.unwrap_or_else(|| Err("its thread has died".into())).map_err(|reason| self.flaw(reason))
    }

    /// See [`Device::let_go`].
    pub fn let_go(&self) {
        self.worker.tell(Order::LetGo);
    }

    /// Tells the thread to end.
    pub fn quit(&self) {
        self.worker.tell(Order::Quit);
    }

    /// Waits for the thread's end.
    pub fn join(&self, deadline: Instant) {
        self.worker.join(deadline);
    }

    /// Gives features and queues, if the device is in use.
    #[allow(clippy::type_complexity)] // two things, used once
    fn restore_registers(
        &self,
        state: &VirtioTransportState,
    ) -> Result<Option<(u64, Vec<Option<Queue>>)>, String> {
        let mut registers = self.registers();
        registers.restore(state)?;
        let needs_reset = state.status & VIRTIO_CONFIG_S_NEEDS_RESET != 0;
        self.interrupt.restore(state.interrupt_status, needs_reset);
        self.config.set_generation(state.config_generation);
        if !registers.is_live() || needs_reset {
            return Ok(None);
        }
        Ok(Some((registers.driver_features(), self.queues(&registers)?)))
    }

    /// The queues as the driver has set them up, all in RAM.
    fn queues(&self, registers: &Registers) -> Result<Vec<Option<Queue>>, String> {
        let queues = registers.queues().map_err(|e| format!("a queue makes no sense: {e}"))?;
        match queues.iter().flatten().all(|queue| queue.is_valid(&*self.memory)) {
            true => Ok(queues),
            false => Err("a queue is not all in RAM".into()),
        }
    }

    fn needs_reset(&self) -> u32 {
        if self.interrupt.needs_reset() { VIRTIO_CONFIG_S_NEEDS_RESET } else { 0 }
    }

    fn flaw(&self, reason: String) -> VmmError {
        VmmError::Device { id: self.id.clone(), reason }
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
