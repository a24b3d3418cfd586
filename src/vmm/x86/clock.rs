//! The guest's clocks: kvmclock and the TSC, so that guest time advances by the downtime.
//!
//! The algorithm is that of Documentation/virt/kvm/devices/vcpu.rst, section 4.1: kvmclock is set
//! with the realtime of its reading, so that KVM adds what has passed; then each TSC offset is
//! chosen so that "TSC at kvmclock 0" is the same number as on the source.

use std::time::{SystemTime, UNIX_EPOCH};

use kvm_bindings::{KVM_CAP_ADJUST_CLOCK, KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::VmFd;

use crate::state::ClockState;
use crate::vmm::VmmError;

/// Whether KVM_SET_CLOCK takes the realtime: KVM_CAP_ADJUST_CLOCK is the set of flags that it knows.
pub fn takes_realtime(vm: &VmFd) -> bool {
    vm.check_extension_raw(u64::from(KVM_CAP_ADJUST_CLOCK)) & KVM_CLOCK_REALTIME as i32 != 0
}

/// KVM_GET_CLOCK (KVM API 4.29).
pub fn save(vm: &VmFd) -> Result<ClockState, VmmError> {
    let raw = vm.get_clock().map_err(VmmError::kvm("KVM_GET_CLOCK"))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
    Ok(state(&raw, takes_realtime(vm).then_some(now)))
}

/// KVM tells the realtime only where kvmclock follows the host's TSC. Elsewhere `now`, read at the same moment, serves: a
/// guest's time would stand still while it is moved without it.
fn state(raw: &kvm_clock_data, now: Option<u64>) -> ClockState {
    ClockState {
        kvmclock_ns: raw.clock,
        realtime_ns: if raw.flags & KVM_CLOCK_REALTIME != 0 { Some(raw.realtime) } else { now },
        host_tsc: (raw.flags & KVM_CLOCK_HOST_TSC != 0).then_some(raw.host_tsc),
    }
}

/// KVM_SET_CLOCK (KVM API 4.30), with KVM_CLOCK_REALTIME if the saved clock has it: then KVM adds
/// the realtime that has passed since. Gives what the clock is now, for [`TscRule`].
pub fn restore(vm: &VmFd, saved: &ClockState) -> Result<ClockState, VmmError> {
    let mut raw = kvm_clock_data { clock: saved.kvmclock_ns, ..Default::default() };
    if let Some(realtime) = saved.realtime_ns {
        raw.realtime = realtime;
        raw.flags = KVM_CLOCK_REALTIME;
    }
    vm.set_clock(&raw).map_err(VmmError::kvm("KVM_SET_CLOCK"))?;
    save(vm)
}

/// How the TSC of each vCPU is restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscRule {
    /// Added to each saved TSC offset, where both hosts told their TSC with the clock.
    pub offset_change: Option<u64>,
    /// Guest ticks that passed since the save by kvmclock; added to the TSC's own value, for
    /// kernels without the offset.
    pub elapsed_ticks: u64,
}

/// The rule for a guest whose clock was `source` at the save and is `dest` now, with a TSC of `khz`.
pub fn tsc_rule(source: &ClockState, dest: &ClockState, khz: u32) -> TscRule {
    // Guest nanoseconds since the save; negative when the clock could not be advanced.
    let passed_ns = i128::from(dest.kvmclock_ns) - i128::from(source.kvmclock_ns);
    let passed_ticks = passed_ns * i128::from(khz) / 1_000_000;
    let offset_change = match (source.host_tsc, dest.host_tsc) {
        (Some(there), Some(here)) => {
            // ofs_dst = ofs_src - (guest_src - guest_dest) * freq + (tsc_src - tsc_dest)
            Some((passed_ticks + i128::from(there) - i128::from(here)) as u64)
        }
        _ => None,
    };
    TscRule { offset_change, elapsed_ticks: passed_ticks.max(0) as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clock(kvmclock_ns: u64, host_tsc: Option<u64>) -> ClockState {
        ClockState { kvmclock_ns, realtime_ns: None, host_tsc }
    }

    #[test]
    fn the_guests_tsc_advances_by_what_kvmclock_did() {
        // 2 GHz; the guest's TSC was host + 1000 = 6000; 1 ms passed; the other host's TSC is at 100.
        let rule = tsc_rule(&clock(50, Some(5000)), &clock(1_000_050, Some(100)), 2_000_000);
        assert_eq!(rule.elapsed_ticks, 2_000_000);
        let offset = 1000u64.wrapping_add(rule.offset_change.unwrap());
        assert_eq!(offset.wrapping_add(100), 6000 + 2_000_000);
    }

    #[test]
    fn the_realtime_is_kvms_own_or_that_of_the_moment() {
        let raw = |flags| kvm_clock_data { clock: 5, flags, realtime: 70, host_tsc: 9, ..Default::default() };
        let own = state(&raw(KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC), Some(80));
        assert_eq!(own, ClockState { kvmclock_ns: 5, realtime_ns: Some(70), host_tsc: Some(9) });
        assert_eq!(
            state(&raw(0), Some(80)),
            ClockState { kvmclock_ns: 5, realtime_ns: Some(80), host_tsc: None }
        );
        // A kernel that cannot set it has no use for it.
        assert_eq!(state(&raw(0), None).realtime_ns, None);
    }

    #[test]
    fn without_host_tscs_only_the_elapsed_time_is_known() {
        let rule = tsc_rule(&clock(1_000_000, None), &clock(0, Some(7)), 2_000_000);
        assert_eq!(rule, TscRule { offset_change: None, elapsed_ticks: 0 });
    }
}
