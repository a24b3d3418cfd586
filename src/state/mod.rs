//! What is saved of a machine and how it is written down: the description that preflight compares,
//! the container of sections, and one schema for each kind of section.
//!
//! Saved types are plain data, never the runtime types; everything that comes from a peer is
//! checked when it is read (D5, D6).

mod machine;
mod section;

pub use machine::{CpuidEntry, DeviceDescription, MachineDescription, Problem, TscFrequency};
pub use section::{MAX_STATE_BYTES, Section, SectionError, SectionKind, read_sections, write_sections};
