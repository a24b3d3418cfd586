//! The dirty log: which pages changed since they were last handed out.
//!
//! Three sources are one answer here: KVM's log (what the guest and KVM wrote), the bitmap of what
//! this process wrote, and the pages that an attempt took and did not get across
//! ([`DirtyLog::put_back`]).
//!
//! With KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (KVM API 8.18) a take only reads the log. A page is
//! write-protected again, and its bit cleared, by [`DirtyLog::clear`] just before its content is
//! read: what the guest writes between the take and the clear is then sent once, not twice. Only
//! pages of the last take are cleared, so `clear` may be given a whole stretch of RAM: a bit that
//! the mover has not seen yet is never lost. A page that is not cleared stays in the next take,
//! whichever source it came from: a mover may take, and stop the guest instead of sending that.
//!
//! With INITIALLY_SET the log begins with every page set and write-protects nothing at the start,
//! which for large RAM is a long hold of the MMU lock. So [`DirtyLog::start`] counts every page as
//! taken: the first pass, which sends everything, clears each stretch before it reads it, and the
//! next take holds only what was written since. (Without manual protection, start protects all
//! pages, and take clears KVM's log: the same calls are right.)

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    kvm_enable_cap,
};
use kvm_ioctls::VmFd;

use super::VmmError;
use super::memory::GuestRam;
use crate::memory::{PageIndex, PageRun, PageSet};
use crate::sys::kvm_ext;

/// The most pages that one KVM_CLEAR_DIRTY_LOG is asked to clear: it holds the MMU lock.
const CLEAR_PAGES: u64 = 1 << 16;

/// How this VM's log is cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protect {
    /// KVM_GET_DIRTY_LOG clears.
    Automatic,
    /// KVM_CLEAR_DIRTY_LOG clears.
    Manual,
}

/// The dirty log of one VM.
pub struct DirtyLog {
    protect: Protect,
    /// Pages that were handed out and are not cleared yet; `None` while the log is off.
    taken: Option<PageSet>,
    put_back: PageSet,
}

impl DirtyLog {
    /// Asks `vm` for manual protection where the kernel has it. To be called before the first start.
    pub fn new(vm: &VmFd, pages: u64) -> Result<Self, VmmError> {
        let offered = vm.check_extension_raw(u64::from(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)) as u32;
        let wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
        let mut protect = Protect::Automatic;
        if offered & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0 {
            let mut cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
            cap.args[0] = u64::from(offered & wanted);
            vm.enable_cap(&cap).map_err(VmmError::kvm("KVM_ENABLE_CAP(MANUAL_DIRTY_LOG_PROTECT2)"))?;
            protect = Protect::Manual;
        }
        Ok(Self { protect, taken: None, put_back: PageSet::new(pages) })
    }

    /// Whether the log is on.
    pub fn is_on(&self) -> bool {
        self.taken.is_some()
    }

    /// Turns the log on: from here on, a write to any page is noted. What was put back or written
    /// before is forgotten: whoever starts the log sends everything.
    pub fn start(&mut self, vm: &VmFd, ram: &GuestRam) -> Result<(), VmmError> {
        if self.is_on() {
            return Err(VmmError::DirtyLog("on already"));
        }
        let pages = ram.map().total_pages();
        ram.take_device_written(&mut vec![0; pages.div_ceil(64) as usize]);
        ram.set_memslots(vm, true)?;
        self.put_back = PageSet::new(pages);
        self.taken = Some(PageSet::full(pages));
        Ok(())
    }

    /// Turns the log off.
    pub fn stop(&mut self, vm: &VmFd, ram: &GuestRam) -> Result<(), VmmError> {
        if self.is_on() {
            ram.set_memslots(vm, false)?;
            self.taken = None;
        }
        Ok(())
    }

