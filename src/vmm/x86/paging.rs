//! How a guest translates its addresses: from the special registers down its page tables (SDM vol. 3,
//! chapter 5; APM vol. 2, chapter 5).

use std::collections::HashSet;
use std::ops::{ControlFlow, Range};

use kvm_bindings::{kvm_segment, kvm_sregs, kvm_sregs2};

use crate::state::SpecialRegisters;
use crate::sys::pod;

pub(super) const CR0_PG: u64 = 1 << 31;
pub(super) const CR4_PSE: u64 = 1 << 4;
pub(super) const CR4_PAE: u64 = 1 << 5;
pub(super) const CR4_LA57: u64 = 1 << 12;
pub(super) const EFER_LMA: u64 = 1 << 10;
pub(super) const PRESENT: u64 = 1;
const USER: u64 = 1 << 2;
pub(super) const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// How linear addresses are translated (SDM vol. 3, chapter 5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paging {
    table: u64,
    levels: &'static [Level],
    entry_bytes: u64,
}

#[derive(Debug, PartialEq, Eq)]
struct Level {
    shift: u32,
    bits: u32,
    may_be_large: bool,
}

const fn level(shift: u32, bits: u32, may_be_large: bool) -> Level {
    Level { shift, bits, may_be_large }
}

const FIVE_LEVELS: [Level; 5] =
    [level(48, 9, false), level(39, 9, false), level(30, 9, true), level(21, 9, true), level(12, 9, false)];
const PAE: [Level; 3] = [level(30, 2, false), level(21, 9, true), level(12, 9, false)];
const LEGACY: [Level; 2] = [level(22, 10, false), level(12, 10, false)];
const LEGACY_PSE: [Level; 2] = [level(22, 10, true), level(12, 10, false)];

impl Level {
    /// Whether an entry of this level says where a page is, not where the next table is.
    fn is_last(&self, entry: u64) -> bool {
        self.shift == 12 || self.may_be_large && entry & LARGE != 0
    }

    /// The bits of an address inside a page of this level.
    fn inside(&self) -> u64 {
        (1 << self.shift) - 1
    }
}

impl Paging {
    /// An entry of a table.
    fn entry(&self, table: u64, index: u64, read: impl Fn(u64) -> Option<u64>) -> Option<u64> {
        let bytes = read(table + index * self.entry_bytes)?;
        Some(if self.entry_bytes == 4 { bytes & u64::from(u32::MAX) } else { bytes })
    }

    /// The addresses of the entries on the way to a linear address, then what it is translated to.
    pub fn walk(&self, linear: u64, read: impl Fn(u64) -> Option<u64>) -> Vec<u64> {
        let mut touched = Vec::new();
        let mut table = self.table;
        for level in self.levels {
            let index = linear >> level.shift & ((1 << level.bits) - 1);
            touched.push(table + index * self.entry_bytes);
            let Some(entry) = self.entry(table, index, &read).filter(|entry| entry & PRESENT != 0) else {
                return touched;
            };
            table = entry & ADDRESS;
            if level.is_last(entry) {
                touched.push(table & !level.inside() | linear & level.inside());
                return touched;
            }
        }
        touched
    }

    /// The table that kernel code would use, where this one is that of Linux's page table isolation for user code
    /// (Documentation/arch/x86/pti.rst): it lies 4 KiB below, and has the same entries for user space, but for their
    /// right to execute.
    fn kernels(&self, read: &impl Fn(u64) -> Option<u64>) -> Option<Self> {
        let table = self.table & !PTI_USER;
        let same = |entry: u64| {
            let (ours, theirs) = (read(self.table + 8 * entry)?, read(table + 8 * entry)?);
            (ours & !NO_EXECUTE == theirs & !NO_EXECUTE).then_some(ours & PRESENT != 0)
        };
        let users = (0..ENTRIES / 2).map(same).collect::<Option<Vec<_>>>()?;
        let is_twin = self.levels.len() >= 4 && table != self.table && users.contains(&true);
        is_twin.then(|| Self { table, ..self.clone() })
    }
}

/// Entries of a table in long mode.
const ENTRIES: u64 = 512;
const NO_EXECUTE: u64 = 1 << 63;
const PTI_USER: u64 = 1 << 12;
/// Page tables that are read at most; the 2 GiB take no more than 1027 in one translation.
const MOST_TABLES: usize = 1 << 12;

/// Calls `found` with the stretches of guest-physical addresses at which 64-bit kernels have themselves under
/// `translations`: what is mapped in the last 2 GiB of the linear addresses, and not for programs. There is all code, and
/// all data with a name, of what is compiled for the code model `kernel` (System V ABI for AMD64, section 3.5.1), as the
/// modules of Linux are too. A stretch may be found more than once, and may be no RAM. Ends when `found` says so. `read`
/// gives 8 bytes of RAM, aligned to 8; `None` where there is none.
pub fn kernel_image(
    translations: &[Paging],
    read: impl Fn(u64) -> Option<u64>,
    found: impl FnMut(Range<u64>) -> ControlFlow<()>,
) {
    let twins: Vec<Paging> = translations.iter().filter_map(|paging| paging.kernels(&read)).collect();
    let mut look = Look { read, found, seen: HashSet::new() };
    for paging in translations.iter().chain(&twins).filter(|paging| paging.levels.len() >= 4) {
        if look.table(paging.levels, paging.table, USER).is_break() {
            return;
        }
    }
}

