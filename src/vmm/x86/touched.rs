//! Which pages of RAM a saved vCPU touches first: those that KVM shares with the guest and writes
//! while the state is restored, and those that its registers point to, with the page tables that lead
//! there. In postcopy they go ahead of the guest.

use kvm_bindings::kvm_regs;

use crate::memory::PAGE_BYTES;
use crate::state::VcpuState;
use crate::sys::pod;

use super::paging::{EFER_LMA, Paging, Sregs};

/// MSRs that hold a guest-physical address (Documentation/virt/kvm/x86/msr.rst), with the bits that
/// are none of it. Bit 0 says that it is in use, but for the wall clock's, which have no such bit.
const SHARED: [(u32, u64); 7] = [
    (0x11, 0),
    (0x12, 1),
    (0x4b56_4d00, 0),
    (0x4b56_4d01, 1),
    (0x4b56_4d02, 0x3f),
    (0x4b56_4d03, 0x3f),
    (0x4b56_4d04, 3),
];
/// The longest of the structures behind them: steal time.
const SHARED_BYTES: u64 = 64;
/// Pages that come with the one that is executed, that one included: code goes on near where it is.
const CODE_PAGES: u64 = 8;
/// How far below the stack pointer the first pushes reach.
const PUSHED_BYTES: u64 = 256;

/// What of one vCPU's state leads to pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roots {
    /// Guest-physical addresses.
    shared: Vec<u64>,
    /// Linear addresses.
    linear: Vec<u64>,
    paging: Option<Paging>,
}

impl Roots {
    /// From a saved state; what is not of this program's making leads nowhere.
    pub fn of(state: &VcpuState) -> Self {
        let value = |index| state.msrs.iter().find(|m| m.index == index).map_or(0, |m| m.value);
        let in_use = |(index, flags): (u32, u64)| {
            let value = value(index);
            (value & !flags != 0 && (flags == 0 || value & 1 == 1)).then_some(value & !flags)
        };
        let shared =
            SHARED.into_iter().filter_map(in_use).flat_map(|at| [at, at.saturating_add(SHARED_BYTES - 1)]);
        let regs: kvm_regs = pod::from_bytes(&state.regs.0).unwrap_or_default();
        let sregs = Sregs::of(&state.sregs);
        let paging = sregs.paging();
        let mask = if sregs.efer & EFER_LMA != 0 { u64::MAX } else { u64::from(u32::MAX) };
        let stack = sregs.ss.base.wrapping_add(regs.rsp);
        let linear = [
            sregs.cs.base.wrapping_add(regs.rip),
            stack,
            stack.wrapping_sub(PUSHED_BYTES),
            sregs.idt,
            sregs.gdt,
            sregs.tr.base,
            sregs.gs.base,
            sregs.fs.base,
        ];
        Self { shared: shared.collect(), linear: linear.iter().map(|at| at & mask).collect(), paging }
    }

    /// The addresses that restoring the state touches.
    pub fn shared(&self) -> &[u64] {
        &self.shared
    }

