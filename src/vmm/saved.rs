//! A machine's saved state: put together from its sections, and checked as a whole before any of it
//! is used.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::VmmError;
use super::virtio::Kind;
use super::x86::irqchip::{self, Chips};
use super::x86::restore::{self, VcpuImage};
use super::x86::save::VcpuLayout;
use crate::state::{
    CLOCK_VERSION, ClockState, IRQCHIP_VERSION, IrqchipState, PIT_VERSION, PitState, SERIAL_VERSION, Section,
    SectionKind, SerialState, VCPU_VERSION, VcpuState, VirtioState, read_sections, write_sections,
};

/// What a machine has besides its vCPUs.
pub struct VmParts {
    pub irqchip: IrqchipState,
    pub pit: PitState,
    pub clock: ClockState,
    pub serial: SerialState,
    /// The virtio devices by slot.
    pub virtio: Vec<(Kind, VirtioState)>,
}

/// A saved state that has been checked in full.
pub struct CheckedState {
    pub vcpus: Vec<VcpuImage>,
    pub chips: Chips,
    pub pit: kvm_bindings::kvm_pit_state2,
    pub clock: ClockState,
    pub serial: SerialState,
    /// By slot.
    pub virtio: Vec<VirtioState>,
}

/// Writes the saved state: the vCPUs' sections and those of the machine.
pub fn write(mut sections: Vec<Section>, parts: &VmParts) -> Result<Vec<u8>, VmmError> {
    sections.push(section(SectionKind::Irqchip, IRQCHIP_VERSION, &parts.irqchip)?);
    sections.push(section(SectionKind::Pit, PIT_VERSION, &parts.pit)?);
    sections.push(section(SectionKind::Clock, CLOCK_VERSION, &parts.clock)?);
    sections.push(section(SectionKind::Serial, SERIAL_VERSION, &parts.serial)?);
    for (slot, (kind, state)) in (0..).zip(&parts.virtio) {
        let section = section(kind.section(), kind.version(), state)?;
        sections.push(Section { instance: slot, ..section });
    }
    Ok(write_sections(&sections))
}

fn section<T: Serialize>(kind: SectionKind, version: u32, value: &T) -> Result<Section, VmmError> {
    let body = serde_json::to_vec(value)
        .map_err(|e| VmmError::Content { section: kind.to_string(), reason: e.to_string() })?;
    Ok(Section { kind, instance: 0, version, body })
}

/// Reads and checks a saved state for a machine of `vcpus` vCPUs. Every section that the machine
/// has (`virtio` tells its virtio devices by slot) must be there, once, and no other.
pub fn check(
    bytes: &[u8],
    vcpus: u32,
    layout: &VcpuLayout,
    virtio: &[Kind],
) -> Result<CheckedState, VmmError> {
    let mut rest = read_sections(bytes)?;
    let mut images = Vec::new();
    for number in 0..vcpus {
        let state: VcpuState = take(&mut rest, SectionKind::Vcpu, number, VCPU_VERSION)?;
        images.push(restore::parse(number, &state, layout)?);
    }
    let irqchip: IrqchipState = take(&mut rest, SectionKind::Irqchip, 0, IRQCHIP_VERSION)?;
    let pit: PitState = take(&mut rest, SectionKind::Pit, 0, PIT_VERSION)?;
    let device = |(slot, kind): (u32, &Kind)| take(&mut rest, kind.section(), slot, kind.version());
    let virtio = (0..).zip(virtio).map(device).collect::<Result<_, _>>()?;
    let state = CheckedState {
        vcpus: images,
        chips: irqchip::parse(&irqchip)?,
        pit: irqchip::parse_pit(&pit)?,
        clock: take(&mut rest, SectionKind::Clock, 0, CLOCK_VERSION)?,
        serial: take(&mut rest, SectionKind::Serial, 0, SERIAL_VERSION)?,
        virtio,
    };
    match rest.first() {
        Some(extra) => Err(VmmError::ExtraSection(format!("{} {}", extra.kind, extra.instance))),
        None => Ok(state),
    }
}

/// Takes the section out of the list and reads its body.
fn take<T: DeserializeOwned>(
    sections: &mut Vec<Section>,
    kind: SectionKind,
    instance: u32,
    known: u32,
) -> Result<T, VmmError> {
    let name = format!("{kind} {instance}");
    let Some(at) = sections.iter().position(|s| s.kind == kind && s.instance == instance) else {
        return Err(VmmError::MissingSection(name));
    };
    let section = sections.swap_remove(at);
    if section.version != known {
        return Err(VmmError::SectionVersion { section: name, version: section.version, known });
    }
    serde_json::from_slice(&section.body)
        .map_err(|e| VmmError::Content { section: name, reason: e.to_string() })
}
