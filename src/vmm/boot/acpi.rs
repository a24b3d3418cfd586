//! The ACPI tables (ACPI 6.5): what a guest cannot find by asking the hardware.
//!
//! | table | says |
//! |---|---|
//! | RSDP, XSDT | where the others are |
//! | FADT | hardware-reduced ACPI, how to reset and to power off, that there is neither VGA nor RTC |
//! | MADT | the vCPUs' local APICs, the IOAPIC |
//! | DSDT | the serial port, the virtio-mmio devices, the sleep type of S5 |
//!
//! There are no interrupt source overrides: KVM's default routing has each ISA interrupt at the
//! IOAPIC input of its own number, the timer's too.
//!
//! The tables are in guest RAM and so go where the guest goes; a machine that comes in gets none.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use super::{BootError, layout};
use crate::memory::GuestPhysAddr;
use crate::vmm::VmmError;
use crate::vmm::devices::{
    COM1_IRQ, COM1_PORTS, RESET_CONTROL, RESET_CONTROL_CPU, SLEEP_CONTROL, SLEEP_STATUS,
};
use crate::vmm::memory::GuestRam;
use crate::vmm::virtio::{SLOT_BYTES, slot_address, slot_interrupt};

const OEM: [u8; 6] = *b"VMFRRY";
const OEM_TABLE: [u8; 8] = *b"VMFERRY ";
const OEM_REVISION: u32 = 1;

/// SLP_TYP of S5. Any will do: there is no other sleep state.
const SLEEP_TYPE_OFF: u8 = 5;
/// IAPC_BOOT_ARCH: no VGA, no CMOS RTC (ACPI 6.5, table 5.11).
const BOOT_ARCH: u16 = 1 << 2 | 1 << 5;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IOAPIC: u32 = 0xfec0_0000;
/// MADT flags: the two PICs that KVM has are there too.
const PCAT_COMPAT: u32 = 1;
const SDT_HEADER_BYTES: u32 = 36;
const MADT_REVISION: u8 = 5;
const DSDT_REVISION: u8 = 2;
/// From this APIC id on, an entry for a local APIC has no room for it.
const FIRST_X2APIC: u32 = 255;
const X2APIC_KIND: u8 = 9;
const X2APIC_BYTES: u8 = 16;
const CPU_ENABLED: u32 = 1;

/// Writes the tables of a machine with `vcpus` vCPUs and devices in the first `virtio` slots.
pub(super) fn write_tables(ram: &GuestRam, vcpus: u32, virtio: usize) -> Result<(), VmmError> {
    let tables = tables(vcpus, virtio);
    if tables.len() as u64 > layout::ACPI_BYTES {
        return Err(BootError::AcpiTooLarge { vcpus, bytes: tables.len(), max: layout::ACPI_BYTES }.into());
    }
    ram.write(layout::ACPI, &tables)
}

/// All tables as they are from [`layout::ACPI`] on; the RSDP is the first.
fn tables(vcpus: u32, virtio: usize) -> Vec<u8> {
    let mut out = vec![0; Rsdp::len()];
    let dsdt = place(&mut out, &dsdt(virtio));
    let fadt = place(&mut out, &fadt(dsdt).finalize());
    let madt = place(&mut out, &madt(vcpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt.0);
    xsdt.add_entry(madt.0);
    let xsdt = place(&mut out, &xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt.0).to_aml_bytes(&mut rsdp);
    out[..rsdp.len()].copy_from_slice(&rsdp);
    out
}

/// Puts a table after the others. Gives its address.
fn place(out: &mut Vec<u8>, table: &dyn Aml) -> GuestPhysAddr {
    out.resize(out.len().next_multiple_of(16), 0);
    let address = GuestPhysAddr(layout::ACPI.0 + out.len() as u64);
    table.to_aml_bytes(out);
    address
}

fn fadt(dsdt: GuestPhysAddr) -> FADTBuilder {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt.0)
        .flag(Flags::Wbinvd)
        .flag(Flags::ResetRegSup)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(RESET_CONTROL);
    fadt.reset_value = RESET_CONTROL_CPU;
    fadt.sleep_control_reg = port(SLEEP_CONTROL);
    fadt.sleep_status_reg = port(SLEEP_STATUS);
    fadt
}

