//! Virtio devices as a hostile driver drives them: any register, any memory, any order; the device's
//! thread is not there, its work is done in between.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use vmferry::fuzzing::{DrivenDevice, GuestMemory, Wire};
use vmferry::state::VirtioState;
use vmferry::vmm::virtio::vsock::SocketPath;
use vmferry::vmm::virtio::{HostEnd, Kind};

use super::input::{Reader, Writer};
use super::kept;
use super::state::a_transport;
use super::vmrun::socket_path;

/// Where the descriptor table, the available ring and the used ring of queue `n` are, if the input
/// says nothing else.
fn place(queue: u64, part: u64) -> u64 {
    0x1000 + queue * 0x3000 + part * 0x1000
}

const DATA: u64 = 0x1_0000;
const DISK_BYTES: usize = 64 << 10;
const CID: u64 = 3;
/// The most programs of the host at a time.
const MOST_PROGRAMS: usize = 8;

/// What a device has of the host.
enum Host {
    /// Nothing that could say anything.
    Quiet,
    /// A network.
    Wire(Wire),
    /// A path for programs, and those that have called.
    Programs(PathBuf, Vec<UnixStream>),
}

impl Host {
    /// Somebody of the host sends something to the guest.
    fn send(&mut self, bytes: &[u8]) {
        match self {
            Self::Quiet => {}
            Self::Wire(wire) => wire.send(bytes),
            Self::Programs(path, programs) => {
                if programs.len() < MOST_PROGRAMS
                    && let Ok(program) = UnixStream::connect(path)
                {
                    program.set_nonblocking(true).expect("it is a socket");
                    programs.push(program);
                }
                // They take turns.
                if let Some(mut program) = programs.pop() {
                    let _ = program.write(bytes);
                    programs.insert(0, program);
                }
            }
        }
    }

    /// Takes what the guest has sent.
    fn drain(&mut self) {
        let mut bytes = [0; 4096];
        match self {
            Self::Quiet => {}
            Self::Wire(wire) => wire.drain(),
            Self::Programs(_, programs) => {
                programs.retain_mut(|program| !matches!(program.read(&mut bytes), Ok(0)));
            }
        }
    }
}

pub fn run(data: &[u8]) {
    let mut input = Reader(data);
    let memory = GuestMemory::new(1 << 20);
    let disk = kept(&[0x11; DISK_BYTES]);
    let open = |kind, text: &str| HostEnd::parse(kind, text).expect("it is right").open("device0", None);
    let image = format!("/proc/self/fd/{}", disk.as_raw_fd());
    let (device, mut host) = match input.u8() % 5 {
        0 => (open(Kind::Block, &image).expect("a memfd is a disk"), Host::Quiet),
        1 => {
            let wire = Wire::new();
            (wire.card(), Host::Wire(wire))
        }
        2 => (open(Kind::Rng, "kernel").expect("there are random numbers"), Host::Quiet),
        3 => (open(Kind::Block, &(image + ",readonly")).expect("a memfd is a disk"), Host::Quiet),
        _ => {
            let path = socket_path();
            let end = HostEnd::Vsock { path: SocketPath(path.clone()), cid: Some(CID) };
            (end.open("device0", None).expect("a socket can be made"), Host::Programs(path, Vec::new()))
        }
    };
    let mut driven = DrivenDevice::new(device, &memory);
    driven.resume();
    while !input.is_empty() {
        step(&mut driven, &memory, &mut host, &mut input);
        driven.work();
        host.drain();
    }
    // A driver can begin anew, whatever it did before.
    driven.write(0x70, 0);
    driven.work();
    assert_eq!(driven.read(0x70), 0, "a reset always works");
}

fn step(driven: &mut DrivenDevice, memory: &GuestMemory, host: &mut Host, input: &mut Reader<'_>) {
    match input.u8() % 8 {
        0 => driven.write(u64::from(input.u8()) * 4, input.u32()),
        1 => drop(driven.read(u64::from(input.u8()) * 4)),
        2 => memory.write(u64::from(input.u16()) * 16, input.chunk()),
        3 => driven.write(0x50, u32::from(input.u8() % 4)),
        4 => set_up(driven, input),
        5 => host.send(input.chunk()),
        6 => chain(memory, input),
        _ => {
            driven.pause();
            if input.u8() & 1 == 0 {
                if let Ok(state) = driven.save() {
                    let restored = driven.restore(state);
                    // A wire is no tap, and has no offloads that could be set; a path is not the source's.
                    let quiet = matches!(host, Host::Quiet);
                    assert!(restored.is_ok() || !quiet, "what was saved is refused: {restored:?}");
                }
            } else if let Ok(state) = serde_json::from_slice::<VirtioState>(input.chunk())
                && let Err(error) = driven.restore(state)
            {
                assert!(!error.is_empty());
            }
            driven.resume();
        }
    }
}

/// All that a driver does before DRIVER_OK, with queues of that size.
fn set_up(driven: &mut DrivenDevice, input: &mut Reader<'_>) {
    let (size, features) = (u32::from(input.u16()), input.u64());
    driven.write(0x70, 0);
    driven.write(0x70, 3);
    for half in 0..2 {
        driven.write(0x24, half);
        driven.write(0x20, (features >> (32 * half)) as u32);
    }
    driven.write(0x70, 11);
    for queue in 0..3 {
        driven.write(0x30, queue);
        driven.write(0x38, size);
        for (part, register) in (0..).zip([0x80, 0x90, 0xa0]) {
            driven.write(register, place(queue.into(), part) as u32);
        }
        driven.write(0x44, 1);
    }
    driven.write(0x70, 15);
}

