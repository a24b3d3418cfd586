use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::time::Duration;

use super::*;
use crate::vmm::virtio::vsock::credit::BUFFER_BYTES;
use crate::vmm::virtio::vsock::packet::{SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

const CID: u64 = 7;
const PORTS: Ports = Ports { host: 80, guest: 1000 };

/// A muxer with one stream, that the guest has asked for; its room is in `credit`.
struct Scene {
    muxer: Muxer,
    host: UnixStream,
    now: Instant,
}

fn packet(ports: Ports, op: Op) -> Header {
    Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID.into(),
        src_port: ports.guest.into(),
        dst_port: ports.host.into(),
        kind: TYPE_STREAM.into(),
        op: (op as u16).into(),
        buf_alloc: 1000.into(),
        ..Header::default()
    }
}

/// A pair of which the device's end never blocks.
fn pair() -> (UnixStream, UnixStream) {
    let (device, host) = UnixStream::pair().unwrap();
    device.set_nonblocking(true).unwrap();
    (device, host)
}

fn nobody(_: u32) -> io::Result<UnixStream> {
    Err(ErrorKind::ConnectionRefused.into())
}

impl Scene {
    fn open() -> Self {
        let (device, host) = pair();
        let mut scene = Self { muxer: Muxer::new(CID), host, now: Instant::now() };
        scene.muxer.guest_sent(&packet(PORTS, Op::Request), &[], scene.now, |port| {
            assert_eq!(port, 80);
            Ok(device)
        });
        let (header, bytes) = scene.next().unwrap();
        assert_eq!((header.op(), bytes), (Some(Op::Response), vec![]));
        assert_eq!((header.src_port.get(), header.dst_port.get(), header.dst_cid.get()), (80, 1000, CID));
        assert_eq!(header.buf_alloc.get(), BUFFER_BYTES);
        scene
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let header = Header { len: (data.len() as u32).into(), ..header };
        self.muxer.guest_sent(&header, data, self.now, nobody);
    }

    fn next(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut room = [0; 600];
        self.muxer.next(&mut room, self.now).map(|(header, bytes)| (header, room[..bytes].to_vec()))
    }

    fn next_op(&mut self) -> Option<Op> {
        self.next().map(|(header, _)| header.op().unwrap())
    }

    fn moved(&mut self, ready: PollFlags) {
        self.muxer.host_moved(PORTS, ready, self.now);
    }
}

#[test]
fn bytes_flow_in_both_directions_within_the_credit() {
    let mut scene = Scene::open();
    scene.send(packet(PORTS, Op::Rw), b"from the guest");
    let mut got = [0; 14];
    scene.host.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"from the guest");

    scene.host.write_all(&[1; 1500]).unwrap();
    scene.moved(PollFlags::POLLIN);
    let sizes: Vec<_> =
        std::iter::from_fn(|| scene.next()).map(|(h, d)| (h.op().unwrap(), d.len())).collect();
    // 1000 bytes of room; then the guest is asked once for more.
    assert_eq!(sizes, [(Op::Rw, 600), (Op::Rw, 400), (Op::CreditRequest, 0)]);
    assert!(!scene.muxer.has_news());
    scene.send(Header { fwd_cnt: 700.into(), ..packet(PORTS, Op::CreditUpdate) }, &[]);
    let (header, data) = scene.next().unwrap();
    assert_eq!((header.op(), data.len(), header.fwd_cnt.get()), (Some(Op::Rw), 500, 14));
    assert_eq!(scene.next_op(), None);
}

