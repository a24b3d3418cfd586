//! Channels whose other end lies, stalls or leaves (FAILURES: row 25).

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use proptest::prelude::*;

use super::testing::*;
use super::*;
use crate::switchover::{Attempt, SessionId};
use crate::wire::limits::MAX_STATE_BYTES;
use crate::wire::{FrameType, HEADER_BYTES, Header, HeaderError, Message, RefusedCode};

/// What a channel makes of `bytes` followed by the end of file.
fn recv(bytes: &[u8]) -> ChannelError {
    let (mut channel, mut socket) = channel_and_socket(options(60_000));
    channel.receiver().accept_pages(64);
    socket.write_all(bytes).unwrap();
    socket.shutdown(Shutdown::Write).unwrap();
    loop {
        if let Err(e) = channel.recv_message() {
            let again = channel.recv_message().unwrap_err();
            assert!(matches!(again, ChannelError::Dead { .. } | ChannelError::Misuse(_)), "{again}");
            return e;
        }
    }
}

/// What becomes of a caller that sends `bytes` and then the end of file, and what it is answered.
fn accept(bytes: &[u8]) -> (ChannelError, Option<Message>) {
    let (near, socket) = UnixStream::pair().unwrap();
    (&socket).write_all(bytes).unwrap();
    socket.shutdown(Shutdown::Write).unwrap();
    let near = Stream::from_socket(near.into(), "the caller".into(), token()).unwrap();
    let error = Channel::accept(near, options(60_000)).unwrap_err();
    let theirs = Stream::from_socket(socket.into(), "the receiver".into(), token()).unwrap();
    let mut theirs = Channel::new(theirs, ATTEMPT, ChannelRole::Main, options(60_000));
    (error, theirs.recv_message().ok())
}

#[test]
fn frames_of_others_are_refused_by_name() {
    let other = Attempt { session: SessionId([1; 16]), ..ATTEMPT };
    let error = recv(&frame(&Message::Run, other, 0));
    assert!(matches!(error, ChannelError::WrongSession { kind: FrameType::Run, .. }), "{error}");
    for epoch in [ATTEMPT.epoch - 1, ATTEMPT.epoch + 1] {
        let error = recv(&frame(&Message::Run, Attempt { epoch, ..ATTEMPT }, 0));
        assert!(matches!(error, ChannelError::WrongEpoch { got, have: 3, .. } if got == epoch), "{error}");
    }
}

#[test]
fn a_repeated_or_missing_frame_is_noticed() {
    let run = |sequence| frame(&Message::Run, ATTEMPT, sequence);
    for (second, bytes) in [(0, [run(0), run(0)]), (2, [run(0), run(2)])] {
        let error = recv(&bytes.concat());
        assert!(
            matches!(error, ChannelError::OutOfOrder { got, expected: 1, .. } if got == second),
            "{error}"
        );
        assert!(error.is_protocol());
    }
}

#[test]
fn an_end_within_a_frame_is_not_an_end_between_frames() {
    let whole = frame(&Message::Barrier { pass: 1 }, ATTEMPT, 0);
    for n in 1..whole.len() {
        let error = recv(&whole[..n]);
        assert!(matches!(error, ChannelError::Stream(StreamError::Truncated { .. })), "{n}: {error}");
    }
    for bytes in [&[][..], &whole] {
        let error = recv(bytes);
        assert!(matches!(error, ChannelError::Stream(StreamError::Closed { .. })), "{error}");
    }
}

#[test]
fn garbage_is_named_as_what_it_is() {
    let error = recv(b"GET / HTTP/1.1\r\nHost: somewhere.example\r\n\r\n    ");
    let expected = matches!(&error, ChannelError::Header { cause: HeaderError::Magic(_), .. });
    assert!(expected && error.to_string().contains("not this protocol"), "{error}");
    let mut damaged = frame(&Message::Barrier { pass: 1 }, ATTEMPT, 0);
    *damaged.last_mut().unwrap() ^= 1;
    assert!(matches!(recv(&damaged), ChannelError::Message { .. }));
}

#[test]
fn a_promise_of_64_mib_costs_nothing_until_it_is_kept() {
    let header = Header {
        kind: FrameType::State,
        payload_bytes: MAX_STATE_BYTES,
        attempt: ATTEMPT,
        sequence: 0,
        body_crc: 0,
    };
    let error = recv(&[&header.encode()[..], &[0; 1000]].concat());
    assert!(matches!(error, ChannelError::Stream(StreamError::Truncated { .. })), "{error}");
}

