//! Ports, terminal, the guest's end, and the other way to boot.

use super::*;

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
        ram_pages: Default::default(),
        memory_bytes: 16 << 20,
        vcpus: 1,
        kernel: KernelSource::File(kernel.path().into()),
        initrd: None,
        cmdline: String::new(),
        serial: SerialBackend::Pty,
        devices: Vec::new(),
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
    let cases: [(&[u8], GuestExit); 4] = [
        // mov al, 0xfe; out 0x64, al
        (&[0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe], GuestExit::Reset),
        // mov dx, 0x604; mov ax, 0x2000; out dx, ax
        (&[0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x20, 0x66, 0xef, 0xeb, 0xfe], GuestExit::Shutdown),
        // mov dx, 0x605; mov al, 0x34; out dx, al
        (&[0x66, 0xba, 0x05, 0x06, 0xb0, 0x34, 0xee, 0xeb, 0xfe], GuestExit::Shutdown),
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
