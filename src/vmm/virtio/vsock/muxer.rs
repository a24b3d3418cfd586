//! All streams of a guest: which packet belongs to which, and whose turn it is.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Bound;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use nix::poll::PollFlags;

use super::packet::{HOST_CID, Header, NO_PORT, Op, Ports, TYPE_STREAM};
use super::stream::{Fate, Stream};

/// The most streams of a guest at a time, in both directions together.
pub const MAX_STREAMS: usize = 256;
/// The most resets that wait for the guest to take them. While there are so many, nothing more is
/// taken from it.
const MAX_RESETS: usize = 256;
/// Host ports of streams that the host asks for begin here, where no service of the host is.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// The streams of one guest.
pub struct Muxer {
    cid: u64,
    streams: BTreeMap<Ports, Stream>,
    /// Packets of no stream: resets, oldest first.
    resets: VecDeque<Header>,
    /// Whose turn it was last.
    last: Option<Ports>,
    next_port: u32,
}

impl Muxer {
    /// For the guest with context id `cid`.
    pub fn new(cid: u64) -> Self {
        let (streams, resets) = (BTreeMap::new(), VecDeque::new());
        Self { cid, streams, resets, last: None, next_port: FIRST_HOST_PORT }
    }

    /// Whether a packet of the guest can be taken now; if not, after [`Muxer::next`].
    pub fn takes(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Takes a packet of the guest's. `dial` connects to a service of the host, by its port.
    pub fn guest_sent(
        &mut self,
        header: &Header,
        data: &[u8],
        now: Instant,
        dial: impl FnOnce(u32) -> io::Result<UnixStream>,
    ) {
        // In another's name, or for another: no business of this device.
        if header.src_cid.get() != self.cid || header.dst_cid.get() != HOST_CID {
            return;
        }
        let ports = Ports::of(header);
        if header.kind.get() != TYPE_STREAM {
            return self.refuse(ports, header);
        }
        if let Some(stream) = self.streams.get_mut(&ports) {
            let fate = stream.guest_sent(ports, header, data, now);
            return self.decide(ports, fate);
        }
        match header.op() {
            Some(Op::Request) if self.streams.len() < MAX_STREAMS && ports.host != NO_PORT => {
                match dial(ports.host) {
                    Ok(socket) => drop(self.streams.insert(ports, Stream::accepted(socket, header))),
                    Err(e) => {
                        tracing::debug!("vsock: port {} of the host: {e}", ports.host);
                        self.refuse(ports, header);
                    }
                }
            }
            _ => self.refuse(ports, header),
        }
    }

    /// A program of the host wants a stream to `port` of the guest; `false` if there are too many.
    pub fn host_asks(&mut self, socket: UnixStream, port: u32, now: Instant) -> bool {
        if self.streams.len() >= MAX_STREAMS {
            return false;
        }
        let mut ports = Ports { host: self.next_port, guest: port };
        // Fewer streams than ports: this ends.
        while self.streams.contains_key(&ports) {
            ports.host = following(ports.host);
        }
        self.next_port = following(ports.host);
        self.streams.insert(ports, Stream::asked(socket, now));
        true
    }

    /// The socket of a stream has moved.
    pub fn host_moved(&mut self, ports: Ports, ready: PollFlags, now: Instant) {
        if let Some(stream) = self.streams.get_mut(&ports) {
            let fate = stream.host_moved(ready, now);
            self.decide(ports, fate);
        }
    }

    /// The next packet for the guest, the streams taking turns; its data, as many bytes as it says,
    /// is put into `room`.
    pub fn next(&mut self, room: &mut [u8], now: Instant) -> Option<(Header, usize)> {
        if let Some(reset) = self.resets.pop_front() {
            return Some((reset, 0));
        }
        let after = self.last.map_or(Bound::Unbounded, Bound::Excluded);
        let upto = self.last.map_or(Bound::Unbounded, Bound::Included);
        let turn = |range| -> Vec<Ports> {
            let range: (Bound<Ports>, Bound<Ports>) = range;
            self.streams.range(range).filter(|(_, s)| s.has_news()).map(|(ports, _)| *ports).collect()
        };
        let mut waiting = turn((after, Bound::Unbounded));
        if self.last.is_some() {
            waiting.extend(turn((Bound::Unbounded, upto)));
        }
        for ports in waiting {
            let stream = self.streams.get_mut(&ports)?;
            if let Some(packet) = stream.next(ports, self.cid, room, now) {
                self.last = Some(ports);
                return Some(packet);
            }
        }
        None
    }

    /// Whether [`Muxer::next`] may have something.
    pub fn has_news(&self) -> bool {
        !self.resets.is_empty() || self.streams.values().any(Stream::has_news)
    }

    /// Ends the streams whose guest has not answered in time.
    pub fn expire(&mut self, now: Instant) {
        let late = |s: &Stream| s.deadline().is_some_and(|at| now >= at);
        let ports: Vec<Ports> = self.streams.iter().filter(|(_, s)| late(s)).map(|(p, _)| *p).collect();
        ports.into_iter().for_each(|p| self.decide(p, Fate::Reset));
    }

    /// When [`Muxer::expire`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        self.streams.values().filter_map(Stream::deadline).min()
    }

    /// The streams with what their sockets are to be watched for.
    pub fn streams(&self) -> impl Iterator<Item = (Ports, &Stream)> {
        self.streams.iter().map(|(ports, stream)| (*ports, stream))
    }

    /// Ends all streams: the host's programs see the end of theirs, the guest is told nothing.
    pub fn clear(&mut self) {
        self.streams.clear();
        self.resets.clear();
        self.last = None;
    }

    fn decide(&mut self, ports: Ports, fate: Fate) {
        if fate != Fate::Stays {
            self.streams.remove(&ports);
        }
        if fate == Fate::Reset {
            self.reset(ports);
        }
    }

    /// Answers a packet that belongs to nothing; a reset is never answered.
    fn refuse(&mut self, ports: Ports, header: &Header) {
        if header.op() != Some(Op::Rst) {
            self.reset(ports);
        }
    }

    fn reset(&mut self, ports: Ports) {
        self.resets.push_back(ports.to_guest(self.cid, Op::Rst));
    }
}

fn following(port: u32) -> u32 {
    if port == NO_PORT - 1 { FIRST_HOST_PORT } else { port + 1 }
}

#[cfg(test)]
#[path = "muxer_tests.rs"]
mod tests;
