//! A guest that drives a virtio device by itself: MMIO exits, ioeventfd, used rings, and a move.

use nix::fcntl::{FallocateFlags, fallocate};

use super::*;
use crate::sys::uffd::FaultFd;
use crate::vmm::virtio::{HostEnd, slot_address};

const DESCRIPTORS: u32 = 0x20_0000;
const AVAILABLE: u32 = 0x20_1000;
const USED: u32 = 0x20_2000;
const BUFFER: u32 = 0x20_3000;
const FLAG: u32 = 0x20_4000;

/// `mov dword [address], value`.
fn store(address: u32, value: u32) -> Vec<u8> {
    [&[0xc7, 0x05][..], &address.to_le_bytes(), &value.to_le_bytes()].concat()
}

/// `cmp word [address], value; je` back to it.
fn wait_while(address: u32, value: u8) -> Vec<u8> {
    [&[0x66, 0x83, 0x3d][..], &address.to_le_bytes(), &[value, 0x74, 0xf6]].concat()
}

/// `mov dx, 0x3f8; mov al, letter; out dx, al`.
fn print(letter: u8) -> Vec<u8> {
    vec![0x66, 0xba, 0xf8, 0x03, 0xb0, letter, 0xee]
}

/// Sets up the random numbers' queue, asks for 8 bytes, prints `a` when they are there; waits for the
/// flag, asks again, prints `b`.
fn program() -> Vec<u8> {
    let base = slot_address(0) as u32;
    let register = |offset: u32, value: u32| store(base + offset, value);
    let mut code = Vec::new();
    for status in [1, 3] {
        code.extend(register(0x70, status));
    }
    // VERSION_1 is bit 0 of the upper half.
    for (offset, value) in [(0x24, 1), (0x20, 1), (0x70, 0xb), (0x30, 0), (0x38, 8)] {
        code.extend(register(offset, value));
    }
    for (offset, value) in [(0x80, DESCRIPTORS), (0x90, AVAILABLE), (0xa0, USED), (0x44, 1), (0x70, 0xf)] {
        code.extend(register(offset, value));
    }
    // One descriptor: 8 bytes that the device writes.
    for (offset, value) in [(0, BUFFER), (8, 8), (12, 2)] {
        code.extend(store(DESCRIPTORS + offset, value));
    }
    for (requests, letter) in [(1u8, b'a'), (2, b'b')] {
        code.extend(store(AVAILABLE, u32::from(requests) << 16));
        code.extend(register(0x50, 0));
        code.extend(wait_while(USED + 2, requests - 1));
        code.extend(print(letter));
        code.extend(wait_while(FLAG, 0));
    }
    code.extend([0xeb, 0xfe]);
    code
}

#[test]
fn a_guest_uses_its_device_here_and_after_a_move() {
    if !kvm_is_here() {
        return;
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), test_elf(&program(), 0x1000, true)).unwrap();
    let rng = DeviceConfig { id: "rng0".into(), host: HostEnd::Rng };
    let source = Guest::boot_with(1, 16, KernelSource::File(file.path().into()), "", vec![rng]);
    source.machine.run().unwrap();
    source.wait_for(0, "a");
    source.pause();
    assert!(source.machine.is_paused());
    let state = source.export();

    let failed = if cfg!(feature = "fault-points") { Some("import:rng0") } else { None };
    if failed.is_some() {
        let dest = Guest::prepare(&source, failed);
        assert!(dest.import(state.clone()).unwrap_err().to_string().contains("rng0"));
    }
    let dest = Guest::prepare(&source, None);
    source.copy_ram_to(&dest);
    dest.import(state).unwrap();
    let mut before = [0; 8];
    dest.machine.ram().read(GuestPhysAddr(BUFFER.into()), &mut before).unwrap();
    assert_ne!(before, [0; 8]);
    dest.machine.run().unwrap();
    dest.machine.ram().write(GuestPhysAddr(FLAG.into()), &[1]).unwrap();
    dest.wait_for(0, "b");
    let mut after = [0; 8];
    dest.machine.ram().read(GuestPhysAddr(BUFFER.into()), &mut after).unwrap();
    assert_ne!(before, after);
}

// Postcopy: a device may stand at a page that does not come. The pause waits for it, and nothing else does.
#[test]
fn a_device_at_a_missing_page_holds_up_the_pause_and_nothing_else() {
    if !kvm_is_here() {
        return;
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), test_elf(&program(), 0x1000, true)).unwrap();
    let rng = DeviceConfig { id: "rng0".into(), host: HostEnd::Rng };
    let guest = Guest::boot_with(1, 16, KernelSource::File(file.path().into()), "", vec![rng]);
    guest.machine.run().unwrap();
    guest.wait_for(0, "a");
    guest.pause();
    let ram = guest.machine.ram();
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(ram.memfds().next().unwrap(), hole, BUFFER.into(), PAGE_BYTES as i64).unwrap();
    let page = ram.addresses()[0].0 + u64::from(BUFFER);
    let faults = FaultFd::new().unwrap();
    faults.register(page, PAGE_BYTES).unwrap();
    ram.write(GuestPhysAddr(FLAG.into()), &[1]).unwrap();
    guest.machine.run().unwrap();
    let began = Instant::now();
    while faults.read_faults().unwrap().is_empty() {
        assert!(began.elapsed() < PATIENCE, "the device never wrote");
    }
    let began = Instant::now();
    guest.machine.request_pause();
    assert!(matches!(guest.machine.dirty_start(), Err(VmmError::WrongState(_)) | Ok(())));
    assert!(began.elapsed() < Duration::from_millis(100), "{:?}", began.elapsed());
    let early = guest.notices.receiver.recv_timeout(Duration::from_millis(200));
    assert!(early.is_err() && !guest.machine.is_paused(), "{early:?}");
    faults.zero(page).unwrap();
    assert!(matches!(guest.notice(), Notice::Paused));
    faults.unregister(page, PAGE_BYTES).unwrap();
    guest.machine.run().unwrap();
    guest.wait_for(0, "b");
}

#[test]
fn a_machine_with_a_device_that_cannot_be_opened_or_differs_is_refused_by_name() {
    if !kvm_is_here() {
        return;
    }
    let rng = DeviceConfig { id: "rng0".into(), host: HostEnd::Rng };
    let kernel = KernelSource::Builtin("heartbeat".into());
    let source = Guest::boot_with(1, 16, kernel, "", vec![rng]);
    let refused = |change: fn(&mut MachineDescription, &mut LocalConfig)| {
        let (sender, _notices) = NoticeSender::channel().unwrap();
        let (mut description, mut local) = (source.machine.describe().clone(), LocalConfig::default());
        change(&mut description, &mut local);
        match Machine::prepare(&description, local, sender) {
            Err(PrepareError::Refused(problems)) => problems[0].text.clone(),
            other => panic!("{:?}", other.map(|_| ())),
        }
    };
    let text = refused(|_, local| drop(local.remaps.insert("rng0".into(), "dice".into())));
    assert!(text.contains("rng0") && text.contains("dice"), "{text}");
    let text = refused(|description, _| {
        description.devices.last_mut().unwrap().properties.insert("sides".into(), "6".into());
    });
    assert!(text.contains("its sides is 6 at the source, none here"), "{text}");
}
