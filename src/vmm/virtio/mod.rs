//! Virtio devices behind virtio-mmio (virtio 1.2, sections 2 and 4.2).
//!
//! Each device is three parts: a [`Device`], which knows its queues and its host end and lives on a
//! thread of its own; the registers, which vCPUs read and write ([`Slot`]); and the host end itself,
//! which is opened before anything is promised ([`HostEnd::open`]) and acts only while the machine
//! runs (S5).
//!
//! A vCPU never waits for device work, but for two register writes whose effect the driver may rely
//! on at once: a reset, and a queue that is stopped. Queues are kicked by ioeventfd. Interrupts are
//! levels, set by KVM_IRQ_LINE: it is synchronous, so that nothing is on its way when the interrupt
//! controllers are saved.

mod block;
mod config;
mod device;
#[cfg(any(fuzzing, test))]
pub mod driven;
mod host;
mod interrupt;
mod io;
mod layout;
pub mod net;
mod registers;
mod rng;
mod slot;
mod slots;
pub mod vsock;
mod worker;

pub use block::ImageConfig;
pub use config::ConfigSpace;
pub use device::{Device, DeviceError, Kind, Watch};
pub use host::{HostEnd, NoHostEnd, OpenError};
pub use interrupt::Interrupt;
pub use io::{Chain, Io};
pub use layout::{MAX_DEVICES, SLOT_BYTES, slot_address, slot_interrupt};
pub use slot::Slot;
pub use slots::VirtioSlots;

/// Whether `text` may be the id of a device.
pub fn is_device_id(text: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    !text.is_empty() && text.len() <= 32 && text.chars().all(fits)
}

#[cfg(test)]
mod tests;
