//! Which MSRs are saved, in which order they are restored, and what they are called.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::vmm::VmmError;

/// IA32_TIME_STAMP_COUNTER.
pub const TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE.
pub const TSC_DEADLINE: u32 = 0x6e0;
/// IA32_APIC_BASE: in the special registers too, which set it.
const APIC_BASE: u32 = 0x1b;
/// IA32_ARCH_CAPABILITIES.
pub const ARCH_CAPABILITIES: u32 = 0x10a;

/// Names, by Intel's SDM vol. 4, AMD's APM and Documentation/virt/kvm/x86/msr.rst.
const NAMES: &[(u32, &str)] = &[
    (0x10, "IA32_TIME_STAMP_COUNTER"),
    (0x11, "MSR_KVM_WALL_CLOCK"),
    (0x12, "MSR_KVM_SYSTEM_TIME"),
    (0x1b, "IA32_APIC_BASE"),
    (0x34, "MSR_SMI_COUNT"),
    (0x3a, "IA32_FEATURE_CONTROL"),
    (0x3b, "IA32_TSC_ADJUST"),
    (0x48, "IA32_SPEC_CTRL"),
    (0x8b, "IA32_BIOS_SIGN_ID"),
    (0x9e, "IA32_SMBASE"),
    (0xce, "MSR_PLATFORM_INFO"),
    (0xe1, "IA32_UMWAIT_CONTROL"),
    (0x10a, "IA32_ARCH_CAPABILITIES"),
    (0x122, "IA32_TSX_CTRL"),
    (0x140, "MSR_MISC_FEATURES_ENABLES"),
    (0x174, "IA32_SYSENTER_CS"),
    (0x175, "IA32_SYSENTER_ESP"),
    (0x176, "IA32_SYSENTER_EIP"),
    (0x17a, "IA32_MCG_STATUS"),
    (0x17b, "IA32_MCG_CTL"),
    (0x1a0, "IA32_MISC_ENABLE"),
    (0x1c4, "IA32_XFD"),
    (0x1c5, "IA32_XFD_ERR"),
    (0x1d9, "IA32_DEBUGCTL"),
    (0x277, "IA32_PAT"),
    (0x2ff, "IA32_MTRR_DEF_TYPE"),
    (0x345, "IA32_PERF_CAPABILITIES"),
    (0x4d0, "IA32_MCG_EXT_CTL"),
    (0x6a0, "IA32_U_CET"),
    (0x6a2, "IA32_S_CET"),
    (0x6e0, "IA32_TSC_DEADLINE"),
    (0xd90, "IA32_BNDCFGS"),
    (0xda0, "IA32_XSS"),
    (0x4b56_4d00, "MSR_KVM_WALL_CLOCK_NEW"),
    (0x4b56_4d01, "MSR_KVM_SYSTEM_TIME_NEW"),
    (0x4b56_4d02, "MSR_KVM_ASYNC_PF_EN"),
    (0x4b56_4d03, "MSR_KVM_STEAL_TIME"),
    (0x4b56_4d04, "MSR_KVM_PV_EOI_EN"),
    (0x4b56_4d05, "MSR_KVM_POLL_CONTROL"),
    (0x4b56_4d06, "MSR_KVM_ASYNC_PF_INT"),
    (0x4b56_4d07, "MSR_KVM_ASYNC_PF_ACK"),
    (0x4b56_4d08, "MSR_KVM_MIGRATION_CONTROL"),
    (0xc000_0080, "EFER"),
    (0xc000_0081, "STAR"),
    (0xc000_0082, "LSTAR"),
    (0xc000_0083, "CSTAR"),
    (0xc000_0084, "SYSCALL_MASK"),
    (0xc000_0100, "FS_BASE"),
    (0xc000_0101, "GS_BASE"),
    (0xc000_0102, "KERNEL_GS_BASE"),
    (0xc000_0103, "TSC_AUX"),
    (0xc000_0104, "AMD64_TSC_RATIO"),
    (0xc001_0117, "VM_HSAVE_PA"),
    (0xc001_011f, "AMD64_VIRT_SPEC_CTRL"),
    (0xc001_0015, "K7_HWCR"),
];

