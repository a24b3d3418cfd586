//! Putting a saved vCPU into KVM: first all of it is checked, then every group is set, and every
//! refusal is an error that names the group or the MSR.

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_sregs2, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;

use super::clock::TscRule;
use super::msrs::Turn;
use super::save::{MSRS_AT_ONCE, VcpuLayout};
use super::{cpuid, msrs};
use crate::state::{CpuidEntry, HexBytes, MsrValue, SpecialRegisters, VcpuState};
use crate::sys::{kvm_ext, pod};
use crate::vmm::VmmError;
use crate::vmm::error::IoError;

/// A saved vCPU in the kernel's form. Built only by [`parse`].
#[derive(Clone)]
pub struct VcpuImage {
    number: u32,
    cpuid: Vec<CpuidEntry>,
    tsc_khz: u32,
    tsc_offset: Option<u64>,
    regs: kvm_regs,
    sregs: SregsImage,
    xcrs: kvm_xcrs,
    xsave: Vec<u8>,
    debugregs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<MsrValue>,
    events: kvm_vcpu_events,
    mp_state: u32,
}

#[derive(Clone)]
enum SregsImage {
    One(kvm_sregs),
    Two(kvm_sregs2),
}

/// Checks a saved vCPU against the machine that it belongs to: exact lengths, the MSRs that the
/// description announced and no other, the same kinds of registers.
pub fn parse(number: u32, state: &VcpuState, layout: &VcpuLayout) -> Result<VcpuImage, VmmError> {
    let check = Checker { number };
    let sregs = match (&state.sregs, layout.sregs2) {
        (SpecialRegisters::Sregs(raw), false) => SregsImage::One(check.exact("sregs", raw)?),
        (SpecialRegisters::Sregs2(raw), true) => SregsImage::Two(check.exact("sregs2", raw)?),
        _ => return check.refuse("sregs are of the other kind than the machine's description says"),
    };
    if state.xsave.0.len() != layout.xsave_bytes as usize {
        let (have, want) = (state.xsave.0.len(), layout.xsave_bytes);
        return check.refuse(format!("xsave has {have} bytes, the machine's has {want}"));
    }
    if state.tsc_offset.is_some() != layout.tsc_offset {
        return check.refuse("tsc_offset is not as the machine's description says");
    }
    if state.cpuid.len() > cpuid::MAX_ENTRIES {
        return check.refuse("cpuid has more entries than KVM takes");
    }
    let mut indices: Vec<u32> = state.msrs.iter().map(|m| m.index).collect();
    indices.sort_unstable();
    if indices != layout.msrs {
        return check.refuse("msrs are not those that the machine's description lists");
    }
    if ![
        KVM_MP_STATE_RUNNABLE,
        KVM_MP_STATE_UNINITIALIZED,
        KVM_MP_STATE_INIT_RECEIVED,
        KVM_MP_STATE_HALTED,
        KVM_MP_STATE_SIPI_RECEIVED,
    ]
    .contains(&state.mp_state)
    {
        return check.refuse(format!("mp_state {} is not known", state.mp_state));
    }
    Ok(VcpuImage {
        number,
        cpuid: state.cpuid.clone(),
        tsc_khz: state.tsc_khz,
        tsc_offset: state.tsc_offset,
        regs: check.exact("regs", &state.regs)?,
        sregs,
        xcrs: check.exact("xcrs", &state.xcrs)?,
        xsave: state.xsave.0.clone(),
        debugregs: check.exact("debugregs", &state.debugregs)?,
        lapic: check.exact("lapic", &state.lapic)?,
        msrs: state.msrs.clone(),
        events: check.exact("events", &state.events)?,
        mp_state: state.mp_state,
    })
}

struct Checker {
    number: u32,
}

impl Checker {
    fn refuse<T>(&self, reason: impl Into<String>) -> Result<T, VmmError> {
        Err(VmmError::Content { section: format!("vcpu {}", self.number), reason: reason.into() })
    }

    fn exact<T: pod::Pod>(&self, name: &str, raw: &HexBytes) -> Result<T, VmmError> {
        match pod::from_bytes(&raw.0) {
            Some(value) => Ok(value),
            None => {
                let (have, want) = (raw.0.len(), std::mem::size_of::<T>());
                self.refuse(format!("{name} has {have} bytes, it should have {want}"))
            }
        }
    }
}

