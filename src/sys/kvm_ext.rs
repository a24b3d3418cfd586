//! KVM ioctls that `kvm-ioctls` does not have, or has only as unsafe functions.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_clear_dirty_log, kvm_device_attr, kvm_ioeventfd,
    kvm_ioeventfd_flag_nr_datamatch, kvm_sregs2, kvm_userspace_memory_region, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};

const _: () = assert!(size_of::<kvm_clear_dirty_log>() == 24);
const _: () = assert!(size_of::<kvm_device_attr>() == 24);
const _: () = assert!(size_of::<kvm_ioeventfd>() == 64);
const _: () = assert!(size_of::<kvm_sregs2>() == 320);
const _: () = assert!(size_of::<kvm_xsave>() == 4096);
const _: () = assert!(size_of::<kvm_userspace_memory_region>() == 32);

mod raw {
    #![allow(missing_docs)] // the kernel's ioctls, wrapped and described below
    use kvm_bindings::{KVMIO, kvm_clear_dirty_log, kvm_device_attr, kvm_ioeventfd, kvm_sregs2, kvm_xsave};
    use nix::{ioctl_read, ioctl_readwrite, ioctl_write_ptr};

    ioctl_write_ptr!(ioeventfd, KVMIO, 0x79, kvm_ioeventfd);
    ioctl_readwrite!(clear_dirty_log, KVMIO, 0xc0, kvm_clear_dirty_log);
    ioctl_read!(get_sregs2, KVMIO, 0xcc, kvm_sregs2);
    ioctl_write_ptr!(set_sregs2, KVMIO, 0xcd, kvm_sregs2);
    ioctl_write_ptr!(set_device_attr, KVMIO, 0xe1, kvm_device_attr);
    ioctl_write_ptr!(get_device_attr, KVMIO, 0xe2, kvm_device_attr);
    ioctl_write_ptr!(has_device_attr, KVMIO, 0xe3, kvm_device_attr);
    ioctl_read!(get_xsave, KVMIO, 0xa4, kvm_xsave);
    ioctl_write_ptr!(set_xsave, KVMIO, 0xa5, kvm_xsave);
    ioctl_read!(get_xsave2, KVMIO, 0xcf, kvm_xsave);
}

/// KVM_CLEAR_DIRTY_LOG (KVM API 4.117): clears, and write-protects again, the pages of memslot
/// `slot` whose bits are set in `bitmap`, whose bit 0 is page `first_page` of the slot. It needs
/// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 enabled.
///
/// `first_page` is a multiple of 64, and so is `pages` unless it ends with the slot. `bitmap` holds
/// exactly the words for `pages`.
pub fn clear_dirty_log(vm: &VmFd, slot: u32, first_page: u64, pages: u32, bitmap: &[u64]) -> io::Result<()> {
    if bitmap.len() != pages.div_ceil(64) as usize {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut arg = kvm_clear_dirty_log { slot, num_pages: pages, first_page, ..Default::default() };
    arg.__bindgen_anon_1.dirty_bitmap = bitmap.as_ptr().cast_mut().cast();
    // SAFETY: `vm` is a VM descriptor; the kernel reads DIV_ROUND_UP(pages, 64) words from the
    // bitmap, which was just checked to be its length, and writes none.
    unsafe { raw::clear_dirty_log(vm.as_raw_fd(), &mut arg) }?;
    Ok(())
}

/// KVM_GET_SREGS2 (KVM API 4.132, KVM_CAP_SREGS2).
pub fn get_sregs2(vcpu: &VcpuFd) -> io::Result<kvm_sregs2> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: `vcpu` is a vCPU descriptor; the kernel fills the whole of a struct of this size.
    unsafe { raw::get_sregs2(vcpu.as_raw_fd(), &mut sregs) }?;
    Ok(sregs)
}

/// KVM_SET_SREGS2 (KVM API 4.133, KVM_CAP_SREGS2).
pub fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> io::Result<()> {
    // SAFETY: `vcpu` is a vCPU descriptor; the kernel reads a struct of this size.
    unsafe { raw::set_sregs2(vcpu.as_raw_fd(), sregs) }?;
    Ok(())
}

fn tsc_offset_attr(value: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: value as u64,
    }
}

