//! Saving, restoring, refusing.

use super::*;

#[test]
fn a_guest_goes_on_in_a_second_machine() {
    if !kvm_is_here() {
        return;
    }
    for vcpus in [1, 2, 4] {
        let began = Instant::now();
        let first = Guest::boot(vcpus, 64, "fill=16M ws=4M rate=5 kvmclock=1");
        let booted = began.elapsed();
        first.machine.run().unwrap();
        first.wait_for_beats();
        let paused = first.pause();
        let began = Instant::now();
        let state = first.export();
        let exported = began.elapsed();

        let began = Instant::now();
        let second = Guest::prepare(&first, None);
        let prepared = began.elapsed();
        first.copy_ram_to(&second);
        let bytes = state.len();
        let times = second.import(state).unwrap();
        assert_eq!(second.output(), "", "nothing goes out before the machine runs");
        second.machine.run().unwrap();
        second.wait_for_beats();
        let quiet = first.output();
        second.wait_for_beats();
        assert_eq!(first.output(), quiet, "a paused guest says nothing");
        let text = second.output();
        eprintln!(
            "{vcpus} vCPUs: boot {booted:?}, prepare {prepared:?}, pause {paused:?}, export {exported:?} ({bytes} bytes), {times:?}"
        );
        assert!(!text.contains("CORRUPT"), "{text}");
        second.pause();
        second.machine.stop();
        first.machine.run().unwrap();
        first.wait_for_beats();
        first.machine.stop();
    }
}

#[test]
fn a_state_that_is_not_right_is_refused_by_name() {
    if !kvm_is_here() {
        return;
    }
    let first = Guest::boot(2, 64, "fill=4M ws=1M");
    let state = first.export();
    let sections = read_sections(&state).unwrap();
    let second = Guest::prepare(&first, None);
    let refuse = |change: &dyn Fn(&mut Vec<crate::state::Section>), text: &str| {
        let mut changed = sections.clone();
        change(&mut changed);
        let error = second.import(write_sections(&changed)).unwrap_err().to_string();
        assert!(error.contains(text), "{error}\nshould contain {text}");
    };
    let replace = |at: usize, from: &'static str, to: &'static str| {
        move |s: &mut Vec<crate::state::Section>| {
            let text = String::from_utf8(s[at].body.clone()).unwrap();
            assert!(text.contains(from), "no {from} in section {at}");
            s[at].body = text.replacen(from, to, 1).into_bytes();
        }
    };
    assert!(second.import(state[..state.len() - 1].to_vec()).is_err());
    refuse(&|s| drop(s.remove(1)), "no section vcpu 1");
    refuse(&|s| s[1].instance = 7, "no section vcpu 1");
    refuse(&|s| s[0].version = 9, "vcpu 0: version 9");
    refuse(&|s| s[0].body = b"{}".to_vec(), "vcpu 0: missing field");
    refuse(&replace(1, "\"regs\":\"", "\"regs\":\"00"), "vcpu 1: regs has 145 bytes");
    refuse(&replace(1, "\"xsave\":\"7f", "\"xsave\":\""), "vcpu 1: xsave has");
    refuse(&replace(0, "\"mp_state\":", "\"mp_state\":9"), "vcpu 0: mp_state 9");
    refuse(&replace(0, "{\"index\":16,", "{\"index\":17,"), "vcpu 0: msrs");
    refuse(&replace(2, "\"ioapic\":\"02", "\"ioapic\":\"01"), "irqchip: ioapic");
    refuse(&replace(4, "\"kvmclock_ns\"", "\"clock\""), "clock 0: unknown field");
    // The machine itself is still good for the right state.
    first.copy_ram_to(&second);
    second.import(state).unwrap();
    second.machine.run().unwrap();
    second.wait_for_beats();
}

#[test]
fn a_refused_msr_is_named() {
    if !kvm_is_here() {
        return;
    }
    let first = Guest::boot(1, 64, "fill=4M ws=1M");
    let mut sections = read_sections(&first.export()).unwrap();
    let mut state: crate::state::VcpuState = serde_json::from_slice(&sections[0].body).unwrap();
    // The address of the system call entry, not canonical.
    state.msrs.iter_mut().find(|m| m.index == 0xc000_0082).unwrap().value = 1 << 63;
    sections[0].body = serde_json::to_vec(&state).unwrap();
    let second = Guest::prepare(&first, None);
    let error = second.import(write_sections(&sections)).unwrap_err().to_string();
    assert!(error.contains("vCPU 0") && error.contains("LSTAR (0xc0000082)"), "{error}");
}

