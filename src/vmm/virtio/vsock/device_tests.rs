//! A driver in guest memory against the whole device, and programs of the host at its socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::mpsc;

use serde_json::json;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::FromBytes;

use super::super::packet::{HOST_CID, Op, TYPE_STREAM};
use super::*;
use crate::memory::{GuestPhysAddr, RamMap, RamPages, RamRegion};
use crate::state::DeviceDescription;
use crate::vmm::GuestRam;
use crate::vmm::virtio::{HostEnd, Interrupt, Slot};

const PATIENCE: Duration = Duration::from_secs(20);
const CID: u64 = 7;
/// Buffers of each queue, a page each.
const SIZE: u16 = 8;
const RAM_BYTES: u64 = 2 << 20;

/// A machine's end: RAM with a driver's queues, and the device in its slot.
struct Machine {
    ram: GuestRam,
    slot: Slot,
    /// By queue: how many buffers were offered, and how many used ones were looked at.
    offered: [u16; 3],
    seen: [u16; 3],
}

impl Machine {
    fn new(device: Box<dyn Device>) -> Self {
        let region = RamRegion { start: GuestPhysAddr(0), bytes: RAM_BYTES };
        let ram = GuestRam::new(RamMap::new(vec![region]).unwrap(), "a test", RamPages::Small).unwrap();
        let interrupt = Arc::new(Interrupt::with_line(|_| ()));
        let slot = Slot::new("vsock0", device, Arc::new(ram.memory().clone()), interrupt).unwrap();
        Self { ram, slot, offered: [0; 3], seen: [0; 3] }
    }

    /// One that runs, with a driver that has set everything up.
    fn booted(path: &Path) -> Self {
        let mut machine = Self::new(open(path, None).unwrap());
        machine.slot.resume();
        machine.activate();
        machine
    }

    /// One that is as `source` is, which is paused, at its own path.
    fn arriving(path: &Path, source: &Machine, source_path: &Path) -> Self {
        let mut machine = Self::new(open(path, Some(source_path)).unwrap());
        let mut bytes = vec![0; RAM_BYTES as usize];
        source.ram.memory().read_slice(&mut bytes, GuestAddress(0)).unwrap();
        machine.put(0, &bytes);
        (machine.offered, machine.seen) = (source.offered, source.seen);
        machine
    }

