//! What can go wrong with a machine.

use std::io;

use thiserror::Error;

use crate::memory::RamMapError;
use crate::state::{Problem, SectionError};

/// Why a machine could not be made, changed, saved or restored. Each message says what was being
/// done, to what, and the kernel's reason.
#[derive(Debug, Error)]
#[allow(missing_docs)] // the messages say it
pub enum VmmError {
    #[error("cannot use /dev/kvm: {0}")]
    OpenKvm(io::Error),
    #[error("KVM lacks {0}, which every machine here needs")]
    MissingCapability(&'static str),
    #[error("{call}: {source}")]
    Kvm { call: &'static str, source: io::Error },
    #[error("vCPU {vcpu}: {group}: {source}")]
    Vcpu { vcpu: u32, group: String, source: io::Error },
    #[error("cannot make guest RAM of {bytes} bytes: {source}")]
    AllocateRam { bytes: u64, source: io::Error },
    #[error("memory of {} MiB is asked for, this host has {} MiB available", .wanted >> 20, .available >> 20)]
    TooMuchRam { wanted: u64, available: u64 },
    #[error("guest RAM of huge pages: {0}")]
    HugePages(String),
    #[error("memory of {0} bytes is not a multiple of 2 MiB, or is none at all")]
    MemorySize(u64),
    #[error(transparent)]
    RamMap(#[from] RamMapError),
    #[error("guest address {address:#x} with {bytes} bytes is not all RAM")]
    NotRam { address: u64, bytes: u64 },
    #[error("{vcpus} vCPUs are asked for; this host's KVM can do 1 to {max}")]
    VcpuCount { vcpus: u32, max: u32 },
    #[error(transparent)]
    Boot(#[from] super::boot::BootError),
    #[error("serial port to {backend}: {source}")]
    Serial { backend: String, source: io::Error },
    #[error("device {id}: {reason}")]
    Device { id: String, reason: String },
    #[error("{devices} virtio devices are asked for; there is room for {max}")]
    TooManyDevices { devices: usize, max: usize },
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
    #[error("the saved state is not acceptable: {0}")]
    Section(#[from] SectionError),
    #[error("the saved state has no section {0}")]
    MissingSection(String),
    #[error("the saved state has a section {0}, which this machine has no place for")]
    ExtraSection(String),
    #[error("{section}: version {version} is not known here (known: {known})")]
    SectionVersion { section: String, version: u32, known: u32 },
    #[error("{section}: {reason}")]
    Content { section: String, reason: String },
    #[error("the machine is {0}: that cannot be done now")]
    WrongState(&'static str),
    #[error("the vCPUs do not leave guest mode")]
    VcpusBusy,
    #[error("the dirty log is {0}")]
    DirtyLog(&'static str),
    #[cfg(feature = "fault-points")]
    #[error("{0}: refused on purpose (fault point)")]
    FaultPoint(String),
}

impl VmmError {
    /// Wraps the error of a VM ioctl, `call` being its name.
    pub(crate) fn kvm<E: Into<IoError>>(call: &'static str) -> impl FnOnce(E) -> Self {
        move |e| Self::Kvm { call, source: e.into().0 }
    }
}

/// Either kind of errno that the KVM wrappers give.
pub(crate) struct IoError(pub io::Error);

impl From<kvm_ioctls::Error> for IoError {
    fn from(e: kvm_ioctls::Error) -> Self {
        Self(io::Error::from_raw_os_error(e.errno()))
    }
}

impl From<io::Error> for IoError {
    fn from(e: io::Error) -> Self {
        Self(e)
    }
}

/// Why [`super::Machine::prepare`] made no machine.
#[derive(Debug, Error)]
pub enum PrepareError {
    /// This host cannot take the machine; everything that is missing is listed.
    #[error("this host cannot take the machine: {}", list(.0))]
    Refused(Vec<Problem>),
    /// Something failed while the machine was being made.
    #[error(transparent)]
    Failed(#[from] VmmError),
}

fn list(problems: &[Problem]) -> String {
    problems.iter().map(|p| p.text.as_str()).collect::<Vec<_>>().join("; ")
}
