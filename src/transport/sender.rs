//! The half of a channel that sends.

use std::io::IoSlice;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use super::channel::ChannelStats;
use super::{CancelToken, ChannelError, ChannelOptions, ChannelRole, StreamError, WriteHalf};
use crate::switchover::Attempt;
use crate::wire::{FrameType, HEADER_BYTES, Header, Message, RunTable};

/// Sends frames, each whole. Clones share the stream and take turns, so a heartbeat can come from
/// a thread of its own. After an error nothing more goes out.
#[derive(Clone, Debug)]
pub struct Sender {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    peer: String,
    cancel: CancelToken,
    attempt: Attempt,
    role: ChannelRole,
    options: ChannelOptions,
    stats: Arc<ChannelStats>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    half: WriteHalf,
    sequence: u64,
    /// Head and table of the PAGES frame under way, kept for its allocation.
    table: Vec<u8>,
    dead: Option<String>,
}

impl Sender {
    pub(super) fn new(
        half: WriteHalf,
        attempt: Attempt,
        role: ChannelRole,
        options: ChannelOptions,
        stats: Arc<ChannelStats>,
    ) -> Self {
        let (peer, cancel) = (half.peer().to_owned(), half.cancel_token().clone());
        let state = Mutex::new(State { half, sequence: 0, table: Vec::new(), dead: None });
        Self { inner: Arc::new(Inner { peer, cancel, attempt, role, options, stats, state }) }
    }

    /// The attempt that every frame carries.
    pub fn attempt(&self) -> Attempt {
        self.inner.attempt
    }

    /// What the channel is for.
    pub fn role(&self) -> ChannelRole {
        self.inner.role
    }

    /// How errors name the peer.
    pub fn peer(&self) -> &str {
        &self.inner.peer
    }

    /// What ends every wait on this channel.
    pub fn cancel_token(&self) -> &CancelToken {
        &self.inner.cancel
    }

    /// The counters of both halves.
    pub fn stats(&self) -> &Arc<ChannelStats> {
        &self.inner.stats
    }

    /// Sends `message`; back when the system has taken all of it. An error when the peer takes
    /// nothing for `peer_timeout`.
    pub fn send(&self, message: &Message) -> Result<(), ChannelError> {
        let payload = self.encoded(message)?;
        self.lock().send(&self.inner, message.kind(), &payload, &[])
    }

    /// Sends the pages of `table`, whose data runs are `data`, in order, however it is cut up.
    /// The system reads `data` once; memory that changes meanwhile arrives in one state or another.
    /// Gives the bytes of the frame.
    pub fn send_pages(&self, table: &RunTable, data: &[IoSlice<'_>]) -> Result<u64, ChannelError> {
        let bytes: u64 = data.iter().map(|d| d.len() as u64).sum();
        if bytes != table.data_bytes() {
            return Err(ChannelError::Misuse("page data does not fit its table"));
        }
        if table.is_empty() {
            return Err(ChannelError::Misuse("a table without runs"));
        }
        let mut state = self.lock();
        let mut head = std::mem::take(&mut state.table);
        head.clear();
        table.encode(&mut head);
        let sent = state.send(&self.inner, FrameType::Pages, &head, data);
        let frame = HEADER_BYTES as u64 + head.len() as u64 + bytes;
        state.table = head;
        sent.map(|()| frame)
    }

    /// Sends PING if nothing was sent for `idle`. Does nothing while a frame is under way, or
    /// while bytes wait in the system for the peer to take them: those are life enough.
    pub fn ping_if_idle(&self, idle: Duration) -> Result<bool, ChannelError> {
        if self.inner.stats.send_idle() < idle {
            return Ok(false);
        }
        self.try_send(|| Message::Ping { nonce: self.inner.stats.ping_nonce() })
    }

    /// Answers a PING, unless the way is busy: then other bytes are the sign of life.
    pub(super) fn pong(&self, nonce: u64) {
        // An error is for the next real send to tell.
        let _ = self.try_send(|| Message::Pong { nonce });
    }

    /// Tells the peer that nothing more comes: after what was sent, it reads the end of file.
    pub fn close(&self) {
        let mut state = self.lock();
        state.half.close();
        state.dead.get_or_insert_with(|| "closed on this side".to_owned());
    }

    fn try_send(&self, message: impl FnOnce() -> Message) -> Result<bool, ChannelError> {
        let mut state = match self.inner.state.try_lock() {
            Ok(state) => state,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(false),
        };
        if state.dead.is_none() && !state.half.is_writable() {
            return Ok(false);
        }
        let message = message();
        let payload = self.encoded(&message)?;
        state.send(&self.inner, message.kind(), &payload, &[])?;
        Ok(true)
    }

    fn encoded(&self, message: &Message) -> Result<Vec<u8>, ChannelError> {
        message.encode().map_err(|cause| ChannelError::Message { peer: self.inner.peer.clone(), cause })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Sends one frame: `body` is what the checksum covers, `data` comes after it.
    fn send(
        &mut self,
        inner: &Inner,
        kind: FrameType,
        body: &[u8],
        data: &[IoSlice<'_>],
    ) -> Result<(), ChannelError> {
        if let Some(cause) = &self.dead {
            return Err(ChannelError::Dead { peer: inner.peer.clone(), cause: cause.clone() });
        }
        let data_bytes: usize = data.iter().map(|d| d.len()).sum();
        let header = Header {
            kind,
            payload_bytes: (body.len() + data_bytes) as u32,
            attempt: inner.attempt,
            sequence: self.sequence,
            body_crc: crc32c::crc32c(body),
        };
        let header = header.encode();
        let mut bufs = Vec::with_capacity(data.len() + 2);
        bufs.extend([IoSlice::new(&header), IoSlice::new(body)]);
        bufs.extend_from_slice(data);
        let sent: Result<(), StreamError> = self.half.write_all_vectored(&bufs, inner.options.peer_timeout);
        match sent {
            Ok(()) => {
                self.sequence += 1;
                inner.stats.count_sent((HEADER_BYTES + body.len() + data_bytes) as u64);
                Ok(())
            }
            Err(e) => {
                // Part of the frame may be out: what came after it could not be understood.
                self.dead = Some(e.to_string());
                Err(e.into())
            }
        }
    }
}
