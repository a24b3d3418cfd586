//! Frames: headers, every payload, the tables of pages. Checksums and magic are put right, or all
//! but one input in four thousand million would end there.

use vmferry::memory::PageIndex;
use vmferry::state::MachineDescription;
use vmferry::switchover::{Attempt, SessionId};
use vmferry::wire::{
    FrameType, HEADER_BYTES, Header, MAGIC, Message, PageBitmap, Run, RunKind, RunTable, Supported, limits,
    negotiate,
};

use super::input::{Reader, Writer};

const HEADER: u8 = 0;
const MESSAGE: u8 = 1;
const PAGES: u8 = 2;

pub fn run(data: &[u8]) {
    let mut input = Reader(data);
    match input.u8() % 3 {
        HEADER => header(&mut input),
        MESSAGE => {
            let kind = FrameType::ALL[usize::from(input.u8()) % FrameType::ALL.len()];
            message(kind, input.rest());
        }
        _ => pages(&mut input),
    }
}

fn header(input: &mut Reader<'_>) {
    let mut raw = [0; HEADER_BYTES];
    let body = input.bytes(HEADER_BYTES - 8);
    raw[..4].copy_from_slice(&MAGIC);
    raw[4..4 + body.len()].copy_from_slice(body);
    let crc = crc32c(&raw[..HEADER_BYTES - 4]);
    raw[HEADER_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
    match Header::decode(&raw) {
        Ok(header) => {
            assert!(header.payload_bytes <= limits::max_payload(header.kind));
            assert_eq!(header.encode(), raw);
        }
        Err(error) => drop(error.to_string()),
    }
}

fn message(kind: FrameType, payload: &[u8]) {
    let payload = &payload[..payload.len().min(limits::max_payload(kind) as usize)];
    let message = match Message::decode(kind, payload.to_vec()) {
        Ok(message) => message,
        Err(error) => return drop(error.to_string()),
    };
    assert_eq!(message.kind(), kind);
    // What is read can be said again, and means the same; only escapes may make it too long.
    if let Ok(again) = message.encode() {
        assert_eq!(Message::decode(kind, again).as_ref(), Ok(&message));
    }
    match message {
        Message::Hello(hello) => match negotiate(&hello, &Supported::default()) {
            Ok(agreed) => {
                assert!((hello.version_min..=hello.version_max).contains(&agreed.version));
                assert!(agreed.features.iter().all(|f| Supported::default().features.contains(f)));
                let _ = hello.all_channels();
            }
            Err(refused) => drop(refused.to_string()),
        },
        Message::Missing(part) | Message::Received(part) => put(&part, kind),
        Message::Machine(body) => {
            if let Ok(machine) = body.parse::<MachineDescription>() {
                assert!(machine.ram.total_bytes() <= 1 << 46);
                assert!(machine.ram.locate(PageIndex(machine.ram.total_pages())).is_none());
            }
        }
        _ => {}
    }
}

fn put(part: &PageBitmap, kind: FrameType) {
    let mut words = vec![0; 100];
    if part.put_into(kind, &mut words).is_err() {
        assert!(words.iter().all(|w| *w == 0));
    }
}

fn pages(input: &mut Reader<'_>) {
    let total = input.u64();
    let payload = input.rest();
    match RunTable::decode(payload, total) {
        Ok((table, at)) => {
            assert!(table.runs().iter().all(|r| r.first.0 + u64::from(r.pages) <= total && r.pages > 0));
            assert_eq!(table.data_bytes(), (payload.len() - at) as u64);
            let mut again = Vec::new();
            table.encode(&mut again);
            assert_eq!(again, payload[..at]);
        }
        Err(error) => drop(error.to_string()),
    }
}

/// CRC-32C, as the frames have it.
pub fn crc32c(bytes: &[u8]) -> u32 {
    vmferry::fuzzing::crc32c(bytes)
}

pub const ATTEMPT: Attempt = Attempt { session: SessionId([0x5e; 16]), epoch: 1 };

pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let mut seeds = Vec::new();
    for (index, kind) in (0u8..).zip(FrameType::ALL) {
        let header = Header {
            kind: *kind,
            payload_bytes: 0,
            attempt: ATTEMPT,
            sequence: u64::from(index),
            body_crc: 7,
        };
        let body = &header.encode()[4..HEADER_BYTES - 4];
        seeds.push((format!("header-{kind}"), Writer::default().u8(HEADER).raw(body).0));
    }
    for message in super::messages::samples() {
        let kind = message.kind();
        let index = FrameType::ALL.iter().position(|k| *k == kind).expect("every type is listed");
        let payload = message.encode().expect("a sample fits its frame");
        seeds.push((format!("{kind}"), Writer::default().u8(MESSAGE).u8(index as u8).raw(&payload).0));
    }
    let mut table = RunTable::new();
    for (first, pages, kind) in [(3, 2, RunKind::Zero), (9, 1, RunKind::Data), (400, 1000, RunKind::Zero)] {
        table.push(Run { first: PageIndex(first), pages, kind }).expect("it fits");
    }
    let mut payload = Vec::new();
    table.encode(&mut payload);
    payload.resize(payload.len() + table.data_bytes() as usize, 0xa5);
    seeds.push(("pages".into(), Writer::default().u8(PAGES).u64(2000).raw(&payload).0));
    seeds
}
