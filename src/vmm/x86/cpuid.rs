//! The CPUID table that guests get.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use crate::state::CpuidEntry;
use crate::vmm::VmmError;

/// The most entries that KVM takes.
pub const MAX_ENTRIES: usize = KVM_MAX_CPUID_ENTRIES;

const LEAF1_ECX_VMX: u32 = 1 << 5;
const LEAF1_ECX_PDCM: u32 = 1 << 15;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_OSXSAVE: u32 = 1 << 27;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HT: u32 = 1 << 28;
const LEAF7_EDX_ARCH_CAPABILITIES: u32 = 1 << 29;
const EXT1_ECX_SVM: u32 = 1 << 2;
const EXT1_ECX_TOPOEXT: u32 = 1 << 22;
const EXT1_ECX_PERFCTR: u32 = 1 << 23 | 1 << 24 | 1 << 28;

/// What this host can offer: KVM_GET_SUPPORTED_CPUID (KVM API 4.46), without what the saved state
/// does not carry or what cannot move between hosts:
///
/// - VMX and SVM: nested state is not saved;
/// - the performance counters (leaf 0xA, PDCM, AMD's counter bits): their MSRs differ by model;
/// - ARCH_CAPABILITIES unless `keep_arch_capabilities`: some KVMs refuse to set its MSR;
/// - TOPOEXT and leaf 0x1f: the topology is one socket of plain cores, told by leaf 0xb.
///
/// The hypervisor bit is set, and TSC-deadline where KVM's local APIC has it. Boot gives guests
/// this table, and preflight compares a guest's table with it.
pub fn supported(kvm: &Kvm, keep_arch_capabilities: bool) -> Result<Vec<CpuidEntry>, VmmError> {
    let table = kvm.get_supported_cpuid(MAX_ENTRIES).map_err(VmmError::kvm("KVM_GET_SUPPORTED_CPUID"))?;
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    let mut out = Vec::new();
    for raw in table.as_slice() {
        let mut e = from_kvm(raw);
        match (e.function, e.index) {
            (1, _) => {
                e.ecx &= !(LEAF1_ECX_VMX | LEAF1_ECX_PDCM | LEAF1_ECX_OSXSAVE);
                e.ecx |= LEAF1_ECX_HYPERVISOR;
                if deadline {
                    e.ecx |= LEAF1_ECX_TSC_DEADLINE;
                }
            }
            (7, 0) if !keep_arch_capabilities => e.edx &= !LEAF7_EDX_ARCH_CAPABILITIES,
            (0xa | 0x8000_0022, _) => [e.eax, e.ebx, e.ecx, e.edx] = [0; 4],
            (0xb | 0x1f | 0x8000_001e | 0x8000_0026, _) => continue,
            (0x8000_0001, _) => e.ecx &= !(EXT1_ECX_SVM | EXT1_ECX_TOPOEXT | EXT1_ECX_PERFCTR),
            (0x8000_000a, _) => [e.eax, e.ebx, e.ecx, e.edx] = [0; 4],
            _ => {}
        }
        out.push(e);
    }
    Ok(out)
}

/// `table` (of [`supported`]) for one vCPU of `vcpus`: its APIC id, and the topology of one socket
/// with a core for each vCPU (Intel SDM vol. 2, CPUID leaves 1, 4 and 0xb).
pub fn for_vcpu(table: &[CpuidEntry], vcpu: u32, vcpus: u32) -> Vec<CpuidEntry> {
    let shift = vcpus.next_power_of_two().trailing_zeros();
    let mut out: Vec<CpuidEntry> = table.iter().filter(|e| e.function != 0xb).copied().collect();
    for e in &mut out {
        match e.function {
            1 => {
                e.ebx = e.ebx & 0xffff | vcpus.min(255) << 16 | (vcpu & 0xff) << 24;
                e.edx = if vcpus > 1 { e.edx | LEAF1_EDX_HT } else { e.edx & !LEAF1_EDX_HT };
            }
            4 if e.eax & 0x1f != 0 => {
                // Cores in the package, minus one; the last level of cache is shared by all.
                let level = e.eax >> 5 & 7;
                let sharing = if level >= 3 { (1 << shift) - 1 } else { 0 };
                e.eax = e.eax & 0x3fff | (((1 << shift) - 1) & 0x3f) << 26 | (sharing & 0xfff) << 14;
            }
            0x8000_0008 => e.ecx = e.ecx & !0xf0ff | (vcpus - 1) & 0xff | shift << 12,
            _ => {}
        }
    }
    let level = |index, eax, ebx, kind: u32| CpuidEntry {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: index | kind << 8,
        edx: vcpu,
    };
    out.extend([level(0, 0, 1, 1), level(1, shift, vcpus, 2), level(2, 0, 0, 0)]);
    out
}

/// The table as KVM_SET_CPUID2 takes it.
pub fn to_kvm(table: &[CpuidEntry]) -> Result<CpuId, VmmError> {
    let entries: Vec<kvm_cpuid_entry2> = table
        .iter()
        .map(|e| kvm_cpuid_entry2 {
            function: e.function,
            index: e.index,
            flags: e.flags,
            eax: e.eax,
            ebx: e.ebx,
            ecx: e.ecx,
            edx: e.edx,
            padding: [0; 3],
        })
        .collect();
    CpuId::from_entries(&entries).map_err(|_| VmmError::Content {
        section: "cpuid".into(),
        reason: format!("{} entries, more than the {MAX_ENTRIES} that KVM takes", table.len()),
    })
}

/// One entry of KVM's.
pub fn from_kvm(e: &kvm_cpuid_entry2) -> CpuidEntry {
    CpuidEntry {
        function: e.function,
        index: e.index,
        flags: e.flags,
        eax: e.eax,
        ebx: e.ebx,
        ecx: e.ecx,
        edx: e.edx,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_vcpu_has_its_own_apic_id() {
        let leaf1 = CpuidEntry { function: 1, index: 0, flags: 0, eax: 0, ebx: 0x00ff_0800, ecx: 0, edx: 0 };
        let table = for_vcpu(&[leaf1], 2, 3);
        let one = table.iter().find(|e| e.function == 1).unwrap();
        assert_eq!(one.ebx, 2 << 24 | 3 << 16 | 0x0800);
        assert_eq!(one.edx, LEAF1_EDX_HT);
        let cores = table.iter().find(|e| e.function == 0xb && e.index == 1).unwrap();
        assert_eq!((cores.eax, cores.ebx, cores.edx), (2, 3, 2));
        assert_eq!(table.iter().filter(|e| e.function == 0xb).count(), 3);
    }
}