    fn get(&self, register: u64) -> u32 {
        let mut bytes = [0; 4];
        self.slot.read(register, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn set(&self, register: u64, value: u32) {
        self.slot.write(register, &value.to_le_bytes());
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.ram.memory().write_slice(bytes, GuestAddress(at)).unwrap();
    }

    fn u16_at(&self, at: u64) -> u16 {
        self.ram.memory().read_obj(GuestAddress(at)).unwrap()
    }

    /// As a driver begins: features, three queues, all buffers that the device fills.
    fn activate(&mut self) {
        [1, 3].into_iter().for_each(|status| self.set(0x70, status));
        self.set(0x24, 1);
        self.set(0x20, 1);
        self.set(0x70, 0xb);
        for queue in [RECEIVE, TRANSMIT, EVENT] {
            self.put(ring(queue, 0), &[0; 0x3000]);
            self.set(0x30, queue as u32);
            self.set(0x38, u32::from(SIZE));
            for (n, register) in [0x80, 0x90, 0xa0].into_iter().enumerate() {
                self.set(register, ring(queue, n as u64) as u32);
            }
            self.set(0x44, 1);
        }
        (self.offered, self.seen) = ([0; 3], [0; 3]);
        self.set(0x70, 0xf);
        for queue in [RECEIVE, EVENT] {
            (0..SIZE).for_each(|_| self.offer(queue, 0x1000, true));
        }
    }

    /// Puts the next buffer of a queue out, and kicks.
    fn offer(&mut self, queue: usize, bytes: u32, writable: bool) {
        let (n, address) = (self.offered[queue] % SIZE, buffer(queue, self.offered[queue]));
        let flags = u32::from(writable) << 1;
        let words = [&address.to_le_bytes()[..], &bytes.to_le_bytes(), &flags.to_le_bytes()].concat();
        self.put(ring(queue, 0) + 16 * u64::from(n), &words);
        self.put(ring(queue, 1) + 4 + 2 * u64::from(n), &n.to_le_bytes());
        self.offered[queue] += 1;
        self.put(ring(queue, 1) + 2, &self.offered[queue].to_le_bytes());
        self.set(0x50, queue as u32);
    }

    fn send_bytes(&mut self, bytes: &[u8]) {
        self.put(buffer(TRANSMIT, self.offered[TRANSMIT]), bytes);
        self.offer(TRANSMIT, bytes.len() as u32, false);
    }

    /// Sends a packet, and waits until it is taken.
    fn send(&mut self, ports: Ports, op: Op, data: &[u8]) {
        self.send_bytes(&packet(ports, op, data));
        let sent = self.offered[TRANSMIT];
        until("the packet is taken", || self.u16_at(ring(TRANSMIT, 2) + 2) == sent);
    }

    /// What the device has put into the next buffer of a queue.
    fn next(&mut self, queue: usize) -> Vec<u8> {
        let seen = self.seen[queue];
        until("the device has something to say", || self.u16_at(ring(queue, 2) + 2) != seen);
        let bytes = self.u16_at(ring(queue, 2) + 4 + 8 * u64::from(seen % SIZE) + 4);
        let mut data = vec![0; bytes.into()];
        self.ram.memory().read_slice(&mut data, GuestAddress(buffer(queue, seen))).unwrap();
        self.seen[queue] += 1;
        self.offer(queue, 0x1000, true);
        data
    }

    /// The next packet for the guest.
    fn receive(&mut self) -> (Op, Ports, Vec<u8>) {
        let bytes = self.next(RECEIVE);
        let (header, data) = Header::read_from_prefix(&bytes).unwrap();
        assert_eq!((header.src_cid.get(), header.dst_cid.get()), (HOST_CID, CID));
        assert_eq!(header.len.get() as usize, data.len());
        let ports = Ports { host: header.src_port.get(), guest: header.dst_port.get() };
        (header.op().unwrap(), ports, data.to_vec())
    }

    fn pause(&self) {
        let (sender, paused) = mpsc::channel();
        self.slot.pause(move || {
            let _ = sender.send(());
        });
        paused.recv_timeout(PATIENCE).unwrap();
    }

    fn quit(&self) {
        self.slot.quit();
        self.slot.join(Instant::now() + PATIENCE);
    }
}

/// The address of a queue's descriptors, available ring, used ring.
fn ring(queue: usize, part: u64) -> u64 {
    0x1000 + 0x4000 * queue as u64 + 0x1000 * part
}

/// Where the `n`th buffer of a queue is.
fn buffer(queue: usize, n: u16) -> u64 {
    0x2_0000 + 0x1_0000 * queue as u64 + 0x1000 * u64::from(n % SIZE)
}

fn packet(ports: Ports, op: Op, data: &[u8]) -> Vec<u8> {
    let header = Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID.into(),
        src_port: ports.guest.into(),
        dst_port: ports.host.into(),
        len: (data.len() as u32).into(),
        kind: TYPE_STREAM.into(),
        op: (op as u16).into(),
        buf_alloc: (1 << 16).into(),
        ..Header::default()
    };
    [header.as_bytes(), data].concat()
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::yield_now();
    }
}

/// The device as a host end opens it; for a guest that comes in from `source`.
fn open(path: &Path, source: Option<&Path>) -> Result<Box<dyn Device>, String> {
    let text = path.display().to_string();
    let HostEnd::Vsock { path, .. } = HostEnd::parse(Kind::Vsock, &text).unwrap() else { panic!("{text}") };
    let theirs = source.map(|source| DeviceDescription {
        id: "vsock0".into(),
        kind: Kind::Vsock.name().into(),
        version: Kind::Vsock.version(),
        host: Some(source.display().to_string()),
        properties: BTreeMap::from([(CID_PROPERTY.to_owned(), CID.to_string())]),
    });
    let cid = theirs.is_none().then_some(CID);
    HostEnd::Vsock { path, cid }.open("vsock0", theirs.as_ref()).map_err(|e| e.to_string())
}

