//! A real guest on a real KVM: booted, paused, saved, restored into a second machine.

use std::time::{Duration, Instant};

use super::*;
use crate::memory::{GuestPhysAddr, PAGE_BYTES, PageIndex};
use crate::state::{read_sections, write_sections};
use crate::vmm::boot::{test_bzimage, test_elf};
use crate::vmm::notice::NoticeReceiver;
use crate::vmm::{GuestExit, Notice};

/// How long a test waits for what should come at once.
const PATIENCE: Duration = Duration::from_secs(20);

/// Whether KVM is here. Without it tests are skipped, said aloud, unless `REQUIRE_KVM` is set.
fn kvm_is_here() -> bool {
    match host::open_kvm() {
        Ok(_) => true,
        Err(e) if std::env::var_os("REQUIRE_KVM").is_some_and(|v| v == "1") => panic!("{e}"),
        Err(e) => {
            eprintln!("skipped: {e}");
            false
        }
    }
}

/// A machine with its notices and its serial output.
struct Guest {
    machine: Machine,
    notices: NoticeReceiver,
    serial: PathBuf,
    _directory: tempfile::TempDir,
}

impl Guest {
    fn boot(vcpus: u32, mib: u64, cmdline: &str) -> Self {
        Self::boot_kernel(vcpus, mib, KernelSource::Builtin("heartbeat".into()), cmdline)
    }