/// A look through page tables.
struct Look<R, F> {
    read: R,
    found: F,
    /// Tables that were looked at, by the level: most of a kernel's are in all translations, and a guest's may lead back
    /// to themselves.
    seen: HashSet<(u32, u64)>,
}

impl<R: Fn(u64) -> Option<u64>, F: FnMut(Range<u64>) -> ControlFlow<()>> Look<R, F> {
    /// Looks at what a table of the first of `levels` maps in the last 2 GiB. `user` is the bit that lets programs use
    /// it, as far as all that leads there has it.
    fn table(&mut self, levels: &[Level], table: u64, user: u64) -> ControlFlow<()> {
        let [level, below @ ..] = levels else { return ControlFlow::Continue(()) };
        if !self.seen.insert((level.shift, table)) {
            return ControlFlow::Continue(());
        }
        if self.seen.len() > MOST_TABLES {
            return ControlFlow::Break(());
        }
        let first = match level.shift {
            48 | 39 => ENTRIES - 1,
            30 => ENTRIES - 2,
            _ => 0,
        };
        for index in first..ENTRIES {
            let Some(entry) = (self.read)(table + 8 * index).filter(|entry| entry & PRESENT != 0) else {
                continue;
            };
            let user = user & entry;
            if !level.is_last(entry) {
                self.table(below, entry & ADDRESS, user)?;
            } else if user == 0 {
                let first = entry & ADDRESS & !level.inside();
                (self.found)(first..first + level.inside() + 1)?;
            }
        }
        ControlFlow::Continue(())
    }
}

/// What both forms of the special registers have.
#[derive(Default)]
pub struct Sregs {
    pub cs: kvm_segment,
    pub ss: kvm_segment,
    pub fs: kvm_segment,
    pub gs: kvm_segment,
    pub tr: kvm_segment,
    pub gdt: u64,
    pub idt: u64,
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
}

macro_rules! from_sregs {
    ($form:ty) => {
        impl From<$form> for Sregs {
            fn from(s: $form) -> Self {
                Self {
                    cs: s.cs,
                    ss: s.ss,
                    fs: s.fs,
                    gs: s.gs,
                    tr: s.tr,
                    gdt: s.gdt.base,
                    idt: s.idt.base,
                    cr0: s.cr0,
                    cr3: s.cr3,
                    cr4: s.cr4,
                    efer: s.efer,
                }
            }
        }
    };
}

from_sregs!(kvm_sregs);
from_sregs!(kvm_sregs2);

impl Sregs {
    /// From a saved state; of what is not of this program's making, all zero.
    pub fn of(saved: &SpecialRegisters) -> Self {
        match saved {
            SpecialRegisters::Sregs(raw) => pod::from_bytes::<kvm_sregs>(&raw.0).map(Self::from),
            SpecialRegisters::Sregs2(raw) => pod::from_bytes::<kvm_sregs2>(&raw.0).map(Self::from),
        }
        .unwrap_or_default()
    }

