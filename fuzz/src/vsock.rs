//! The streams between guest and host: whatever packets the guest sends, whatever the host's programs do.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use vmferry::vmm::virtio::vsock::{Header, MAX_STREAMS, Muxer, Op, Ports};

use super::input::{Reader, Writer};

const CID: u64 = 3;

pub fn run(data: &[u8]) {
    let mut input = Reader(data);
    let mut muxer = Muxer::new(CID);
    let mut now = Instant::now();
    let mut programs: Vec<UnixStream> = Vec::new();
    let mut room = vec![0; 8192];
    while !input.is_empty() {
        match input.u8() % 8 {
            0..=2 if muxer.takes() => {
                let header = packet(&mut input);
                let data = input.chunk();
                let refuses = header.flags.get() & 0x100 != 0;
                muxer.guest_sent(&header, data, now, |_| {
                    if refuses {
                        return Err(std::io::Error::from(std::io::ErrorKind::ConnectionRefused));
                    }
                    let (ours, theirs) = UnixStream::pair()?;
                    ours.set_nonblocking(true)?;
                    theirs.set_nonblocking(true)?;
                    programs.push(theirs);
                    Ok(ours)
                });
            }
            3 => {
                let (ours, theirs) = UnixStream::pair().expect("a pair of sockets can be made");
                ours.set_nonblocking(true).expect("it is a socket");
                theirs.set_nonblocking(true).expect("it is a socket");
                programs.push(theirs);
                muxer.host_asks(ours, u32::from(input.u8()), now);
            }
            4 if !programs.is_empty() => {
                let which = usize::from(input.u8()) % programs.len();
                match input.u8() % 4 {
                    0 => drop(programs.swap_remove(which)),
                    1 => drop(programs[which].read(&mut room)),
                    2 => drop(programs[which].shutdown(std::net::Shutdown::Write)),
                    _ => drop(programs[which].write(input.chunk())),
                }
            }
            5 => {
                let watched: Vec<Ports> = muxer.streams().map(|(ports, _)| ports).collect();
                let ready = PollFlags::from_bits_truncate(i16::from(input.u8()));
                watched.into_iter().for_each(|ports| muxer.host_moved(ports, ready, now));
            }
            6 => {
                now += Duration::from_millis(input.u16().into());
                muxer.expire(now);
            }
            _ => {
                let size = usize::from(input.u16()) % room.len();
                // Turns come round: nobody is left out, and it ends.
                for _ in 0..64 {
                    let Some((header, bytes)) = muxer.next(&mut room[..size], now) else { break };
                    assert_eq!(header.len.get() as usize, bytes);
                    assert!(bytes <= size && header.dst_cid.get() == CID);
                }
            }
        }
        assert!(muxer.streams().count() <= MAX_STREAMS);
        let _ = muxer.deadline();
    }
    muxer.clear();
    assert!(!muxer.has_news());
}

fn packet(input: &mut Reader<'_>) -> Header {
    let (how, op) = (input.u8(), input.u8());
    let length = if how & 1 != 0 { input.u32() } else { 0 };
    Header {
        src_cid: if how & 2 != 0 { input.u64() } else { CID }.into(),
        dst_cid: if how & 4 != 0 { input.u64() } else { 2 }.into(),
        src_port: u32::from(input.u8() % 8).into(),
        dst_port: if how & 8 != 0 {
            (1 << 30) + u32::from(input.u8() % 8)
        } else {
            u32::from(input.u8() % 8)
        }
        .into(),
        len: length.into(),
        kind: u16::from(how & 16 == 0).into(),
        op: u16::from(op).into(),
        flags: u32::from(input.u16()).into(),
        buf_alloc: input.u32().into(),
        fwd_cnt: input.u32().into(),
    }
}

fn put(input: Writer, op: Op, ports: (u8, u8), flags: u16, data: &[u8]) -> Writer {
    let input = input.u8(0).u8(1).u8(op as u8).u32(data.len() as u32).u8(ports.0).u8(ports.1).u16(flags);
    input.u32(65536).u32(0).chunk(data)
}

pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let take = |input: Writer| input.u8(7).u16(4096);
    let asked = take(put(Writer::default(), Op::Request, (5, 1), 0, b""));
    let talked = put(asked.clone(), Op::Rw, (5, 1), 0, b"hello").u8(4).u8(0).u8(1);
    let talked = take(talked.u8(4).u8(0).u8(3).chunk(b"answer").u8(5).u8(1));
    let talked = put(put(talked, Op::CreditUpdate, (5, 1), 0, b""), Op::CreditRequest, (5, 1), 0, b"");
    let shut = take(put(talked.clone(), Op::Shutdown, (5, 1), 3, b""));
    let host = Writer::default().u8(3).u8(7);
    let host = take(take(host).u8(4).u8(0).u8(2).u8(5).u8(1).u8(6).u16(20_000));
    let refused = take(put(put(Writer::default(), Op::Request, (1, 1), 0x100, b""), Op::Rst, (9, 9), 0, b""));
    vec![
        ("talk".into(), take(talked).0),
        ("shut".into(), shut.0),
        ("host".into(), host.0),
        ("refused".into(), refused.0),
    ]
}
