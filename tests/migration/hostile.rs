//! Peers that lie, babble, or say nothing: the receiver stays, holds no guest, and takes the next
//! honest sender; a sender keeps its guest.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use vmferry::control::RunState;
use vmferry::wire::limits::max_payload;
use vmferry::wire::{
    Done, End, FrameType, HEADER_BYTES, Header, JsonBody, MAGIC, Message, PAGES_HEAD_BYTES, PageBitmap,
    Refused, RefusedCode,
};

use crate::guest::{check_alive, check_beats};
use crate::peer::{Peer, attempt, hello, machine};
use crate::program::until;
use crate::proxy::{Proxy, Way};
use crate::scene::{Receiver, SLOW, Scene, Vmrun, kvm, never_paused};

/// A guest and a receiver, which takes the guest in the end.
struct Target {
    a: Vmrun,
    b: Receiver,
    scene: Scene,
}

impl Target {
    fn new(receiver: &[&str]) -> Self {
        let scene = Scene::new();
        let a = scene.small("a");
        let b = scene.receiver("b", receiver);
        Self { a, b, scene }
    }

    fn peer(&self) -> Peer {
        Peer::connect(&self.b.address, 9)
    }

    /// The receiver is as it was, and takes an honest guest.
    #[track_caller]
    fn check_honest(mut self) {
        assert!(self.b.program.is_running());
        self.b.await_status("it is empty", |s| s.run_state == RunState::Empty);
        self.scene.send(&self.a, &self.b.address, &[]).end().expect(0, &[]);
        assert_eq!(self.b.program.end().code, 0);
        check_alive(&[&self.a, &self.b]);
    }
}