    /// A guest of `code` in ring 0, 32-bit, at 1 MiB.
    fn boot_code(vcpus: u32, code: &[u8]) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), test_elf(code, 0x1000, true)).unwrap();
        Self::boot_kernel(vcpus, 16, KernelSource::File(file.path().into()), "")
    }

    fn boot_kernel(vcpus: u32, mib: u64, kernel: KernelSource, cmdline: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let serial = directory.path().join("serial");
        let (sender, notices) = NoticeSender::channel().unwrap();
        let config = MachineConfig {
            name: "test".into(),
            uuid: "0".into(),
            memory_bytes: mib << 20,
            vcpus,
            kernel,
            initrd: None,
            cmdline: cmdline.into(),
            serial: SerialBackend::File(serial.clone()),
        };
        let machine = Machine::boot(&config, sender).unwrap();
        Self { machine, notices, serial, _directory: directory }
    }

    /// An empty machine like `other`.
    fn prepare(other: &Guest, fault: Option<&str>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let serial = directory.path().join("serial");
        let (sender, notices) = NoticeSender::channel().unwrap();
        let mut local = LocalConfig { serial: SerialBackend::File(serial.clone()), ..Default::default() };
        set_fault(&mut local, fault);
        let machine = Machine::prepare(other.machine.describe(), local, sender).unwrap();
        Self { machine, notices, serial, _directory: directory }
    }

    fn notice(&self) -> Notice {
        self.notices.receiver.recv_timeout(PATIENCE).expect("a notice")
    }

    fn pause(&self) -> Duration {
        let began = Instant::now();
        self.machine.request_pause();
        match self.notice() {
            Notice::Paused => began.elapsed(),
            other => panic!("{other:?}"),
        }
    }

    fn export(&self) -> Vec<u8> {
        self.machine.request_export();
        match self.notice() {
            Notice::Exported(state) => state.unwrap(),
            other => panic!("{other:?}"),
        }
    }

    fn import(&self, state: Vec<u8>) -> Result<SyncTimes, VmmError> {
        self.machine.request_import(state);
        match self.notice() {
            Notice::Synchronised(result) => result,
            other => panic!("{other:?}"),
        }
    }

    fn output(&self) -> String {
        output(&self.serial)
    }

    /// Waits until the output holds `text` after its first `from` bytes.
    fn wait_for(&self, from: usize, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.output().get(from..).unwrap_or_default().contains(text) {
            if let Ok(Notice::Exit(exit)) = self.notices.receiver.try_recv() {
                panic!("the guest ended: {exit:?}\n{}", self.output());
            }
            assert!(Instant::now() < deadline, "no {text:?} in:\n{}", self.output());
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn wait_for_beats(&self) {
        let from = self.output().len();
        for round in 0..3 {
            let from = self.output().len().max(from);
            self.wait_for(from, "\n");
            assert!(round < 3);
        }
        assert!(!self.output().contains("CORRUPT"), "{}", self.output());
    }

    fn copy_ram_to(&self, other: &Guest) {
        let mut page = vec![0; 1 << 20];
        for region in self.machine.ram().map().regions() {
            for at in (region.start.0..region.start.0 + region.bytes).step_by(page.len()) {
                self.machine.ram().read(GuestPhysAddr(at), &mut page).unwrap();
                other.machine.ram().write(GuestPhysAddr(at), &page).unwrap();
            }
        }
    }
}

fn output(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}

#[cfg(feature = "fault-points")]
fn set_fault(local: &mut LocalConfig, fault: Option<&str>) {
    local.fault = fault.map(Into::into);
}

#[cfg(not(feature = "fault-points"))]
fn set_fault(_: &mut LocalConfig, _: Option<&str>) {}

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
        let quiet = first.output();
        let began = Instant::now();
        let state = first.export();
        let exported = began.elapsed();
        assert_eq!(first.output().len(), quiet.len(), "a paused guest says nothing");

        let began = Instant::now();
        let second = Guest::prepare(&first, None);
        let prepared = began.elapsed();
        first.copy_ram_to(&second);
        let bytes = state.len();
        let times = second.import(state).unwrap();
        assert_eq!(second.output(), "", "nothing goes out before the machine runs");
        second.machine.run().unwrap();
        second.wait_for_beats();
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

#[cfg(feature = "fault-points")]
#[test]
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
fn the_dirty_log_sees_writes_and_takes_pages_back() {
    if !kvm_is_here() {
        return;
    }
    let guest = Guest::boot(1, 64, "fill=16M ws=4M rate=5");
    let machine = &guest.machine;
    let pages = machine.ram().map().total_pages();
    let everything = PageRun { first: PageIndex(0), pages };
    let take = || {
        let mut words = vec![0; (pages / 64) as usize];
        let count = machine.dirty_take(&mut words).unwrap();
        let set = PageSet::from_words(words, pages);
        assert_eq!(set.count(), count);
        set
    };
    assert!(matches!(machine.dirty_take(&mut []), Err(VmmError::DirtyLog("off"))));
    machine.run().unwrap();
    guest.wait_for_beats();
    machine.dirty_start().unwrap();
    assert!(machine.dirty_start().is_err(), "it is on");
    machine.dirty_clear(everything).unwrap();
    guest.wait_for_beats();
    let some = take();
    assert!(some.count() > 0 && some.count() < pages / 2, "{} of {pages}", some.count());

    guest.pause();
    machine.dirty_clear(everything).unwrap();
    let _ = take();
    machine.dirty_clear(everything).unwrap();
    assert!(take().is_empty(), "a paused guest writes nothing");
    // A page that was taken and not cleared comes again; one that was put back too.
    machine.ram().write(GuestPhysAddr(5 * PAGE_BYTES), b"device").unwrap();
    let mut back = PageSet::new(pages);
    back.insert(PageIndex(9));
    machine.dirty_put_back(&back);
    let taken = take();
    assert_eq!(taken.count(), 2);
    assert!(taken.contains(PageIndex(5)) && taken.contains(PageIndex(9)));
    assert!(take().is_empty());
    machine.dirty_stop().unwrap();

    // A second session begins anew.
    machine.dirty_start().unwrap();
    machine.dirty_clear(everything).unwrap();
    machine.run().unwrap();
    guest.wait_for_beats();
    assert!(!take().is_empty());
    machine.dirty_stop().unwrap();
}

#[test]
fn a_large_machine_has_ram_above_four_gib() {
    if !kvm_is_here() || host::open_kvm().is_ok_and(|kvm| too_little_memory(&kvm, 6 << 30)) {
        return;
    }
    let guest = Guest::boot(2, 5 << 10, "fill=64M ws=16M rate=50 place=spread");
    let machine = &guest.machine;
    assert_eq!(machine.ram().map().regions().len(), 2);
    machine.run().unwrap();
    guest.wait_for_beats();
    let pages = machine.ram().map().total_pages();
    let timed = |what: &str, call: &dyn Fn()| {
        let began = Instant::now();
        call();
        eprintln!("5 GiB: {what} took {:?}", began.elapsed());
    };
    let mut words = vec![0; (pages / 64) as usize];
    timed("dirty_start", &|| machine.dirty_start().unwrap());
    timed("dirty_clear of everything", &|| {
        machine.dirty_clear(PageRun { first: PageIndex(0), pages }).unwrap()
    });
    guest.wait_for_beats();
    let began = Instant::now();
    assert!(machine.dirty_take(&mut words).unwrap() > 0);
    eprintln!("5 GiB: dirty_take took {:?}", began.elapsed());
    timed("dirty_stop", &|| machine.dirty_stop().unwrap());
}

fn too_little_memory(kvm: &Kvm, bytes: u64) -> bool {
    HostAbilities::of_this_host(kvm).is_ok_and(|host| host.memory_available_bytes < bytes)
}

#[test]
fn a_bzimage_enters_in_64_bit_mode() {
    if !kvm_is_here() {
        return;
    }
    // In 64-bit mode: mov rdx, 0x3f8 (REX.W, which 32-bit code would take for dec eax); mov al, '6';
    // out dx, al; mov al, '\n'; out dx, al; spin.
    let code = [
        0x48, 0xc7, 0xc2, 0xf8, 0x03, 0x00, 0x00, 0x48, 0xc7, 0xc0, 0x36, 0x00, 0x00, 0x00, 0xee, 0xb0, 0x0a,
        0xee, 0xeb, 0xfe,
    ];
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), test_bzimage(&code)).unwrap();
    let guest = Guest::boot_kernel(1, 32, KernelSource::File(file.path().into()), "quiet");
    guest.machine.run().unwrap();
    guest.wait_for(0, "6\n");
    let second = Guest::prepare(&guest, None);
    guest.pause();
    guest.copy_ram_to(&second);
    second.import(guest.export()).unwrap();
    second.machine.run().unwrap();
    second.pause();
}

