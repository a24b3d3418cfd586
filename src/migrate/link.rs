//! The source's connection to a destination: the main channel with its reader, the bulk channels
//! with their workers.

use std::sync::Arc;
use std::sync::mpsc::Sender as EventSender;
use std::time::Instant;

use crate::switchover::Attempt;
use crate::transport::{
    CancelToken, Channel, ChannelError, ChannelOptions, ChannelRole, ChannelStats, Heartbeat, RateLimiter,
    Receiver, Sender, connect,
};
use crate::wire::{self, Message, Refused, RefusedCode};

use super::bulk;
use super::options::SendOptions;
use super::outcome::{Ending, MigrateError, Side, here};
use super::precopy::Bulk;
use super::wires::{MainLine, shorter};

/// What wakes the source's conductor. The number is the epoch of the connection.
#[derive(Debug)]
pub enum Event {
    /// A message on the main channel.
    Main(u32, Message),
    /// A channel has failed, and why.
    Lost(u32, String),
}

/// One connection of a session.
#[derive(Debug)]
pub struct Link {
    main: MainLine,
    bulk: Vec<Sender>,
    heartbeat: Option<Heartbeat>,
    limiter: RateLimiter,
    stats: Vec<Arc<ChannelStats>>,
    cancel: CancelToken,
    attempt: Attempt,
    /// The shorter of both sides' time-outs.
    patience: std::time::Duration,
}

impl Link {
    /// Connects, says HELLO, and hears the answer.
    pub fn connect(
        options: &SendOptions,
        attempt: Attempt,
        hello: &wire::Hello,
        events: &EventSender<Event>,
    ) -> Result<(Self, wire::HelloAck), MigrateError> {
        let cancel = CancelToken::new().map_err(here)?;
        let mut channel = open(options, attempt, ChannelRole::Main, &cancel)?;
        channel.send(&Message::Hello(hello.clone())).map_err(lost)?;
        let ack = match channel.recv_message().map_err(lost)? {
            Message::HelloAck(ack) => ack,
            Message::Refused(refused) => return Err(refusal(refused)),
            other => return Err(lost(channel.receiver().unexpected(&other, "HELLO_ACK"))),
        };
        if !(hello.version_min..=hello.version_max).contains(&ack.version) {
            let what =
                format!("the destination wants to speak version {} of the protocol, unasked", ack.version);
            return Err(MigrateError::new(Ending::PeerFailed, Side::Destination, what));
        }
        let stats = vec![channel.stats().clone()];
        let patience = shorter(options.peer_timeout, ack.peer_timeout_ms);
        let (main, receiver) = MainLine::start(channel, patience).map_err(here)?;
        let to = events.clone();
        std::thread::spawn(move || read_main(receiver, attempt.epoch, &to));
        let limiter = RateLimiter::new(options.bandwidth_limit);
        Ok((Self { main, bulk: vec![], heartbeat: None, limiter, stats, cancel, attempt, patience }, ack))
    }

    /// Opens `channels` bulk channels (none: pages go on the main channel) and starts a worker on
    /// each, which takes its work from `bulk`.
    pub fn open_bulk(
        &mut self,
        options: &SendOptions,
        channels: u32,
        bulk: &Bulk,
        events: &EventSender<Event>,
    ) -> Result<(), MigrateError> {
        for index in 1..=channels {
            let mut channel = open(options, self.attempt, ChannelRole::Bulk(index), &self.cancel)?;
            channel.send(&Message::Join { index }).map_err(lost)?;
            match channel.recv_message().map_err(lost)? {
                Message::Joined { index: got } if got == index => {}
                Message::Refused(refused) => return Err(refusal(refused)),
                other => return Err(lost(channel.receiver().unexpected(&other, "JOINED"))),
            }
            self.stats.push(channel.stats().clone());
            self.bulk.push(channel.split().0);
        }
        if channels > 0 {
            self.heartbeat = Some(Heartbeat::start(self.bulk.clone(), self.patience).map_err(here)?);
        }
        let senders = if self.bulk.is_empty() { vec![self.main.sender().clone()] } else { self.bulk.clone() };
        for sender in senders {
            let (bulk, limiter, events, epoch) =
                (bulk.clone(), self.limiter.clone(), events.clone(), self.attempt.epoch);
            std::thread::Builder::new()
                .name("bulk".to_owned())
                .spawn(move || {
                    if let Err(error) =
                        bulk::work(&sender, &bulk.queue, &bulk.views, &bulk.counters, &limiter)
                    {
                        let _ = events.send(Event::Lost(epoch, error.to_string()));
                        bulk.queue.stop();
                    }
                })
                .map_err(here)?;
        }
        Ok(())
    }

    /// Says something on the main channel.
    pub fn send(&self, message: &Message) -> Result<(), ChannelError> {
        self.main.send(message)
    }

    /// Changes the bandwidth limit: bytes per second over all bulk channels, 0 for none.
    pub fn set_rate(&self, bytes_per_s: u64) {
        if self.limiter.rate() != bytes_per_s {
            self.limiter.set_rate(bytes_per_s);
        }
    }

    /// Bytes sent on all channels, headers included.
    pub fn bytes_sent(&self) -> u64 {
        self.stats.iter().map(|s| s.bytes_sent()).sum()
    }

    /// Ends the connection: what was sent before still arrives.
    pub fn close(self) {
        drop(self.heartbeat);
        for sender in &self.bulk {
            sender.close();
        }
        self.main.close();
    }
}

fn open(
    options: &SendOptions,
    attempt: Attempt,
    role: ChannelRole,
    cancel: &CancelToken,
) -> Result<Channel, MigrateError> {
    let started = Instant::now();
    let stream =
        connect(&options.dest, options.connect_timeout, options.peer_timeout, cancel).map_err(|e| {
            tracing::debug!("gave up connecting after {:?}", started.elapsed());
            MigrateError::new(Ending::Failed, Side::Link, e)
        })?;
    Ok(Channel::new(stream, attempt, role, ChannelOptions { peer_timeout: options.peer_timeout }))
}

/// Passes on what comes on the main channel, until it ends.
fn read_main(mut receiver: Receiver, epoch: u32, events: &EventSender<Event>) {
    loop {
        let event = match receiver.recv_message() {
            Ok(message) => Event::Main(epoch, message),
            Err(error) => Event::Lost(epoch, error.to_string()),
        };
        let last = matches!(event, Event::Lost(..));
        if events.send(event).is_err() || last {
            return;
        }
    }
}

/// What REFUSED means for the migration: nothing was sent, nothing is touched.
pub fn refusal(refused: Refused) -> MigrateError {
    let ending = match refused.code {
        RefusedCode::Version | RefusedCode::Feature | RefusedCode::Unsuitable | RefusedCode::Busy => {
            Ending::Unsuitable
        }
        RefusedCode::Failed => Ending::Failed,
        _ => Ending::PeerFailed,
    };
    MigrateError { ending, side: Side::Destination, cause: refused.message, problems: refused.problems }
}

fn lost(error: ChannelError) -> MigrateError {
    MigrateError::new(Ending::PeerFailed, Side::Link, error)
}