/// How an MSR is named in messages: `IA32_PAT (0x277)`, or `0x1234` where it has no name here.
pub fn name(index: u32) -> String {
    let known = NAMES.iter().find(|(i, _)| *i == index).map(|(_, name)| *name);
    let ranged = match index {
        0x200..=0x20f => Some("IA32_MTRR_PHYS"),
        0x250 | 0x258 | 0x259 | 0x268..=0x26f => Some("IA32_MTRR_FIX"),
        0x400..=0x47f => Some("IA32_MC"),
        0x480..=0x491 => Some("IA32_VMX"),
        0x800..=0x8ff => Some("x2APIC"),
        0xc1..=0xc8 | 0x186..=0x18d | 0x309..=0x30b | 0x38d..=0x390 => Some("performance counter"),
        0x4000_0000..=0x4000_01ff => Some("Hyper-V"),
        0xc001_0000..=0xc001_0007 | 0xc001_0200..=0xc001_020b => Some("AMD performance counter"),
        _ => None,
    };
    match known.or(ranged) {
        Some(name) => format!("{name} ({index:#x})"),
        None => format!("{index:#x}"),
    }
}

/// MSRs of features that guests are not offered (see [`super::cpuid::supported`]), or that KVM
/// keeps on behalf of the VMM: nested virtualisation, performance counters, Hyper-V.
fn left_out(index: u32) -> bool {
    matches!(
        index,
        APIC_BASE
            | 0xc1..=0xc8
            | 0x186..=0x18d
            | 0x309..=0x30b
            | 0x345
            | 0x38d..=0x390
            | 0x3f1
            | 0x480..=0x491
            | 0x4000_0000..=0x4000_01ff
            | 0xc001_0000..=0xc001_0007
            | 0xc001_0200..=0xc001_020b
            | 0xc000_0104
            | 0xc000_0300..=0xc000_0303
    )
}

/// State that KVM keeps for the guest and does not list: the MTRRs.
const NOT_LISTED: [std::ops::RangeInclusive<u32>; 5] =
    [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x2ff..=0x2ff];

/// Which MSRs to save: what KVM_GET_MSR_INDEX_LIST names (KVM API 4.3), and the MTRRs, if it reads
/// on `vcpu` and may be set to what was just read. `vcpu` is a fresh vCPU with its CPUID table,
/// never run.
pub fn probe(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<u32>, VmmError> {
    let list = kvm.get_msr_index_list().map_err(VmmError::kvm("KVM_GET_MSR_INDEX_LIST"))?;
    let mut indices = list.as_slice().to_vec();
    indices.extend(NOT_LISTED.into_iter().flatten());
    indices.sort_unstable();
    indices.dedup();
    let mut out = Vec::new();
    for index in indices {
        if left_out(index) {
            continue;
        }
        match can_be_restored(vcpu, index) {
            true => out.push(index),
            false => tracing::debug!(msr = name(index), "not saved: KVM refuses it"),
        }
    }
    Ok(out)
}

/// Whether the MSR reads on a fresh `vcpu` and may be set to what was read.
pub fn can_be_restored(vcpu: &VcpuFd, index: u32) -> bool {
    let Ok(mut one) = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]) else {
        return false;
    };
    matches!(vcpu.get_msrs(&mut one), Ok(1)) && matches!(vcpu.set_msrs(&one), Ok(1))
}

/// When an MSR is restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// With the rest, after the special registers.
    Early,
    /// By the clock's rule, after the early ones.
    Tsc,
    /// After the local APIC and the TSC: arms the timer.
    Deadline,
}

/// When `index` is restored.
pub fn turn(index: u32) -> Turn {
    match index {
        TSC => Turn::Tsc,
        TSC_DEADLINE => Turn::Deadline,
        _ => Turn::Early,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn msrs_have_names_and_turns() {
        assert_eq!(name(0x277), "IA32_PAT (0x277)");
        assert_eq!(name(0x401), "IA32_MC (0x401)");
        assert_eq!(name(0x1234), "0x1234");
        assert_eq!(turn(TSC), Turn::Tsc);
        assert_eq!(turn(TSC_DEADLINE), Turn::Deadline);
        assert_eq!(turn(0x3b), Turn::Early);
        assert!(left_out(0x186) && !left_out(0x277));
    }
}
