//! Pausing, also when a vCPU waits for what does not come.

use super::*;

#[test]
fn export_needs_a_paused_machine_and_pausing_twice_is_answered_twice() {
    if !kvm_is_here() {
        return;
    }
    let guest = Guest::boot(1, 64, "fill=4M ws=1M");
    guest.machine.run().unwrap();
    guest.machine.request_export();
    assert!(matches!(guest.notice(), Notice::Exported(Err(VmmError::WrongState(_)))));
    guest.pause();
    guest.pause();
    guest.machine.run().unwrap();
    guest.pause();
}

/// A userfaultfd over all RAM of a machine, which nobody serves.
fn hold_all_pages(machine: &Machine) -> userfaultfd::Uffd {
    let uffd = userfaultfd::UffdBuilder::new().user_mode_only(false).non_blocking(true).create().unwrap();
    let ram = machine.ram();
    for (region, address) in ram.map().regions().iter().zip(ram.addresses()) {
        uffd.register(address.0 as *mut _, region.bytes as usize).unwrap();
    }
    uffd
}

#[test]
fn a_page_that_never_comes_holds_up_only_the_import() {
    if !kvm_is_here() {
        return;
    }
    // Where the guest uses kvmclock, setting its MSR needs a page of its RAM.
    let first = Guest::boot(2, 64, "fill=4M ws=1M kvmclock=1");
    first.machine.run().unwrap();
    first.wait_for_beats();
    first.pause();
    let state = first.export();
    let second = Guest::prepare(&first, None);
    let uffd = hold_all_pages(&second.machine);
    let began = Instant::now();
    second.machine.request_import(state.clone());
    let fault = loop {
        // The event comes as soon as a vCPU thread needs the page.
        match uffd.read_event().unwrap() {
            Some(event) => break event,
            None => assert!(began.elapsed() < PATIENCE, "no fault"),
        }
    };
    let began = Instant::now();
    assert!(matches!(second.machine.run(), Err(VmmError::WrongState("being imported"))));
    second.machine.request_pause();
    assert!(matches!(second.notice(), Notice::Paused));
    second.machine.request_import(state);
    assert!(matches!(second.notice(), Notice::Synchronised(Err(VmmError::WrongState("being imported")))));
    assert!(matches!(second.machine.dirty_start(), Err(VmmError::WrongState("being imported"))));
    assert!(began.elapsed() < Duration::from_millis(100), "{:?}", began.elapsed());
    assert!(second.notices.receiver.try_recv().is_err(), "still importing");
    drop(fault);
    let began = Instant::now();
    second.machine.stop();
    assert!(began.elapsed() < Duration::from_secs(3));
}

#[test]
fn a_vcpu_in_a_page_fault_pauses_or_is_left_behind() {
    if !kvm_is_here() {
        return;
    }
    let first = Guest::boot(1, 64, "fill=4M ws=1M");
    first.machine.run().unwrap();
    first.wait_for_beats();
    first.pause();
    let second = Guest::prepare(&first, None);
    let uffd = hold_all_pages(&second.machine);
    second.import(first.export()).unwrap();
    second.machine.run().unwrap();
    let began = Instant::now();
    while uffd.read_event().unwrap().is_none() {
        assert!(began.elapsed() < PATIENCE, "no fault");
    }
    second.machine.request_pause();
    // Which of the two depends on where in KVM the fault is taken.
    let paused = second.notices.receiver.recv_timeout(Duration::from_millis(300));
    eprintln!("a pause with a vCPU in a page fault: {paused:?}");
    let began = Instant::now();
    second.machine.stop();
    eprintln!("the end with a vCPU in a page fault took {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(3));
}

#[test]
fn a_spinning_vcpu_is_paused_at_once() {
    if !kvm_is_here() {
        return;
    }
    // The guest's first vCPU spins in ring 0; the second waits for an IPI that never comes.
    let guest = Guest::boot_code(2, &[0xeb, 0xfe]);
    let mut worst = Duration::ZERO;
    for _ in 0..50 {
        guest.machine.run().unwrap();
        worst = worst.max(guest.pause());
    }
    eprintln!("worst of 50 pauses of a spinning vCPU: {worst:?}");
    guest.machine.run().unwrap();
    guest.machine.stop();
}
