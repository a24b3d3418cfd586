//! The half of a channel that receives.

use std::io::IoSliceMut;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::channel::ChannelStats;
use super::frame_io::{read_counted, read_header, read_message, unexpected};
use super::stream::Limits;
use super::{CancelToken, ChannelError, ChannelOptions, ChannelRole, ReadHalf, Sender, StreamError};
use crate::switchover::Attempt;
use crate::wire::{FrameType, Header, Message, MessageError, PAGES_HEAD_BYTES, RunTable};

/// Receives frames in order, and answers PING by itself. After an error nothing more comes.
#[derive(Debug)]
pub struct Receiver {
    half: ReadHalf,
    tx: Sender,
    options: ChannelOptions,
    stats: Arc<ChannelStats>,
    sequence: u64,
    total_pages: Option<u64>,
    table: RunTable,
    scratch: Vec<u8>,
    data: DataState,
    /// Since when nothing has come, while that is being waited for.
    silent_since: Option<Instant>,
    dead: Option<String>,
}

/// What is left of the PAGES frame under way.
#[derive(Debug)]
struct DataState {
    left: u64,
    /// When the frame must be there, and how long that is from its beginning.
    whole: (Instant, Duration),
    failed: Option<String>,
}

/// What was received.
#[derive(Debug)]
pub enum Frame<'a> {
    /// A frame without pages.
    Message(Message),
    /// Pages, whose data has yet to be read.
    Pages(PagesFrame<'a>),
}

/// A PAGES frame: its table, checked, and its data, still in the stream.
#[derive(Debug)]
pub struct PagesFrame<'a> {
    /// Which pages; every one is inside the RAM that [`Receiver::accept_pages`] named.
    pub table: &'a RunTable,
    /// The data of the data runs, one after the other.
    pub data: PageData<'a>,
}

/// The data part of a PAGES frame. All of it must be read before the next frame.
#[derive(Debug)]
pub struct PageData<'a> {
    half: &'a ReadHalf,
    state: &'a mut DataState,
    stats: &'a ChannelStats,
    options: ChannelOptions,
}

impl Receiver {
    pub(super) fn new(half: ReadHalf, tx: Sender, options: ChannelOptions, stats: Arc<ChannelStats>) -> Self {
        let whole = (Instant::now(), Duration::ZERO);
        Self {
            half,
            tx,
            options,
            stats,
            sequence: 0,
            total_pages: None,
            table: RunTable::new(),
            scratch: Vec::new(),
            data: DataState { left: 0, whole, failed: None },
            silent_since: None,
            dead: None,
        }
    }

    /// The first frame was read by [`super::frame_io::FirstFrame`].
    pub(super) fn skip_first(&mut self) {
        self.sequence = 1;
    }

    /// The attempt that every frame must carry.
    pub fn attempt(&self) -> Attempt {
        self.tx.attempt()
    }

    /// What the channel is for.
    pub fn role(&self) -> ChannelRole {
        self.tx.role()
    }

    /// How errors name the peer.
    pub fn peer(&self) -> &str {
        self.half.peer()
    }

    /// What ends every wait on this channel.
    pub fn cancel_token(&self) -> &CancelToken {
        self.half.cancel_token()
    }

    /// The counters of both halves.
    pub fn stats(&self) -> &Arc<ChannelStats> {
        &self.stats
    }

    /// From now on PAGES frames are taken, for a guest with `total_pages` of RAM. Before that, they
    /// are an error.
    pub fn accept_pages(&mut self, total_pages: u64) {
        self.total_pages = Some(total_pages);
    }

