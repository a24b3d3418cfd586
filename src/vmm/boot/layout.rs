//! Where things are in guest-physical memory at boot.
//!
//! ```text
//! 0x0000_0500  GDT
//! 0x0000_6000  PVH start info, module list, memory map
//! 0x0000_7000  Linux zero page (bzImage)
//! 0x0000_9000  page tables (bzImage), to 0xf000
//! 0x0002_0000  command line, at most 64 KiB
//! 0x0009_fc00  end of usable low memory; up to 1 MiB nothing is usable
//! 0x000e_0000  ACPI tables, to 1 MiB
//! 0x0010_0000  kernel
//! top of RAM below 3 GiB: initrd, page-aligned
//! ```

use crate::memory::{GuestPhysAddr, RamMap};

/// The boot GDT.
pub const GDT: GuestPhysAddr = GuestPhysAddr(0x500);
/// `struct hvm_start_info`; the module list and the memory map follow it in the same page.
pub const START_INFO: GuestPhysAddr = GuestPhysAddr(0x6000);
/// Linux's `struct boot_params`.
pub const ZERO_PAGE: GuestPhysAddr = GuestPhysAddr(0x7000);
/// Six pages: PML4, PDPT, four page directories.
pub const PAGE_TABLES: GuestPhysAddr = GuestPhysAddr(0x9000);
/// The command line, with a NUL at its end.
pub const CMDLINE: GuestPhysAddr = GuestPhysAddr(0x2_0000);
/// The longest command line in bytes, with its NUL.
pub const CMDLINE_MAX: usize = 0x1_0000;
/// Usable memory below 1 MiB ends here (where an EBDA would be).
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// Usable memory goes on here; kernels are at or above it.
pub const HIGH_MEMORY_START: u64 = 0x10_0000;

/// The ACPI tables, the RSDP first: where a BIOS would be, so that a guest that looks there finds it.
pub const ACPI: GuestPhysAddr = GuestPhysAddr(0xe_0000);
/// The room for the ACPI tables.
pub const ACPI_BYTES: u64 = HIGH_MEMORY_START - ACPI.0;

/// What a range of the memory map is; the numbers are those of both e820 and PVH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryKind {
    /// Usable RAM.
    Ram = 1,
    /// ACPI tables.
    AcpiTables = 3,
}

/// The memory map as (start, bytes, kind), ascending: all RAM but the hole below 1 MiB, and in the
/// hole the ACPI tables.
pub fn memory_map(map: &RamMap) -> Vec<(u64, u64, MemoryKind)> {
    let mut out = vec![(0, LOW_MEMORY_END, MemoryKind::Ram), (ACPI.0, ACPI_BYTES, MemoryKind::AcpiTables)];
    for region in map.regions() {
        let start = region.start.0.max(HIGH_MEMORY_START);
        let end = region.start.0 + region.bytes;
        if end > start {
            out.push((start, end - start, MemoryKind::Ram));
        }
    }
    out
}

/// Where RAM below 4 GiB ends.
pub fn low_ram_end(map: &RamMap) -> u64 {
    let first = &map.regions()[0];
    first.start.0 + first.bytes
}