#[test]
fn a_terminal_takes_input_and_gives_output() {
    if !kvm_is_here() {
        return;
    }
    // Echo: mov dx, 0x3fd; l: in al, dx; test al, 1; jz l; mov dl, 0xf8; in al, dx; out dx, al;
    // mov dl, 0xfd; jmp l
    let code = [
        0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb, 0xb2, 0xf8, 0xec, 0xee, 0xb2, 0xfd, 0xeb, 0xf3,
    ];
    let kernel = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(kernel.path(), test_elf(&code, 0x1000, true)).unwrap();
    let (sender, receiver) = NoticeSender::channel().unwrap();
    let config = MachineConfig {
        name: "echo".into(),
        uuid: "0".into(),
        memory_bytes: 16 << 20,
        vcpus: 1,
        kernel: KernelSource::File(kernel.path().into()),
        initrd: None,
        cmdline: String::new(),
        serial: SerialBackend::Pty,
    };
    let machine = Machine::boot(&config, sender).unwrap();
    let path = machine.serial_path().unwrap();
    let mut terminal = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    machine.run().unwrap();
    let text: Vec<u8> = (0..500).map(|i| b'a' + (i % 26) as u8).collect();
    std::io::Write::write_all(&mut terminal, &text).unwrap();
    let mut echo = vec![0; text.len()];
    std::io::Read::read_exact(&mut terminal, &mut echo).unwrap();
    assert_eq!(echo, text);
    machine.request_pause();
    assert!(matches!(receiver.receiver.recv_timeout(PATIENCE), Ok(Notice::Paused)));
    machine.stop();
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
fn only_what_was_taken_is_cleared() {
    if !kvm_is_here() {
        return;
    }
    let guest = Guest::boot(1, 64, "fill=8M ws=8M rate=0");
    let machine = &guest.machine;
    let pages = machine.ram().map().total_pages();
    let everything = PageRun { first: PageIndex(0), pages };
    machine.run().unwrap();
    guest.wait_for_beats();
    machine.dirty_start().unwrap();
    machine.dirty_clear(everything).unwrap();
    machine.dirty_clear(everything).unwrap();
    guest.wait_for_beats();
    // Nothing was taken since: these clears must not lose what the guest wrote meanwhile.
    machine.dirty_clear(everything).unwrap();
    guest.pause();
    let mut words = vec![0; (pages / 64) as usize];
    assert!(machine.dirty_take(&mut words).unwrap() > 0);
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

#[test]
fn an_interrupted_port_write_is_completed() {
    if !kvm_is_here() {
        return;
    }
    // mov dx, 0x3f8; l: mov al, cl; and al, 0x3f; add al, 0x20; out dx, al; inc cl; jmp l
    let code = [
        0x66, 0xba, 0xf8, 0x03, 0x31, 0xc9, 0x88, 0xc8, 0x24, 0x3f, 0x04, 0x20, 0xee, 0xfe, 0xc1, 0xeb, 0xf5,
    ];
    let guest = Guest::boot_code(1, &code);
    for _ in 0..30 {
        guest.machine.run().unwrap();
        guest.wait_for(guest.output().len(), "");
        guest.pause();
    }
    // Half of it is printed by a second machine.
    let second = Guest::prepare(&guest, None);
    guest.copy_ram_to(&second);
    second.import(guest.export()).unwrap();
    second.machine.run().unwrap();
    second.wait_for(0, " !\"#");
    second.pause();
    let (first_serial, second_serial) = (guest.serial.clone(), second.serial.clone());
    let Guest { machine, _directory: d1, .. } = guest;
    machine.stop();
    let Guest { machine, _directory: d2, .. } = second;
    machine.stop();
    let text = output(&first_serial) + &output(&second_serial);
    drop((d1, d2));
    let expected: String = (0..text.len()).map(|i| char::from((i % 64) as u8 + 0x20)).collect();
    assert_eq!(text, expected, "each byte once, in order, over the pauses and the move");
}

#[test]
fn the_guests_end_is_reported_once() {
    if !kvm_is_here() {
        return;
    }
    let cases: [(&[u8], GuestExit); 3] = [
        // mov al, 0xfe; out 0x64, al
        (&[0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe], GuestExit::Reset),
        // mov dx, 0x604; mov ax, 0x2000; out dx, ax
        (&[0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x20, 0x66, 0xef, 0xeb, 0xfe], GuestExit::Shutdown),
        // ud2 without an IDT
        (&[0x0f, 0x0b], GuestExit::TripleFault),
    ];
    for (code, exit) in cases {
        let guest = Guest::boot_code(2, code);
        guest.machine.run().unwrap();
        match guest.notice() {
            Notice::Exit(how) => assert_eq!(how, exit),
            other => panic!("{other:?}"),
        }
        assert!(guest.machine.run().is_err(), "it has ended");
        guest.pause();
        assert!(guest.notices.receiver.try_recv().is_err());
    }
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