fn madt(vcpus: u32) -> Sdt {
    let mut entries = Vec::new();
    for id in 0..vcpus {
        match u8::try_from(id) {
            Ok(short) if id < FIRST_X2APIC => {
                ProcessorLocalApic::new(short, short, EnabledStatus::Enabled).to_aml_bytes(&mut entries);
            }
            _ => entries.extend(x2apic(id)),
        }
    }
    IoApic::new(0, IOAPIC, 0).to_aml_bytes(&mut entries);
    let mut madt = Sdt::new(*b"APIC", SDT_HEADER_BYTES, MADT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    madt.append(LOCAL_APIC);
    madt.append(PCAT_COMPAT);
    madt.append_slice(&entries);
    madt
}

/// A processor local x2APIC structure (ACPI 6.5, 5.2.12.12): kind, length, reserved, id, flags, uid.
fn x2apic(id: u32) -> Vec<u8> {
    let mut out = vec![X2APIC_KIND, X2APIC_BYTES, 0, 0];
    [id, CPU_ENABLED, id].iter().for_each(|value| out.extend(value.to_le_bytes()));
    out
}

fn dsdt(virtio: usize) -> Sdt {
    let mut devices = Vec::new();
    serial_port(&mut devices);
    (0..virtio).for_each(|slot| virtio_device(&mut devices, slot));
    let mut dsdt = Sdt::new(*b"DSDT", SDT_HEADER_BYTES, DSDT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&Scope::raw("\\_SB_".into(), devices));
    let sleep = Package::new(vec![&SLEEP_TYPE_OFF, &0u8, &0u8, &0u8]);
    let mut s5 = Vec::new();
    Name::new("\\_S5_".into(), &sleep).to_aml_bytes(&mut s5);
    dsdt.append_slice(&s5);
    dsdt
}

fn serial_port(out: &mut Vec<u8>) {
    let (first, count) = (*COM1_PORTS.start(), COM1_PORTS.count() as u8);
    let ports = IO::new(first, first, 1, count);
    // A consumer of it: edge, active high, its own.
    let interrupt = Interrupt::new(true, true, false, false, COM1_IRQ);
    device(out, "COM1", &EISAName::new("PNP0501"), 0, &[&ports, &interrupt]);
}

/// LNRO0005 is what Linux looks for: a virtio-mmio device.
fn virtio_device(out: &mut Vec<u8>, slot: usize) {
    let registers = Memory32Fixed::new(true, slot_address(slot) as u32, SLOT_BYTES as u32);
    // Level, active high, its own.
    let interrupt = Interrupt::new(true, false, false, false, slot_interrupt(slot));
    device(out, &format!("VR{slot:02}"), &"LNRO0005", slot, &[&registers, &interrupt]);
}

/// Adds a device: its name, what it is, which one of those, and what it takes.
fn device(out: &mut Vec<u8>, name: &str, hid: &dyn Aml, uid: usize, resources: &[&dyn Aml]) {
    let hid = Name::new("_HID".into(), hid);
    let uid = Name::new("_UID".into(), &uid);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(resources.to_vec()));
    Device::new(name.into(), vec![&hid, &uid, &resources]).to_aml_bytes(out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::virtio::MAX_DEVICES;

    fn u32_at(raw: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(raw[at..at + 4].try_into().unwrap())
    }

    /// The table at an address, by the length that it says it has; its sum has to be right.
    fn table_at(raw: &[u8], address: u64, signature: &[u8; 4]) -> Vec<u8> {
        let table = &raw[(address - layout::ACPI.0) as usize..];
        let table = table[..u32_at(table, 4) as usize].to_vec();
        assert_eq!(&table[..4], signature);
        assert_eq!(sum(&table), 0, "checksum of {}", String::from_utf8_lossy(signature));
        table
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn u64_at(raw: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(raw[at..at + 8].try_into().unwrap())
    }

    /// FADT, MADT, DSDT, found as a guest finds them.
    fn found(raw: &[u8]) -> [Vec<u8>; 3] {
        assert_eq!(&raw[..8], b"RSD PTR ");
        assert_eq!((sum(&raw[..20]), sum(&raw[..36]), raw[15]), (0, 0, 2));
        let xsdt = table_at(raw, u64_at(raw, 24), b"XSDT");
        assert_eq!(xsdt.len(), 36 + 2 * 8);
        let fadt = table_at(raw, u64_at(&xsdt, 36), b"FACP");
        let madt = table_at(raw, u64_at(&xsdt, 44), b"APIC");
        let dsdt = table_at(raw, u64_at(&fadt, 140), b"DSDT");
        [fadt, madt, dsdt]
    }

    fn times(raw: &[u8], piece: &[u8]) -> usize {
        raw.windows(piece.len()).filter(|window| *window == piece).count()
    }

    #[test]
    fn the_fadt_says_how_to_reset_and_power_off() {
        let [fadt, ..] = found(&tables(1, 0));
        assert_eq!(fadt.len(), 276);
        assert_eq!(u32_at(&fadt, 112), 1 | 1 << 10 | 1 << 20, "flags");
        assert_eq!(fadt[109..111], [0x24, 0], "neither VGA nor RTC");
        // I/O space, 8 bits from bit 0, byte access, the port.
        let register = |at: usize| (fadt[at..at + 4].to_vec(), u64_at(&fadt, at + 4));
        assert_eq!(register(116), (vec![1, 8, 0, 1], 0xcf9));
        assert_eq!(fadt[128], 6);
        assert_eq!(register(244), (vec![1, 8, 0, 1], 0x605));
        assert_eq!(register(256), (vec![1, 8, 0, 1], 0x606));
    }

    #[test]
    fn the_madt_has_every_vcpu_once_and_the_ioapic() {
        for vcpus in [1, 2, 255, 256, 300] {
            let [_, madt, _] = found(&tables(vcpus, 0));
            assert_eq!((u32_at(&madt, 36), u32_at(&madt, 40)), (0xfee0_0000, 1));
            let (mut rest, mut ids, mut ioapics) = (&madt[44..], Vec::new(), 0);
            while let [kind, bytes, ..] = *rest {
                let entry = &rest[..bytes.into()];
                match (kind, bytes) {
                    (0, 8) => {
                        assert_eq!((entry[2], u32_at(entry, 4)), (entry[3], 1));
                        ids.push(u32::from(entry[3]));
                    }
                    (9, 16) => {
                        assert_eq!((u32_at(entry, 8), u32_at(entry, 12)), (1, u32_at(entry, 4)));
                        ids.push(u32_at(entry, 4));
                    }
                    (1, 12) => {
                        assert_eq!((entry[2], u32_at(entry, 4), u32_at(entry, 8)), (0, 0xfec0_0000, 0));
                        ioapics += 1;
                    }
                    other => panic!("{other:?}"),
                }
                rest = &rest[bytes.into()..];
            }
            assert!(rest.is_empty());
            assert_eq!(ids, (0..vcpus).collect::<Vec<_>>());
            assert_eq!(ioapics, 1);
        }
    }

    #[test]
    fn the_dsdt_has_each_device_where_the_machine_has_it() {
        for devices in 0..=MAX_DEVICES {
            let [_, _, dsdt] = found(&tables(1, devices));
            assert_eq!(times(&dsdt, b"LNRO0005\0"), devices);
            for slot in 0..MAX_DEVICES {
                // Fixed memory, 9 bytes, writable, address, size; extended interrupt, 6 bytes,
                // consumer of a level that is active high, one of them.
                let mut resources = vec![0x86, 9, 0, 1];
                resources.extend((0xd000_0000 + 0x1000 * slot as u32).to_le_bytes());
                resources.extend(0x1000u32.to_le_bytes());
                resources.extend([0x89, 6, 0, 0b0001, 1]);
                resources.extend(slot_interrupt(slot).to_le_bytes());
                assert_eq!(times(&dsdt, &resources), usize::from(slot < devices), "slot {slot}");
            }
            // Ports, 16 bits decoded, first, last, alignment, count; the interrupt is an edge.
            let serial = [0x47, 1, 0xf8, 3, 0xf8, 3, 1, 8, 0x89, 6, 0, 0b0011, 1, 4, 0, 0, 0];
            assert_eq!(times(&dsdt, &serial), 1);
            assert_eq!(times(&dsdt, b"\\_S5_\x12\x07\x04\x0a\x05\0\0\0"), 1);
        }
    }

    #[test]
    fn tables_that_do_not_fit_are_refused() {
        let map = crate::vmm::memory::ram_map(16 << 20).unwrap();
        let ram = GuestRam::new(map, "test", crate::memory::RamPages::Small).unwrap();
        write_tables(&ram, 4096, MAX_DEVICES).unwrap();
        let error = write_tables(&ram, 10_000, 0).unwrap_err().to_string();
        assert!(error.contains("10000 vCPUs"), "{error}");
    }
}