#[test]
fn the_guest_hears_when_its_bytes_have_gone_on_and_may_not_send_more_than_there_is_room_for() {
    let mut scene = Scene::open();
    let piece = vec![5; 32 << 10];
    // More than the socket takes: the rest is kept, up to the buffer's size.
    let mut sent = 0;
    while scene.muxer.streams().next().is_some_and(|(_, s)| s.interest().is_empty() || sent < 600 << 10) {
        scene.send(packet(PORTS, Op::Rw), &piece);
        sent += piece.len();
        if scene.muxer.streams().next().is_none() {
            break;
        }
        assert!(sent < 8 << 20, "the socket takes everything");
    }
    // It went beyond its credit: the stream is reset, and nothing else has grown.
    assert_eq!(scene.muxer.streams().count(), 0);
    let last = std::iter::from_fn(|| scene.next_op()).last();
    assert_eq!(last, Some(Op::Rst));

    let mut scene = Scene::open();
    for _ in 0..3 {
        scene.send(packet(PORTS, Op::Rw), &piece);
    }
    let (header, _) = scene.next().unwrap();
    assert_eq!((header.op(), header.fwd_cnt.get()), (Some(Op::CreditUpdate), 96 << 10));
    scene.send(packet(PORTS, Op::CreditRequest), &[]);
    assert_eq!(scene.next_op(), Some(Op::CreditUpdate));
    assert_eq!(scene.next_op(), None);
}

#[test]
fn each_side_may_end_its_direction_and_a_reset_confirms_the_end_of_both() {
    let mut scene = Scene::open();
    scene.send(packet(PORTS, Op::Rw), b"last");
    scene.send(Header { flags: SHUTDOWN_SEND.into(), ..packet(PORTS, Op::Shutdown) }, &[]);
    let mut got = Vec::new();
    scene.host.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"last");
    // The other direction goes on, and ends with the host's.
    scene.host.write_all(b"answer").unwrap();
    scene.host.shutdown(Shutdown::Write).unwrap();
    scene.moved(PollFlags::POLLIN);
    assert_eq!(scene.next().map(|(_, data)| data), Some(b"answer".to_vec()));
    let (header, _) = scene.next().unwrap();
    assert_eq!((header.op(), header.flags.get() & SHUTDOWN_SEND), (Some(Op::Shutdown), SHUTDOWN_SEND));
    scene.send(Header { flags: SHUTDOWN_BOTH.into(), ..packet(PORTS, Op::Shutdown) }, &[]);
    assert_eq!(scene.next_op(), Some(Op::Rst));
    assert_eq!(scene.muxer.streams().count(), 0);
}

#[test]
fn a_program_that_is_gone_ends_the_stream_at_once_or_in_time() {
    let mut scene = Scene::open();
    drop(std::mem::replace(&mut scene.host, pair().1));
    scene.moved(PollFlags::POLLHUP);
    let (header, _) = scene.next().unwrap();
    assert_eq!((header.op(), header.flags.get()), (Some(Op::Shutdown), SHUTDOWN_BOTH));
    // The guest never confirms it.
    let deadline = scene.muxer.deadline().unwrap();
    scene.muxer.expire(deadline - Duration::from_millis(1));
    assert_eq!(scene.muxer.streams().count(), 1);
    scene.muxer.expire(deadline);
    assert_eq!((scene.muxer.streams().count(), scene.next_op()), (0, Some(Op::Rst)));

    // Bytes for a program that is gone: the guest learns that nobody reads.
    let mut scene = Scene::open();
    drop(std::mem::replace(&mut scene.host, pair().1));
    scene.send(packet(PORTS, Op::Rw), b"too late");
    let told: Vec<_> =
        std::iter::from_fn(|| scene.next()).filter(|(h, _)| h.op() == Some(Op::Shutdown)).collect();
    assert!(told.iter().any(|(h, _)| h.flags.get() & SHUTDOWN_RECEIVE != 0), "{told:?}");
}