    /// The guest-physical addresses that the vCPU touches first, with entries of page tables, in the
    /// order in which it needs them, then those around the code that runs. `read` gives 8 bytes of RAM, aligned to 4; `None` where there is none.
    pub fn first(&self, read: impl Fn(u64) -> Option<u64>) -> Vec<u64> {
        let walk =
            |at: &u64| self.paging.as_ref().map_or_else(|| vec![*at], |paging| paging.walk(*at, &read));
        let mut touched: Vec<u64> = self.linear.iter().flat_map(walk).collect();
        // The way to the instruction comes first, and ends at it where it leads there.
        if let Some(code) = self.linear.first().and_then(|rip| walk(rip).last().copied()) {
            let block = code & !(CODE_PAGES * PAGE_BYTES - 1);
            touched.extend((0..CODE_PAGES).map(|page| block.saturating_add(page * PAGE_BYTES)));
        }
        touched
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use kvm_bindings::kvm_sregs;

    use super::super::paging::*;
    use super::*;
    use crate::state::{HexBytes, MsrValue, SpecialRegisters};

    fn state(regs: kvm_regs, sregs: kvm_sregs, msrs: &[(u32, u64)]) -> VcpuState {
        VcpuState {
            cpuid: vec![],
            tsc_khz: 0,
            tsc_offset: None,
            regs: HexBytes(pod::to_bytes(&regs)),
            sregs: SpecialRegisters::Sregs(HexBytes(pod::to_bytes(&sregs))),
            xcrs: HexBytes(vec![]),
            xsave: HexBytes(vec![]),
            debugregs: HexBytes(vec![]),
            lapic: HexBytes(vec![]),
            msrs: msrs.iter().map(|(index, value)| MsrValue { index: *index, value: *value }).collect(),
            events: HexBytes(vec![]),
            mp_state: 0,
        }
    }

    fn long_mode(cr3: u64) -> kvm_sregs {
        kvm_sregs { cr0: CR0_PG | 1, cr3, cr4: CR4_PAE, efer: EFER_LMA, ..Default::default() }
    }

    #[test]
    fn pages_that_kvm_shares_are_those_in_use() {
        let msrs = [
            (0x11, 0x5000),
            (0x12, 0x6001),
            (0x4b56_4d01, 0x7000),
            (0x4b56_4d02, 0x8000 | 0xf),
            (0x4b56_4d03, 0x9ff1),
            (0x4b56_4d04, 0),
        ];
        let roots = Roots::of(&state(kvm_regs::default(), kvm_sregs::default(), &msrs));
        let first: Vec<u64> = roots.shared().iter().step_by(2).copied().collect();
        assert_eq!(first, [0x5000, 0x6000, 0x8000, 0x9fc0]);
    }

    #[test]
    fn page_tables_lead_from_registers_to_pages() {
        let regs = kvm_regs { rip: 0x40_1234, rsp: 0x8000_0010, ..Default::default() };
        let ram = HashMap::from([
            (0x1000u64, 0x2000 | PRESENT),
            (0x2000, 0x3000 | PRESENT),
            // 2 MiB at 4 MiB, and a page table for the 2 MiB at 2 GiB.
            (0x3010, 0xa0_0000 | LARGE | PRESENT),
            (0x2010, 0x4000 | PRESENT),
            (0x4000, 0x5000 | PRESENT),
            (0x5000, 0xb000 | PRESENT | 1 << 63),
        ]);
        let read = |at: u64| Some(ram.get(&at).copied().unwrap_or(0));
        let touched = Roots::of(&state(regs, long_mode(0x1000), &[])).first(read);
        assert_eq!(touched[..4], [0x1000, 0x2000, 0x3010, 0xa0_1234]);
        assert_eq!(touched[4..9], [0x1000, 0x2010, 0x4000, 0x5000, 0xb010]);
        let around: Vec<u64> = (0xa0_0000..0xa0_8000).step_by(0x1000).collect();
        assert_eq!(touched[touched.len() - 8..], around);
        // A table that is not there ends the way.
        assert_eq!(Roots::of(&state(regs, long_mode(0x1000), &[])).first(|_| None)[..2], [0x1000, 0x1000]);
        // Five levels begin one higher.
        let la57 = kvm_sregs { cr4: CR4_PAE | CR4_LA57, ..long_mode(0x9000) };
        let read = |at: u64| if at == 0x9000 { Some(0x1000 | PRESENT) } else { read(at) };
        assert_eq!(Roots::of(&state(regs, la57, &[])).first(read)[..3], [0x9000, 0x1000, 0x2000]);
    }

    #[test]
    fn older_modes_and_none_at_all() {
        let regs = kvm_regs { rip: 0x40_1234, rsp: 0x1_0000_2000, ..Default::default() };
        let flat = Roots::of(&state(regs, kvm_sregs::default(), &[])).first(|_| None);
        assert_eq!(flat[..3], [0x40_1234, 0x2000, 0x1f00]);
        let protected = kvm_sregs { cr0: CR0_PG | 1, cr3: 0x1000, ..Default::default() };
        let read = |at| (at == 0x1004).then_some(0xdead_0000_0000_0000 | 0x3000 | PRESENT);
        assert_eq!(Roots::of(&state(regs, protected, &[])).first(read)[..2], [0x1004, 0x3004]);
        let pse = kvm_sregs { cr4: CR4_PSE, ..protected };
        let read = |at| (at == 0x1004).then_some(0x80_0000 | LARGE | PRESENT);
        assert_eq!(Roots::of(&state(regs, pse, &[])).first(read)[..2], [0x1004, 0x80_1234]);
        let pae = kvm_sregs { cr4: CR4_PAE, cr3: 0x1020, ..protected };
        let read = |at| Some(if at == 0x1020 { 0x2000 | PRESENT } else { 0 });
        assert_eq!(Roots::of(&state(regs, pae, &[])).first(read)[..2], [0x1020, 0x2010]);
    }
}
