//! The saved state of what belongs to the whole machine: interrupt controllers, timer, clock and
//! the serial port.

use serde::{Deserialize, Serialize};

use super::HexBytes;

/// The version of [`IrqchipState`] that is written.
pub const IRQCHIP_VERSION: u32 = 1;
/// The version of [`PitState`] that is written.
pub const PIT_VERSION: u32 = 1;
/// The version of [`ClockState`] that is written.
pub const CLOCK_VERSION: u32 = 1;
/// The version of [`SerialState`] that is written.
pub const SERIAL_VERSION: u32 = 1;

/// The in-kernel interrupt controllers (section kind `irqchip`): `struct kvm_irqchip` of
/// KVM_GET_IRQCHIP for each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IrqchipState {
    /// KVM_IRQCHIP_PIC_MASTER.
    pub pic_master: HexBytes,
    /// KVM_IRQCHIP_PIC_SLAVE.
    pub pic_slave: HexBytes,
    /// KVM_IRQCHIP_IOAPIC.
    pub ioapic: HexBytes,
}

/// The in-kernel timer (section kind `pit`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PitState {
    /// `struct kvm_pit_state2` of KVM_GET_PIT2.
    pub pit2: HexBytes,
}

/// The guest's clock (section kind `clock`), KVM_GET_CLOCK: all read at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClockState {
    /// kvmclock in nanoseconds.
    pub kvmclock_ns: u64,
    /// The host's CLOCK_REALTIME in nanoseconds since 1970; none where KVM_SET_CLOCK does not take it.
    pub realtime_ns: Option<u64>,
    /// The host's TSC in ticks, with KVM_CLOCK_HOST_TSC.
    pub host_tsc: Option<u64>,
}

/// A 16550 serial port (section kind `serial`): its registers by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // the chip's own names
pub struct SerialState {
    pub baud_divisor_low: u8,
    pub baud_divisor_high: u8,
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    /// Input that the guest has not read yet, at most 64 bytes.
    pub in_buffer: Vec<u8>,
}
