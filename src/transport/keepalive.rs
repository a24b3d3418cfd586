//! Signs of life: each side sends PING when it has nothing else to say.

use std::time::{Duration, Instant};

use super::{CancelToken, Sender};

/// The shortest time between two PINGs, whatever time-out the peer says that it has.
const LEAST: Duration = Duration::from_millis(10);

/// A thread that keeps channels from falling silent; it ends when this is dropped.
///
/// The other half of the matter is in [`super::Receiver`]: any byte is life, and silence for
/// `peer_timeout` is an error.
#[derive(Debug)]
pub struct Heartbeat {
    stop: CancelToken,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Heartbeat {
    /// Sends PING on each of `senders` that has sent nothing for a quarter of `peer_timeout` (the
    /// shorter of the two sides'). A channel that fails is left alone from then on: its own user
    /// learns the error from its next call.
    pub fn start(senders: Vec<Sender>, peer_timeout: Duration) -> std::io::Result<Self> {
        let stop = CancelToken::new()?;
        let theirs = stop.clone();
        let thread = std::thread::Builder::new()
            .name("heartbeat".to_owned())
            .spawn(move || beat(senders, (peer_timeout / 4).max(LEAST), &theirs))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

fn beat(mut senders: Vec<Sender>, idle: Duration, stop: &CancelToken) {
    let step = (idle / 4).max(Duration::from_millis(1));
    while !senders.is_empty() && !stop.wait(Instant::now() + step) {
        senders.retain(|sender| sender.ping_if_idle(idle).is_ok());
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.stop.cancel("no more heartbeats are wanted");
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
