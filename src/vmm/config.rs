//! What is asked of a machine, at boot and when one comes in.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::virtio::HostEnd;
use super::{KernelSource, SerialBackend};
use crate::memory::RamPages;

/// A machine to boot.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// `--name`.
    pub name: String,
    /// Random, for this machine's whole life.
    pub uuid: String,
    /// RAM in bytes, a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// What RAM is made of.
    pub ram_pages: RamPages,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// What is booted.
    pub kernel: KernelSource,
    /// An initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// What the serial port is connected to.
    pub serial: SerialBackend,
    /// Its virtio devices, in the order of their slots.
    pub devices: Vec<DeviceConfig>,
}

/// A virtio device of a machine to boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Its id, unique in the machine.
    pub id: String,
    /// What it is connected to; that also tells its kind.
    pub host: HostEnd,
}

/// What a host decides about a machine that comes in.
#[derive(Clone, Debug, Default)]
pub struct LocalConfig {
    /// What RAM is made of; as where the machine comes from when `None`.
    pub ram_pages: Option<RamPages>,
    /// What the serial port is connected to, unless it is remapped.
    pub serial: SerialBackend,
    /// `--remap ID=VALUE`: host paths by device id.
    pub remaps: BTreeMap<String, String>,
    /// Pages may come after the guest, so that this host has to serve its page faults.
    pub postcopy: bool,
    /// Where an import fails on purpose, for drills: `import:SECTION` or `vcpu:NUMBER:GROUP`, for
    /// example `import:serial` or `vcpu:1:lapic`. Without it, the environment variable
    /// `VMFERRY_FAULT_POINT` counts.
    #[cfg(feature = "fault-points")]
    pub fault: Option<String>,
}