impl VcpuImage {
    /// Sets everything, on the thread that runs the vCPU.
    ///
    /// The order matters: CPUID first, since it decides what the rest may hold; special registers
    /// before MSRs; the local APIC after the APIC base, which the special registers hold; the TSC
    /// before its deadline, which needs the APIC too; events after the general registers, which
    /// clear a pending exception; the MP state last. MSRs such as kvmclock's or steal time's touch
    /// guest RAM: with RAM that is still elsewhere this blocks until the page has come.
    pub fn restore(&self, vcpu: &VcpuFd, tsc: &TscRule, trap: &FaultTrap) -> Result<(), VmmError> {
        let put = Setter { number: self.number, trap };
        let table = cpuid::to_kvm(&self.cpuid)?;
        put.set("KVM_SET_CPUID2", || vcpu.set_cpuid2(&table))?;
        self.set_frequency(vcpu, &put)?;
        match &self.sregs {
            SregsImage::One(sregs) => put.set("KVM_SET_SREGS", || vcpu.set_sregs(sregs))?,
            SregsImage::Two(sregs) => put.set("KVM_SET_SREGS2", || kvm_ext::set_sregs2(vcpu, sregs))?,
        }
        put.set("KVM_SET_XCRS", || vcpu.set_xcrs(&self.xcrs))?;
        let bytes = self.xsave.len();
        put.set("KVM_SET_XSAVE", || kvm_ext::set_xsave(vcpu, &self.xsave, bytes))?;
        let turn = |wanted| self.msrs.iter().filter(move |m| msrs::turn(m.index) == wanted).copied();
        put.msrs(vcpu, turn(Turn::Early))?;
        put.set("KVM_SET_LAPIC", || vcpu.set_lapic(&self.lapic))?;
        match (self.tsc_offset, tsc.offset_change) {
            (Some(offset), Some(change)) => {
                let offset = offset.wrapping_add(change);
                put.set("KVM_SET_DEVICE_ATTR(TSC_OFFSET)", || kvm_ext::set_tsc_offset(vcpu, offset))?;
            }
            _ => put.msrs(
                vcpu,
                turn(Turn::Tsc).map(|m| MsrValue { value: m.value.wrapping_add(tsc.elapsed_ticks), ..m }),
            )?,
        }
        put.msrs(vcpu, turn(Turn::Deadline))?;
        put.set("KVM_SET_DEBUGREGS", || vcpu.set_debug_regs(&self.debugregs))?;
        put.set("KVM_SET_REGS", || vcpu.set_regs(&self.regs))?;
        put.set("KVM_SET_VCPU_EVENTS", || vcpu.set_vcpu_events(&self.events))?;
        let mp_state = kvm_mp_state { mp_state: self.mp_state };
        put.set("KVM_SET_MP_STATE", || vcpu.set_mp_state(mp_state))
    }

    /// Scales the TSC where it differs from this host's (preflight has seen that it can, or that
    /// the difference does not matter).
    fn set_frequency(&self, vcpu: &VcpuFd, put: &Setter<'_>) -> Result<(), VmmError> {
        let here = vcpu.get_tsc_khz().unwrap_or(0);
        if here == self.tsc_khz {
            return Ok(());
        }
        match vcpu.set_tsc_khz(self.tsc_khz) {
            Ok(()) => Ok(()),
            Err(_) if u64::from(here.abs_diff(self.tsc_khz)) * 4000 <= u64::from(here) => Ok(()),
            Err(e) => put.set("KVM_SET_TSC_KHZ", || Err::<(), _>(e)),
        }
    }
}

/// Where a drill makes one group fail: the text after `vcpu:N:` of the fault point. Always empty in
/// builds without the feature `fault-points`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FaultTrap {
    /// The vCPU and the part of the group's name to refuse.
    pub point: Option<(u32, String)>,
}

struct Setter<'a> {
    number: u32,
    trap: &'a FaultTrap,
}

impl Setter<'_> {
    fn set<E: Into<IoError>>(
        &self,
        group: &str,
        call: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), VmmError> {
        if let Some((vcpu, part)) = &self.trap.point
            && *vcpu == self.number
            && group.to_lowercase().contains(part.as_str())
        {
            return Err(self.error(group, IoError(std::io::Error::from_raw_os_error(libc::EINVAL))));
        }
        call().map_err(|e| self.error(group, e.into()))
    }

    fn error(&self, group: &str, source: IoError) -> VmmError {
        VmmError::Vcpu { vcpu: self.number, group: group.into(), source: source.0 }
    }

    /// KVM_SET_MSRS (KVM API 4.19) stops at the first MSR that it refuses, and says how many it set.
    fn msrs(&self, vcpu: &VcpuFd, values: impl Iterator<Item = MsrValue>) -> Result<(), VmmError> {
        let entries: Vec<_> =
            values.map(|m| kvm_msr_entry { index: m.index, data: m.value, ..Default::default() }).collect();
        for some in entries.chunks(MSRS_AT_ONCE) {
            let list = Msrs::from_entries(some).expect("fewer than KVM_MAX_MSR_ENTRIES");
            let mut done = some.len();
            self.set("KVM_SET_MSRS", || {
                done = vcpu.set_msrs(&list)?;
                Ok::<_, kvm_ioctls::Error>(())
            })?;
            if let Some(refused) = some.get(done) {
                let group = format!(
                    "KVM_SET_MSRS: MSR {} refuses the value {:#x}",
                    msrs::name(refused.index),
                    refused.data
                );
                return Err(self.error(&group, IoError(std::io::Error::from_raw_os_error(libc::EINVAL))));
            }
        }
        Ok(())
    }
}
