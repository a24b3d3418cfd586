//! Reading the parts of a frame from a stream.

use std::io::IoSliceMut;
use std::time::Instant;

use super::channel::ChannelStats;
use super::stream::Limits;
use super::{ChannelError, ChannelOptions, ReadHalf, StreamError};
use crate::wire::{FrameType, HEADER_BYTES, Header, HeaderError, MAGIC, Message, MessageError};

/// How much is allocated ahead of the bytes that fill it.
const STEP: usize = 1 << 20;

/// The frame that a stream begins with, before it is known whose it is.
pub(super) struct FirstFrame {
    pub header: Header,
    message: Result<Message, ChannelError>,
}

impl FirstFrame {
    /// Reads it. An error when there is no valid header; what is wrong after that is kept for
    /// [`FirstFrame::message`], since it can be answered.
    pub(super) fn read(
        half: &ReadHalf,
        options: ChannelOptions,
        stats: &ChannelStats,
    ) -> Result<Self, ChannelError> {
        let (header, _) = read_header(half, options, stats)?;
        let peer = || half.peer().to_owned();
        if !matches!(header.kind, FrameType::Hello | FrameType::Join) {
            let message = Err(unexpected(peer(), header.kind, "HELLO or JOIN"));
            return Ok(Self { header, message });
        }
        if header.sequence != 0 {
            let message = Err(ChannelError::OutOfOrder { peer: peer(), got: header.sequence, expected: 0 });
            return Ok(Self { header, message });
        }
        let bound = options.frame_time(u64::from(header.payload_bytes));
        let limits = Limits { silence: options.peer_timeout, whole: Some((Instant::now() + bound, bound)) };
        let message = match read_message(half, &header, limits, stats) {
            Err(e @ ChannelError::Stream(_)) => return Err(e),
            other => other,
        };
        Ok(Self { header, message })
    }

    /// HELLO or JOIN, or what is wrong.
    pub(super) fn message(self) -> Result<Message, ChannelError> {
        self.message
    }
}

/// The error for a frame of type `got` where `expected` was due.
pub(super) fn unexpected(peer: String, got: FrameType, expected: &str) -> ChannelError {
    ChannelError::Unexpected { peer, got, expected: expected.to_owned() }
}

/// Reads one header and when its first byte came. The whole must come within the silence that is
/// allowed.
pub(super) fn read_header(
    half: &ReadHalf,
    options: ChannelOptions,
    stats: &ChannelStats,
) -> Result<(Header, Instant), ChannelError> {
    let silence = options.peer_timeout;
    let mut bytes = [0; HEADER_BYTES];
    let mut filled = half.read_some(&mut [IoSliceMut::new(&mut bytes)], Limits { silence, whole: None })?;
    if filled == 0 {
        return Err(half.closed().into());
    }
    let begun = Instant::now();
    let limits = Limits { silence, whole: Some((begun + silence, silence)) };
    // What speaks something else is told at once: it may have nothing more to say.
    let first = [bytes[0], bytes[1], bytes[2], bytes[3]];
    let known = filled.min(MAGIC.len());
    let rest = match first[..known] == MAGIC[..known] {
        true => half.read_exact(&mut bytes, &mut filled, limits),
        false => Ok(()),
    };
    stats.count_received(filled);
    rest?;
    if first[..known] != MAGIC[..known] {
        let (peer, cause) = (half.peer().to_owned(), HeaderError::Magic(first));
        return Err(ChannelError::Header { peer, cause });
    }
    let header = Header::decode(&bytes)
        .map_err(|cause| ChannelError::Header { peer: half.peer().to_owned(), cause })?;
    Ok((header, begun))
}

/// Reads the payload of a frame that is not PAGES. Memory is allocated as bytes come, not as they
/// are promised.
pub(super) fn read_message(
    half: &ReadHalf,
    header: &Header,
    limits: Limits,
    stats: &ChannelStats,
) -> Result<Message, ChannelError> {
    let length = header.payload_bytes as usize;
    let mut payload = Vec::new();
    while payload.len() < length {
        let at = payload.len();
        payload.resize(length.min(at + STEP), 0);
        read_counted(half, &mut payload[at..], limits, stats)?;
    }
    let result = match crc32c::crc32c(&payload) == header.body_crc {
        true => Message::decode(header.kind, payload),
        false => Err(MessageError::Damaged(header.kind)),
    };
    result.map_err(|cause| ChannelError::Message { peer: half.peer().to_owned(), cause })
}

/// Fills `buf` and counts the bytes, also when it fails.
pub(super) fn read_counted(
    half: &ReadHalf,
    buf: &mut [u8],
    limits: Limits,
    stats: &ChannelStats,
) -> Result<(), StreamError> {
    let mut filled = 0;
    let result = half.read_exact(buf, &mut filled, limits);
    stats.count_received(filled);
    result
}
