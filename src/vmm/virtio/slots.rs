//! All virtio devices of a machine, by slot.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kvm_ioctls::VmFd;

use super::{Device, Interrupt, MAX_DEVICES, Slot, layout, slot_interrupt};
use crate::vmm::VmmError;
use crate::vmm::memory::GuestRam;

/// The longest that the end waits for the devices' threads.
const STOP_WAIT: Duration = Duration::from_secs(1);

/// The devices; the number in the list is the slot.
#[derive(Default)]
pub struct VirtioSlots(Vec<Slot>);

impl VirtioSlots {
    /// Puts the devices, each with its id, into the slots from 0 on, and wires them to `vm`.
    pub fn new(
        vm: &Arc<VmFd>,
        ram: &GuestRam,
        devices: Vec<(String, Box<dyn Device>)>,
    ) -> Result<Self, VmmError> {
        if devices.len() > MAX_DEVICES {
            return Err(VmmError::TooManyDevices { devices: devices.len(), max: MAX_DEVICES });
        }
        let memory = Arc::new(ram.memory().clone());
        let place = |(number, (id, device)): (usize, (String, Box<dyn Device>))| {
            let interrupt = Arc::new(Interrupt::new(Arc::clone(vm), slot_interrupt(number)));
            let slot = Slot::new(&id, device, Arc::clone(&memory), interrupt)?;
            slot.wire(vm, number)?;
            Ok(slot)
        };
        devices.into_iter().enumerate().map(place).collect::<Result<_, _>>().map(Self)
    }

    /// The devices with their slots.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Slot)> {
        (0..).zip(&self.0)
    }

    /// A vCPU reads at a guest-physical address that is no RAM; all ones where no device is.
    pub fn read(&self, address: u64, into: &mut [u8]) {
        match self.at(address) {
            Some((slot, offset)) => slot.read(offset, into),
            None => into.fill(0xff),
        }
    }

    /// A vCPU writes at a guest-physical address that is no RAM.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        if let Some((slot, offset)) = self.at(address) {
            slot.write(offset, bytes);
        }
    }

    /// Has every device come to rest; `then` is called when all have, on the thread of the last.
    pub fn pause(&self, then: impl FnOnce() + Send + 'static) {
        if self.0.is_empty() {
            return then();
        }
        let left = Arc::new(AtomicUsize::new(self.0.len()));
        let then = Arc::new(std::sync::Mutex::new(Some(then)));
        for slot in &self.0 {
            let (left, then) = (Arc::clone(&left), Arc::clone(&then));
            slot.pause(move || {
                if left.fetch_sub(1, Ordering::SeqCst) == 1
                    && let Some(then) = then.lock().ok().and_then(|mut then| then.take())
                {
                    then();
                }
            });
        }
    }

    /// Lets every device act on the host.
    pub fn resume(&self) {
        self.0.iter().for_each(Slot::resume);
    }

    /// Whether all hold still.
    pub fn are_still(&self) -> bool {
        self.0.iter().all(Slot::is_still)
    }

    /// Ends what programs of the host have of the devices of a guest that is elsewhere.
    pub fn let_go(&self) {
        self.0.iter().for_each(Slot::let_go);
    }

    /// Ends the threads, which close what their devices have of the host.
    pub fn stop(&self) {
        self.0.iter().for_each(Slot::quit);
        let deadline = Instant::now() + STOP_WAIT;
        self.0.iter().for_each(|slot| slot.join(deadline));
    }

    fn at(&self, address: u64) -> Option<(&Slot, u64)> {
        let (slot, offset) = layout::locate(address)?;
        Some((self.0.get(slot)?, offset))
    }
}

impl Drop for VirtioSlots {
    fn drop(&mut self) {
        self.stop();
    }
}
