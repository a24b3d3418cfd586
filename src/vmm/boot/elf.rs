//! ELF kernels with a PVH note: planned from the headers before anything is copied.
//!
//! Segments go to their physical addresses; what a segment has beyond its bytes in the file is
//! zero because the RAM is fresh.

use super::source::Image;
use super::{BootError, Loaded, layout};
use crate::memory::{GuestPhysAddr, RamMap};
use crate::vmm::VmmError;
use crate::vmm::memory::GuestRam;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const MACHINE_386: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
const MAX_HEADERS: u64 = 128;
const MAX_NOTE_BYTES: u64 = 1 << 20;

/// `struct hvm_start_info` begins with this (xen/include/public/arch-x86/hvm/start_info.h).
const START_INFO_MAGIC: u32 = 0x336e_c578;
const START_INFO_BYTES: u64 = 56;
const MODULE_BYTES: u64 = 32;

/// A part of the file that goes into RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub offset: u64,
    pub address: u64,
    pub file_bytes: u64,
}

/// What is to be loaded, and where the guest begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub segments: Vec<Segment>,
    pub entry: u64,
    /// The end of the highest segment in memory.
    pub end: u64,
}

/// One program header, the same for both classes.
struct Header {
    kind: u32,
    offset: u64,
    address: u64,
    file_bytes: u64,
    memory_bytes: u64,
}

pub(super) fn is_elf(head: &[u8]) -> bool {
    head.starts_with(b"\x7fELF")
}

/// Reads the headers and the notes, and checks that everything fits into `map`.
pub(super) fn plan(image: &Image, map: &RamMap) -> Result<Plan, BootError> {
    let headers = headers(image)?;
    let mut entry = None;
    let mut segments = Vec::new();
    let mut end = 0;
    for h in &headers {
        match h.kind {
            PT_NOTE if entry.is_none() => entry = pvh_entry(image, h)?,
            PT_LOAD if h.memory_bytes > 0 => {
                end = end.max(check_segment(image, h, map)?);
                if h.file_bytes > 0 {
                    let &Header { offset, address, file_bytes, .. } = h;
                    segments.push(Segment { offset, address, file_bytes });
                }
            }
            _ => {}
        }
    }
    let entry = entry.ok_or_else(|| BootError::NoPvhNote { kernel: image.name().into() })?;
    if segments.is_empty() {
        return Err(image.bad("it has nothing to load"));
    }
    Ok(Plan { segments, entry: u64::from(entry), end })
}

/// Gives where the segment ends in memory.
fn check_segment(image: &Image, h: &Header, map: &RamMap) -> Result<u64, BootError> {
    let end = h
        .address
        .checked_add(h.memory_bytes)
        .filter(|_| h.file_bytes <= h.memory_bytes)
        .ok_or_else(|| image.bad(format!("its segment at {:#x} is nonsense", h.address)))?;
    if h.address < layout::HIGH_MEMORY_START {
        return Err(image.bad(format!("its segment at {:#x} is below 1 MiB", h.address)));
    }
    if end > layout::low_ram_end(map) {
        return Err(BootError::TooSmall { what: image.name().into(), memory: map.total_bytes(), end });
    }
    Ok(end)
}

/// The program headers of an ELF32 or ELF64 for x86.
fn headers(image: &Image) -> Result<Vec<Header>, BootError> {
    let mut head = [0; 64];
    image.read_at(0, &mut head[..52], "the ELF header")?;
    let (wide, little) = (head[4] == 2, head[5] == 1);
    if wide {
        image.read_at(0, &mut head, "the ELF header")?;
    }
    let machine = u16::from_le_bytes([head[18], head[19]]);
    if !little || !(1..=2).contains(&head[4]) || ![MACHINE_386, MACHINE_X86_64].contains(&machine) {
        return Err(image.bad(format!("it is an ELF for another machine ({machine})")));
    }
    let (table, size, count) = match wide {
        true => (u64_at(&head, 32), u16_at(&head, 54), u16_at(&head, 56)),
        false => (u64::from(u32_at(&head, 28)), u16_at(&head, 42), u16_at(&head, 44)),
    };
    if u64::from(count) > MAX_HEADERS || usize::from(size) != if wide { 56 } else { 32 } {
        return Err(image.bad(format!("it has {count} program headers of {size} bytes")));
    }
    let mut raw = vec![0; usize::from(size)];
    let mut out = Vec::new();
    for i in 0..u64::from(count) {
        let at = table.saturating_add(i * u64::from(size));
        image.read_at(at, &mut raw, "the program headers")?;
        out.push(match wide {
            true => Header {
                kind: u32_at(&raw, 0),
                offset: u64_at(&raw, 8),
                address: u64_at(&raw, 24),
                file_bytes: u64_at(&raw, 32),
                memory_bytes: u64_at(&raw, 40),
            },
            false => Header {
                kind: u32_at(&raw, 0),
                offset: u32_at(&raw, 4).into(),
                address: u32_at(&raw, 12).into(),
                file_bytes: u32_at(&raw, 16).into(),
                memory_bytes: u32_at(&raw, 20).into(),
            },
        });
    }
    Ok(out)
}

