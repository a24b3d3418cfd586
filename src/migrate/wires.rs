//! What both ends of a connection need: the main channel with its heartbeat, names, sessions.

use std::fs::File;
use std::io::{self, Read};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::switchover::SessionId;
use crate::transport::{CancelToken, Channel, ChannelError, Heartbeat, Receiver, Sender};
use crate::wire::Message;

use super::intake::Place;

/// How long the last words of a connection may take to be read.
pub const FAREWELL: Duration = Duration::from_secs(1);

/// Connections whose last words may be on their way at a time. Each is a thread and some descriptors:
/// whoever calls and is turned away again and again must not have as many as they like.
static FAREWELLS: Farewells = Farewells { under_way: AtomicUsize::new(0), most: 64 };

struct Farewells {
    under_way: AtomicUsize,
    most: usize,
}

impl Farewells {
    /// Has `wait` done on a thread of its own; false, and nothing done, where too many are under way.
    fn take(&'static self, wait: impl FnOnce() + Send + 'static) -> bool {
        let more = |n| (n < self.most).then_some(n + 1);
        if self.under_way.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).is_err() {
            return false;
        }
        let run = move || {
            wait();
            self.under_way.fetch_sub(1, Ordering::AcqRel);
        };
        let started = std::thread::Builder::new().name("farewell".to_owned()).spawn(run).is_ok();
        if !started {
            self.under_way.fetch_sub(1, Ordering::AcqRel);
        }
        started
    }
}

/// The sending half of a main channel, kept alive by heartbeats until it is closed.
#[derive(Debug)]
pub struct MainLine {
    sender: Sender,
    token: CancelToken,
    _heartbeat: Heartbeat,
}

impl MainLine {
    /// Starts the heartbeat and gives the receiving half to whoever reads. `peer_timeout` is the
    /// shorter of both sides': whichever is less patient has to be kept content.
    pub fn start(channel: Channel, peer_timeout: Duration) -> io::Result<(Self, Receiver)> {
        let (sender, receiver) = channel.split();
        let heartbeat = Heartbeat::start(vec![sender.clone()], peer_timeout)?;
        let token = sender.cancel_token().clone();
        Ok((Self { sender, token, _heartbeat: heartbeat }, receiver))
    }

    /// Sends a message.
    pub fn send(&self, message: &Message) -> Result<(), ChannelError> {
        self.sender.send(message)
    }

    /// The sending half itself.
    pub fn sender(&self) -> &Sender {
        &self.sender
    }

    /// Says that nothing more comes; what was sent is read to its end.
    pub fn end(&self) {
        self.sender.close();
    }

    /// Ends the connection: what was sent before still arrives, and whoever reads here does so until
    /// the peer has closed as well, but no longer than [`FAREWELL`]. Bytes that are left unread would
    /// make TCP drop our last words.
    pub fn close(self) {
        self.sender.close();
        let token = self.token.clone();
        let end = |token: &CancelToken| token.cancel("the connection was closed on this side");
        let wait = move || {
            token.wait(Instant::now() + FAREWELL);
            end(&token);
        };
        if !FAREWELLS.take(wait) {
            end(&self.token);
        }
    }

    /// Ends the connection and every wait on it now.
    pub fn cut(self) {
        self.token.cancel("the connection is over");
    }
}

/// The shorter patience of both sides, from what the peer said of itself.
pub fn shorter(ours: Duration, theirs_ms: u64) -> Duration {
    ours.min(Duration::from_millis(theirs_ms.max(1)))
}

/// Sends a last message on a channel that is not wanted, and lets the peer read it. It keeps its place
/// at the door meanwhile: so there are no more such threads than places.
pub fn turn_away(channel: Channel, message: &Message, place: Place) {
    let (sender, mut receiver) = channel.split();
    if sender.send(message).is_ok() {
        sender.close();
        FAREWELLS.take(move || {
            receiver.wait_closed(FAREWELL);
            drop(place);
        });
    }
}

/// A new random session.
pub fn new_session() -> io::Result<SessionId> {
    let mut id = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut id)?;
    Ok(SessionId(id))
}

/// This host's name, for the other side's log.
pub fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn no_more_than_so_many_are_waited_for() {
        static TWO: Farewells = Farewells { under_way: AtomicUsize::new(0), most: 2 };
        let (ends, waits): (Vec<_>, Vec<_>) = (0..3).map(|_| mpsc::channel::<()>()).unzip();
        let taken: Vec<bool> =
            waits.into_iter().map(|wait| TWO.take(move || wait.recv().unwrap_or_default())).collect();
        assert_eq!(taken, [true, true, false]);
        drop(ends);
        while !TWO.take(|| ()) {
            std::thread::yield_now();
        }
    }
}