/// A program of the host that asks for a port of the guest.
fn caller(path: &Path, port: u32) -> UnixStream {
    let mut socket = UnixStream::connect(path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    writeln!(socket, "CONNECT {port}").unwrap();
    socket
}

fn read_text(mut socket: &UnixStream, bytes: usize) -> String {
    let mut text = vec![0; bytes];
    socket.read_exact(&mut text).unwrap();
    String::from_utf8(text).unwrap()
}

/// A stream between a program of the host and the guest's port 5000.
fn connected(machine: &mut Machine, path: &Path) -> (UnixStream, Ports) {
    let socket = caller(path, 5000);
    let (op, ports, _) = machine.receive();
    assert_eq!((op, ports.guest), (Op::Request, 5000));
    machine.send(ports, Op::Response, &[]);
    let line = format!("OK {}\n", ports.host);
    assert_eq!(read_text(&socket, line.len()), line);
    (socket, ports)
}

fn service(path: &Path, port: u32) -> UnixListener {
    UnixListener::bind(format!("{}_{port}", path.display())).unwrap()
}

fn ends(mut socket: &UnixStream) -> bool {
    matches!(socket.read(&mut [0]), Ok(0))
}

#[test]
fn a_program_of_the_host_reaches_a_port_of_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    let mut machine = Machine::booted(&path);
    assert_eq!((machine.get(8), machine.get(0x100), machine.get(0x104)), (19, CID as u32, 0));
    let (mut socket, ports) = connected(&mut machine, &path);
    socket.write_all(b"hello").unwrap();
    assert_eq!(machine.receive(), (Op::Rw, ports, b"hello".to_vec()));
    machine.send(ports, Op::Rw, b"world");
    assert_eq!(read_text(&socket, 5), "world");
    drop(socket);
    assert_eq!(machine.receive(), (Op::Shutdown, ports, vec![]));
    machine.send(ports, Op::Rst, &[]);

    // One that the guest refuses, and one that says nothing sensible.
    let refused = caller(&path, 5001);
    let (_, ports, _) = machine.receive();
    machine.send(ports, Op::Rst, &[]);
    assert!(ends(&refused));
    let mut strange = UnixStream::connect(&path).unwrap();
    strange.write_all(b"HELLO\n").unwrap();
    assert!(ends(&strange));
    machine.quit();
    assert!(!path.exists());
}

#[test]
fn the_guest_reaches_a_service_of_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    let mut machine = Machine::booted(&path);
    let listener = service(&path, 80);
    let ports = Ports { host: 80, guest: 1000 };
    machine.send(ports, Op::Request, &[]);
    assert_eq!(machine.receive(), (Op::Response, ports, vec![]));
    let (mut socket, _) = listener.accept().unwrap();
    machine.send(ports, Op::Rw, b"GET /\n");
    assert_eq!(read_text(&socket, 6), "GET /\n");
    let page = vec![b'x'; 10_000];
    socket.write_all(&page).unwrap();
    let mut got = Vec::new();
    while got.len() < page.len() {
        let (op, from, data) = machine.receive();
        assert_eq!((op, from), (Op::Rw, ports));
        got.extend(data);
    }
    assert_eq!(got, page);
    // Nobody listens there; and there is no such port.
    for host in [81, NO_PORT] {
        let ports = Ports { host, guest: 1001 };
        machine.send(ports, Op::Request, &[]);
        assert_eq!(machine.receive(), (Op::Rst, ports, vec![]));
    }
}

#[test]
fn without_a_driver_nobody_is_kept_waiting_and_its_reset_ends_all_streams() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    let mut machine = Machine::new(open(&path, None).unwrap());
    machine.slot.resume();
    assert!(ends(&UnixStream::connect(&path).unwrap()));
    machine.activate();
    let (socket, _) = connected(&mut machine, &path);
    machine.set(0x70, 0);
    assert!(ends(&socket));
    machine.activate();
    connected(&mut machine, &path);
}

#[test]
fn packets_that_make_no_sense_need_a_reset_and_then_it_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    let mut machine = Machine::booted(&path);
    let ports = Ports { host: 80, guest: 1000 };
    let whole = packet(ports, Op::Rw, b"data");
    let spoil = |machine: &mut Machine, bytes: &[u8]| {
        machine.send_bytes(bytes);
        until("it says so", || machine.get(0x70) == 0x4f);
        machine.set(0x70, 0);
        machine.activate();
    };
    spoil(&mut machine, &whole[..43]);
    spoil(&mut machine, &whole[..47]);
    // A buffer for packets that has room for none.
    machine.set(0x70, 0);
    [1, 3].into_iter().for_each(|status| machine.set(0x70, status));
    machine.activate();
    machine.seen[RECEIVE] = 0;
    for n in 0..SIZE {
        machine.put(ring(RECEIVE, 0) + 16 * u64::from(n) + 8, &43u32.to_le_bytes());
    }
    machine.send_bytes(&packet(ports, Op::Request, &[]));
    until("it says so", || machine.get(0x70) == 0x4f);
    machine.set(0x70, 0);
    machine.activate();
    connected(&mut machine, &path);
}

