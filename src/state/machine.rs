//! What a machine is, as far as another host must know it before anything is sent.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::memory::{RamMap, RamPages};
pub use crate::wire::Problem;

/// A machine as its `vmrun` describes it. The receiver's `vmrun` makes itself the same, or names
/// everything that it cannot ([`Problem`]).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineDescription {
    /// The name given by `--name`.
    pub name: String,
    /// Random, made at boot, kept through every migration.
    pub uuid: String,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest RAM.
    pub ram: RamMap,
    /// What guest RAM is made of where it is now. The next host makes it of the same, unless its
    /// operator says otherwise.
    #[serde(default)]
    pub ram_pages: RamPages,
    /// The CPUID table of vCPU 0 (the others differ in their APIC id only).
    pub cpuid: Vec<CpuidEntry>,
    /// The MSRs that the saved state will hold, by index.
    pub msrs: Vec<u32>,
    /// The KVM capabilities that the saved state relies on, by the name in `linux/kvm.h`.
    pub capabilities: Vec<String>,
    /// The guest's TSC.
    pub tsc: TscFrequency,
    /// The bytes of the XSAVE area (KVM_CAP_XSAVE2, or 4096).
    pub xsave_bytes: u32,
    /// Every device with a saved state.
    pub devices: Vec<DeviceDescription>,
}

/// One line of a CPUID table, as KVM_SET_CPUID2 takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // the registers' own names
pub struct CpuidEntry {
    /// The leaf.
    pub function: u32,
    /// The subleaf, where `flags` says that it counts (KVM_CPUID_FLAG_SIGNIFCANT_INDEX).
    pub index: u32,
    pub flags: u32,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// How fast the guest's TSC runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TscFrequency {
    /// KVM_GET_TSC_KHZ.
    pub khz: u32,
}

/// One device of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceDescription {
    /// The id that `--remap ID=VALUE` names, unique in the machine.
    pub id: String,
    /// The kind of its saved state.
    pub kind: String,
    /// The newest version of its saved state that is written.
    pub version: u32,
    /// What it is backed by on the host (`stdio`, `file:PATH`, …), if anything.
    pub host: Option<String>,
    /// What the guest can tell about it, by name: the same wherever it runs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub properties: BTreeMap<String, String>,
}
