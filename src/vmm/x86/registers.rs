//! The registers with which a fresh machine's first vCPU enters its kernel.

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use crate::memory::GuestPhysAddr;
use crate::vmm::VmmError;
use crate::vmm::boot::{BootEntry, layout};
use crate::vmm::memory::GuestRam;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Descriptors of the boot GDT: none, none, code, data, TSS. The code segment's selector is 0x10 and
/// the data segment's 0x18, as Linux's boot protocol wants them.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

/// Sets vCPU 0 up to enter at `entry`: 32-bit protected mode without paging for PVH (the Xen
/// x86/HVM direct boot ABI), 64-bit with the low 4 GiB mapped one to one for Linux's 64-bit boot
/// protocol (Documentation/arch/x86/boot.rst). Writes the tables that this needs into RAM.
pub fn enter(vcpu: &VcpuFd, ram: &GuestRam, entry: &BootEntry) -> Result<(), VmmError> {
    let long = matches!(entry, BootEntry::Linux64 { .. });
    let code = segment(CODE_SELECTOR, 0xb, long);
    let data = segment(DATA_SELECTOR, 0x3, false);
    let tss =
        kvm_segment { limit: 0x67, type_: 0xb, present: 1, selector: TSS_SELECTOR, ..Default::default() };
    let gdt = [0, 0, descriptor(&code), descriptor(&data), descriptor(&tss)];
    let raw: Vec<u8> = gdt.iter().flat_map(|d: &u64| d.to_le_bytes()).collect();
    ram.write(layout::GDT, &raw)?;

    let mut sregs = vcpu.get_sregs().map_err(VmmError::kvm("KVM_GET_SREGS"))?;
    sregs.gdt.base = layout::GDT.0;
    sregs.gdt.limit = raw.len() as u16 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = tss;
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    if long {
        write_page_tables(ram)?;
        sregs.cr3 = layout::PAGE_TABLES.0;
        sregs.cr4 = CR4_PAE;
        sregs.cr0 |= CR0_PG;
        sregs.efer |= EFER_LME | EFER_LMA;
    }
    vcpu.set_sregs(&sregs).map_err(VmmError::kvm("KVM_SET_SREGS"))?;

    let mut regs = kvm_regs { rflags: 2, ..Default::default() };
    match *entry {
        BootEntry::Pvh { entry, start_info } => (regs.rip, regs.rbx) = (entry, start_info.0),
        BootEntry::Linux64 { entry, zero_page } => (regs.rip, regs.rsi) = (entry, zero_page.0),
    }
    vcpu.set_regs(&regs).map_err(VmmError::kvm("KVM_SET_REGS"))
}

/// A flat segment over 4 GiB: code if `kind` is 0xb (64-bit if `long`), data if it is 0x3.
fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// The segment as the GDT holds it (Intel SDM vol. 3, 3.4.5).
fn descriptor(s: &kvm_segment) -> u64 {
    let limit = u64::from(if s.g == 1 { s.limit >> 12 } else { s.limit });
    let access = u64::from(s.type_) | u64::from(s.s) << 4 | u64::from(s.dpl) << 5 | u64::from(s.present) << 7;
    let flags = u64::from(s.avl) | u64::from(s.l) << 1 | u64::from(s.db) << 2 | u64::from(s.g) << 3;
    let base = s.base;
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (base >> 24 & 0xff) << 56
}

/// Maps the low 4 GiB one to one in 2 MiB pages: PML4, PDPT and four page directories.
fn write_page_tables(ram: &GuestRam) -> Result<(), VmmError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let base = layout::PAGE_TABLES.0;
    let entry = |at: u64, value: u64| ram.write(GuestPhysAddr(at), &value.to_le_bytes());
    entry(base, (base + 0x1000) | PRESENT_WRITABLE)?;
    for directory in 0..4u64 {
        let at = base + 0x2000 + directory * 0x1000;
        entry(base + 0x1000 + directory * 8, at | PRESENT_WRITABLE)?;
        let pages = (0..512).map(|i| (directory * 512 + i) << 21 | PRESENT_WRITABLE | LARGE);
        let raw: Vec<u8> = pages.flat_map(u64::to_le_bytes).collect();
        ram.write(GuestPhysAddr(at), &raw)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_manual() {
        assert_eq!(descriptor(&segment(CODE_SELECTOR, 0xb, false)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(DATA_SELECTOR, 0x3, false)), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&segment(CODE_SELECTOR, 0xb, true)), 0x00af_9b00_0000_ffff);
    }
}
