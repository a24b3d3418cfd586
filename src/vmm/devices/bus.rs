//! Which port leads to which device.
//!
//! | port | device |
//! |---|---|
//! | 0x3f8–0x3ff | serial port |
//! | 0x60, 0x64 | i8042: reads as idle; command 0xfe to 0x64 is a reset |
//! | 0x71 | CMOS: reads as zero, so that nobody waits for its update to end |
//! | 0xcf9 | reset control: bits 1 and 2 set (0x06, 0x0e) is a reset |
//! | 0x604 | ACPI PM1a control, as QEMU has it: SLP_EN (bit 13) is a power-off |
//! | 0x605 | its upper half, ACPI's sleep control register: SLP_EN (bit 5) is a power-off |
//! | 0x606 | ACPI's sleep status register: reads as zero |
//!
//! Every other port, and every address that is neither RAM nor an in-kernel device, reads as all
//! ones and ignores writes.

use super::{COM1_PORTS, SerialPort};
use crate::vmm::GuestExit;
use crate::vmm::virtio::VirtioSlots;

const I8042_DATA: u16 = 0x60;
const I8042_COMMAND: u16 = 0x64;
const I8042_RESET: u8 = 0xfe;
const CMOS_DATA: u16 = 0x71;
/// The reset register.
pub const RESET_CONTROL: u16 = 0xcf9;
/// What resets the machine when it is written there.
pub const RESET_CONTROL_CPU: u8 = 0x06;
const PM1A_CONTROL: u16 = 0x604;
const PM1A_SLEEP_ENABLE: u16 = 1 << 13;
/// The sleep control register of hardware-reduced ACPI (ACPI 6.5, 4.8.3.7).
pub const SLEEP_CONTROL: u16 = PM1A_CONTROL + 1;
const SLEEP_ENABLE: u8 = 1 << 5;
/// The sleep status register; nothing is ever woken.
pub const SLEEP_STATUS: u16 = 0x606;

/// The devices of a machine, by port.
pub struct Bus {
    /// COM1.
    pub serial: SerialPort,
    /// What is reached by memory.
    pub virtio: VirtioSlots,
}

impl Bus {
    /// The guest reads `into.len()` bytes from `port`.
    pub fn read(&self, port: u16, into: &mut [u8]) {
        match port {
            p if COM1_PORTS.contains(&p) => {
                into.fill_with(|| self.serial.read((p - COM1_PORTS.start()) as u8));
            }
            I8042_DATA | I8042_COMMAND | CMOS_DATA | SLEEP_CONTROL | SLEEP_STATUS => into.fill(0),
            _ => into.fill(0xff),
        }
    }

    /// The guest writes to `port`. Gives how the machine ends, if that is what it asks for.
    pub fn write(&self, port: u16, bytes: &[u8]) -> Option<GuestExit> {
        if COM1_PORTS.contains(&port) {
            self.serial.write((port - COM1_PORTS.start()) as u8, bytes);
            return None;
        }
        power_write(port, bytes)
    }
}

/// What a write to a port of the reset and power logic does.
fn power_write(port: u16, bytes: &[u8]) -> Option<GuestExit> {
    match (port, bytes) {
        (I8042_COMMAND, [I8042_RESET, ..]) => Some(GuestExit::Reset),
        (RESET_CONTROL, [value, ..]) if value & RESET_CONTROL_CPU == RESET_CONTROL_CPU => {
            Some(GuestExit::Reset)
        }
        (PM1A_CONTROL, [low, high, ..]) if u16::from_le_bytes([*low, *high]) & PM1A_SLEEP_ENABLE != 0 => {
            Some(GuestExit::Shutdown)
        }
        (SLEEP_CONTROL, [value, ..]) if value & SLEEP_ENABLE != 0 => Some(GuestExit::Shutdown),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reset_and_power_off_have_their_ports() {
        assert_eq!(power_write(0x64, &[0xfe]), Some(GuestExit::Reset));
        assert_eq!(power_write(0x64, &[0x20]), None);
        assert_eq!(power_write(0xcf9, &[0x02]), None);
        assert_eq!(power_write(0xcf9, &[0x06]), Some(GuestExit::Reset));
        assert_eq!(power_write(0x604, &[0x00, 0x20]), Some(GuestExit::Shutdown));
        assert_eq!(power_write(0x604, &[0x00, 0x00]), None);
        assert_eq!(power_write(0x604, &[0x20]), None, "the lower half");
        assert_eq!(power_write(0x605, &[0x34]), Some(GuestExit::Shutdown));
        assert_eq!(power_write(0x605, &[0x14]), None, "a sleep type alone");
        assert_eq!(power_write(0x606, &[0x80]), None);
        assert_eq!(power_write(0x80, &[0xfe]), None);
    }
}
