//! One stream between a Unix socket of the host and a port of the guest: its state, its credit in
//! both directions, and what is to be told to the guest next.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::credit::{BUFFER_BYTES, Credit};
use super::packet::{Header, Op, Ports, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// How long a guest may take to answer a request, and to confirm that a stream is at its end.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// A stream. What it has to tell the guest is in flags, not in a queue: a guest that takes nothing
/// makes nothing grow.
pub struct Stream {
    socket: UnixStream,
    /// The guest has accepted it, or has asked for it itself.
    open: bool,
    /// The guest must have answered by then.
    deadline: Option<Instant>,
    credit: Credit,
    /// Bytes of the guest that the host has not taken yet.
    backlog: VecDeque<u8>,
    /// SHUTDOWN_ flags that the guest has sent.
    guest_shut: u32,
    /// SHUTDOWN_ flags that the guest is to be sent, or has been.
    host_shut: u32,
    /// The socket may have bytes for the guest.
    readable: bool,
    news: News,
}

/// What the guest is to be told.
#[derive(Clone, Copy, Debug, Default)]
struct News {
    request: bool,
    response: bool,
    shutdown: bool,
    credit: bool,
    ask_credit: bool,
}

/// What has become of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Fate {
    /// It goes on.
    Stays,
    /// It is at its end, which the guest knows.
    Gone,
    /// It is at its end, of which the guest is told by a reset.
    Reset,
}

impl Stream {
    /// One that the guest has asked for, and a program of the host has taken.
    pub fn accepted(socket: UnixStream, request: &Header) -> Self {
        let news = News { response: true, ..News::default() };
        let mut stream = Self::new(socket, true, None, news);
        stream.credit.heard(request);
        stream
    }

    /// One that a program of the host asks the guest for.
    pub fn asked(socket: UnixStream, now: Instant) -> Self {
        let news = News { request: true, ..News::default() };
        Self::new(socket, false, Some(now + ANSWER_WITHIN), news)
    }

    fn new(socket: UnixStream, open: bool, deadline: Option<Instant>, news: News) -> Self {
        Self {
            socket,
            open,
            deadline,
            credit: Credit::default(),
            backlog: VecDeque::new(),
            guest_shut: 0,
            host_shut: 0,
            readable: open,
            news,
        }
    }

