//! The container of saved state: a flat list of sections.
//!
//! ```text
//! "VMSTATE1"                                   8 bytes
//! per section, little-endian:
//!   kind u32 | instance u32 | version u32 | flags u32 | body bytes u32 | CRC-32C of the body u32
//!   body
//! end: a header with kind 0, no body
//! ```

use std::fmt;

use thiserror::Error;

/// The first bytes of every saved state.
const MAGIC: &[u8; 8] = b"VMSTATE1";
const HEADER_BYTES: usize = 24;
/// The largest body of one section: an XSAVE area with AMX is 11 KiB, in JSON some 60 KiB.
const MAX_BODY_BYTES: usize = 4 << 20;
/// The most sections: a few for each of 256 vCPUs and the devices.
const MAX_SECTIONS: usize = 4096;
/// The largest saved state in all.
pub const MAX_STATE_BYTES: usize = 64 << 20;

/// What a section holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum SectionKind {
    /// One vCPU, `instance` is its number.
    Vcpu = 1,
    /// The in-kernel PICs and IOAPIC.
    Irqchip = 2,
    /// The in-kernel PIT.
    Pit = 3,
    /// KVM's clock with the realtime and TSC that belong to it.
    Clock = 4,
    /// A 16550 serial port.
    Serial = 16,
    /// A virtio disk; `instance` is its slot, as for all virtio devices.
    VirtioBlock = 34,
    /// A virtio network card; `instance` is its slot, as for all virtio devices.
    VirtioNet = 33,
    /// A virtio source of random numbers.
    VirtioRng = 36,
    /// Sockets between host and guest.
    VirtioVsock = 51,
}

impl SectionKind {
    fn from_u32(kind: u32) -> Option<Self> {
        Some(match kind {
            1 => Self::Vcpu,
            2 => Self::Irqchip,
            3 => Self::Pit,
            4 => Self::Clock,
            16 => Self::Serial,
            34 => Self::VirtioBlock,
            33 => Self::VirtioNet,
            36 => Self::VirtioRng,
            51 => Self::VirtioVsock,
            _ => return None,
        })
    }
}

impl fmt::Display for SectionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vcpu => "vcpu",
            Self::Irqchip => "irqchip",
            Self::Pit => "pit",
            Self::Clock => "clock",
            Self::Serial => "serial",
            Self::VirtioBlock => "virtio-block",
            Self::VirtioNet => "virtio-net",
            Self::VirtioRng => "virtio-rng",
            Self::VirtioVsock => "virtio-vsock",
        })
    }
}

/// One section of saved state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// What it holds.
    pub kind: SectionKind,
    /// Which one, where there are several of a kind.
    pub instance: u32,
    /// The version of the body's schema.
    pub version: u32,
    /// The body: JSON with named fields, by the schema of (kind, version).
    pub body: Vec<u8>,
}

/// Why bytes are no saved state.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs)] // the messages say it
pub enum SectionError {
    #[error("the saved state does not begin with its magic")]
    NoMagic,
    #[error("the saved state ends early, at byte {0}")]
    Truncated(usize),
    #[error("the saved state has bytes after its end, at byte {0}")]
    Trailing(usize),
    #[error("section kind {0} is not known here")]
    UnknownKind(u32),
    #[error("section {kind} {instance} has flags {flags:#x}, which are not known here")]
    UnknownFlags { kind: SectionKind, instance: u32, flags: u32 },
    #[error("section {kind} {instance} says that it has {bytes} bytes, more than {MAX_BODY_BYTES}")]
    TooLarge { kind: SectionKind, instance: u32, bytes: usize },
    #[error("section {kind} {instance} is damaged (its checksum does not fit)")]
    Damaged { kind: SectionKind, instance: u32 },
    #[error("section {kind} {instance} is there twice")]
    Twice { kind: SectionKind, instance: u32 },
    #[error("the saved state has more than {MAX_SECTIONS} sections")]
    TooMany,
}

