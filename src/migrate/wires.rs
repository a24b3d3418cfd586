//! What both ends of a connection need: the main channel with its heartbeat, names, sessions.

use std::fs::File;
use std::io::{self, Read};
use std::time::Duration;

use crate::switchover::SessionId;
use crate::transport::{CancelToken, Channel, ChannelError, Heartbeat, Receiver, Sender};
use crate::wire::Message;

/// The sending half of a main channel, kept alive by heartbeats until it is closed.
#[derive(Debug)]
pub struct MainLine {
    sender: Sender,
    token: CancelToken,
    _heartbeat: Heartbeat,
}

impl MainLine {
    /// Starts the heartbeat and gives the receiving half to whoever reads.
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

    /// Lets the peer read to the end of what was sent.
    pub fn end(&self) {
        self.sender.close();
    }

    /// Ends the connection, and every wait on it.
    pub fn close(self) {
        self.sender.close();
        self.token.cancel("the connection was closed on this side");
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
