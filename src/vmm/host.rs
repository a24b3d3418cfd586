//! What this host's KVM can do, found out once.

use std::sync::OnceLock;

use kvm_bindings::{KVM_CAP_SREGS2, KVM_CAP_TSC_CONTROL, KVM_CAP_XSAVE2, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::VmmError;
use super::pool::HugePool;
use super::x86::{clock, cpuid, msrs};
use crate::state::CpuidEntry;
use crate::sys::kvm_ext;

/// Where KVM keeps its real-mode TSS: three pages that are no RAM (KVM API 4.38).
const TSS_ADDRESS: usize = 0xfffb_d000;
/// Where KVM keeps its identity map: one page that is no RAM (KVM API 4.98).
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// Capabilities that a saved state relies on, by their names in `linux/kvm.h`.
pub const CAP_SREGS2: &str = "KVM_CAP_SREGS2";
/// The TSC offset attribute of a vCPU.
pub const CAP_TSC_OFFSET: &str = "KVM_VCPU_TSC_OFFSET";
/// The kvmclock with the realtime that belongs to it.
pub const CAP_CLOCK_REALTIME: &str = "KVM_CLOCK_REALTIME";

/// What a host offers to machines: all that preflight compares.
#[derive(Clone, Debug)]
pub struct HostAbilities {
    /// The CPUID table that guests get here.
    pub cpuid: Vec<CpuidEntry>,
    /// The MSRs that can be saved and restored here.
    pub msrs: Vec<u32>,
    /// The capabilities that a saved state may rely on, by name.
    pub capabilities: Vec<String>,
    /// Whether a guest's TSC can be scaled to another frequency (KVM_CAP_TSC_CONTROL).
    pub tsc_control: bool,
    /// The TSC of a guest that is not scaled, in kHz.
    pub tsc_khz: u32,
    /// Bytes of the XSAVE area.
    pub xsave_bytes: u32,
    /// KVM_CAP_MAX_VCPUS.
    pub max_vcpus: u32,
    /// MemAvailable of /proc/meminfo in bytes, at the time of asking.
    pub memory_available_bytes: u64,
    /// Huge pages, at the time of asking.
    pub huge_pages: HugePool,
}

impl HostAbilities {
    /// What this host can do. KVM is asked once in a process, with a machine that is thrown away;
    /// the available memory is read anew each time.
    pub fn of_this_host(kvm: &Kvm) -> Result<Self, VmmError> {
        static ONCE: OnceLock<HostAbilities> = OnceLock::new();
        let known = match ONCE.get() {
            Some(known) => known,
            None => {
                let probed = Self::probe(kvm)?;
                ONCE.get_or_init(|| probed)
            }
        };
        Ok(Self {
            memory_available_bytes: memory_available_bytes(),
            huge_pages: HugePool::of_this_host(),
            ..known.clone()
        })
    }

    fn probe(kvm: &Kvm) -> Result<Self, VmmError> {
        let vm = create_vm(kvm)?;
        let vcpu = vm.create_vcpu(0).map_err(VmmError::kvm("KVM_CREATE_VCPU"))?;
        let everything = cpuid::supported(kvm, true)?;
        set_cpuid(&vcpu, &cpuid::for_vcpu(&everything, 0, 1))?;
        let keep = msrs::can_be_restored(&vcpu, msrs::ARCH_CAPABILITIES);
        let table = cpuid::supported(kvm, keep)?;
        set_cpuid(&vcpu, &cpuid::for_vcpu(&table, 0, 1))?;
        let mut capabilities = Vec::new();
        let mut add = |there: bool, name: &str| {
            if there {
                capabilities.push(name.to_string());
            }
        };
        add(vm.check_extension_raw(u64::from(KVM_CAP_SREGS2)) > 0, CAP_SREGS2);
        add(kvm_ext::has_tsc_offset(&vcpu), CAP_TSC_OFFSET);
        add(clock::takes_realtime(&vm), CAP_CLOCK_REALTIME);
        Ok(Self {
            cpuid: table,
            msrs: msrs::probe(kvm, &vcpu)?,
            capabilities,
            tsc_control: kvm.check_extension_raw(u64::from(KVM_CAP_TSC_CONTROL)) > 0,
            tsc_khz: vcpu.get_tsc_khz().map_err(VmmError::kvm("KVM_GET_TSC_KHZ"))?,
            xsave_bytes: xsave_bytes(&vm),
            max_vcpus: kvm.get_max_vcpus() as u32,
            memory_available_bytes: 0,
            huge_pages: HugePool::default(),
        })
    }

    /// Whether a capability of those named here is there.
    pub fn has(&self, capability: &str) -> bool {
        self.capabilities.iter().any(|c| c == capability)
    }
}

/// Opens /dev/kvm and checks what every machine needs.
pub fn open_kvm() -> Result<Kvm, VmmError> {
    let kvm = Kvm::new().map_err(|e| VmmError::OpenKvm(std::io::Error::from_raw_os_error(e.errno())))?;
    for (cap, name) in [
        (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
        (Cap::Pit2, "KVM_CAP_PIT2"),
        (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
        (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
        (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
        (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
        (Cap::MpState, "KVM_CAP_MP_STATE"),
        (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
        (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
        (Cap::Xsave, "KVM_CAP_XSAVE"),
        (Cap::Xcrs, "KVM_CAP_XCRS"),
        (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
    ] {
        if !kvm.check_extension(cap) {
            return Err(VmmError::MissingCapability(name));
        }
    }
    Ok(kvm)
}

/// Makes a VM with what every machine has: TSS and identity map out of the way, in-kernel
/// interrupt controllers and PIT. No memory, no vCPU.
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, VmmError> {
    let vm = kvm.create_vm().map_err(VmmError::kvm("KVM_CREATE_VM"))?;
    vm.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(VmmError::kvm("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.set_tss_address(TSS_ADDRESS).map_err(VmmError::kvm("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip().map_err(VmmError::kvm("KVM_CREATE_IRQCHIP"))?;
    // Port 0x61 answers too: guests calibrate their clocks with it.
    let pit = kvm_pit_config { flags: kvm_bindings::KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(VmmError::kvm("KVM_CREATE_PIT2"))?;
    Ok(vm)
}

/// The size of the XSAVE area for vCPUs of `vm`: KVM_CAP_XSAVE2, at least 4096.
pub fn xsave_bytes(vm: &VmFd) -> u32 {
    vm.check_extension_raw(u64::from(KVM_CAP_XSAVE2)).max(4096) as u32
}

/// KVM_SET_CPUID2.
pub fn set_cpuid(vcpu: &VcpuFd, table: &[CpuidEntry]) -> Result<(), VmmError> {
    vcpu.set_cpuid2(&cpuid::to_kvm(table)?).map_err(VmmError::kvm("KVM_SET_CPUID2"))
}

/// MemAvailable in bytes; everything if /proc/meminfo does not tell.
fn memory_available_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok())
        .map_or(u64::MAX, |kib| kib * 1024)
}
