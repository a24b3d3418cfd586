//! Which pages of its RAM a guest wants first where it goes: those that its vCPUs touch when they go on, and its
//! kernel.

use std::collections::HashSet;
use std::ops::{ControlFlow, Range};

use super::memory::GuestRam;
use super::x86::paging::{self, Paging};
use super::x86::touched::Roots;
use crate::memory::{GuestPhysAddr, PAGE_BYTES, PageIndex, PageSet};

/// The most pages of a kernel: 64 MiB.
const MOST_IMAGE_PAGES: u64 = 1 << 14;

/// The pages that restoring the vCPUs touches, then those that they touch first, each once.
pub fn first_touched(ram: &GuestRam, roots: &[Roots]) -> Vec<PageIndex> {
    let shared = roots.iter().flat_map(|r| r.shared().iter().copied());
    let first = roots.iter().flat_map(|r| r.first(|at| read_word(ram, at)));
    let mut seen = HashSet::new();
    let pages = shared.chain(first).filter_map(|at| ram.map().page_of(GuestPhysAddr(at)));
    pages.filter(|page| seen.insert(*page)).collect()
}

/// The kernel in these translations ([`paging::kernel_image`]), as far as it is found.
pub fn kernel_image(ram: &GuestRam, translations: &[Paging]) -> PageSet {
    let mut image = PageSet::new(ram.map().total_pages());
    let mut room = MOST_IMAGE_PAGES;
    let found = |stretch: Range<u64>| {
        for at in stretch.step_by(PAGE_BYTES as usize) {
            if room == 0 {
                return ControlFlow::Break(());
            }
            room -= 1;
            if let Some(page) = ram.map().page_of(GuestPhysAddr(at)) {
                image.insert(page);
            }
        }
        ControlFlow::Continue(())
    };
    paging::kernel_image(translations, |at| read_word(ram, at), found);
    image
}

/// 8 bytes of RAM.
fn read_word(ram: &GuestRam, at: u64) -> Option<u64> {
    let mut bytes = [0; 8];
    ram.read(GuestPhysAddr(at), &mut bytes).ok().map(|()| u64::from_le_bytes(bytes))
}