// Row 25.
#[test]
fn bytes_that_are_no_stream() {
    if !kvm() {
        return;
    }
    let target = Target::new(&[]);
    let honest = target.peer().header(FrameType::Hello, b"{}").encode();
    let mut oversized = honest;
    oversized[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    reseal(&mut oversized);
    let mut damaged = honest;
    damaged[20] ^= 1;
    let random: Vec<u8> = (0..100_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let texts: [&[u8]; 9] = [
        b"",
        b"GET / HTTP/1.1\r\nHost: there\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        &random,
        &MAGIC,
        &honest[..20],
        &honest,
        &oversized,
        &damaged,
    ];
    for text in texts {
        let mut peer = target.peer();
        peer.bytes(text);
        let _ = peer.stream.shutdown(std::net::Shutdown::Write);
        let heard = peer.hear_all();
        assert!(heard.iter().all(|m| matches!(m, Message::Refused(_))), "{text:?}: {heard:?}");
        assert!(target.b.is_empty());
    }
    target.check_honest();
}

fn reseal(header: &mut [u8; HEADER_BYTES]) {
    let crc = crc32c::crc32c(&header[..HEADER_BYTES - 4]);
    header[HEADER_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn first_words_that_are_out_of_place() {
    if !kvm() {
        return;
    }
    let target = Target::new(&[]);
    let good = hello(&machine(&target.a));
    for (message, code) in [
        (Message::Run, Some(RefusedCode::Protocol)),
        (Message::Revoke, Some(RefusedCode::Protocol)),
        (end(0, 0, None), Some(RefusedCode::Protocol)),
        (Message::Join { index: 1 }, Some(RefusedCode::Session)),
        (Message::Hello(vmferry::wire::Hello { resume: true, ..good.clone() }), None),
        (
            Message::Hello(vmferry::wire::Hello { version_min: 8, version_max: 9, ..good }),
            Some(RefusedCode::Version),
        ),
    ] {
        let mut peer = target.peer();
        peer.say(&message);
        let answers = peer.hear_all();
        match (&answers[..], code) {
            ([Message::Refused(Refused { code: got, .. })], Some(want)) => {
                assert_eq!(*got, want, "{message:?}")
            }
            ([Message::HelloAck(ack)], None) => {
                assert_eq!(ack.resume_phase, Some(vmferry::wire::ResumePhase::Unknown));
            }
            _ => panic!("{message:?}: {answers:?}"),
        }
        assert!(target.b.is_empty());
    }
    // A HELLO that is no JSON.
    let mut peer = target.peer();
    peer.frame(FrameType::Hello, b"{\"version_min\":");
    assert!(matches!(&peer.hear_all()[..], [Message::Refused(r)] if r.code == RefusedCode::Protocol));
    target.check_honest();
}

/// Says something within an attempt that has come as far as HELLO or MACHINE. It must end the
/// attempt, never crash anything, and never let the guest run.
#[test]
fn lies_within_an_attempt() {
    if !kvm() {
        return;
    }
    let target = Target::new(&[]);
    let total = machine(&target.a).ram.total_pages();
    type Lie<'a> = (&'static str, &'a dyn Fn(&mut Peer));
    let after_hello: &[Lie] = &[
        ("pages before the machine", &|p| p.frame(FrameType::Pages, &pages(0, 1, 1, 0))),
        ("a machine that is none", &|p| p.say(&Message::Machine(JsonBody::of(&[1, 2]).unwrap()))),
        ("a machine with silly numbers", &|p| {
            let mut m = serde_json::to_value(machine(&target.a)).unwrap();
            m["vcpus"] = 0.into();
            p.say(&Message::Machine(JsonBody::of(&m).unwrap()));
        }),
        ("HELLO twice", &|p| p.say(&Message::Hello(hello(&machine(&target.a))))),
        ("END at once", &|p| p.say(&end(total, 0, None))),
        ("RUN at once", &|p| p.say(&Message::Run)),
        ("DONE at once", &|p| {
            p.say(&Message::Done(Done { pages: 0, zero_pages: 0, digest: None, latency: None }))
        }),
        ("what only a destination says", &|p| p.say(&Message::Accepted)),
        ("another session", &|p| {
            p.attempt = attempt(8, 1);
            p.say(&Message::Ping { nonce: 1 });
        }),
        ("another epoch", &|p| {
            p.attempt = attempt(9, 2);
            p.say(&Message::Ping { nonce: 1 });
        }),
        ("a frame left out", &|p| {
            p.sequence += 1;
            p.say(&Message::Ping { nonce: 1 });
        }),
        ("a frame again", &|p| {
            p.sequence -= 1;
            p.say(&Message::Hello(hello(&machine(&target.a))));
        }),
        ("half a frame", &|p| {
            let header = p.header(FrameType::Machine, &[b' '; 1000]).encode();
            p.bytes(&header);
            let _ = p.stream.shutdown(std::net::Shutdown::Write);
        }),
        ("a payload that is damaged", &|p| {
            let header = Header { body_crc: 1, ..p.header(FrameType::Ping, &[0; 8]) }.encode();
            p.bytes(&[&header[..], &[0; 8]].concat());
        }),
    ];
    let after_machine: &[Lie] = &[
        ("a page outside RAM", &|p| p.frame(FrameType::Pages, &pages(total, 1, 1, 0))),
        ("a page at the end of the world", &|p| p.frame(FrameType::Pages, &pages(u64::MAX, 1, 1, 0))),
        ("a run over the end of RAM", &|p| p.frame(FrameType::Pages, &pages(total - 1, u32::MAX, 1, 0))),
        ("a table that says more than there is", &|p| p.frame(FrameType::Pages, &pages(0, 4, 0, 1))),
        ("runs of an unknown kind", &|p| p.frame(FrameType::Pages, &pages(0, 1, 9, 1))),
        ("a pass that ends with nothing placed", &|p| {
            p.say(&Message::State(vec![7; 100]));
            p.say(&end(total, 0, None));
        }),
        ("a state that is none, with all pages", &|p| {
            p.frame(FrameType::Pages, &pages(0, total as u32, 1, 0));
            p.say(&Message::State(vec![7; 100]));
            p.say(&end(0, total, None));
        }),
        ("a digest that is wrong", &|p| {
            p.frame(FrameType::Pages, &pages(0, total as u32, 1, 0));
            p.say(&Message::State(vec![7; 100]));
            let digest = Some("00".repeat(32));
            p.say(&end(0, total, digest));
        }),
        ("the largest state and no more", &|p| {
            let header =
                Header { payload_bytes: max_payload(FrameType::State), ..p.header(FrameType::State, b"") };
            p.bytes(&header.encode());
            let _ = p.stream.shutdown(std::net::Shutdown::Write);
        }),
        ("the machine twice", &|p| p.say(&Message::Machine(JsonBody::of(&machine(&target.a)).unwrap()))),
        ("pages to come later, which HELLO has not asked for", &|p| {
            p.say(&Message::Missing(PageBitmap { first: 0, words: vec![u64::MAX; total as usize / 64] }));
        }),
        ("RUN before everything", &|p| p.say(&Message::Run)),
        ("REVOKE before everything", &|p| p.say(&Message::Revoke)),
    ];
    let mut session = 10;
    for (made, lies) in [(false, after_hello), (true, after_machine)] {
        for (what, lie) in lies {
            session += 1;
            let connect = if made { Peer::with_machine } else { Peer::with_hello };
            let mut peer = until("the receiver is free again", || {
                target.b.status().name.is_none().then(|| connect(&target.b.address, session, &target.a))
            });
            lie(&mut peer);
            let heard = peer.hear_all();
            let bad = |m: &Message| matches!(m, Message::Ready(_) | Message::Running(_) | Message::Done(_));
            assert!(!heard.iter().any(bad), "{what}: {heard:?}");
            target.b.await_status(what, |s| s.run_state == RunState::Empty);
        }
    }
    target.check_honest();
}

/// END after one pass.
fn end(pages: u64, zero_pages: u64, digest: Option<String>) -> Message {
    let mut end: End = serde_json::from_str(r#"{"passes":1,"pages":0,"zero_pages":0}"#).unwrap();
    (end.pages, end.zero_pages, end.digest) = (pages, zero_pages, digest);
    Message::End(end)
}

/// A PAGES payload with one run, whose data is zeros.
fn pages(first: u64, count: u32, kind: u32, data_pages: usize) -> Vec<u8> {
    let mut bytes = vec![0; PAGES_HEAD_BYTES];
    bytes[0..4].copy_from_slice(&1u32.to_le_bytes());
    bytes[4..8].copy_from_slice(&4096u32.to_le_bytes());
    bytes.extend(first.to_le_bytes());
    bytes.extend(count.to_le_bytes());
    bytes.extend(kind.to_le_bytes());
    bytes.resize(bytes.len() + data_pages * 4096, 0);
    bytes
}

#[test]
fn a_frame_that_comes_twice_ends_the_attempt() {
    if !kvm() {
        return;
    }
    let target = Target::new(&[]);
    let link = Proxy::to(&target.b.address);
    for (way, kind) in [(Way::ToDest, FrameType::Barrier), (Way::ToSource, FrameType::Accepted)] {
        link.repeat(way, kind);
        let end = target.scene.send(&target.a, &link.address, &[]).end();
        end.expect(5, &["the source has the guest"]);
        target.b.await_status("it is empty", |s| s.run_state == RunState::Empty);
        target.a.await_running();
    }
    target.check_honest();
}

#[test]
fn a_second_sender_is_refused_and_disturbs_nobody() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let elsewhere = Scene::new();
    let (a, other) = (scene.big("a"), elsewhere.small("other"));
    let mut b = scene.receiver("b", &[]);
    let mut send = scene.send(&a, &b.address, &["--bwlimit", "6M"]);
    send.await_line("pages on their way", |l| {
        (l["progress"]["sent_bytes"].as_u64()? > 1 << 20).then_some(())
    });
    never_paused(&other, || {
        elsewhere.send(&other, &b.address, &[]).end().expect(3, &["another migration is under way"]);
    });
    // The same vmrun cannot be sent twice at once, either.
    let end = scene.send(&a, &b.address, &[]).end();
    assert!([1, 3].contains(&end.code) && end.stderr.contains("another mover"), "{end:?}");
    send.end().expect(0, &[]);
    assert_eq!(b.program.end().code, 0);
    check_alive(&[&a, &b]);
    check_beats(&[&other]);
}

#[test]
fn many_idle_callers_and_some_that_drip() {
    if !kvm() {
        return;
    }
    let target = Target::new(&["--peer-timeout", "1s"]);
    let address = target.b.address.strip_prefix("tcp:").unwrap().to_owned();
    let idle: Vec<TcpStream> = (0..100).map(|_| TcpStream::connect(&address).unwrap()).collect();
    let honest = target.peer().header(FrameType::Hello, &[b' '; 1 << 20]).encode();
    let drips: Vec<_> = (0..8)
        .map(|_| {
            let mut stream = TcpStream::connect(&address).unwrap();
            let mut bytes = honest.into_iter().chain(std::iter::repeat(b' '));
            std::thread::spawn(move || {
                // Until it is turned away.
                while stream.write_all(&[bytes.next().unwrap()]).is_ok() {
                    std::thread::sleep(Duration::from_millis(200));
                }
            })
        })
        .collect();
    target.check_honest();
    drop(idle);
    for drip in drips {
        drip.join().unwrap();
    }
}

/// A destination that is none, for one caller: reads some, answers `bytes`, waits for the end.
fn false_destination(bytes: &'static [u8]) -> (String, std::thread::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", listener.local_addr().unwrap());
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 1000]);
        let _ = stream.write_all(bytes);
        let _ = stream.set_read_timeout(Some(crate::program::PATIENCE));
        while stream.read(&mut [0; 1000]).is_ok_and(|n| n > 0) {}
    });
    (address, thread)
}

#[test]
fn destinations_that_are_none() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.small("a");
    for (bytes, why) in [
        (
            &b"HTTP/1.1 400 Bad Request\r\n\r\nand some more text, so that there is a header's worth"[..],
            "not this protocol",
        ),
        (b"", "silent"),
        (b"VMFYxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", "damaged"),
    ] {
        let (address, thread) = false_destination(bytes);
        never_paused(&a, || {
            let end = scene.send(&a, &address, &["--peer-timeout", "1s"]).end();
            end.expect(5, &[why, &address, "the source has the guest"]);
            assert_eq!(end.stderr.lines().count(), 1, "{end:?}");
        });
        thread.join().unwrap();
    }
    check_beats(&[&a]);
}

#[test]
fn a_destination_of_another_version() {
    if !kvm() {
        return;
    }
    let target = Target::new(&[]);
    let link = Proxy::to(&target.b.address);
    link.rewrite(Way::ToSource, FrameType::HelloAck, |ack| ack["version"] = 4.into());
    never_paused(&target.a, || {
        let end = target.scene.send(&target.a, &link.address, SLOW).end();
        assert!([3, 5].contains(&end.code), "{end:?}");
        end.expect(end.code, &["version 4", "the source has the guest"]);
    });
    target.check_honest();
}
