use std::io::Write;

use super::*;
use crate::memory::{RamMap, RamRegion};

fn ram(mib: u64) -> GuestRam {
    let regions = vec![RamRegion { start: GuestPhysAddr(0), bytes: mib << 20 }];
    GuestRam::new(RamMap::new(regions).unwrap(), "test", Default::default()).unwrap()
}

/// An ELF64 with one segment of `memory_bytes` at 1 MiB that begins with `code`, and, if wanted,
/// the PVH note.
pub(in crate::vmm) fn elf(code: &[u8], memory_bytes: u64, note: bool) -> Vec<u8> {
    let mut out = b"\x7fELF\x02\x01\x01".to_vec();
    out.resize(64, 0);
    out[18] = 62;
    out[32] = 64;
    out[54] = 56;
    out[56] = 2;
    let mut header = |kind: u32, offset: u64, bytes: u64, memory: u64| {
        out.extend(kind.to_le_bytes());
        out.extend([7, 0, 0, 0]);
        for v in [offset, 0x10_0000, 0x10_0000, bytes, memory, 8] {
            out.extend(v.to_le_bytes());
        }
    };
    header(1, 0x200, code.len() as u64, memory_bytes);
    header(if note { 4 } else { 0 }, 0x100 + 0x80, 20, 20);
    out.resize(0x180, 0);
    for v in [4u32, 4, 18] {
        out.extend(v.to_le_bytes());
    }
    out.extend(b"Xen\0");
    out.extend(0x10_0000u32.to_le_bytes());
    out.resize(0x200, 0);
    out.extend(code);
    out
}

