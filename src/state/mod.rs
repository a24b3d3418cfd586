//! What is saved of a machine and how it is written down: the description that preflight compares,
//! the container of sections, and one schema for each kind of section.
//!
//! Saved types are plain data, never the runtime types; everything that comes from a peer is
//! checked when it is read (D5, D6).

mod devices;
mod hex;
mod machine;
mod section;
mod vcpu;
mod virtio;

pub use devices::{
    CLOCK_VERSION, ClockState, IRQCHIP_VERSION, IrqchipState, PIT_VERSION, PitState, SERIAL_VERSION,
    SerialState,
};
pub use hex::HexBytes;
pub use machine::{CpuidEntry, DeviceDescription, MachineDescription, Problem, TscFrequency};
pub use section::{MAX_STATE_BYTES, Section, SectionError, SectionKind, read_sections, write_sections};
pub use vcpu::{MsrValue, SpecialRegisters, VCPU_VERSION, VcpuState};
pub use virtio::{
    SocketFile, VIRTIO_BLOCK_VERSION, VIRTIO_NET_VERSION, VIRTIO_RNG_VERSION, VIRTIO_VSOCK_VERSION,
    VirtioBlockState, VirtioNetState, VirtioQueueState, VirtioRngState, VirtioState, VirtioTransportState,
    VirtioVsockState,
};