#[test]
fn a_guest_that_moves_keeps_its_streams_until_it_has_gone_and_is_told_at_the_destination() {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = (dir.path().join("a"), dir.path().join("b"));
    let mut source = Machine::booted(&here);
    let (mut socket, ports) = connected(&mut source, &here);
    let listener = service(&there, 80);

    // An attempt that fails: the guest goes on, and so does its stream.
    source.pause();
    let state = source.slot.save().unwrap();
    drop(Machine::arriving(&there, &source, &here));
    source.slot.resume();
    socket.write_all(b"still here").unwrap();
    assert_eq!(source.receive(), (Op::Rw, ports, b"still here".to_vec()));
    source.send(ports, Op::Rw, b"so am I");
    assert_eq!(read_text(&socket, 7), "so am I");

    source.pause();
    // What it says when it is paused, it says to the destination.
    source.send_bytes(&packet(ports, Op::Rw, b"lost"));
    source.send_bytes(&packet(Ports { host: 80, guest: 1000 }, Op::Request, &[]));
    let saved = source.slot.save().unwrap();
    assert_ne!(saved, state);
    let mut dest = Machine::arriving(&there, &source, &here);
    dest.slot.restore(saved).unwrap();
    assert!(!there.exists() && here.exists());
    dest.slot.resume();
    assert_eq!(dest.next(EVENT), TRANSPORT_RESET);
    assert_eq!(dest.receive(), (Op::Rst, ports, vec![]));
    assert_eq!(dest.receive().0, Op::Rst);
    assert_eq!(dest.get(0x100), CID as u32);
    until("it has its path", || there.exists());
    let (_again, _) = connected(&mut dest, &there);
    let ports = Ports { host: 80, guest: 1001 };
    dest.send(ports, Op::Request, &[]);
    assert_eq!(dest.receive(), (Op::Response, ports, vec![]));
    listener.accept().unwrap();

    // The source's programs learn it when its guest is given away.
    socket.set_nonblocking(true).unwrap();
    assert_eq!(socket.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    socket.set_nonblocking(false).unwrap();
    source.slot.let_go();
    assert!(ends(&socket));
    until("its socket is gone", || !here.exists());
}

#[test]
fn on_one_path_the_destination_takes_over_from_its_source_and_from_nobody_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    let source = Machine::booted(&path);
    source.pause();
    let saved = source.slot.save().unwrap();
    let refused = open(&path, Some(&dir.path().join("other"))).err().unwrap();
    assert!(refused.contains("listens there (process"), "{refused}");
    let mut dest = Machine::arriving(&path, &source, &path);
    dest.slot.restore(saved.clone()).unwrap();
    dest.slot.resume();
    assert_eq!(dest.next(EVENT), TRANSPORT_RESET);
    source.quit();
    let (mut socket, ports) = connected(&mut dest, &path);
    socket.write_all(b"x").unwrap();
    assert_eq!(dest.receive(), (Op::Rw, ports, b"x".to_vec()));

    // For the same state a second time, the socket is a stranger's.
    let late = Machine::arriving(&path, &dest, &path);
    let refused = late.slot.restore(saved.clone()).unwrap_err().to_string();
    assert!(refused.contains("device vsock0") && refused.contains("listens there"), "{refused}");
    let mut strange = saved;
    strange.device = json!({"socket": null, "streams": []});
    assert!(late.slot.restore(strange).unwrap_err().to_string().contains("unknown field"));
    assert!(dir.path().join("v").exists());
}

#[test]
fn a_path_that_is_taken_is_told_and_one_that_becomes_free_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    std::fs::write(&path, "precious").unwrap();
    assert!(open(&path, None).err().unwrap().contains("no socket"));
    std::fs::remove_file(&path).unwrap();

    let home = dir.path().join("home");
    let source = Machine::booted(&home);
    source.pause();
    let mut dest = Machine::arriving(&path, &source, &home);
    dest.slot.restore(source.slot.save().unwrap()).unwrap();
    // Between its acknowledgement and its run somebody else comes.
    let stranger = UnixListener::bind(&path).unwrap();
    dest.slot.resume();
    assert_eq!(dest.next(EVENT), TRANSPORT_RESET);
    assert_eq!(socket_file::occupant(&path).unwrap(), socket_file::Occupant::Live(std::process::id() as i32));
    drop(stranger);
    let free = || UnixStream::connect(&path).is_ok();
    until("the path is its own", free);
    let (mut socket, ports) = connected(&mut dest, &path);
    socket.write_all(b"x").unwrap();
    assert_eq!(dest.receive(), (Op::Rw, ports, b"x".to_vec()));
}
