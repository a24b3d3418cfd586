//! The boot loader: kernels as PVH ELF and bzImage, initrd and command line, into RAM of many sizes.

use std::os::fd::AsRawFd;
use std::path::PathBuf;

use vmferry::memory::{GuestPhysAddr, RamMap, RamPages, RamRegion};
use vmferry::vmm::boot::{BootConfig, BootEntry, load};
use vmferry::vmm::virtio::MAX_DEVICES;
use vmferry::vmm::{GuestRam, KernelSource};

use super::input::{Reader, Writer};
use super::kept;

/// RAM in MiB, below and above 4 GiB.
const SIZES: [(u64, u64); 6] = [(2, 0), (4, 0), (8, 0), (32, 0), (2, 2), (3072, 4)];

pub fn run(data: &[u8]) {
    let mut input = Reader(data);
    let (low, high) = SIZES[usize::from(input.u8()) % SIZES.len()];
    let (vcpus, virtio) = (u32::from(input.u16()), usize::from(input.u8()) % (MAX_DEVICES + 1));
    let cmdline = String::from_utf8_lossy(input.chunk()).into_owned();
    let initrd = kept(input.chunk());
    let kernel = kept(input.rest());
    let path = |file: &std::fs::File| PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let mut regions = vec![RamRegion { start: GuestPhysAddr(0), bytes: low << 20 }];
    if high > 0 {
        regions.push(RamRegion { start: GuestPhysAddr(1 << 32), bytes: high << 20 });
    }
    let map = RamMap::new(regions).expect("a map");
    let ram = GuestRam::new(map, "fuzz", RamPages::Small).expect("RAM can be made");
    let (kernel, initrd) = (KernelSource::File(path(&kernel)), path(&initrd));
    let config = BootConfig { kernel: &kernel, initrd: Some(&initrd), cmdline: &cmdline, vcpus, virtio };
    match load(&ram, &config) {
        Ok(BootEntry::Pvh { start_info, .. }) => assert!(start_info.0 < low << 20),
        Ok(BootEntry::Linux64 { entry, zero_page }) => {
            assert!(entry < low << 20 && zero_page.0 < low << 20);
        }
        Err(error) => drop(error.to_string()),
    }
}

pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let input = |size: u8, kernel: &[u8]| {
        Writer::default()
            .u8(size)
            .u16(1)
            .u8(3)
            .chunk(b"console=ttyS0 quiet")
            .chunk(b"an initrd")
            .raw(kernel)
            .0
    };
    let vcpus = |count| Writer::default().u8(3).u16(count).u8(8).chunk(b"").chunk(b"").raw(&elf(2)).0;
    vec![
        ("elf64".into(), input(2, &elf(2))),
        ("elf32".into(), input(4, &elf(1))),
        ("bzimage".into(), input(3, &bzimage())),
        ("bzimage-high".into(), input(5, &bzimage())),
        ("vcpus".into(), vcpus(250)),
        ("too-many-vcpus".into(), vcpus(60_000)),
    ]
}

/// An ELF with a segment at 1 MiB and the PVH note: class 1 is 32-bit, 2 is 64-bit.
fn elf(class: u8) -> Vec<u8> {
    let (wide, headers_at, note_at, code_at) = (class == 2, 64, 0x180, 0x1a0);
    let mut out = [b"\x7fELF", &[class, 1, 1][..]].concat();
    out.resize(headers_at, 0);
    out[18] = if wide { 62 } else { 3 };
    let (table, size, count) = if wide { (32, 54, 56) } else { (28, 42, 44) };
    (out[table], out[size], out[count]) = (headers_at as u8, if wide { 56 } else { 32 }, 2);
    for (kind, offset, bytes, memory) in [(1u32, code_at as u64, 4u64, 4096u64), (4, note_at as u64, 20, 20)]
    {
        out.extend(kind.to_le_bytes());
        if wide {
            out.extend(7u32.to_le_bytes());
            [offset, 1 << 20, 1 << 20, bytes, memory, 8].iter().for_each(|v| out.extend(v.to_le_bytes()));
        } else {
            [offset, 1 << 20, 1 << 20, bytes, memory, 7, 8]
                .iter()
                .for_each(|v| out.extend((*v as u32).to_le_bytes()));
        }
    }
    out.resize(note_at, 0);
    [4u32, 4, 18].iter().for_each(|v| out.extend(v.to_le_bytes()));
    out.extend(b"Xen\0");
    out.extend((1u32 << 20).to_le_bytes());
    out.resize(code_at, 0);
    out.extend(b"code");
    out
}

/// A bzImage for 16 MiB.
fn bzimage() -> Vec<u8> {
    let mut out = vec![0; 1024 + 0x400];
    let fields: [(usize, &[u8]); 8] = [
        (0x1f1, &[1]),
        (0x1fe, &[0x55, 0xaa]),
        (0x201, b"\x66HdrS\x0f\x02"),
        (0x211, &[1]),
        (0x236, &[1]),
        (0x238, &[0xff, 7]),
        (0x258, &[0, 0, 0, 1]),
        (0x260, &[0, 0, 0x20]),
    ];
    fields.iter().for_each(|(at, bytes)| out[*at..at + bytes.len()].copy_from_slice(bytes));
    out
}
