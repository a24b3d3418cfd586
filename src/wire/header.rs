//! The header that every frame begins with.
//!
//! Fixed layout, little-endian, 48 bytes; docs/protocol.md has the table. A header is checked whole
//! (magic, checksum, type, flags, length) before a byte of its payload is read.

use std::fmt;

use thiserror::Error;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::limits::max_payload;
use crate::switchover::{Attempt, SessionId};

/// The first four bytes of every frame.
pub const MAGIC: [u8; 4] = *b"VMFY";

/// Bytes in a header.
pub const HEADER_BYTES: usize = 48;

/// The header as it is on the wire.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    kind: U16,
    flags: U16,
    payload_bytes: U32,
    epoch: U32,
    session: [u8; 16],
    sequence: U64,
    body_crc: U32,
    header_crc: U32,
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES);

macro_rules! frame_types {
    ($($(#[$doc:meta])* $name:ident = $number:literal $word:literal,)*) => {
        /// What a frame is. The numbers are the protocol's and never change their meaning.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum FrameType {
            $($(#[$doc])* $name = $number,)*
        }

        impl FrameType {
            /// Every type there is, by number.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            fn from_u16(number: u16) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }
        }

        impl fmt::Display for FrameType {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self {
                    $(Self::$name => $word,)*
                })
            }
        }
    };
}

frame_types! {
    /// S→D, first on the main channel.
    Hello = 1 "HELLO",
    /// D→S, the answer to HELLO.
    HelloAck = 2 "HELLO_ACK",
    /// D→S, instead of an answer: no.
    Refused = 3 "REFUSED",
    /// S→D, what the machine is.
    Machine = 4 "MACHINE",
    /// D→S, the machine is made and empty: send.
    Accepted = 5 "ACCEPTED",
    /// S→D, first on every further channel.
    Join = 6 "JOIN",
    /// D→S, the answer to JOIN.
    Joined = 7 "JOINED",
    /// S→D, pages of guest RAM.
    Pages = 16 "PAGES",
    /// S→D on every channel that carried pages: the pass is over.
    Barrier = 17 "BARRIER",
    /// D→S, all barriers of a pass have come and every page before them is placed.
    PassDone = 18 "PASS_DONE",
    /// S→D, the saved state of vCPUs and devices.
    State = 32 "STATE",
    /// S→D, everything has been sent.
    End = 33 "END",
    /// D→S, everything is restored and synchronised; the guest is held.
    Ready = 34 "READY",
    /// S→D, the source is fenced: run.
    Run = 35 "RUN",
    /// D→S, the guest runs.
    Running = 36 "RUNNING",
    /// S→D, give the guest up if it does not run.
    Revoke = 37 "REVOKE",
    /// D→S, it never ran and never will.
    Revoked = 38 "REVOKED",
    /// S→D, before END: pages that come after the guest.
    Missing = 64 "MISSING",
    /// D→S, somebody waits for these pages.
    PageRequest = 65 "PAGE_REQUEST",
    /// D→S, on a connection that comes back: the pages that are there.
    Received = 66 "RECEIVED",
    /// Either way, before READY: this attempt is over.
    Abort = 48 "ABORT",
    /// Either way: the counts that both must agree on.
    Done = 49 "DONE",
    /// Either way: a sign of life.
    Ping = 50 "PING",
    /// Either way: the answer to PING.
    Pong = 51 "PONG",
    /// S→D, last: the source has let its copy go.
    Released = 52 "RELEASED",
}

/// Numbers that are set aside for postcopy (docs/protocol.md), and refused by name until then.
const RESERVED: &[(u16, &str)] = &[(67, "RESUME_AT")];

/// A checked header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the frame is.
    pub kind: FrameType,
    /// Bytes after the header, at most [`max_payload`] of the type.
    pub payload_bytes: u32,
    /// The migration and the connection within it.
    pub attempt: Attempt,
    /// Counts the frames of one direction of one channel, from 0.
    pub sequence: u64,
    /// CRC-32C of the payload; of a PAGES frame, of the head and table only (its data is sent
    /// straight from guest memory, which may change meanwhile).
    pub body_crc: u32,
}

/// Why 48 bytes are no header.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum HeaderError {
    /// The first bytes are something else.
    #[error("not this protocol: a frame begins with {MAGIC:02x?}, this with {0:02x?}")]
    Magic([u8; 4]),
    /// The checksum does not fit.
    #[error("a frame header is damaged (its checksum is {got:#010x}, it says {said:#010x})")]
    Checksum {
        /// Computed here.
        got: u32,
        /// In the header.
        said: u32,
    },
    /// A frame type of a later version.
    #[error("frame type {0} is not known here")]
    UnknownType(u16),
    /// A frame type that is set aside and not spoken yet.
    #[error("frame type {1} ({0}) is not spoken in this version")]
    Reserved(u16, &'static str),
    /// A flag of a later version.
    #[error("a {kind} frame has flags {flags:#06x}, which are not known here")]
    UnknownFlags {
        /// The frame's type.
        kind: FrameType,
        /// All its flags.
        flags: u16,
    },
    /// The length is over the limit of the type.
    #[error("a {kind} frame says that it has {bytes} bytes, more than the {limit} that it may have")]
    TooLarge {
        /// The frame's type.
        kind: FrameType,
        /// What it says.
        bytes: u32,
        /// What it may have.
        limit: u32,
    },
}