/// The entry in a PT_NOTE segment, if it holds the PVH note: name "Xen", type 18, a 32-bit address.
fn pvh_entry(image: &Image, header: &Header) -> Result<Option<u32>, BootError> {
    if header.file_bytes > MAX_NOTE_BYTES {
        return Err(image.bad(format!("its notes have {} bytes", header.file_bytes)));
    }
    let mut notes = vec![0; header.file_bytes as usize];
    image.read_at(header.offset, &mut notes, "its notes")?;
    let mut rest = &notes[..];
    while rest.len() >= 12 {
        let (name_bytes, desc_bytes, kind) = (u32_at(rest, 0), u32_at(rest, 4), u32_at(rest, 8));
        let name_end = 12usize.saturating_add(name_bytes as usize);
        let desc = 12usize.saturating_add((name_bytes as usize).next_multiple_of(4));
        let desc_end = desc.saturating_add(desc_bytes as usize);
        let Some(name) = rest.get(12..name_end) else { break };
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" {
            return match rest.get(desc..desc_end) {
                Some(desc) if desc.len() >= 4 => Ok(Some(u32_at(desc, 0))),
                _ => Err(image.bad("its PVH note has no address")),
            };
        }
        let next = desc.saturating_add((desc_bytes as usize).next_multiple_of(4));
        rest = rest.get(next..).unwrap_or_default();
    }
    Ok(None)
}

/// Writes `struct hvm_start_info` version 1, its module list and its memory map.
pub(super) fn write_start_info(
    ram: &GuestRam,
    initrd: Option<Loaded>,
    cmdline: bool,
) -> Result<(), VmmError> {
    let modules = layout::START_INFO.0 + START_INFO_BYTES;
    let memory_map = modules + MODULE_BYTES;
    let ranges = layout::memory_map(ram.map());
    let mut out = Vec::new();
    let u32s = |out: &mut Vec<u8>, values: &[u32]| values.iter().for_each(|v| out.extend(v.to_le_bytes()));
    let u64s = |out: &mut Vec<u8>, values: &[u64]| values.iter().for_each(|v| out.extend(v.to_le_bytes()));
    // magic, version, flags, number of modules
    u32s(&mut out, &[START_INFO_MAGIC, 1, 0, u32::from(initrd.is_some())]);
    // module list, command line, RSDP, memory map
    let cmdline_at = if cmdline { layout::CMDLINE.0 } else { 0 };
    u64s(&mut out, &[if initrd.is_some() { modules } else { 0 }, cmdline_at, layout::ACPI.0, memory_map]);
    u32s(&mut out, &[ranges.len() as u32, 0]);
    // the module: address, bytes, its command line, reserved
    let Loaded { start, bytes } = initrd.unwrap_or(Loaded { start: 0, bytes: 0 });
    u64s(&mut out, &[start, bytes, 0, 0]);
    for (start, bytes, kind) in ranges {
        u64s(&mut out, &[start, bytes]);
        u32s(&mut out, &[kind as u32, 0]);
    }
    ram.write(GuestPhysAddr(layout::START_INFO.0), &out)
}

fn u16_at(raw: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([raw[at], raw[at + 1]])
}

fn u32_at(raw: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]])
}

fn u64_at(raw: &[u8], at: usize) -> u64 {
    u64::from(u32_at(raw, at)) | u64::from(u32_at(raw, at + 4)) << 32
}