/// Whether the vCPU has the TSC offset attribute (Documentation/virt/kvm/devices/vcpu.rst, 4.1).
pub fn has_tsc_offset(vcpu: &VcpuFd) -> bool {
    // SAFETY: KVM_HAS_DEVICE_ATTR reads the struct and ignores its address.
    unsafe { raw::has_device_attr(vcpu.as_raw_fd(), &tsc_offset_attr(std::ptr::null_mut())) }.is_ok()
}

/// The guest's TSC minus the host's, in guest ticks (vcpu.rst, 4.1).
pub fn get_tsc_offset(vcpu: &VcpuFd) -> io::Result<u64> {
    let mut value = 0u64;
    // SAFETY: the kernel writes one u64 to the address in the struct, which is that of `value`.
    unsafe { raw::get_device_attr(vcpu.as_raw_fd(), &tsc_offset_attr(&mut value)) }?;
    Ok(value)
}

/// Sets what [`get_tsc_offset`] reads.
pub fn set_tsc_offset(vcpu: &VcpuFd, mut value: u64) -> io::Result<()> {
    // SAFETY: the kernel reads one u64 from the address in the struct, which is that of `value`.
    unsafe { raw::set_device_attr(vcpu.as_raw_fd(), &tsc_offset_attr(&mut value)) }?;
    Ok(())
}

/// The vCPU's XSAVE area: KVM_GET_XSAVE (KVM API 4.42) when `bytes` is 4096, else KVM_GET_XSAVE2
/// (4.134). `bytes` must be what KVM_CAP_XSAVE2 says for this VM, or 4096 where that says less.
pub fn get_xsave(vcpu: &VcpuFd, bytes: usize) -> io::Result<Vec<u8>> {
    let mut area = vec![0u64; bytes.div_ceil(8)];
    let pointer = area.as_mut_ptr().cast();
    if bytes < size_of::<kvm_xsave>() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the kernel writes 4096 bytes (GET_XSAVE), or as many as KVM_CAP_XSAVE2 says
    // (GET_XSAVE2), and the buffer has `bytes`, which the caller took from that capability.
    unsafe {
        match bytes == size_of::<kvm_xsave>() {
            true => raw::get_xsave(vcpu.as_raw_fd(), pointer),
            false => raw::get_xsave2(vcpu.as_raw_fd(), pointer),
        }
    }?;
    let mut out: Vec<u8> = area.iter().flat_map(|w| w.to_ne_bytes()).collect();
    out.truncate(bytes);
    Ok(out)
}

/// KVM_SET_XSAVE (KVM API 4.43). `expected` is the size that KVM_CAP_XSAVE2 gives for this VM (or
/// 4096): the kernel reads that many bytes whatever it is given, so an area of any other length is
/// refused here.
pub fn set_xsave(vcpu: &VcpuFd, area: &[u8], expected: usize) -> io::Result<()> {
    if area.len() != expected || expected < size_of::<kvm_xsave>() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut words = vec![0u64; area.len().div_ceil(8)];
    for (word, bytes) in words.iter_mut().zip(area.chunks(8)) {
        let mut raw = [0; 8];
        raw[..bytes.len()].copy_from_slice(bytes);
        *word = u64::from_ne_bytes(raw);
    }
    // SAFETY: the kernel reads `expected` bytes, the length that was just checked, from an aligned
    // buffer.
    unsafe { raw::set_xsave(vcpu.as_raw_fd(), words.as_ptr().cast()) }?;
    Ok(())
}

/// KVM_IOEVENTFD (KVM API 4.59): a guest's write of the 32 bits `value` to the address counts `event`
/// up instead of leaving guest mode. KVM keeps a reference to the event.
pub fn ioeventfd(vm: &VmFd, event: BorrowedFd<'_>, address: u64, value: u32) -> io::Result<()> {
    let arg = kvm_ioeventfd {
        datamatch: value.into(),
        addr: address,
        len: 4,
        fd: event.as_raw_fd(),
        flags: 1 << kvm_ioeventfd_flag_nr_datamatch,
        ..Default::default()
    };
    // SAFETY: `vm` is a VM descriptor; the kernel reads a struct of this size.
    unsafe { raw::ioeventfd(vm.as_raw_fd(), &arg) }?;
    Ok(())
}
