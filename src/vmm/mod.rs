//! The virtual machine: KVM, vCPU threads, boot, devices, saving and restoring.
//!
//! [`Machine`] is what the service thread holds. No call of that thread's waits for a vCPU: what takes
//! time is asked for (`request_…`) and answered by a [`Notice`], or done beside the loop.

pub mod boot;
mod config;
pub mod devices;
mod dirty;
mod error;
mod fault;
mod first_pages;
mod host;
mod machine;
pub mod memory;
mod notice;
pub(crate) mod pool;
pub(crate) mod preflight;
pub(crate) mod saved;
pub mod service;
mod vcpu;
pub mod virtio;
pub(crate) mod x86;

pub use boot::KernelSource;
pub use config::{DeviceConfig, LocalConfig, MachineConfig};
pub use devices::SerialBackend;
pub use error::{PrepareError, VmmError};
pub use host::{HostAbilities, open_kvm};
pub use machine::Machine;
pub use memory::GuestRam;
pub use notice::{Exported, GuestExit, Notice, NoticeReceiver, NoticeSender, SyncTimes};
pub use preflight::problems;
