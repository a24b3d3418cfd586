//! The receiver's door: takes connections, hears their first word, passes them on.
//!
//! Each caller is heard on a thread of its own, for a bounded time, and only so many at once: one
//! that says nothing, or drips, keeps nobody else waiting (`places`).

mod places;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender as EventSender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::switchover::Attempt;
use crate::transport::{Address, CancelToken, Channel, ChannelOptions, Listener, StreamError};
use crate::wire::{self, Message};

use super::dest::Event;
use super::options::ReceiveOptions;
pub use places::Place;
use places::Places;

/// How often the door looks whether it is to be shut.
const STEP: Duration = Duration::from_millis(200);
/// How often it looks whether a place is free, while somebody waits for one.
const CROWDED: Duration = Duration::from_millis(10);

/// Somebody who has said who they are.
#[derive(Debug)]
pub struct Caller {
    /// The session and epoch that they named.
    pub attempt: Attempt,
    /// What they said.
    pub opening: Opening,
    /// The connection.
    pub channel: Channel,
    /// Kept until the caller is taken in, or has gone: so no more wait at the door than it has places.
    pub place: Place,
}

/// The first word of a caller.
#[derive(Debug)]
pub enum Opening {
    /// A main channel.
    Hello(Box<wire::Hello>),
    /// A bulk channel.
    Join {
        /// Its number.
        index: u32,
    },
}

/// The listening socket with its thread; shut when dropped.
#[derive(Debug)]
pub struct Intake {
    address: Address,
    single: bool,
    shut: Arc<AtomicBool>,
    /// Ends the accept that is under way.
    waiting: Arc<Mutex<CancelToken>>,
    thread: Option<JoinHandle<()>>,
}

impl Intake {
    /// Listens at `options.listen`; callers become events.
    pub fn open(options: &ReceiveOptions, events: EventSender<Event>) -> Result<Self, StreamError> {
        let listener = Listener::bind(&options.listen, options.peer_timeout)?;
        let listen_error = |e: std::io::Error| StreamError::Listen {
            address: options.listen.to_string(),
            cause: e.to_string(),
        };
        let (address, single) = (listener.local().clone(), !listener.takes_many());
        let shut = Arc::new(AtomicBool::new(false));
        let waiting = Arc::new(Mutex::new(CancelToken::new().map_err(listen_error)?));
        let channel_options = ChannelOptions { peer_timeout: options.peer_timeout };
        let door = Door { listener, channel_options, events, shut: shut.clone(), waiting: waiting.clone() };
        let thread = std::thread::Builder::new()
            .name("intake".to_owned())
            .spawn(move || door.take_callers())
            .map_err(listen_error)?;
        Ok(Self { address, single, shut, waiting, thread: Some(thread) })
    }

    /// Where it listens, with the port that was taken.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Whether there is one connection only, which cannot come again.
    pub fn is_single(&self) -> bool {
        self.single
    }
}

impl Drop for Intake {
    fn drop(&mut self) {
        self.shut.store(true, Ordering::Release);
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).cancel("the receiver is done");
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Door {
    listener: Listener,
    channel_options: ChannelOptions,
    events: EventSender<Event>,
    shut: Arc<AtomicBool>,
    waiting: Arc<Mutex<CancelToken>>,
}

impl Door {
    fn take_callers(self) {
        let places = Places::default();
        while !self.shut.load(Ordering::Acquire) {
            // Each connection has a token of its own: ending one must not end the listening.
            let Ok(token) = CancelToken::new() else {
                std::thread::sleep(STEP);
                continue;
            };
            *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = token.clone();
            let stream = match self.listener.accept(Some(Instant::now() + STEP), &token) {
                Ok(Some(stream)) => stream,
                Ok(None) => continue,
                Err(error) => {
                    if !self.listener.takes_many() || self.shut.load(Ordering::Acquire) {
                        return;
                    }
                    tracing::warn!("{error}");
                    token.wait(Instant::now() + STEP);
                    continue;
                }
            };
            let place = loop {
                if let Some(place) = places.take(stream.peer(), &token) {
                    break place;
                }
                if token.wait(Instant::now() + CROWDED) {
                    return;
                }
            };
            let (events, options) = (self.events.clone(), self.channel_options);
            let hearing = std::thread::Builder::new()
                .name("caller".to_owned())
                .spawn(move || hear(stream, options, place, &events));
            if let Err(error) = hearing {
                tracing::warn!("a caller cannot be heard: {error}");
            }
        }
    }
}

fn hear(
    stream: crate::transport::Stream,
    options: ChannelOptions,
    place: Place,
    events: &EventSender<Event>,
) {
    match Channel::accept(stream, options) {
        Ok((channel, opening)) => {
            let opening = match opening {
                Message::Hello(hello) => Opening::Hello(Box::new(hello)),
                Message::Join { index } => Opening::Join { index },
                // `accept` gives nothing else.
                _ => return,
            };
            let _ =
                events.send(Event::Caller(Caller { attempt: channel.attempt(), opening, channel, place }));
        }
        Err(error) => tracing::warn!("a caller was turned away: {error}"),
    }
}