/// A chain of descriptors, put out as the next request of a queue of 8.
fn chain(memory: &GuestMemory, input: &mut Reader<'_>) {
    let (queue, index, count) = (u64::from(input.u8() % 3), input.u16(), input.u8() % 9);
    for n in 0..u64::from(count) {
        let (how, offset, length) = (input.u8(), u64::from(input.u16()) * 16, input.u32());
        let next = if how & 4 != 0 { u16::from(input.u8()) } else { (n + 1) as u16 };
        // NEXT as it should be, or not; WRITE; INDIRECT.
        let more = u16::from((n + 1 < count.into()) != (how & 1 != 0));
        let flags = more | u16::from(how & 2) | (u16::from(how & 8) / 2);
        let length = if how & 16 != 0 { length } else { length % 4096 };
        let bytes = [
            &(DATA + offset).to_le_bytes()[..],
            &length.to_le_bytes(),
            &flags.to_le_bytes(),
            &next.to_le_bytes(),
        ];
        memory.write(place(queue, 0) + 16 * n, &bytes.concat());
    }
    memory.write(place(queue, 1) + 4 + u64::from(index % 8) * 2, &[0, 0]);
    memory.write(place(queue, 1) + 2, &index.wrapping_add(1).to_le_bytes());
}

/// The whole of one request: data, its chain (offset / 16, bytes, to be written), a kick.
fn request(input: Writer, queue: u8, index: u16, data: &[u8], parts: &[(u16, u32, bool)]) -> Writer {
    let input = input.u8(2).u16((DATA / 16) as u16).chunk(data);
    let input = input.u8(6).u8(queue).u16(index).u8(parts.len() as u8);
    let put = |input: Writer, p: &(u16, u32, bool)| input.u8(u8::from(p.2) * 2).u16(p.0).u32(p.1);
    parts.iter().fold(input, put).u8(3).u8(queue)
}

pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let version_1 = 1u64 << 32;
    let begin =
        |device: u8, features: u64| Writer::default().u8(device).u8(4).u16(8).u64(version_1 | features);
    let disk = |kind: u32, sector: u64| [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
    let reads: &[(u16, u32, bool)] = &[(0, 16, false), (64, 512, true), (32, 1, true)];
    let writes: &[(u16, u32, bool)] = &[(0, 16, false), (64, 512, false), (32, 1, true)];
    let others: &[(u16, u32, bool)] = &[(0, 16, false), (64, 20, true), (32, 1, true)];
    let block = request(begin(0, 0), 0, 0, &disk(0, 3), reads);
    let block = request(block, 0, 1, &disk(1, 5), writes);
    let block = request(request(block, 0, 2, &disk(4, 0), others), 0, 3, &disk(8, 0), others);
    let frame = [&[0; 12][..], &[0xff; 6], &[0x52, 0x54, 0, 0x12, 0x34, 0x56], &[8, 6], &[0; 40]].concat();
    let net = request(begin(1, 1 << 15 | 1 << 17 | 1 << 21), 1, 0, &frame, &[(0, frame.len() as u32, false)]);
    let net = request(net, 0, 0, b"", &[(256, 1024, true), (512, 1024, true)]).u8(5).chunk(&frame);
    let net = request(net, 2, 0, &[3, 0], &[(0, 2, false), (16, 1, true)]);
    let rng = request(begin(2, 1 << 29), 0, 0, b"", &[(0, 64, true)]).u8(7).u8(0);
    let state = VirtioState { transport: a_transport(), device: serde_json::json!({}) };
    let state = serde_json::to_vec(&state).expect("it can be written");
    let restored = Writer::default().u8(2).u8(7).u8(1).chunk(&state).u8(3).u8(0);
    let readonly = request(begin(3, 1 << 5), 0, 0, &disk(1, 0), writes);
    let packet = |op: u8, bytes: &[u8]| {
        let ids =
            [&CID.to_le_bytes()[..], &2u64.to_le_bytes(), &7u32.to_le_bytes(), &9u32.to_le_bytes()].concat();
        let length = (bytes.len() as u32).to_le_bytes();
        [&ids[..], &length, &[1, 0, op, 0], &[0; 4], &65536u32.to_le_bytes(), &[0; 4], bytes].concat()
    };
    let vsock = request(begin(4, 0), 0, 0, b"", &[(512, 4000, true)]);
    let vsock = request(vsock, 1, 0, &packet(1, b""), &[(0, 44, false)]);
    let vsock = request(vsock, 1, 1, &packet(5, b"hello"), &[(0, 44, false), (16, 5, false)]);
    let vsock = vsock.u8(5).chunk(b"CONNECT 7\n").u8(3).u8(0).u8(5).chunk(b"more").u8(7).u8(0);
    vec![
        ("vsock".into(), vsock.0),
        ("block".into(), block.0),
        ("net".into(), net.0),
        ("rng".into(), rng.0),
        ("restored".into(), restored.0),
        ("readonly".into(), readonly.0),
    ]
}
