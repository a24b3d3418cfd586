//! A channel: the first frame of a caller, then all others, with the data of pages.

use std::io::{Seek, SeekFrom, Write};
use std::time::Duration;

use vmferry::switchover::{Attempt, SessionId};
use vmferry::sys::memfd;
use vmferry::transport::{CancelToken, Channel, ChannelOptions, Frame, Stream};
use vmferry::wire::Message;

use super::frames::{self, Sent};
use super::input::{Reader, Writer};
use super::messages::{hello, samples};
use super::wire::ATTEMPT;

/// The largest stream.
const MOST_BYTES: usize = 4 << 20;

pub fn run(data: &[u8]) {
    let mut input = Reader(data);
    let total_pages = u64::from(input.u16());
    let accepts_pages = input.u8() & 1 == 1;
    let mut sent = Sent { attempt: ATTEMPT, sequence: 0 };
    let mut bytes = Vec::new();
    while !input.is_empty() && bytes.len() < MOST_BYTES {
        bytes.extend(sent.frame(&mut input).1);
    }
    let options = ChannelOptions { peer_timeout: Duration::from_secs(5) };
    let (mut channel, first) = match Channel::accept(stream_of(&bytes), options) {
        Ok(accepted) => accepted,
        Err(error) => return drop(error.to_string()),
    };
    assert!(matches!(first, Message::Hello(_) | Message::Join { index: 1.. }));
    if accepts_pages {
        channel.receiver().accept_pages(total_pages);
    }
    let error = loop {
        match channel.receiver().recv() {
            Ok(Frame::Message(message)) => {
                assert!(!matches!(message, Message::Ping { .. } | Message::Pong { .. }));
            }
            Ok(Frame::Pages(mut pages)) => {
                assert!(accepts_pages);
                let mut into = vec![0; pages.table.data_bytes() as usize];
                assert_eq!(pages.data.left(), into.len() as u64);
                assert!(pages.table.runs().iter().all(|r| r.first.0 + u64::from(r.pages) <= total_pages));
                let _ = pages.data.read(&mut into);
            }
            Err(error) => break error,
        }
    };
    let _ = error.to_string();
    assert!(channel.receiver().recv().is_err(), "after an error nothing more comes");
}

/// A stream that brings `bytes` and ends.
fn stream_of(bytes: &[u8]) -> Stream {
    let made = "a memfd can be made";
    let mut from = memfd::create_sealed(c"fuzz", bytes.len() as u64).expect(made);
    from.write_all(bytes).expect(made);
    from.seek(SeekFrom::Start(0)).expect(made);
    let into = std::fs::File::options().write(true).open("/dev/null").expect("there is /dev/null");
    let token = CancelToken::new().expect("a token can be made");
    Stream::from_pipes(from.into(), into.into(), "the fuzzer".into(), token).expect("a stream can be made")
}

pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let begin = || Writer::default().u16(256).u8(1);
    let opened = || frames::put(begin(), &Message::Hello(hello(0, true)));
    let all = samples().iter().fold(opened(), frames::put);
    let pages = frames::put_pages(opened(), &[(0, 3, false), (9, 200, true)]);
    let joined = frames::put(begin(), &Message::Join { index: 1 });
    let joined = frames::put_pages(joined, &[(7, 1, false)]);
    let joined = frames::put(joined, &Message::Barrier { pass: 1 });
    let other = Attempt { session: SessionId([1; 16]), epoch: 2 };
    let strange = Sent { attempt: other, sequence: 0 };
    let strange = vmferry::wire::Header {
        kind: vmferry::wire::FrameType::Run,
        payload_bytes: 0,
        attempt: strange.attempt,
        sequence: strange.sequence,
        body_crc: 0,
    };
    let strange = opened().u8(0).u8(32).chunk(&strange.encode());
    vec![
        ("all".into(), all.0),
        ("pages".into(), pages.0),
        ("bulk".into(), joined.0),
        ("strange".into(), strange.0),
    ]
}
