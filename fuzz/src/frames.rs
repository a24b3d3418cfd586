//! Frames as a source could send them, right but for what the input says: the checksums fit, since
//! otherwise everything would end at the first.

use vmferry::memory::PageIndex;
use vmferry::switchover::Attempt;
use vmferry::wire::{FrameType, Header, Message, Run, RunKind, RunTable};

use super::input::{Reader, Writer};
use super::wire::crc32c;

/// What is wrong with a frame, as bits.
const WRONG_SEQUENCE: u8 = 1;
const WRONG_EPOCH: u8 = 2;
const WRONG_SESSION: u8 = 4;
const WRONG_BODY: u8 = 8;
const WRONG_LENGTH: u8 = 16;
/// No frame at all, but bytes.
const BYTES: u8 = 32;
/// The table of pages as bytes.
const TABLE: u8 = 64;
/// The most page data of one frame.
const MOST_DATA: u64 = 64;

/// One direction of a channel.
pub struct Sent {
    pub attempt: Attempt,
    pub sequence: u64,
}

impl Sent {
    /// The next frame, and what it is.
    pub fn frame(&mut self, input: &mut Reader<'_>) -> (FrameType, Vec<u8>) {
        let kind = FrameType::ALL[usize::from(input.u8()) % FrameType::ALL.len()];
        let how = input.u8();
        if how & BYTES != 0 {
            return (kind, input.chunk().to_vec());
        }
        let (body, data) = match kind {
            FrameType::Pages if how & TABLE == 0 => pages(input),
            _ => (input.chunk().to_vec(), Vec::new()),
        };
        let mut header = Header {
            kind,
            payload_bytes: (body.len() + data.len()) as u32,
            attempt: self.attempt,
            sequence: self.sequence,
            body_crc: crc32c(&body),
        };
        header.sequence = header.sequence.wrapping_add(u64::from(how & WRONG_SEQUENCE));
        header.attempt.epoch = header.attempt.epoch.wrapping_add(u32::from(how & WRONG_EPOCH));
        header.attempt.session.0[0] ^= how & WRONG_SESSION;
        header.body_crc ^= u32::from(how & WRONG_BODY);
        if how & WRONG_LENGTH != 0 {
            header.payload_bytes = input.u32();
        }
        self.sequence += 1;
        (kind, [&header.encode()[..], &body, &data].concat())
    }
}

/// A table of runs that fits its data, wherever the pages are.
fn pages(input: &mut Reader<'_>) -> (Vec<u8>, Vec<u8>) {
    let mut table = RunTable::new();
    for _ in 0..input.u8() % 16 {
        let (first, pages, zero) = (input.u16(), input.u8(), input.u8() & 1 == 1);
        let (kind, most) = if zero { (RunKind::Zero, u64::MAX) } else { (RunKind::Data, MOST_DATA) };
        let pages = u64::from(pages).min(most) as u32;
        // What does not fit is left out.
        let _ = table.push(Run { first: PageIndex(first.into()), pages, kind });
    }
    let mut body = Vec::new();
    table.encode(&mut body);
    (body, vec![input.u8(); table.data_bytes() as usize])
}

/// [`Sent::frame`] the other way round, for a message that is right.
pub fn put(input: Writer, message: &Message) -> Writer {
    let payload = message.encode().expect("a sample fits its frame");
    input.u8(index(message.kind())).u8(0).chunk(&payload)
}

/// The same for pages: (first, pages, zero).
pub fn put_pages(input: Writer, runs: &[(u16, u8, bool)]) -> Writer {
    let input = input.u8(index(FrameType::Pages)).u8(0).u8(runs.len() as u8);
    let run = |input: Writer, run: &(u16, u8, bool)| input.u16(run.0).u8(run.1).u8(u8::from(run.2));
    runs.iter().fold(input, run).u8(0xa5)
}

fn index(kind: FrameType) -> u8 {
    FrameType::ALL.iter().position(|k| *k == kind).expect("every type is listed") as u8
}
