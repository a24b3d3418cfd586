//! A source made by hand, for what no honest vmsend would say.

use std::io::{Read, Write};
use std::net::TcpStream;

use vmferry::control::Client;
use vmferry::state::MachineDescription;
use vmferry::switchover::{Attempt, SessionId};
use vmferry::wire::{FrameType, HEADER_BYTES, Header, Hello, JsonBody, Message, VERSION};

use super::program::PATIENCE;
use super::scene::Host;

/// One connection to a receiver.
pub struct Peer {
    pub stream: TcpStream,
    pub attempt: Attempt,
    pub sequence: u64,
}

impl Peer {
    pub fn connect(address: &str, session: u8) -> Self {
        let stream = TcpStream::connect(address.strip_prefix("tcp:").unwrap()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { stream, attempt: attempt(session, 1), sequence: 0 }
    }

    /// A connection whose HELLO was taken, for the guest of `host`.
    pub fn with_hello(address: &str, session: u8, host: &Host) -> Self {
        let mut peer = Self::connect(address, session);
        peer.say(&Message::Hello(hello(&machine(host))));
        assert!(matches!(peer.hear(), Some(Message::HelloAck(_))), "no HELLO_ACK");
        peer
    }

    /// A connection whose machine was accepted.
    pub fn with_machine(address: &str, session: u8, host: &Host) -> Self {
        let mut peer = Self::with_hello(address, session, host);
        peer.say(&Message::Machine(JsonBody::of(&machine(host)).unwrap()));
        assert_eq!(peer.hear(), Some(Message::Accepted));
        peer
    }

    pub fn say(&mut self, message: &Message) {
        let payload = message.encode().unwrap();
        self.frame(message.kind(), &payload);
    }

    /// A frame with a correct header.
    pub fn frame(&mut self, kind: FrameType, payload: &[u8]) {
        let bytes = [&self.header(kind, payload).encode()[..], payload].concat();
        self.sequence += 1;
        self.bytes(&bytes);
    }

    pub fn header(&self, kind: FrameType, payload: &[u8]) -> Header {
        Header {
            kind,
            payload_bytes: payload.len() as u32,
            attempt: self.attempt,
            sequence: self.sequence,
            body_crc: crc32c::crc32c(payload),
        }
    }

    /// Bytes as they are. The other side may have hung up already.
    pub fn bytes(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    /// The next message that is no sign of life; `None` when the other side has hung up.
    pub fn hear(&mut self) -> Option<Message> {
        loop {
            let mut bytes = [0; HEADER_BYTES];
            self.stream.read_exact(&mut bytes).ok()?;
            let header = Header::decode(&bytes).unwrap();
            let mut payload = vec![0; header.payload_bytes as usize];
            self.stream.read_exact(&mut payload).ok()?;
            match Message::decode(header.kind, payload).unwrap() {
                Message::Ping { .. } | Message::Pong { .. } => {}
                message => return Some(message),
            }
        }
    }

    /// Waits until the other side has hung up; what it said before.
    pub fn hear_all(&mut self) -> Vec<Message> {
        std::iter::from_fn(|| self.hear()).collect()
    }
}

pub fn attempt(session: u8, epoch: u32) -> Attempt {
    Attempt { session: SessionId([session; 16]), epoch }
}

pub fn machine(host: &Host) -> MachineDescription {
    Client::connect(&host.control, "test").unwrap().machine().unwrap()
}

/// One connection only: pages come on the main channel.
pub fn hello(machine: &MachineDescription) -> Hello {
    Hello {
        version_min: VERSION,
        version_max: VERSION,
        release: "test".into(),
        host: "test".into(),
        vm_uuid: machine.uuid.clone(),
        vm_name: machine.name.clone(),
        resume: false,
        superseded: None,
        channels: 0,
        features: vec![],
        verify: false,
        peer_timeout_ms: 5000,
    }
}