#[test]
fn the_host_asks_the_guest_and_is_told_its_port() {
    let (device, mut host) = pair();
    let mut scene = Scene { muxer: Muxer::new(CID), host: pair().1, now: Instant::now() };
    assert!(scene.muxer.host_asks(device, 5000, scene.now));
    let (request, _) = scene.next().unwrap();
    assert_eq!((request.op(), request.dst_port.get()), (Some(Op::Request), 5000));
    let ports = Ports { host: request.src_port.get(), guest: 5000 };
    scene.send(packet(ports, Op::Response), &[]);
    let line = format!("OK {}\n", ports.host);
    let mut got = vec![0; line.len()];
    host.read_exact(&mut got).unwrap();
    assert_eq!(got, line.as_bytes());

    // A guest that refuses, and one that never answers.
    for answers in [true, false] {
        let (device, mut host) = pair();
        assert!(scene.muxer.host_asks(device, 5001, scene.now));
        let (request, _) = scene.next().unwrap();
        match answers {
            true => scene.send(packet(Ports { host: request.src_port.get(), guest: 5001 }, Op::Rst), &[]),
            false => scene.muxer.expire(scene.muxer.deadline().unwrap()),
        }
        assert_eq!(host.read(&mut [0; 1]).unwrap(), 0);
        assert_eq!(scene.next_op(), (!answers).then_some(Op::Rst));
    }
}

#[test]
fn what_belongs_to_nothing_is_reset_and_never_more_than_a_few_resets_wait() {
    let mut scene = Scene::open();
    scene.send(packet(Ports { host: 81, guest: 1 }, Op::Request), &[]);
    scene.send(packet(Ports { host: 81, guest: 1 }, Op::Rw), b"x");
    scene.send(packet(Ports { host: 81, guest: 1 }, Op::Rst), &[]);
    scene.send(Header { kind: 2.into(), ..packet(Ports { host: 81, guest: 2 }, Op::Request) }, &[]);
    assert_eq!(
        (scene.next_op(), scene.next_op(), scene.next_op()),
        (Some(Op::Rst), Some(Op::Rst), Some(Op::Rst))
    );
    // In another's name, or to another: not even that.
    scene.send(Header { src_cid: 9.into(), ..packet(Ports { host: 81, guest: 1 }, Op::Request) }, &[]);
    scene.send(Header { dst_cid: 9.into(), ..packet(Ports { host: 81, guest: 1 }, Op::Request) }, &[]);
    assert_eq!(scene.next_op(), None);
    // An operation that is none, or has no place there, ends the stream that it names.
    scene.send(Header { op: 99.into(), ..packet(PORTS, Op::Rw) }, &[]);
    assert_eq!((scene.next_op(), scene.muxer.streams().count()), (Some(Op::Rst), 0));
    let mut taken = 0;
    while scene.muxer.takes() {
        scene.send(packet(Ports { host: 81, guest: taken }, Op::Rw), b"x");
        taken += 1;
        assert!(taken <= 1000);
    }
    assert_eq!(scene.next_op(), Some(Op::Rst));
    assert!(scene.muxer.takes());
}

#[test]
fn streams_take_turns_and_their_number_is_limited() {
    let mut scene = Scene { muxer: Muxer::new(CID), host: pair().1, now: Instant::now() };
    let mut hosts = Vec::new();
    for guest in 0..MAX_STREAMS as u32 {
        let (device, host) = pair();
        hosts.push(host);
        scene
            .muxer
            .guest_sent(&packet(Ports { host: 80, guest }, Op::Request), &[], scene.now, |_| Ok(device));
    }
    while scene.next().is_some() {}
    let more = Ports { host: 80, guest: 9999 };
    scene.muxer.guest_sent(&packet(more, Op::Request), &[], scene.now, |_| Ok(pair().0));
    assert_eq!(scene.next_op(), Some(Op::Rst));
    assert!(!scene.muxer.host_asks(pair().0, 1, scene.now));
    for guest in [3, 200] {
        hosts[guest as usize].write_all(&[0; 900]).unwrap();
        scene.muxer.host_moved(Ports { host: 80, guest }, PollFlags::POLLIN, scene.now);
    }
    let order: Vec<u32> = std::iter::from_fn(|| scene.next()).map(|(h, _)| h.dst_port.get()).collect();
    assert_eq!(order[..4], [3, 200, 3, 200]);
    scene.muxer.clear();
    assert_eq!(hosts[0].read(&mut [0; 1]).unwrap(), 0);
    assert!(!scene.muxer.has_news());
}