    /// When it ends if the guest says nothing.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// What the socket is to be watched for, if for anything.
    pub fn interest(&self) -> PollFlags {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::POLLIN, self.open && !self.readable && !self.host_sends_no_more());
        flags.set(PollFlags::POLLOUT, !self.backlog.is_empty());
        flags
    }

    /// Takes a packet of the guest's; `ports` are the stream's.
    pub fn guest_sent(&mut self, ports: Ports, header: &Header, data: &[u8], now: Instant) -> Fate {
        self.credit.heard(header);
        match header.op() {
            Some(Op::Rst) => Fate::Gone,
            Some(Op::Response) if !self.open => self.answered(ports),
            Some(Op::Rw) if self.open => self.take(data, now),
            Some(Op::Shutdown) if self.open => {
                self.guest_shut |= header.flags.get() & SHUTDOWN_BOTH;
                self.settle(now)
            }
            Some(Op::CreditUpdate) if self.open => Fate::Stays,
            Some(Op::CreditRequest) if self.open => {
                self.news.credit = true;
                Fate::Stays
            }
            _ => Fate::Reset,
        }
    }

    fn answered(&mut self, ports: Ports) -> Fate {
        (self.open, self.deadline, self.readable) = (true, None, true);
        let line = format!("OK {}\n", ports.host);
        // Its first bytes: a socket whose program is there has room for them.
        match (&self.socket).write(line.as_bytes()) {
            Ok(bytes) if bytes == line.len() => Fate::Stays,
            _ => Fate::Reset,
        }
    }

    fn take(&mut self, data: &[u8], now: Instant) -> Fate {
        let room = (BUFFER_BYTES as usize).saturating_sub(self.backlog.len());
        // More than it has credit for, or after its word that it sends no more.
        if data.len() > room || self.guest_shut & SHUTDOWN_SEND != 0 {
            return Fate::Reset;
        }
        self.backlog.extend(data);
        self.settle(now)
    }

    /// The socket may be read, or has room again.
    pub fn host_moved(&mut self, ready: PollFlags, now: Instant) -> Fate {
        self.readable |= ready.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR);
        self.settle(now)
    }

    /// Hands the backlog to the host, and ends what is at its end.
    fn settle(&mut self, now: Instant) -> Fate {
        while !self.backlog.is_empty() {
            let (front, _) = self.backlog.as_slices();
            match (&self.socket).write(front) {
                Ok(bytes) => {
                    self.backlog.drain(..bytes);
                    self.credit.forwarded(bytes);
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => {
                    // Nobody reads any more. What was sent before may still be on its way to the guest.
                    self.credit.forwarded(self.backlog.len());
                    self.backlog.clear();
                    self.shut(SHUTDOWN_RECEIVE, now);
                }
            }
        }
        self.news.credit |= self.credit.is_worth_telling();
        if self.backlog.is_empty() && self.guest_shut & SHUTDOWN_SEND != 0 {
            let _ = self.socket.shutdown(Shutdown::Write);
            if self.guest_shut == SHUTDOWN_BOTH {
                return Fate::Reset;
            }
        }
        Fate::Stays
    }

    /// The host sends, or receives, no more.
    fn shut(&mut self, flags: u32, now: Instant) {
        if self.host_shut | flags != self.host_shut {
            self.host_shut |= flags;
            self.news.shutdown = true;
        }
        if self.host_shut == SHUTDOWN_BOTH && self.deadline.is_none() {
            self.deadline = Some(now + ANSWER_WITHIN);
        }
    }

    fn host_sends_no_more(&self) -> bool {
        self.host_shut & SHUTDOWN_SEND != 0 || self.guest_shut & SHUTDOWN_RECEIVE != 0
    }

    /// Whether [`Stream::next`] is worth a call.
    pub fn has_news(&self) -> bool {
        let News { request, response, shutdown, credit, ask_credit } = self.news;
        request || response || shutdown || credit || ask_credit || self.may_read()
    }

    fn may_read(&self) -> bool {
        self.open && self.readable && !self.host_sends_no_more() && !self.credit.is_awaited()
    }

    /// The next packet for the guest, with how many bytes of data were put into `room`; none if there
    /// is nothing to say.
    pub fn next(&mut self, ports: Ports, cid: u64, room: &mut [u8], now: Instant) -> Option<(Header, usize)> {
        let (op, bytes) = self.next_op(room, now)?;
        let mut header = ports.to_guest(cid, op);
        header.len = (bytes as u32).into();
        if op == Op::Shutdown {
            header.flags = self.host_shut.into();
        }
        self.credit.tell(&mut header);
        self.news.credit = false;
        Some((header, bytes))
    }

    fn next_op(&mut self, room: &mut [u8], now: Instant) -> Option<(Op, usize)> {
        if std::mem::take(&mut self.news.request) {
            return Some((Op::Request, 0));
        }
        if std::mem::take(&mut self.news.response) {
            return Some((Op::Response, 0));
        }
        if let Some(bytes) = self.read(room, now) {
            return Some((Op::Rw, bytes));
        }
        if std::mem::take(&mut self.news.shutdown) {
            return Some((Op::Shutdown, 0));
        }
        if std::mem::take(&mut self.news.ask_credit) {
            return Some((Op::CreditRequest, 0));
        }
        self.news.credit.then_some((Op::CreditUpdate, 0))
    }

    /// Bytes of the host, as many as `room` and the guest's credit allow.
    fn read(&mut self, room: &mut [u8], now: Instant) -> Option<usize> {
        if !self.may_read() || room.is_empty() {
            return None;
        }
        let most = room.len().min(self.credit.left() as usize);
        if most == 0 {
            self.credit.wait();
            self.news.ask_credit = true;
            return None;
        }
        let ended = loop {
            match (&self.socket).read(&mut room[..most]) {
                Ok(0) => break true,
                Ok(bytes) => {
                    self.credit.sent(bytes);
                    return Some(bytes);
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => break e.kind() != ErrorKind::WouldBlock,
            }
        };
        self.readable = false;
        if ended {
            let flags = if is_closed(&self.socket) { SHUTDOWN_BOTH } else { SHUTDOWN_SEND };
            self.shut(flags, now);
        }
        None
    }
}

/// Whether nobody has the other end any more (or both directions are shut, which comes to the same).
fn is_closed(socket: &UnixStream) -> bool {
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::empty())];
    let looked = poll(&mut fds, PollTimeout::ZERO);
    looked.is_err() || fds[0].any().unwrap_or(true)
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