    /// The translation that is on, if one is.
    pub fn paging(&self) -> Option<Paging> {
        if self.cr0 & CR0_PG == 0 {
            return None;
        }
        let (levels, entry_bytes, mask): (&'static [Level], _, _) = if self.efer & EFER_LMA != 0 {
            (&FIVE_LEVELS[usize::from(self.cr4 & CR4_LA57 == 0)..], 8, ADDRESS)
        } else if self.cr4 & CR4_PAE != 0 {
            (&PAE, 8, 0xffff_ffe0)
        } else if self.cr4 & CR4_PSE != 0 {
            (&LEGACY_PSE, 4, 0xffff_f000)
        } else {
            (&LEGACY, 4, 0xffff_f000)
        };
        Some(Paging { table: self.cr3 & mask, levels, entry_bytes })
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::collections::HashMap;

    use super::*;

    const IN: u64 = PRESENT;
    /// The last entry of a table, and that of the last 2 GiB in the table of those of 1 GiB.
    const LAST: u64 = 511;
    const IMAGE: u64 = 510;

    fn long_mode() -> Paging {
        let sregs = Sregs { cr0: CR0_PG, cr3: 0x1000, cr4: CR4_PAE, efer: EFER_LMA, ..Default::default() };
        sregs.paging().unwrap()
    }

    /// Tables by (table, index): entry.
    fn ram(entries: &[(u64, u64, u64)]) -> impl Fn(u64) -> Option<u64> + use<> {
        let entries: HashMap<u64, u64> =
            entries.iter().map(|(table, index, entry)| (table + 8 * index, *entry)).collect();
        move |at| Some(entries.get(&at).copied().unwrap_or(0))
    }

    /// The stretches, each from its first address up to its end.
    fn image(translations: &[Paging], read: impl Fn(u64) -> Option<u64>) -> Vec<(u64, u64)> {
        let mut all = Vec::new();
        kernel_image(translations, read, |stretch| {
            all.push((stretch.start, stretch.end));
            ControlFlow::Continue(())
        });
        all
    }

    #[test]
    fn the_image_is_what_the_last_2_gib_map_for_the_kernel() {
        let entries = [
            (0x1000, LAST, 0x2000 | IN | USER),
            (0x2000, IMAGE, 0x3000 | IN),
            // 2 MiB, with the bit of a large page for its caching, and small pages.
            (0x3000, 8, 0x100_1000 | IN | LARGE),
            (0x3000, 10, 0x4000 | IN),
            (0x4000, 0, 0x140_0000 | IN | NO_EXECUTE),
            (0x4000, 2, 0x140_2000 | IN | USER),
            (0x4000, 3, 0x140_3000),
            // For programs is only what all that leads there says to be.
            (0x2000, LAST, 0x5000 | IN | USER),
            (0x5000, 0, 0x6000 | IN | USER),
            (0x6000, 0, 0x150_0000 | IN | USER),
            (0x6000, LAST, 0x150_1000 | IN),
            // What lies below the 2 GiB.
            (0x2000, IMAGE - 1, IN | LARGE),
            (0x1000, LAST - 1, 0x2000 | IN),
            (0x1000, 0, 0x2000 | IN),
        ];
        let small = |at: u64| (at, at + 0x1000);
        let all = [(0x100_0000, 0x120_0000), small(0x140_0000), small(0x140_2000), small(0x150_1000)];
        assert_eq!(image(&[long_mode()], ram(&entries)), all);
        // Five levels begin one higher.
        let five = Paging { table: 0x9000, levels: &FIVE_LEVELS, ..long_mode() };
        let higher = [&entries[..], &[(0x9000, LAST, 0x1000 | IN | USER)]].concat();
        assert_eq!(image(&[five], ram(&higher)), all);
        // 1 GiB at once.
        let large = [(0x1000, LAST, 0x2000 | IN), (0x2000, IMAGE, 0x8000_0000 | IN | LARGE)];
        assert_eq!(image(&[long_mode()], ram(&large)), [(0x8000_0000, 0xc000_0000)]);
        // Older modes have no such place.
        for (levels, entry_bytes) in [(&PAE[..], 8), (&LEGACY[..], 4), (&LEGACY_PSE[..], 4)] {
            assert_eq!(image(&[Paging { table: 0x1000, levels, entry_bytes }], |_| Some(IN | LARGE)), []);
        }
    }

    #[test]
    fn what_two_translations_share_is_found_once_and_tables_that_lead_back_are_left() {
        let entries = [
            (0x1000, LAST, 0x2000 | IN),
            (0x6000, LAST, 0x2000 | IN),
            (0x2000, IMAGE, 0x3000 | IN),
            (0x3000, 0, 0x20_0000 | IN | LARGE),
            (0x2000, LAST, 0x1000 | IN),
        ];
        let found = image(&[long_mode(), Paging { table: 0x6000, ..long_mode() }], ram(&entries));
        let times = found.iter().filter(|stretch| **stretch == (0x20_0000, 0x40_0000)).count();
        assert_eq!(times, 1, "{found:x?}");
    }

    #[test]
    fn guests_that_have_endless_tables_are_not_followed() {
        let reads = Cell::new(0u64);
        // Each entry leads to a table of its own.
        let read = |at: u64| {
            reads.set(reads.get() + 1);
            Some((at * 512) & ADDRESS | IN)
        };
        let many: Vec<Paging> = (0..64).map(|n| Paging { table: n << 20, ..long_mode() }).collect();
        image(&many, read);
        assert!(reads.get() < (MOST_TABLES as u64 + 2 * 64) * ENTRIES, "{} reads", reads.get());
        // And whoever has had enough ends it.
        let mut first = None;
        let read = |at: u64| Some(if at < 0x2000 { 0x2000 | IN } else { 0x4000_0000 | IN | LARGE });
        kernel_image(&[long_mode()], read, |stretch| {
            assert_eq!(first.replace(stretch), None);
            ControlFlow::Break(())
        });
        assert_eq!(first, Some(1 << 30..2 << 30));
    }

    #[test]
    fn user_code_under_page_table_isolation_has_the_kernels_table_beside_its_own() {
        let users = Paging { table: 0x3000, ..long_mode() };
        let mut entries = vec![
            // Of the two tables programs are in both, the kernel in the first.
            (0x2000, 0, 0x8000 | IN | USER | NO_EXECUTE),
            (0x3000, 0, 0x8000 | IN | USER),
            (0x2000, LAST, 0x4000 | IN),
            (0x4000, IMAGE, 0x5000 | IN),
            (0x5000, 0, 0x20_0000 | IN | LARGE),
        ];
        assert_eq!(image(std::slice::from_ref(&users), ram(&entries)), [(0x20_0000, 0x40_0000)]);
        // Another page below that is no table, or an empty one.
        entries[0].2 ^= 1 << 20;
        assert_eq!(image(std::slice::from_ref(&users), ram(&entries)), []);
        assert_eq!(image(&[users], ram(&entries[2..])), []);
    }
}
