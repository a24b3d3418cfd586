//! Reading the whole state of a vCPU out of KVM.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::{cpuid, msrs};
use crate::state::{HexBytes, MsrValue, SpecialRegisters, VcpuState};
use crate::sys::{kvm_ext, pod};
use crate::vmm::VmmError;
use crate::vmm::error::IoError;

/// What saving and restoring a vCPU has to know about its machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VcpuLayout {
    /// The MSRs that are saved.
    pub msrs: Vec<u32>,
    /// Bytes of the XSAVE area.
    pub xsave_bytes: u32,
    /// Whether SREGS2 is used.
    pub sregs2: bool,
    /// Whether the TSC offset is used.
    pub tsc_offset: bool,
}

/// The most MSRs that one ioctl takes.
pub(super) const MSRS_AT_ONCE: usize = 255;

/// Reads everything. The vCPU is out of KVM_RUN, with its last I/O completed.
///
/// The order matters. KVM_GET_MP_STATE accepts pending INIT and SIPI, which changes registers: it is
/// first. KVM_GET_VCPU_EVENTS is last, since what is read before may change what is pending.
pub fn save(number: u32, vcpu: &VcpuFd, layout: &VcpuLayout) -> Result<VcpuState, VmmError> {
    let at = Reader { number };
    let mp_state = at.get("KVM_GET_MP_STATE", vcpu.get_mp_state())?.mp_state;
    let regs = pod::to_bytes(&at.get("KVM_GET_REGS", vcpu.get_regs())?);
    let sregs = match layout.sregs2 {
        true => SpecialRegisters::Sregs2(HexBytes(pod::to_bytes(
            &at.get("KVM_GET_SREGS2", kvm_ext::get_sregs2(vcpu))?,
        ))),
        false => {
            SpecialRegisters::Sregs(HexBytes(pod::to_bytes(&at.get("KVM_GET_SREGS", vcpu.get_sregs())?)))
        }
    };
    let xsave = at.get("KVM_GET_XSAVE2", kvm_ext::get_xsave(vcpu, layout.xsave_bytes as usize))?;
    let xcrs = pod::to_bytes(&at.get("KVM_GET_XCRS", vcpu.get_xcrs())?);
    let debugregs = pod::to_bytes(&at.get("KVM_GET_DEBUGREGS", vcpu.get_debug_regs())?);
    let lapic = pod::to_bytes(&at.get("KVM_GET_LAPIC", vcpu.get_lapic())?);
    let tsc_khz = at.get("KVM_GET_TSC_KHZ", vcpu.get_tsc_khz())?;
    let tsc_offset = match layout.tsc_offset {
        true => Some(at.get("KVM_GET_DEVICE_ATTR(TSC_OFFSET)", kvm_ext::get_tsc_offset(vcpu))?),
        false => None,
    };
    let msrs = at.msrs(vcpu, &layout.msrs)?;
    let table = at.get("KVM_GET_CPUID2", vcpu.get_cpuid2(cpuid::MAX_ENTRIES))?;
    let events = pod::to_bytes(&at.get("KVM_GET_VCPU_EVENTS", vcpu.get_vcpu_events())?);
    Ok(VcpuState {
        cpuid: table.as_slice().iter().map(cpuid::from_kvm).collect(),
        tsc_khz,
        tsc_offset,
        regs: HexBytes(regs),
        sregs,
        xcrs: HexBytes(xcrs),
        xsave: HexBytes(xsave),
        debugregs: HexBytes(debugregs),
        lapic: HexBytes(lapic),
        msrs,
        events: HexBytes(events),
        mp_state,
    })
}

struct Reader {
    number: u32,
}

impl Reader {
    fn get<T, E: Into<IoError>>(&self, group: &str, result: Result<T, E>) -> Result<T, VmmError> {
        result.map_err(|e| VmmError::Vcpu { vcpu: self.number, group: group.into(), source: e.into().0 })
    }

    fn msrs(&self, vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<MsrValue>, VmmError> {
        let mut out = Vec::with_capacity(indices.len());
        for some in indices.chunks(MSRS_AT_ONCE) {
            let entries: Vec<_> =
                some.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
            let mut list = Msrs::from_entries(&entries).expect("fewer than KVM_MAX_MSR_ENTRIES");
            let got = self.get("KVM_GET_MSRS", vcpu.get_msrs(&mut list))?;
            if let Some(&refused) = some.get(got) {
                let group = format!("KVM_GET_MSRS: MSR {}", msrs::name(refused));
                return self.get(&group, Err(kvm_ioctls::Error::new(libc::EINVAL)));
            }
            out.extend(list.as_slice().iter().map(|e| MsrValue { index: e.index, value: e.data }));
        }
        Ok(out)
    }
}