#[test]
fn the_guests_clocks_advance_by_the_downtime() {
    if !kvm_is_here() {
        return;
    }
    let clocks = |state: &[u8]| {
        let sections = read_sections(state).unwrap();
        let vcpu: crate::state::VcpuState = serde_json::from_slice(&sections[0].body).unwrap();
        let clock: crate::state::ClockState = serde_json::from_slice(&sections[3].body).unwrap();
        let tsc = vcpu.msrs.iter().find(|m| m.index == 0x10).unwrap().value;
        (tsc * 1000 / u64::from(vcpu.tsc_khz), clock.kvmclock_ns / 1000)
    };
    let first = Guest::boot(1, 64, "fill=4M ws=1M kvmclock=1");
    first.machine.run().unwrap();
    first.wait_for_beats();
    first.pause();
    let before = Instant::now();
    let state = first.export();
    let between = Instant::now();
    let (tsc_then_us, kvmclock_then_us) = clocks(&state);
    let second = Guest::prepare(&first, None);
    first.copy_ram_to(&second);
    second.import(state).unwrap();
    second.machine.run().unwrap();
    second.wait_for_beats();
    second.pause();
    let least = between.elapsed().as_micros() as i64;
    let (tsc_us, kvmclock_us) = clocks(&second.export());
    let most = before.elapsed().as_micros() as i64;
    // CLOCK_REALTIME, which counts the downtime, may be slewed a little meanwhile.
    let possible = least - 1000..=most + 1000;
    let (tsc, kvmclock) = (tsc_us as i64 - tsc_then_us as i64, kvmclock_us as i64 - kvmclock_then_us as i64);
    eprintln!("downtime and run {least} to {most} us; TSC {tsc} us, kvmclock {kvmclock} us");
    assert!(possible.contains(&tsc), "TSC: {tsc} us, not in {possible:?}");
    assert!(possible.contains(&kvmclock), "kvmclock: {kvmclock} us, not in {possible:?}");
}

// PVCLOCK_GUEST_STOPPED (Documentation/virt/kvm/x86/msr.rst): bit 1 of the flags, byte 29 of what a vCPU shares.
#[test]
fn the_guest_is_told_that_it_was_stopped() {
    if !kvm_is_here() {
        return;
    }
    let told = |guest: &Guest| {
        let sections = read_sections(&guest.export()).unwrap();
        let vcpu: crate::state::VcpuState = serde_json::from_slice(&sections[0].body).unwrap();
        let clock = vcpu.msrs.iter().find(|m| m.index == 0x4b56_4d01).unwrap().value;
        assert_eq!(clock & 1, 1, "the guest uses kvmclock");
        let mut flags = [0];
        guest.machine.ram().read(GuestPhysAddr((clock & !1) + 29), &mut flags).unwrap();
        flags[0] & 2 != 0
    };
    let first = Guest::boot(1, 64, "fill=4M ws=1M kvmclock=1");
    first.machine.run().unwrap();
    first.wait_for_beats();
    first.pause();
    assert!(!told(&first), "nobody has stopped it before");
    let second = Guest::prepare(&first, None);
    first.copy_ram_to(&second);
    second.import(first.export()).unwrap();
    for guest in [&second, &first] {
        guest.machine.run().unwrap();
        guest.wait_for_beats();
        guest.pause();
        assert!(told(guest));
    }
}

#[test]
#[cfg(feature = "fault-points")]
fn a_fault_point_fails_where_it_says() {
    if !kvm_is_here() {
        return;
    }
    let first = Guest::boot(2, 64, "fill=4M ws=1M");
    let state = first.export();
    for (fault, text) in [
        ("import:serial", "serial: refused on purpose"),
        ("vcpu:1:lapic", "vCPU 1: KVM_SET_LAPIC"),
        ("vcpu:0:xcrs", "vCPU 0: KVM_SET_XCRS"),
    ] {
        let error = Guest::prepare(&first, Some(fault)).import(state.clone()).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
}

#[test]
fn a_guest_moves_there_and_back_under_load() {
    if !kvm_is_here() {
        return;
    }
    let mut here = Guest::boot(4, 64, "fill=32M ws=16M rate=0 kvmclock=1");
    here.machine.run().unwrap();
    for _ in 0..10 {
        here.wait_for_beats();
        here.pause();
        let there = Guest::prepare(&here, None);
        here.copy_ram_to(&there);
        there.import(here.export()).unwrap();
        there.machine.run().unwrap();
        here = there;
    }
    here.wait_for_beats();
}

#[test]
fn prepare_says_everything_that_is_missing() {
    if !kvm_is_here() {
        return;
    }
    let first = Guest::boot(1, 64, "fill=4M ws=1M");
    let mut desc = first.machine.describe().clone();
    desc.vcpus = 100_000;
    desc.msrs.push(0x1234_5678);
    desc.devices[3].kind = "teapot".into();
    let (sender, _notices) = NoticeSender::channel().unwrap();
    let remaps = [("disk0".to_string(), "x".to_string()), ("serial0".into(), "tin can".into())].into();
    let local = LocalConfig { remaps, ..Default::default() };
    let Err(PrepareError::Refused(problems)) = Machine::prepare(&desc, local, sender) else {
        panic!("it should be refused")
    };
    for text in ["100000 vCPUs", "0x12345678", "teapot", "disk0", "tin can"] {
        assert!(problems.iter().any(|p| p.text.contains(text)), "{text} in {problems:?}");
    }
}
