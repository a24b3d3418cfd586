//! The saved state of one vCPU (section kind `vcpu`, version 1).

use serde::{Deserialize, Serialize};

use super::{CpuidEntry, HexBytes};

/// The version of [`VcpuState`] that is written.
pub const VCPU_VERSION: u32 = 1;

/// One vCPU. What is hexadecimal is the KVM structure of the ioctl named, in the kernel's layout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    /// The CPUID table of this vCPU, with its own APIC id (KVM_SET_CPUID2).
    pub cpuid: Vec<CpuidEntry>,
    /// The guest's TSC in kHz (KVM_GET_TSC_KHZ).
    pub tsc_khz: u32,
    /// The guest's TSC minus the host's in ticks (KVM_VCPU_TSC_OFFSET), where the kernel tells it.
    pub tsc_offset: Option<u64>,
    /// KVM_GET_REGS: `struct kvm_regs`.
    pub regs: HexBytes,
    /// KVM_GET_SREGS or KVM_GET_SREGS2.
    pub sregs: SpecialRegisters,
    /// KVM_GET_XCRS: `struct kvm_xcrs`.
    pub xcrs: HexBytes,
    /// KVM_GET_XSAVE or KVM_GET_XSAVE2: as long as the description's `xsave_bytes`.
    pub xsave: HexBytes,
    /// KVM_GET_DEBUGREGS: `struct kvm_debugregs`.
    pub debugregs: HexBytes,
    /// KVM_GET_LAPIC: `struct kvm_lapic_state`.
    pub lapic: HexBytes,
    /// KVM_GET_MSRS, every MSR that the description lists.
    pub msrs: Vec<MsrValue>,
    /// KVM_GET_VCPU_EVENTS: `struct kvm_vcpu_events`.
    pub events: HexBytes,
    /// KVM_GET_MP_STATE.
    pub mp_state: u32,
}

/// The special registers: SREGS2 has the PDPTEs besides, where the kernel has KVM_CAP_SREGS2.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpecialRegisters {
    /// `struct kvm_sregs`.
    Sregs(HexBytes),
    /// `struct kvm_sregs2`.
    Sregs2(HexBytes),
}

/// One model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsrValue {
    /// Its number.
    pub index: u32,
    /// Its 64 bits.
    pub value: u64,
}
