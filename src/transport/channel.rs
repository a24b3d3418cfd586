//! A stream that speaks frames for one attempt.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::frame_io::FirstFrame;
use super::{ChannelError, Receiver, Sender, Stream};
use crate::switchover::Attempt;
use crate::wire::limits::MIN_FRAME_RATE;
use crate::wire::{FrameType, Message, Refused, RefusedCode};

/// What a channel is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChannelRole {
    /// Messages both ways; pages as well where there is no bulk channel. PINGs are answered here.
    Main,
    /// Pages from the source; the number is its JOIN's, from 1. After JOINED the destination says
    /// nothing on it.
    Bulk(u32),
}

/// How a channel behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChannelOptions {
    /// The longest silence, and the longest time that a write may stand still.
    pub peer_timeout: Duration,
}

impl Default for ChannelOptions {
    /// Five seconds.
    fn default() -> Self {
        Self { peer_timeout: Duration::from_secs(5) }
    }
}

impl ChannelOptions {
    /// How long a frame of `bytes` may take to arrive from its first byte on.
    pub(super) fn frame_time(&self, bytes: u64) -> Duration {
        self.peer_timeout + Duration::from_millis(bytes * 1000 / MIN_FRAME_RATE)
    }
}

/// Counters of one channel; both halves write them, anyone may read them.
#[derive(Debug)]
pub struct ChannelStats {
    epoch: Instant,
    sent: AtomicU64,
    received: AtomicU64,
    last_sent_us: AtomicU64,
    last_ping: AtomicU64,
    rtt_us: AtomicU64,
}

impl ChannelStats {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            epoch: Instant::now(),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            last_sent_us: AtomicU64::new(0),
            last_ping: AtomicU64::new(0),
            rtt_us: AtomicU64::new(0),
        })
    }

    /// Bytes sent, headers included.
    pub fn bytes_sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Bytes received, headers included.
    pub fn bytes_received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// The last time that PING took to come back, if it ever did: the round trip and what the peer
    /// was busy with.
    pub fn round_trip(&self) -> Option<Duration> {
        match self.rtt_us.load(Ordering::Relaxed) {
            0 => None,
            us => Some(Duration::from_micros(us)),
        }
    }

    fn now_us(&self) -> u64 {
        self.epoch.elapsed().as_micros() as u64
    }

    pub(super) fn count_sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
        self.last_sent_us.store(self.now_us(), Ordering::Relaxed);
    }

    pub(super) fn count_received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// How long nothing has been sent.
    pub(super) fn send_idle(&self) -> Duration {
        Duration::from_micros(self.now_us().saturating_sub(self.last_sent_us.load(Ordering::Relaxed)))
    }

    /// The nonce of the next PING: the time, so that PONG tells how long it took.
    pub(super) fn ping_nonce(&self) -> u64 {
        let nonce = self.now_us().max(1);
        self.last_ping.store(nonce, Ordering::Relaxed);
        nonce
    }

    /// A PONG that answers nothing of ours is passed over.
    pub(super) fn pong(&self, nonce: u64) {
        if nonce != 0 && self.last_ping.swap(0, Ordering::Relaxed) == nonce {
            self.rtt_us.store(self.now_us().saturating_sub(nonce).max(1), Ordering::Relaxed);
        }
    }
}

/// A connection that speaks frames.
#[derive(Debug)]
pub struct Channel {
    tx: Sender,
    rx: Receiver,
}

impl Channel {
    /// A channel of `attempt` over a fresh stream: the side that connects.
    pub fn new(stream: Stream, attempt: Attempt, role: ChannelRole, options: ChannelOptions) -> Self {
        let stats = ChannelStats::new();
        let (read, write) = stream.split();
        let tx = Sender::new(write, attempt, role, options, stats.clone());
        let rx = Receiver::new(read, tx.clone(), options, stats);
        Self { tx, rx }
    }

    /// Reads the first frame of a stream that someone has opened, HELLO or JOIN, which says what
    /// the channel is and for which attempt. Whether that attempt is welcome is for the caller to
    /// say. What the stream sends instead is answered with REFUSED where the answer has a chance.
    /// Takes no longer than `peer_timeout` and the time of one frame.
    pub fn accept(stream: Stream, options: ChannelOptions) -> Result<(Self, Message), ChannelError> {
        let stats = ChannelStats::new();
        let peer = stream.peer().to_owned();
        let (read, write) = stream.split();
        let first = FirstFrame::read(&read, options, &stats)?;
        let attempt = first.header.attempt;
        let (role, result) = match first.message() {
            Ok(Message::Join { index: 0 }) => (
                ChannelRole::Main,
                Err(ChannelError::Unexpected {
                    peer,
                    got: FrameType::Join,
                    expected: "a channel number from 1".to_owned(),
                }),
            ),
            Ok(Message::Join { index }) => (ChannelRole::Bulk(index), Ok(Message::Join { index })),
            other => (ChannelRole::Main, other),
        };
        let tx = Sender::new(write, attempt, role, options, stats.clone());
        match result {
            Ok(message) => {
                let mut rx = Receiver::new(read, tx.clone(), options, stats);
                rx.skip_first();
                Ok((Self { tx, rx }, message))
            }
            Err(error) => {
                let refused =
                    Refused { code: RefusedCode::Protocol, message: error.to_string(), problems: Vec::new() };
                let _ = tx.send(&Message::Refused(refused));
                Err(error)
            }
        }
    }

    /// The attempt that every frame carries.
    pub fn attempt(&self) -> Attempt {
        self.tx.attempt()
    }

    /// What the channel is for.
    pub fn role(&self) -> ChannelRole {
        self.tx.role()
    }

    /// How errors name the peer.
    pub fn peer(&self) -> &str {
        self.rx.peer()
    }

    /// The counters of both halves.
    pub fn stats(&self) -> &Arc<ChannelStats> {
        self.tx.stats()
    }

    /// The half that sends; it may be cloned.
    pub fn sender(&self) -> &Sender {
        &self.tx
    }

    /// The half that receives.
    pub fn receiver(&mut self) -> &mut Receiver {
        &mut self.rx
    }

    /// Both halves, for two threads.
    pub fn split(self) -> (Sender, Receiver) {
        (self.tx, self.rx)
    }

    /// [`Sender::send`].
    pub fn send(&self, message: &Message) -> Result<(), ChannelError> {
        self.tx.send(message)
    }

    /// [`Receiver::recv_message`].
    pub fn recv_message(&mut self) -> Result<Message, ChannelError> {
        self.rx.recv_message()
    }
}