/// Writes `sections` as one saved state.
pub fn write_sections(sections: &[Section]) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    for s in sections {
        let crc = crc32c::crc32c(&s.body);
        for field in [s.kind as u32, s.instance, s.version, 0, s.body.len() as u32, crc] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        out.extend_from_slice(&s.body);
    }
    out.extend_from_slice(&[0; HEADER_BYTES]);
    out
}

/// Reads a saved state that may come from anyone: every length is checked before it is used, an
/// unknown kind or flag is an error, and so is a section that is there twice.
pub fn read_sections(bytes: &[u8]) -> Result<Vec<Section>, SectionError> {
    let mut rest = bytes.strip_prefix(MAGIC).ok_or(SectionError::NoMagic)?;
    let at = |rest: &[u8]| bytes.len() - rest.len();
    let mut sections = Vec::new();
    let mut seen = std::collections::HashSet::new();
    loop {
        let Some((header, body)) = rest.split_at_checked(HEADER_BYTES) else {
            return Err(SectionError::Truncated(at(rest)));
        };
        let mut fields = [0u32; 6];
        for (field, raw) in fields.iter_mut().zip(header.chunks_exact(4)) {
            *field = u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]);
        }
        let [kind, instance, version, flags, length, crc] = fields;
        if kind == 0 {
            return match body {
                [] if header.iter().all(|b| *b == 0) => Ok(sections),
                _ => Err(SectionError::Trailing(at(rest))),
            };
        }
        let kind = SectionKind::from_u32(kind).ok_or(SectionError::UnknownKind(kind))?;
        if flags != 0 {
            return Err(SectionError::UnknownFlags { kind, instance, flags });
        }
        let length = length as usize;
        if length > MAX_BODY_BYTES {
            return Err(SectionError::TooLarge { kind, instance, bytes: length });
        }
        let Some((body, after)) = body.split_at_checked(length) else {
            return Err(SectionError::Truncated(at(rest)));
        };
        if crc32c::crc32c(body) != crc {
            return Err(SectionError::Damaged { kind, instance });
        }
        if !seen.insert((kind, instance)) {
            return Err(SectionError::Twice { kind, instance });
        }
        if sections.len() == MAX_SECTIONS {
            return Err(SectionError::TooMany);
        }
        sections.push(Section { kind, instance, version, body: body.to_vec() });
        rest = after;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> Vec<Section> {
        vec![
            Section { kind: SectionKind::Vcpu, instance: 1, version: 1, body: b"{}".to_vec() },
            Section { kind: SectionKind::Clock, instance: 0, version: 2, body: vec![] },
        ]
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(read_sections(&write_sections(&sample())), Ok(sample()));
    }

    #[test]
    fn every_truncation_and_every_addition_is_an_error() {
        let whole = write_sections(&sample());
        for n in 0..whole.len() {
            assert!(read_sections(&whole[..n]).is_err(), "{n} bytes");
        }
        let longer = [&whole[..], &[0]].concat();
        assert!(matches!(read_sections(&longer), Err(SectionError::Trailing(_))));
    }

    #[test]
    fn damage_repetition_and_lies_are_named() {
        let mut damaged = write_sections(&sample());
        damaged[8 + HEADER_BYTES] ^= 1;
        assert!(matches!(read_sections(&damaged), Err(SectionError::Damaged { .. })));
        let twice = write_sections(&[sample(), sample()].concat());
        assert!(matches!(read_sections(&twice), Err(SectionError::Twice { .. })));
        let mut huge = write_sections(&sample());
        huge[8 + 16..8 + 20].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(read_sections(&huge), Err(SectionError::TooLarge { .. })));
    }

    proptest! {
        #[test]
        fn no_input_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = read_sections(&bytes);
            let _ = read_sections(&[&MAGIC[..], &bytes].concat());
        }
    }
}
