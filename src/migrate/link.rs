//! The source's connection to a destination: the main channel with its reader, the bulk channels
//! with their workers.

use std::sync::mpsc::Sender as EventSender;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use crate::switchover::Attempt;
use crate::sys::schedule;
use crate::transport::{
    CancelToken, Channel, ChannelError, ChannelOptions, ChannelRole, ChannelStats, Heartbeat, RateLimiter,
    Receiver, Sender, connect,
};
use crate::wire::{self, Message, Refused, RefusedCode, RunTable};

use super::backlog::{Backlog, Place};
use super::bulk::{self, WorkError};
use super::options::SendOptions;
use super::outcome::{Ending, MigrateError, Side, here};
use super::postcopy::server::PageServer;
use super::precopy::Bulk;
use super::queue::Chunk;
use super::wires::{MainLine, shorter};

/// What wakes the source's conductor. The number is the epoch of the connection.
#[derive(Debug)]
pub enum Event {
    /// A message on the main channel, with its place among those that wait.
    Main(u32, Message, Place),
    /// A channel has failed, and why.
    Lost(u32, String),
}

/// What answers page requests.
#[derive(Clone, Debug)]
struct Serving {
    server: Arc<PageServer>,
    bulk: Bulk,
    urgent: Sender,
}

/// One connection of a session.
#[derive(Debug)]
pub struct Link {
    main: MainLine,
    bulk: Vec<Sender>,
    /// Pages that somebody waits for (postcopy).
    urgent: Option<Sender>,
    serving: Arc<OnceLock<Serving>>,
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
        let serving = Arc::new(OnceLock::new());
        let served = serving.clone();
        std::thread::spawn(move || read_main(receiver, attempt.epoch, &served, &to));
        let limiter = RateLimiter::new(options.bandwidth_limit);
        Ok((
            Self {
                main,
                bulk: vec![],
                urgent: None,
                serving,
                heartbeat: None,
                limiter,
                stats,
                cancel,
                attempt,
                patience,
            },
            ack,
        ))
    }

    /// Opens the bulk channels that `hello` has promised (none: pages go on the main channel), and
    /// for postcopy the urgent one.
    pub fn open_channels(&mut self, options: &SendOptions, hello: &wire::Hello) -> Result<(), MigrateError> {
        for index in 1..=hello.all_channels() {
            let mut channel = open(options, self.attempt, ChannelRole::Bulk(index), &self.cancel)?;
            channel.send(&Message::Join { index }).map_err(lost)?;
            match channel.recv_message().map_err(lost)? {
                Message::Joined { index: got } if got == index => {}
                Message::Refused(refused) => return Err(refusal(refused)),
                other => return Err(lost(channel.receiver().unexpected(&other, "JOINED"))),
            }
            self.stats.push(channel.stats().clone());
            let sender = channel.split().0;
            if index > hello.channels {
                self.urgent = Some(sender);
            } else {
                self.bulk.push(sender);
            }
        }
        let all: Vec<Sender> = self.bulk.iter().chain(&self.urgent).cloned().collect();
        if !all.is_empty() {
            self.heartbeat = Some(Heartbeat::start(all, self.patience).map_err(here)?);
        }
        Ok(())
    }

    /// Starts a worker on each bulk channel, which takes its work from `bulk`.
    pub fn start_passes(&self, bulk: &Bulk, events: &EventSender<Event>) -> Result<(), MigrateError> {
        self.on_bulk_channels(events, |sender, limiter| {
            let bulk = bulk.clone();
            move || {
                let result = bulk::work(&sender, &bulk.queue, &bulk.views, &bulk.counters, &limiter);
                if result.is_err() {
                    bulk.queue.stop();
                }
                result
            }
        })
    }

    /// From here on page requests are answered from what `server` owes.
    pub fn serve(&self, server: &Arc<PageServer>, bulk: &Bulk) {
        let urgent = self.urgent.as_ref().unwrap_or(self.main.sender()).clone();
        let _ = self.serving.set(Serving { server: server.clone(), bulk: bulk.clone(), urgent });
    }

    /// Answers requests that came before anybody could.
    pub fn answer(&self, pages: &[u64]) -> Result<(), MigrateError> {
        match self.serving.get() {
            Some(s) => s.server.answer(pages, &s.urgent, &s.bulk.views, &s.bulk.counters).map_err(here),
            None => Ok(()),
        }
    }

    /// Sends what `server` owes in the background.
    pub fn start_push(
        &self,
        server: &Arc<PageServer>,
        bulk: &Bulk,
        events: &EventSender<Event>,
    ) -> Result<(), MigrateError> {
        self.on_bulk_channels(events, |sender, limiter| {
            let (server, bulk) = (server.clone(), bulk.clone());
            move || {
                // Nobody waits for these pages yet: who answers requests, or runs the guest, goes first.
                schedule::log_unchanged("the background push", schedule::yield_to_others());
                server.push(&sender, &bulk.views, &bulk.counters, &limiter)
            }
        })
    }

    /// Runs what `make` gives on a thread for each bulk channel; its error is the link's.
    fn on_bulk_channels<W>(
        &self,
        events: &EventSender<Event>,
        make: impl Fn(Sender, RateLimiter) -> W,
    ) -> Result<(), MigrateError>
    where
        W: FnOnce() -> Result<(), WorkError> + Send + 'static,
    {
        let senders = if self.bulk.is_empty() { vec![self.main.sender().clone()] } else { self.bulk.clone() };
        for sender in senders {
            let work = make(sender, self.limiter.clone());
            let (events, epoch) = (events.clone(), self.attempt.epoch);
            let run = move || {
                if let Err(error) = work() {
                    let _ = events.send(Event::Lost(epoch, error.to_string()));
                }
            };
            std::thread::Builder::new().name("bulk".to_owned()).spawn(run).map_err(here)?;
        }
        Ok(())
    }

    /// Sends pages on the main channel, in order with what is said there.
    pub fn send_on_main(&self, chunk: &Chunk, bulk: &Bulk) -> Result<(), MigrateError> {
        let mut table = RunTable::new();
        bulk::send_chunk(chunk, &mut table, self.main.sender(), &bulk.views, &bulk.counters, None)
            .map_err(|e| MigrateError::new(Ending::PeerFailed, Side::Link, e))
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
        for sender in self.bulk.iter().chain(&self.urgent) {
            sender.close();
        }
        self.main.close();
    }

    /// Ends the connection and every wait on it now.
    pub fn cut(self) {
        self.cancel.cancel("the connection is over");
        self.main.cut();
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
fn read_main(mut receiver: Receiver, epoch: u32, serving: &OnceLock<Serving>, events: &EventSender<Event>) {
    schedule::log_unchanged("who answers page requests", schedule::be_prompt());
    let mut backlog = Backlog::new();
    loop {
        let event = match receiver.recv_message() {
            // Answered on the spot: somebody waits.
            Ok(Message::PageRequest(pages)) if serving.get().is_some() => {
                let Some(s) = serving.get() else { continue };
                match s.server.answer(&pages, &s.urgent, &s.bulk.views, &s.bulk.counters) {
                    Ok(()) => continue,
                    Err(error) => Event::Lost(epoch, error.to_string()),
                }
            }
            Ok(message) => Event::Main(epoch, message, backlog.place()),
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
