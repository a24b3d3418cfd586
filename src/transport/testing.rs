//! Channels without a network, for tests here and in the layers above.

use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::{CancelToken, Channel, ChannelOptions, ChannelRole, Stream};
use crate::switchover::{Attempt, SessionId};
use crate::wire::{Header, Message};

/// A time-out that no test is meant to reach.
pub(crate) const LONG: Duration = Duration::from_secs(60);

pub(crate) const ATTEMPT: Attempt = Attempt { session: SessionId([0x5e; 16]), epoch: 3 };

pub(crate) fn token() -> CancelToken {
    CancelToken::new().unwrap()
}

pub(crate) fn options(ms: u64) -> ChannelOptions {
    ChannelOptions { peer_timeout: Duration::from_millis(ms) }
}

/// Two ends of a Unix socket pair, each with a token of its own.
pub(crate) fn stream_pair() -> (Stream, Stream) {
    let (a, b) = UnixStream::pair().unwrap();
    let stream = |s: UnixStream, name: &str| Stream::from_socket(s.into(), name.into(), token()).unwrap();
    (stream(a, "the destination"), stream(b, "the source"))
}

/// Two channels that talk to each other: the source's end and the destination's.
pub(crate) fn channel_pair(role: ChannelRole, options: ChannelOptions) -> (Channel, Channel) {
    let (a, b) = stream_pair();
    (Channel::new(a, ATTEMPT, role, options), Channel::new(b, ATTEMPT, role, options))
}

/// A channel, and the bare socket of its peer.
pub(crate) fn channel_and_socket(options: ChannelOptions) -> (Channel, UnixStream) {
    let (a, b) = UnixStream::pair().unwrap();
    let stream = Stream::from_socket(a.into(), "the other end".into(), token()).unwrap();
    (Channel::new(stream, ATTEMPT, ChannelRole::Main, options), b)
}

/// A stream over two pipes to itself: what is written is read.
pub(crate) fn pipe_loop() -> Stream {
    let (read, write) = std::io::pipe().unwrap();
    Stream::from_pipes(OwnedFd::from(read), OwnedFd::from(write), "the pipe".into(), token()).unwrap()
}

/// A message as bytes, as a channel of `attempt` would send it as frame `sequence`.
pub(crate) fn frame(message: &Message, attempt: Attempt, sequence: u64) -> Vec<u8> {
    let body = message.encode().unwrap();
    let header = Header {
        kind: message.kind(),
        payload_bytes: body.len() as u32,
        attempt,
        sequence,
        body_crc: crc32c::crc32c(&body),
    };
    [&header.encode()[..], &body].concat()
}

/// Bytes that are not all alike.
pub(crate) fn noise(bytes: usize) -> Vec<u8> {
    (0..bytes as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

/// `data` cut into pieces of uneven lengths, some of them empty.
pub(crate) fn pieces(data: &[u8]) -> Vec<IoSlice<'_>> {
    let mut rest = data;
    let mut out = Vec::new();
    for i in 0.. {
        if rest.is_empty() {
            return out;
        }
        let (now, later) = rest.split_at(rest.len().min(i % 7 * 501));
        out.push(IoSlice::new(now));
        rest = later;
    }
    out
}