impl Header {
    /// The header as bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut raw = RawHeader {
            magic: MAGIC,
            kind: U16::new(self.kind as u16),
            flags: U16::ZERO,
            payload_bytes: U32::new(self.payload_bytes),
            epoch: U32::new(self.attempt.epoch),
            session: self.attempt.session.0,
            sequence: U64::new(self.sequence),
            body_crc: U32::new(self.body_crc),
            header_crc: U32::ZERO,
        };
        raw.header_crc = U32::new(crc32c::crc32c(&raw.as_bytes()[..HEADER_BYTES - 4]));
        zerocopy::transmute!(raw)
    }

    /// Reads and checks a header that may come from anyone.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, HeaderError> {
        let raw: RawHeader = zerocopy::transmute!(*bytes);
        if raw.magic != MAGIC {
            return Err(HeaderError::Magic(raw.magic));
        }
        let (got, said) = (crc32c::crc32c(&bytes[..HEADER_BYTES - 4]), raw.header_crc.get());
        if got != said {
            return Err(HeaderError::Checksum { got, said });
        }
        let number = raw.kind.get();
        let Some(kind) = FrameType::from_u16(number) else {
            return Err(match RESERVED.iter().find(|(n, _)| *n == number) {
                Some((n, name)) => HeaderError::Reserved(*n, name),
                None => HeaderError::UnknownType(number),
            });
        };
        if raw.flags.get() != 0 {
            return Err(HeaderError::UnknownFlags { kind, flags: raw.flags.get() });
        }
        let (bytes, limit) = (raw.payload_bytes.get(), max_payload(kind));
        if bytes > limit {
            return Err(HeaderError::TooLarge { kind, bytes, limit });
        }
        Ok(Self {
            kind,
            payload_bytes: bytes,
            attempt: Attempt { session: SessionId(raw.session), epoch: raw.epoch.get() },
            sequence: raw.sequence.get(),
            body_crc: raw.body_crc.get(),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> Header {
        Header {
            kind: FrameType::Hello,
            payload_bytes: 258,
            attempt: Attempt { session: SessionId([0xab; 16]), epoch: 3 },
            sequence: 7,
            body_crc: 0x1234_5678,
        }
    }

    /// Puts the checksum right after a change, as a hostile peer would.
    fn resealed(mut bytes: [u8; HEADER_BYTES], at: usize, value: &[u8]) -> [u8; HEADER_BYTES] {
        bytes[at..at + value.len()].copy_from_slice(value);
        let crc = crc32c::crc32c(&bytes[..HEADER_BYTES - 4]);
        bytes[HEADER_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    #[test]
    fn layout_is_what_the_documentation_says() {
        let bytes = sample().encode();
        assert_eq!(&bytes[..4], b"VMFY");
        assert_eq!(bytes[4..8], [1, 0, 0, 0]);
        assert_eq!(bytes[8..12], [2, 1, 0, 0]);
        assert_eq!(bytes[12..16], [3, 0, 0, 0]);
        assert_eq!(bytes[16..32], [0xab; 16]);
        assert_eq!(bytes[32..40], [7, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[40..44], [0x78, 0x56, 0x34, 0x12]);
    }

    #[test]
    fn every_type_is_in_the_documentation_with_its_limit() {
        let text = include_str!("../../docs/protocol.md");
        for kind in FrameType::ALL {
            let line = text.lines().find(|l| l.starts_with(&format!("| {} | {kind} | ", *kind as u16)));
            let line = line.unwrap_or_else(|| panic!("docs/protocol.md lacks {kind}"));
            let limit = match max_payload(*kind) {
                n if n >= 1 << 20 && n % (1 << 20) == 0 => format!("| {} MiB |", n >> 20),
                n if *kind == FrameType::Pages => {
                    assert_eq!(n, 16 + 65_536 + (1 << 20));
                    "| 16 + 65,536 + 1 MiB |".to_owned()
                }
                n => format!("| {n} |"),
            };
            assert!(line.ends_with(&limit), "{line}");
        }
        for (number, name) in RESERVED {
            assert!(text.contains(&format!("{number} {name}")), "{name}");
        }
    }

    #[test]
    fn lies_are_named() {
        let good = sample().encode();
        assert!(matches!(Header::decode(&resealed(good, 0, b"HTTP")), Err(HeaderError::Magic(_))));
        assert_eq!(Header::decode(&resealed(good, 4, &[200, 0])), Err(HeaderError::UnknownType(200)));
        assert_eq!(Header::decode(&resealed(good, 4, &[67, 0])), Err(HeaderError::Reserved(67, "RESUME_AT")));
        assert!(matches!(
            Header::decode(&resealed(good, 6, &[0, 1])),
            Err(HeaderError::UnknownFlags { flags: 256, .. })
        ));
        assert!(matches!(
            Header::decode(&resealed(good, 8, &[0xff; 4])),
            Err(HeaderError::TooLarge { bytes: u32::MAX, .. })
        ));
    }

    #[test]
    fn every_changed_bit_is_noticed() {
        let good = sample().encode();
        for bit in 0..HEADER_BYTES * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&bad).is_err(), "bit {bit}");
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(
            kind in prop::sample::select(FrameType::ALL),
            bytes: u32, epoch: u32, session: [u8; 16], sequence: u64, body_crc: u32,
        ) {
            let header = Header {
                kind,
                payload_bytes: bytes.min(max_payload(kind)),
                attempt: Attempt { session: SessionId(session), epoch },
                sequence,
                body_crc,
            };
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
        }

        #[test]
        fn random_bytes_never_pass_the_limits(bytes: [u8; 44]) {
            let mut raw = [0; HEADER_BYTES];
            raw[..44].copy_from_slice(&bytes);
            let _ = Header::decode(&raw);
            if let Ok(header) = Header::decode(&resealed(raw, 0, &MAGIC)) {
                prop_assert!(header.payload_bytes <= max_payload(header.kind));
            }
        }
    }
}