    /// Fills `into` (one bit a page, dense) with the pages that changed, and says how many they are.
    /// Where an error is returned, nothing is lost: what was read before it comes with the next take.
    pub fn take(&mut self, vm: &VmFd, ram: &GuestRam, into: &mut [u64]) -> Result<u64, VmmError> {
        let pages = ram.map().total_pages();
        let Some(taken) = &self.taken else { return Err(VmmError::DirtyLog("off")) };
        if into.len() != pages.div_ceil(64) as usize {
            return Err(VmmError::DirtyLog("of another size than the bitmap to fill"));
        }
        self.put_back.union(taken);
        into.copy_from_slice(self.put_back.words());
        self.put_back = PageSet::new(pages);
        ram.take_device_written(into);
        for (slot, region) in ram.map().regions().iter().enumerate() {
            let first = (ram.map().first_page(slot).0 / 64) as usize;
            match vm.get_dirty_log(slot as u32, region.bytes as usize) {
                Ok(log) => into[first..].iter_mut().zip(log).for_each(|(to, bits)| *to |= bits),
                Err(e) => {
                    self.put_back = PageSet::from_words(into.to_vec(), pages);
                    return Err(VmmError::kvm("KVM_GET_DIRTY_LOG")(e));
                }
            }
        }
        self.taken = Some(PageSet::from_words(into.to_vec(), pages));
        Ok(into.iter().map(|w| u64::from(w.count_ones())).sum())
    }

    /// Before the pages of `run` are read: clears and write-protects those of them that the last
    /// take (or the start) handed out.
    pub fn clear(&mut self, vm: &VmFd, ram: &GuestRam, run: PageRun) -> Result<(), VmmError> {
        let Some(taken) = &mut self.taken else { return Err(VmmError::DirtyLog("off")) };
        let end = run.first.0.saturating_add(run.pages).min(taken.capacity());
        let mut at = run.first.0;
        while at < end {
            let Some((slot, _)) = ram.map().locate(PageIndex(at)) else { break };
            let slot_first = ram.map().first_page(slot).0;
            let slot_end = slot_first + ram.map().regions()[slot].bytes / crate::memory::PAGE_BYTES;
            // Regions begin on a word of the bitmap, and so do the pieces that KVM accepts.
            let word_first = at / 64 * 64;
            let upto = end.min(slot_end).min(word_first + CLEAR_PAGES);
            let piece = PageRun { first: PageIndex(at), pages: upto - at };
            let words = masked(taken, piece);
            if self.protect == Protect::Manual && words.iter().any(|w| *w != 0) {
                let pages = words.len() as u32 * 64;
                kvm_ext::clear_dirty_log(vm, slot as u32, word_first - slot_first, pages, &words)
                    .map_err(VmmError::kvm("KVM_CLEAR_DIRTY_LOG"))?;
            }
            taken.remove_run(piece);
            at = upto;
        }
        Ok(())
    }

    /// Adds pages to the next take: an attempt took them and did not get them across.
    pub fn put_back(&mut self, pages: &PageSet) {
        self.put_back.union(pages);
    }
}

/// The words of `set` that `run` touches, with the bits outside of it cleared.
fn masked(set: &PageSet, run: PageRun) -> Vec<u64> {
    let end = run.first.0 + run.pages;
    let (from, to) = (run.first.0 / 64, end.div_ceil(64));
    let mut words = set.words()[from as usize..to as usize].to_vec();
    if let Some(word) = words.first_mut() {
        *word &= u64::MAX << (run.first.0 % 64);
    }
    if let Some(word) = words.last_mut()
        && !end.is_multiple_of(64)
    {
        *word &= (1 << (end % 64)) - 1;
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_cut_out_of_the_words() {
        let set = PageSet::full(256);
        let run = |first, pages| PageRun { first: PageIndex(first), pages };
        assert_eq!(masked(&set, run(4, 4)), vec![0xf0]);
        assert_eq!(masked(&set, run(60, 8)), vec![0xf << 60, 0xf]);
        assert_eq!(masked(&set, run(64, 128)), vec![u64::MAX; 2]);
    }
}
