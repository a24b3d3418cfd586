//! Guest RAM as `vmrun` holds it: one file of memory for each region (a sealed memfd, or one on a tmpfs of its own),
//! mapped shared, given to KVM as one memslot each.
//!
//! Everything that this process writes into guest RAM goes through [`GuestRam::memory`], whose
//! bitmap notes the pages: KVM's dirty log does not see those writes (D1).
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::bitmap::AtomicBitmap;
#[cfg(test)]
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
};

use super::VmmError;
use crate::memory::{GuestPhysAddr, RamMap, RamPages, RamRegion, VmmAddr};
use crate::sys::{memfd, tmpfs};

/// RAM sizes are multiples of this, so that huge pages fit.
const RAM_ALIGN: u64 = 2 << 20;
/// RAM below 4 GiB ends here at the latest: above are devices, the local APICs and firmware.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// RAM that does not fit below goes on here.
pub const HIGH_RAM_START: u64 = 1 << 32;

/// `GuestMemoryMmap` that notes which pages this process wrote.
pub type TrackedMemory = GuestMemoryMmap<AtomicBitmap>;

/// The RAM map for `bytes` of memory: from 0 to 3 GiB, the rest from 4 GiB on.
pub fn ram_map(bytes: u64) -> Result<RamMap, VmmError> {
    if bytes == 0 || !bytes.is_multiple_of(RAM_ALIGN) {
        return Err(VmmError::MemorySize(bytes));
    }
    let low = bytes.min(LOW_RAM_END);
    let mut regions = vec![RamRegion { start: GuestPhysAddr(0), bytes: low }];
    if bytes > low {
        regions.push(RamRegion { start: GuestPhysAddr(HIGH_RAM_START), bytes: bytes - low });
    }
    Ok(RamMap::new(regions)?)
}

/// All RAM of one guest.
pub struct GuestRam {
    map: RamMap,
    memory: TrackedMemory,
    memfds: Vec<File>,
    addresses: Vec<VmmAddr>,
    pages: RamPages,
}

impl GuestRam {
    /// Makes fresh RAM, all zero, of which nothing is allocated until it is touched; huge pages are
    /// set aside in the host's pool at once, so that none is lacking later. `name` shows in `/proc`
    /// beside the memfds. Nothing is asked about transparent huge pages: that is for [`Self::join_pages`].
    pub fn new(map: RamMap, name: &str, pages: RamPages) -> Result<Self, VmmError> {
        let total = map.total_bytes();
        let allocate = |source| VmmError::AllocateRam { bytes: total, source };
        let label: String =
            name.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(100).collect();
        let mut memfds = Vec::new();
        let mut regions = Vec::new();
        for (i, region) in map.regions().iter().enumerate() {
            let file = create_file(&format!("vmrun-{label}-{i}"), region.bytes, pages).map_err(allocate)?;
            let mapped = map_region(&file, region.bytes, pages).map_err(allocate)?;
            let region = GuestRegionMmap::new(mapped, GuestAddress(region.start.0));
            regions.push(region.ok_or_else(|| allocate(io::Error::other("it ends beyond all addresses")))?);
            memfds.push(file);
        }
        let memory =
            TrackedMemory::from_regions(regions).map_err(|e| allocate(io::Error::other(e.to_string())))?;
        let mut addresses = Vec::new();
        for region in map.regions() {
            let pointer = memory
                .get_host_address(GuestAddress(region.start.0))
                .map_err(|e| allocate(io::Error::other(e.to_string())))?;
            addresses.push(VmmAddr(pointer as u64));
        }
        Ok(Self { map, memory, memfds, addresses, pages })
    }

    /// What it is made of.
    pub fn pages(&self) -> RamPages {
        self.pages
    }

    /// The RAM map.
    pub fn map(&self) -> &RamMap {
        &self.map
    }

