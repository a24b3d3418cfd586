//! The in-kernel interrupt controllers and timer, saved and restored.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;

use crate::state::{HexBytes, IrqchipState, PitState};
use crate::sys::pod;
use crate::vmm::VmmError;

/// KVM_GET_IRQCHIP for each chip (KVM API 4.26).
pub fn save(vm: &VmFd) -> Result<IrqchipState, VmmError> {
    let chip = |chip_id| {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).map_err(VmmError::kvm("KVM_GET_IRQCHIP"))?;
        Ok::<_, VmmError>(HexBytes(pod::to_bytes(&chip)))
    };
    Ok(IrqchipState {
        pic_master: chip(KVM_IRQCHIP_PIC_MASTER)?,
        pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE)?,
        ioapic: chip(KVM_IRQCHIP_IOAPIC)?,
    })
}

/// The chips of a saved state, checked and in the kernel's form.
pub struct Chips([kvm_irqchip; 3]);

/// Checks that each chip has its length and its number.
pub fn parse(state: &IrqchipState) -> Result<Chips, VmmError> {
    let chip = |name: &str, bytes: &HexBytes, id: u32| {
        let chip = pod::from_bytes::<kvm_irqchip>(&bytes.0).filter(|chip| chip.chip_id == id);
        chip.ok_or_else(|| VmmError::Content {
            section: "irqchip".into(),
            reason: format!("{name} has {} bytes or another chip's number", bytes.0.len()),
        })
    };
    Ok(Chips([
        chip("pic_master", &state.pic_master, KVM_IRQCHIP_PIC_MASTER)?,
        chip("pic_slave", &state.pic_slave, KVM_IRQCHIP_PIC_SLAVE)?,
        chip("ioapic", &state.ioapic, KVM_IRQCHIP_IOAPIC)?,
    ]))
}

/// KVM_SET_IRQCHIP for each chip (KVM API 4.27).
pub fn restore(vm: &VmFd, chips: &Chips) -> Result<(), VmmError> {
    for chip in &chips.0 {
        vm.set_irqchip(chip).map_err(VmmError::kvm("KVM_SET_IRQCHIP"))?;
    }
    Ok(())
}

/// KVM_GET_PIT2 (KVM API 4.71).
pub fn save_pit(vm: &VmFd) -> Result<PitState, VmmError> {
    let state = vm.get_pit2().map_err(VmmError::kvm("KVM_GET_PIT2"))?;
    Ok(PitState { pit2: HexBytes(pod::to_bytes(&state)) })
}

/// Checks the length.
pub fn parse_pit(state: &PitState) -> Result<kvm_pit_state2, VmmError> {
    pod::from_bytes(&state.pit2.0).ok_or_else(|| VmmError::Content {
        section: "pit".into(),
        reason: format!("pit2 has {} bytes", state.pit2.0.len()),
    })
}

/// KVM_SET_PIT2 (KVM API 4.72).
pub fn restore_pit(vm: &VmFd, state: &kvm_pit_state2) -> Result<(), VmmError> {
    vm.set_pit2(state).map_err(VmmError::kvm("KVM_SET_PIT2"))
}