/// A bzImage for 16 MiB with `code` at its 64-bit entry.
pub(in crate::vmm) fn bzimage(code: &[u8]) -> Vec<u8> {
    let mut out = vec![0u8; 1024 + 0x400];
    out[0x1f1] = 1;
    out[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    out[0x201] = 0x66;
    out[0x202..0x206].copy_from_slice(b"HdrS");
    out[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    out[0x211] = 1;
    out[0x236] = 1;
    out[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
    out[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes());
    out[0x260..0x264].copy_from_slice(&0x20_0000u32.to_le_bytes());
    out[1024 + 0x200..][..code.len()].copy_from_slice(code);
    out
}

fn boot(ram: &GuestRam, kernel: &[u8], initrd: Option<&[u8]>, cmdline: &str) -> Result<BootEntry, String> {
    let write = |bytes: &[u8]| {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    };
    let (kernel, initrd) = (write(kernel), initrd.map(write));
    let source = KernelSource::File(kernel.path().into());
    let path = initrd.as_ref().map(|f| f.path().to_path_buf());
    load(ram, &BootConfig { kernel: &source, initrd: path.as_ref(), cmdline, vcpus: 1, virtio: 2 })
        .map_err(|e| e.to_string())
}

fn u64_in(ram: &GuestRam, at: u64) -> u64 {
    let mut raw = [0; 8];
    ram.read(GuestPhysAddr(at), &mut raw).unwrap();
    u64::from_le_bytes(raw)
}

#[test]
fn a_pvh_elf_is_loaded_with_its_start_info() {
    let ram = ram(8);
    let entry = boot(&ram, &elf(b"code", 0x1000, true), Some(b"disk"), "a=1").unwrap();
    assert_eq!(entry, BootEntry::Pvh { entry: 0x10_0000, start_info: layout::START_INFO });
    assert_eq!(u64_in(&ram, 0x10_0000) as u32, u32::from_le_bytes(*b"code"));
    let info = layout::START_INFO.0;
    assert_eq!(u64_in(&ram, info), 0x1_336e_c578);
    let module = u64_in(&ram, info + 16);
    assert_eq!(u64_in(&ram, module), (8 << 20) - 4096);
    assert_eq!(u64_in(&ram, module + 8), 4);
    assert_eq!(u64_in(&ram, u64_in(&ram, info + 24)) as u32, u32::from_le_bytes(*b"a=1\0"));
    let memory_map = u64_in(&ram, info + 40);
    assert_eq!(u64_in(&ram, info + 48), 3);
    assert_eq!((u64_in(&ram, memory_map), u64_in(&ram, memory_map + 8)), (0, layout::LOW_MEMORY_END));
    assert_eq!(u64_in(&ram, memory_map + 16), 1);
    let tables = memory_map + 24;
    assert_eq!(
        (u64_in(&ram, tables), u64_in(&ram, tables + 8), u64_in(&ram, tables + 16)),
        (0xe_0000, 0x2_0000, 3)
    );
    assert_eq!(u64_in(&ram, memory_map + 48), 1 << 20);
    assert_eq!(u64_in(&ram, memory_map + 56), 7 << 20);
    assert_eq!(u64_in(&ram, u64_in(&ram, info + 32)), u64::from_le_bytes(*b"RSD PTR "));
}

#[test]
fn a_bzimage_is_loaded_with_its_zero_page() {
    let ram = ram(32);
    let entry = boot(&ram, &bzimage(&[0xf4]), None, "quiet").unwrap();
    assert_eq!(entry, BootEntry::Linux64 { entry: 0x100_0200, zero_page: layout::ZERO_PAGE });
    assert_eq!(u64_in(&ram, 0x100_0200) as u8, 0xf4);
    assert_eq!(u64_in(&ram, layout::ZERO_PAGE.0 + 0x1e8) as u8, 3);
    let second = layout::ZERO_PAGE.0 + 0x2d0 + 20;
    assert_eq!((u64_in(&ram, second), u64_in(&ram, second + 8)), (0xe_0000, 0x2_0000));
    assert_eq!(u64_in(&ram, second + 16) as u32, 3);
    let rsdp = u64_in(&ram, layout::ZERO_PAGE.0 + 0x70);
    assert_eq!(u64_in(&ram, rsdp), u64::from_le_bytes(*b"RSD PTR "));
    assert_eq!(u64_in(&ram, layout::ZERO_PAGE.0 + 0x228) as u32, 0x2_0000);
    assert_eq!(u64_in(&ram, layout::ZERO_PAGE.0 + 0x202) as u32, u32::from_le_bytes(*b"HdrS"));
}

/// Kernel, initrd, command line, and a piece of the message.
type Case<'a> = (&'a [u8], Option<&'a [u8]>, &'a str, &'a str);

#[test]
fn what_cannot_be_booted_is_named() {
    let ram = ram(4);
    let good = elf(b"code", 0x1000, true);
    let cases: &[Case<'_>] = &[
        (b"#!/bin/sh", None, "", "is neither an ELF with a PVH note nor a bzImage"),
        (b"", None, "", "is neither an ELF with a PVH note nor a bzImage"),
        (&elf(b"code", 0x1000, false), None, "", "without a PVH note"),
        (&elf(b"code", 8 << 20, true), None, "", "memory of 4 MiB is too small for kernel"),
        (&elf(b"code", u64::MAX, true), None, "", "nonsense"),
        (&good[..0x201], None, "", "the file ends in the middle of what is to be loaded"),
        (&good[..100], None, "", "the file ends in the middle of the program headers"),
        (&good, Some(&[1; 3 << 20]), "", "does not fit between the kernel's end"),
        (&good, None, "a\0b", "NUL"),
        (&bzimage(&[0xf4]), None, "", "memory of 4 MiB is too small"),
        (&bzimage(&[0xf4])[..1100], None, "", "the file ends in the middle of the kernel"),
    ];
    for (kernel, initrd, cmdline, text) in cases {
        let error = boot(&ram, kernel, *initrd, cmdline).unwrap_err();
        assert!(error.contains(text), "{error}\nshould contain: {text}");
    }
    let long = "x".repeat(layout::CMDLINE_MAX);
    assert!(boot(&ram, &good, None, &long).unwrap_err().contains("at most"));
    let nowhere = KernelSource::File("/nonexistent/kernel".into());
    let config = BootConfig { kernel: &nowhere, initrd: None, cmdline: "", vcpus: 1, virtio: 0 };
    let error = load(&ram, &config).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/kernel"), "{error}");
}