    /// The memfd of each region, in the order of the map.
    pub fn memfds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.memfds.iter().map(AsFd::as_fd)
    }

    /// Where this process maps each region, in the order of the map: what KVM and a userfaultfd of
    /// this process speak of.
    pub fn addresses(&self) -> &[VmmAddr] {
        &self.addresses
    }

    /// For devices and loaders: reads, and writes that are noted as dirty.
    pub fn memory(&self) -> &TrackedMemory {
        &self.memory
    }

    /// Writes `bytes` at a guest-physical address; an error unless all of it is RAM.
    pub fn write(&self, at: GuestPhysAddr, bytes: &[u8]) -> Result<(), VmmError> {
        self.memory
            .write_slice(bytes, GuestAddress(at.0))
            .map_err(|_| VmmError::NotRam { address: at.0, bytes: bytes.len() as u64 })
    }

    /// Reads RAM at a guest-physical address; an error unless all of it is RAM.
    pub fn read(&self, at: GuestPhysAddr, into: &mut [u8]) -> Result<(), VmmError> {
        let bytes = into.len() as u64;
        self.memory
            .read_slice(into, GuestAddress(at.0))
            .map_err(|_| VmmError::NotRam { address: at.0, bytes })
    }

    /// Makes each region a memslot of `vm` (its number is the region's), or changes the flags of
    /// those that are there: KVM_SET_USER_MEMORY_REGION (KVM API 4.35), with dirty logging on or
    /// off.
    pub(super) fn set_memslots(&self, vm: &VmFd, log_dirty: bool) -> Result<(), VmmError> {
        for (slot, (region, address)) in self.map.regions().iter().zip(&self.addresses).enumerate() {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: if log_dirty { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: region.start.0,
                memory_size: region.bytes,
                userspace_addr: address.0,
            };
            // SAFETY: the range is a mapping of this process that lives as long as `self`; the
            // machine keeps `self` until its VM and its vCPUs are closed, and regions of a checked
            // map do not overlap. Other processes write it only through the memfd.
            unsafe { vm.set_user_memory_region(region) }
                .map_err(VmmError::kvm("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }

    /// Asks the host for transparent huge pages, or for none. Pages that are missing one by one (postcopy) want none:
    /// the kernel would join what is there with zeros for what is not (`khugepaged`), and nobody would ask for it.
    /// Of memory that was not made to have them, and of huge pages of the pool, nothing is asked.
    pub fn join_pages(&self, join: bool) {
        let advice = match self.pages {
            RamPages::Huge => return,
            RamPages::Transparent if join => libc::MADV_HUGEPAGE,
            RamPages::Small | RamPages::Transparent => libc::MADV_NOHUGEPAGE,
        };
        for (region, address) in self.map.regions().iter().zip(&self.addresses) {
            // SAFETY: exactly a mapping of ours; the advice changes no content.
            let done =
                unsafe { libc::madvise(address.0 as *mut libc::c_void, region.bytes as usize, advice) };
            if done != 0 {
                // A kernel without them has small pages, which is as good, but slower.
                tracing::debug!("transparent huge pages of RAM: {}", io::Error::last_os_error());
            }
        }
    }

    /// Takes the memory out of this process's mapping; the files keep it. What is touched from here on
    /// faults, whatever was touched before.
    pub fn unmap(&self) -> io::Result<()> {
        for (region, address) in self.map.regions().iter().zip(&self.addresses) {
            // SAFETY: exactly a mapping of ours, shared: its content is the file's and stays.
            let done = unsafe {
                libc::madvise(address.0 as *mut libc::c_void, region.bytes as usize, libc::MADV_DONTNEED)
            };
            if done != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }

    /// Adds the pages that this process wrote since the last call to `words` (dense numbering, one
    /// bit a page), and forgets them.
    pub(super) fn take_device_written(&self, words: &mut [u64]) {
        for (i, region) in self.memory.iter().enumerate() {
            let first = (self.map.first_page(i).0 / 64) as usize;
            for (into, bits) in words[first..].iter_mut().zip(region.get_mmap().bitmap().get_and_reset()) {
                *into |= bits;
            }
        }
    }

    /// Notes a page as written by this process.
    #[cfg(test)]
    pub(super) fn mark_device_written(&self, at: GuestPhysAddr) {
        if let Some((region, offset)) = self.map.page_of(at).and_then(|p| self.map.locate(p))
            && let Some(region) = self.memory.iter().nth(region)
        {
            Bitmap::mark_dirty(region.get_mmap().bitmap(), offset as usize, 1);
        }
    }
}

/// The file of a region: a memfd, except where transparent huge pages can be had without it. Where they cannot, the
/// host's settings say what a memfd is made of.
fn create_file(name: &str, bytes: u64, pages: RamPages) -> io::Result<File> {
    let label = CString::new(name).expect("no NUL among the letters");
    match pages {
        RamPages::Small => memfd::create_sealed(&label, bytes),
        RamPages::Huge => memfd::create_sealed_huge(&label, bytes),
        RamPages::Transparent => tmpfs::create(name, bytes).or_else(|error| {
            tracing::debug!("no tmpfs for the guest's RAM, a memfd has to do: {error}");
            memfd::create_sealed(&label, bytes)
        }),
    }
}

/// Maps a memfd, shared. Without MAP_NORESERVE a mapping of huge pages sets them aside, or fails.
fn map_region(file: &File, bytes: u64, pages: RamPages) -> io::Result<MmapRegion<AtomicBitmap>> {
    let set_aside = if pages == RamPages::Huge { 0 } else { libc::MAP_NORESERVE };
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let at = FileOffset::new(file.try_clone()?, 0);
    MmapRegion::build(Some(at), bytes as usize, access, libc::MAP_SHARED | set_aside)
        .map_err(|e| io::Error::other(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_beyond_three_gib_goes_above_four() {
        let map = ram_map(4 << 30).unwrap();
        assert_eq!(map.regions()[0].bytes, LOW_RAM_END);
        assert_eq!(map.regions()[1].start.0, HIGH_RAM_START);
        assert_eq!(map.total_bytes(), 4 << 30);
        assert!(matches!(ram_map(0), Err(VmmError::MemorySize(0))));
        assert!(matches!(ram_map((1 << 20) + 5), Err(VmmError::MemorySize(_))));
    }

    #[test]
    fn writes_of_this_process_are_noted_once() {
        let map = RamMap::new(vec![
            RamRegion { start: GuestPhysAddr(0), bytes: 2 << 20 },
            RamRegion { start: GuestPhysAddr(HIGH_RAM_START), bytes: 2 << 20 },
        ])
        .unwrap();
        let ram = GuestRam::new(map, "a test", RamPages::Small).unwrap();
        ram.write(GuestPhysAddr(0x1fff), &[1, 2]).unwrap();
        ram.mark_device_written(GuestPhysAddr(HIGH_RAM_START + 4096));
        let mut words = vec![0; 16];
        ram.take_device_written(&mut words);
        assert_eq!(words[0], 0b110);
        assert_eq!(words[8], 0b10);
        let mut again = vec![0; 16];
        ram.take_device_written(&mut again);
        assert!(again.iter().all(|w| *w == 0));
        assert!(matches!(ram.write(GuestPhysAddr((2 << 20) - 1), &[0, 0]), Err(VmmError::NotRam { .. })));
        let mut back = [0; 2];
        ram.read(GuestPhysAddr(0x1fff), &mut back).unwrap();
        assert_eq!(back, [1, 2]);
    }
}