#[test]
fn pages_before_their_time_are_refused() {
    let header =
        Header { kind: FrameType::Pages, payload_bytes: 64, attempt: ATTEMPT, sequence: 0, body_crc: 0 };
    let (mut channel, mut socket) = channel_and_socket(options(60_000));
    socket.write_all(&header.encode()).unwrap();
    assert!(matches!(channel.recv_message(), Err(ChannelError::Unexpected { .. })));
    let short = Header { payload_bytes: 15, ..header };
    assert!(matches!(recv(&[&short.encode()[..], &[0; 15]].concat()), ChannelError::Message { .. }));
}

#[test]
fn a_dripping_peer_is_given_up() {
    let (mut channel, socket) = channel_and_socket(options(600));
    let stop = token();
    std::thread::scope(|s| {
        let (stop, mut socket) = (&stop, socket);
        s.spawn(move || {
            let bytes = frame(&Message::Run, ATTEMPT, 0);
            for byte in bytes.iter().take(HEADER_BYTES - 1) {
                if socket.write_all(&[*byte]).is_err() || stop.wait(Instant::now() + options(50).peer_timeout)
                {
                    return;
                }
            }
            stop.wait(Instant::now() + LONG);
        });
        let error = channel.recv_message().unwrap_err();
        stop.cancel("seen");
        assert!(matches!(error, ChannelError::Stream(StreamError::TooSlow { .. })), "{error}");
    });
}

#[test]
fn a_silent_caller_does_not_hold_up_the_receiver() {
    let (near, _socket) = UnixStream::pair().unwrap();
    let near = Stream::from_socket(near.into(), "the caller".into(), token()).unwrap();
    let error = Channel::accept(near, options(30)).unwrap_err();
    assert!(matches!(error, ChannelError::Stream(StreamError::Silent { .. })), "{error}");
}

#[test]
fn a_caller_that_begins_wrongly_is_told_so() {
    for first in [Message::Run, Message::Join { index: 0 }] {
        let (error, answer) = accept(&frame(&first, ATTEMPT, 0));
        assert!(matches!(error, ChannelError::Unexpected { .. }), "{error}");
        let Some(Message::Refused(refused)) = answer else { panic!("{answer:?}") };
        assert_eq!(refused.code, RefusedCode::Protocol);
    }
    let (error, answer) = accept(&frame(&Message::Join { index: 1 }, ATTEMPT, 5));
    assert!(matches!(error, ChannelError::OutOfOrder { got: 5, expected: 0, .. }), "{error}");
    assert!(matches!(answer, Some(Message::Refused(_))));
    // Bytes that are no frame get no answer, only an end.
    let (error, answer) = accept(&noise(200));
    assert!(matches!(error, ChannelError::Header { .. }), "{error}");
    assert!(answer.is_none());
}

#[test]
fn pings_that_nobody_reads_answers_to_do_not_block() {
    let (mut channel, mut socket) = channel_and_socket(options(60_000));
    std::thread::scope(|s| {
        s.spawn(move || {
            for sequence in 0..20_000 {
                socket.write_all(&frame(&Message::Ping { nonce: 1 }, ATTEMPT, sequence)).unwrap();
            }
            socket.write_all(&frame(&Message::Run, ATTEMPT, 20_000)).unwrap();
            socket
        });
        assert_eq!(channel.recv_message().unwrap(), Message::Run);
    });
}

proptest! {
    #[test]
    fn no_stream_panics(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        kind in prop::sample::select(FrameType::ALL),
        length in 0u32..200,
    ) {
        recv(&bytes);
        accept(&bytes);
        let header = Header { kind, payload_bytes: length, attempt: ATTEMPT, sequence: 0, body_crc: crc32c::crc32c(&bytes) };
        // A length over the limit of the type does not pass either.
        let framed = [&header.encode()[..], &bytes].concat();
        recv(&framed);
        let (near, socket) = UnixStream::pair().unwrap();
        (&socket).write_all(&framed).unwrap();
        socket.shutdown(Shutdown::Write).unwrap();
        let near = Stream::from_socket(near.into(), "the caller".into(), token()).unwrap();
        let _ = Channel::accept(near, options(60_000));
    }
}