    /// Waits for the next frame other than PING and PONG. An error when no byte comes for
    /// `peer_timeout`, or a frame takes longer than its size allows.
    pub fn recv(&mut self) -> Result<Frame<'_>, ChannelError> {
        match self.next_frame(None)? {
            Some(header) => self.frame(header),
            // Without a deadline the wait ends in a frame or an error.
            None => Err(ChannelError::Misuse("a wait without a deadline ended")),
        }
    }

    /// As [`Receiver::recv`]; `None` when `until` comes before the next frame has begun.
    pub fn recv_until(&mut self, until: Instant) -> Result<Option<Frame<'_>>, ChannelError> {
        match self.next_frame(Some(until))? {
            Some(header) => self.frame(header).map(Some),
            None => Ok(None),
        }
    }

    /// As [`Receiver::recv`], where pages would be an error.
    pub fn recv_message(&mut self) -> Result<Message, ChannelError> {
        let peer = self.peer().to_owned();
        match self.recv()? {
            Frame::Message(message) => Ok(message),
            Frame::Pages(_) => Err(unexpected(peer, FrameType::Pages, "a message")),
        }
    }

    /// The error for a message that does not belong where it came; `expected` is what did.
    pub fn unexpected(&self, got: &Message, expected: &str) -> ChannelError {
        unexpected(self.peer().to_owned(), got.kind(), expected)
    }

    /// Reads and drops whatever still comes until the peer closes; false when it has not done so
    /// within `timeout`. Bytes that are left unread at the end would reset a TCP connection, and
    /// take with them what the peer has not read yet.
    pub fn wait_closed(&mut self, timeout: Duration) -> bool {
        let (until, mut rest) = (Instant::now() + timeout, [0; 4096]);
        self.dead.get_or_insert_with(|| "closed on this side".to_owned());
        let limits = Limits { silence: timeout, whole: Some((until, timeout)) };
        loop {
            match self.half.read_some(&mut [IoSliceMut::new(&mut rest)], limits) {
                Ok(0) | Err(StreamError::Broken { .. }) => return true,
                Ok(_) if Instant::now() < until => {}
                _ => return false,
            }
        }
    }

    /// The header of the next frame that is no heartbeat.
    fn next_frame(&mut self, until: Option<Instant>) -> Result<Option<Header>, ChannelError> {
        if let Some(cause) = self.dead.as_ref().or(self.data.failed.as_ref()) {
            return Err(ChannelError::Dead { peer: self.peer().to_owned(), cause: cause.clone() });
        }
        if self.data.left > 0 {
            return Err(ChannelError::Misuse("page data of the frame before was not read"));
        }
        loop {
            let header = match self.header(until) {
                Ok(Some(header)) => header,
                Ok(None) => return Ok(None),
                Err(e) => return Err(self.fail(e)),
            };
            if !matches!(header.kind, FrameType::Ping | FrameType::Pong) {
                return Ok(Some(header));
            }
            match self.message(&header).map_err(|e| self.fail(e))? {
                Message::Ping { nonce } if self.role() == ChannelRole::Main => self.tx.pong(nonce),
                Message::Pong { nonce } => self.stats.pong(nonce),
                _ => {}
            }
        }
    }

    /// Reads the next header and checks it against what is due.
    fn header(&mut self, until: Option<Instant>) -> Result<Option<Header>, ChannelError> {
        let silence = self.options.peer_timeout;
        // Waits that end with `until` and are taken up again are one silence.
        let give_up = *self.silent_since.get_or_insert_with(Instant::now) + silence;
        if !self.half.wait_readable(until.map_or(give_up, |u| u.min(give_up)))? {
            if until.is_some_and(|u| u < give_up) {
                return Ok(None);
            }
            let (peer, ms) = (self.peer().to_owned(), silence.as_millis() as u64);
            return Err(StreamError::Silent { peer, ms }.into());
        }
        self.silent_since = None;
        let (header, begun) = read_header(&self.half, self.options, &self.stats)?;
        let bound = self.options.frame_time(u64::from(header.payload_bytes));
        self.data.whole = (begun + bound, bound);
        let (have, kind) = (self.tx.attempt(), header.kind);
        let peer = || self.peer().to_owned();
        if header.attempt.session != have.session {
            let (got, have) = (header.attempt.session, have.session);
            return Err(ChannelError::WrongSession { peer: peer(), kind, got, have });
        }
        if header.attempt.epoch != have.epoch {
            let (got, have) = (header.attempt.epoch, have.epoch);
            return Err(ChannelError::WrongEpoch { peer: peer(), kind, got, have });
        }
        if header.sequence != self.sequence {
            let (got, expected) = (header.sequence, self.sequence);
            return Err(ChannelError::OutOfOrder { peer: peer(), got, expected });
        }
        self.sequence += 1;
        Ok(Some(header))
    }

    fn frame(&mut self, header: Header) -> Result<Frame<'_>, ChannelError> {
        if header.kind != FrameType::Pages {
            return match self.message(&header) {
                Ok(message) => Ok(Frame::Message(message)),
                Err(e) => Err(self.fail(e)),
            };
        }
        match self.table(&header) {
            Ok(data_bytes) => self.data.left = data_bytes,
            Err(e) => return Err(self.fail(e)),
        }
        let (half, stats, options) = (&self.half, &*self.stats, self.options);
        let data = PageData { half, state: &mut self.data, stats, options };
        Ok(Frame::Pages(PagesFrame { table: &self.table, data }))
    }

    fn message(&self, header: &Header) -> Result<Message, ChannelError> {
        read_message(&self.half, header, self.limits(), &self.stats)
    }

    /// Reads and checks the table of a PAGES frame; gives the bytes of data after it.
    fn table(&mut self, header: &Header) -> Result<u64, ChannelError> {
        let peer = || self.half.peer().to_owned();
        let Some(total) = self.total_pages else {
            return Err(unexpected(peer(), FrameType::Pages, "no page yet"));
        };
        let table_error = |cause| ChannelError::Table { peer: self.half.peer().to_owned(), cause };
        let mut head = [0; PAGES_HEAD_BYTES];
        if (header.payload_bytes as usize) < PAGES_HEAD_BYTES {
            let cause = format!("{} bytes are too few", header.payload_bytes);
            let cause = MessageError::Malformed { kind: FrameType::Pages, cause };
            return Err(ChannelError::Message { peer: peer(), cause });
        }
        let limits = self.limits();
        read_counted(&self.half, &mut head, limits, &self.stats)?;
        let bytes = RunTable::table_bytes(&head, header.payload_bytes).map_err(table_error)?;
        self.scratch.resize(bytes, 0);
        read_counted(&self.half, &mut self.scratch, limits, &self.stats)?;
        if crc32c::crc32c_append(crc32c::crc32c(&head), &self.scratch) != header.body_crc {
            let cause = MessageError::Damaged(FrameType::Pages);
            return Err(ChannelError::Message { peer: peer(), cause });
        }
        let data_bytes = u64::from(header.payload_bytes) - (PAGES_HEAD_BYTES + bytes) as u64;
        self.table.decode_into(&self.scratch, data_bytes, total).map_err(table_error)?;
        Ok(data_bytes)
    }

    fn limits(&self) -> Limits {
        Limits { silence: self.options.peer_timeout, whole: Some(self.data.whole) }
    }

    fn fail(&mut self, error: ChannelError) -> ChannelError {
        self.dead.get_or_insert_with(|| error.to_string());
        error
    }
}

