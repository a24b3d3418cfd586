//! bzImage kernels by Linux's 64-bit boot protocol (Documentation/arch/x86/boot.rst and
//! zero-page.rst in the kernel's source).

use super::source::Image;
use super::{BootError, Loaded, layout};
use crate::memory::RamMap;
use crate::vmm::VmmError;
use crate::vmm::memory::GuestRam;

// Offsets in the file, which are those in the zero page too.
const SETUP_SECTS: usize = 0x1f1;
const BOOT_FLAG: usize = 0x1fe;
const JUMP_LENGTH: usize = 0x201;
const HEADER_MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const TYPE_OF_LOADER: usize = 0x210;
const LOADFLAGS: usize = 0x211;
const CODE32_START: usize = 0x214;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const CMD_LINE_PTR: usize = 0x228;
const XLOADFLAGS: usize = 0x236;
const CMDLINE_SIZE: usize = 0x238;
const PREF_ADDRESS: usize = 0x258;
const INIT_SIZE: usize = 0x260;
const HEADER_END: usize = 0x268;
// Only in the zero page.
const ACPI_RSDP: usize = 0x070;
const EXT_RAMDISK_IMAGE: usize = 0x0c0;
const E820_ENTRIES: usize = 0x1e8;
const E820_TABLE: usize = 0x2d0;

const LOADED_HIGH: u8 = 1;
const KERNEL_64: u16 = 1;
/// The first version with `xloadflags`, and so with the 64-bit entry.
const MIN_VERSION: u16 = 0x20c;
const LOADER_UNDEFINED: u8 = 0xff;

/// Where the protected-mode kernel goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Its place in the file and its length there.
    pub offset: u64,
    pub file_bytes: u64,
    /// Where it goes.
    pub address: u64,
    /// The end of the memory that it uses before it reads the memory map.
    pub end: u64,
    /// The longest command line with its NUL.
    pub cmdline_max: usize,
}

pub(super) fn is_bzimage(head: &[u8]) -> bool {
    head.len() >= HEADER_END
        && &head[HEADER_MAGIC..HEADER_MAGIC + 4] == b"HdrS"
        && head[BOOT_FLAG..][..2] == [0x55, 0xaa]
}

pub(super) fn plan(image: &Image, head: &[u8], map: &RamMap) -> Result<Plan, BootError> {
    let version = u16_at(head, VERSION);
    if version < MIN_VERSION
        || head[LOADFLAGS] & LOADED_HIGH == 0
        || u16_at(head, XLOADFLAGS) & KERNEL_64 == 0
    {
        return Err(
            image.bad(format!("it is a Linux kernel (boot protocol {version:#x}) without a 64-bit entry"))
        );
    }
    let sectors = match head[SETUP_SECTS] {
        0 => 4,
        n => u64::from(n),
    };
    let offset = (sectors + 1) * 512;
    let file_bytes = image.bytes()?.checked_sub(offset).filter(|n| *n > 0x200);
    let file_bytes = file_bytes.ok_or_else(|| image.bad("the file ends in the middle of the kernel"))?;
    let preferred = u64::from(u32_at(head, PREF_ADDRESS)) | u64::from(u32_at(head, PREF_ADDRESS + 4)) << 32;
    let address = preferred.max(layout::HIGH_MEMORY_START);
    let needs = file_bytes.max(u64::from(u32_at(head, INIT_SIZE)));
    let end = address.checked_add(needs).ok_or_else(|| image.bad("its preferred address is nonsense"))?;
    if end > layout::low_ram_end(map) {
        return Err(BootError::TooSmall { what: image.name().into(), memory: map.total_bytes(), end });
    }
    let cmdline_max = (u32_at(head, CMDLINE_SIZE) as usize).saturating_add(1).min(layout::CMDLINE_MAX);
    Ok(Plan { offset, file_bytes, address, end, cmdline_max })
}

/// Writes `struct boot_params`: the kernel's own header, what a boot loader fills in, the memory map.
pub(super) fn write_zero_page(
    ram: &GuestRam,
    head: &[u8],
    plan: &Plan,
    initrd: Option<Loaded>,
) -> Result<(), VmmError> {
    let mut page = [0u8; 4096];
    // The header ends where its jump leads to, and is at most what is known here.
    let end = (HEADER_MAGIC + usize::from(head[JUMP_LENGTH])).min(head.len()).clamp(HEADER_END, 0x290);
    let end = end.min(head.len());
    page[SETUP_SECTS..end].copy_from_slice(&head[SETUP_SECTS..end]);
    page[TYPE_OF_LOADER] = LOADER_UNDEFINED;
    put(&mut page, CODE32_START, plan.address as u32);
    put(&mut page, CMD_LINE_PTR, layout::CMDLINE.0 as u32);
    let Loaded { start, bytes } = initrd.unwrap_or(Loaded { start: 0, bytes: 0 });
    put(&mut page, RAMDISK_IMAGE, start as u32);
    put(&mut page, RAMDISK_SIZE, bytes as u32);
    put(&mut page, EXT_RAMDISK_IMAGE, (start >> 32) as u32);
    // Its upper half is zero.
    put(&mut page, ACPI_RSDP, layout::ACPI.0 as u32);
    let ranges = layout::memory_map(ram.map());
    page[E820_ENTRIES] = ranges.len() as u8;
    for (i, (start, bytes, kind)) in ranges.iter().enumerate() {
        let at = E820_TABLE + i * 20;
        page[at..at + 8].copy_from_slice(&start.to_le_bytes());
        page[at + 8..at + 16].copy_from_slice(&bytes.to_le_bytes());
        put(&mut page, at + 16, *kind as u32);
    }
    ram.write(layout::ZERO_PAGE, &page)
}

fn put(page: &mut [u8], at: usize, value: u32) {
    page[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn u16_at(raw: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([raw[at], raw[at + 1]])
}

fn u32_at(raw: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]])
}
