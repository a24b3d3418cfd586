//! The interrupt of a device: a level, up while its status has a bit set.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};

/// The interrupt line and InterruptStatus (virtio 1.2, section 4.2.2) of one device.
pub struct Interrupt {
    status: Mutex<u32>,
    /// DEVICE_NEEDS_RESET: set by the device, gone with its reset.
    needs_reset: AtomicBool,
    set_line: Box<dyn Fn(bool) + Send + Sync>,
}

impl Interrupt {
    /// One that is wired to the interrupt controllers of `vm` at input `gsi`.
    pub fn new(vm: Arc<VmFd>, gsi: u32) -> Self {
        Self::with_line(move |up| {
            if let Err(e) = vm.set_irq_line(gsi, up) {
                tracing::error!("KVM_IRQ_LINE {gsi}: {e}");
            }
        })
    }

    /// One whose line is whatever `set_line` makes of it.
    pub fn with_line(set_line: impl Fn(bool) + Send + Sync + 'static) -> Self {
        Self { status: Mutex::new(0), needs_reset: AtomicBool::new(false), set_line: Box::new(set_line) }
    }

    /// A queue has used buffers.
    pub fn used(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// The configuration, or DEVICE_NEEDS_RESET, has changed.
    pub fn config_changed(&self) {
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// The device cannot go on until it is reset.
    pub(super) fn set_needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    pub(super) fn status(&self) -> u32 {
        *self.lock()
    }

    /// The driver writes InterruptACK.
    pub(super) fn acknowledge(&self, bits: u32) {
        let mut status = self.lock();
        let was = *status;
        *status &= !bits;
        if was != 0 && *status == 0 {
            (self.set_line)(false);
        }
    }

    /// The device is reset: nothing is pending.
    pub(super) fn reset(&self) {
        self.acknowledge(u32::MAX);
        self.needs_reset.store(false, Ordering::SeqCst);
    }

    /// Takes over a saved status. The line follows with [`Interrupt::refresh`].
    pub(super) fn restore(&self, status: u32, needs_reset: bool) {
        *self.lock() = status;
        self.needs_reset.store(needs_reset, Ordering::SeqCst);
    }

    /// Sets the line as the status says: KVM's saved state does not hold who keeps a line up.
    pub(super) fn refresh(&self) {
        let status = self.lock();
        (self.set_line)(*status != 0);
    }

    fn raise(&self, bit: u32) {
        let mut status = self.lock();
        let was = *status;
        *status |= bit;
        if was == 0 {
            (self.set_line)(true);
        }
    }

    fn lock(&self) -> MutexGuard<'_, u32> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