impl PageData<'_> {
    /// Bytes that have not been read.
    pub fn left(&self) -> u64 {
        self.state.left
    }

    /// Fills `buf` with the next bytes.
    pub fn read(&mut self, buf: &mut [u8]) -> Result<(), ChannelError> {
        self.read_vectored(&mut [IoSliceMut::new(buf)])
    }

    /// Fills all of `bufs` with the next bytes, in few system calls.
    pub fn read_vectored(&mut self, bufs: &mut [IoSliceMut<'_>]) -> Result<(), ChannelError> {
        let mut wanted: u64 = bufs.iter().map(|b| b.len() as u64).sum();
        if wanted > self.state.left {
            return Err(ChannelError::Misuse("more page data was asked for than the frame has"));
        }
        let limits = Limits { silence: self.options.peer_timeout, whole: Some(self.state.whole) };
        let mut rest = bufs;
        // Leading empty buffers would make a read of nothing look like the end.
        IoSliceMut::advance_slices(&mut rest, 0);
        while wanted > 0 {
            let n = match self.half.read_some(rest, limits) {
                Ok(0) => return Err(self.fail(self.half.ended())),
                Ok(n) => n,
                Err(e) => return Err(self.fail(e)),
            };
            self.stats.count_received(n);
            self.state.left -= n as u64;
            wanted -= n as u64;
            IoSliceMut::advance_slices(&mut rest, n);
        }
        Ok(())
    }

    fn fail(&mut self, error: StreamError) -> ChannelError {
        self.state.failed.get_or_insert_with(|| error.to_string());
        error.into()
    }
}
