//! Sockets between host and guest as a device: its queues, the programs of the host, and what becomes
//! of both when the guest moves.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use serde_json::Value;
use zerocopy::IntoBytes;

use super::callers::{Callers, FIRST_FREE_NUMBER};
use super::credit::BUFFER_BYTES;
use super::door::Door;
use super::packet::{HEADER_BYTES, Header, NO_PORT, Ports};
use super::{CID_PROPERTY, Muxer};
use crate::state::{SocketFile, VirtioVsockState};
use crate::sys::socket_file::{self, FileId};
use crate::vmm::memory::TrackedMemory;
use crate::vmm::virtio::{Chain, ConfigSpace, Device, DeviceError, Io, Kind, Watch};

/// The queues (virtio 1.2, 5.10.2).
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENT: usize = 2;
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, as an event of the driver's (5.10.6.7).
const TRANSPORT_RESET: [u8; 4] = [0; 4];
/// How many packets are moved in each direction before orders and sockets have their turn.
const BATCH: usize = 256;
/// The most data of one packet to the guest.
const MAX_DATA_BYTES: usize = 64 << 10;
/// How long until the path is tried again, the first time and at most.
const DOOR_WAIT: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// How long nobody is let in when this process has no descriptor left.
const DEAF: Duration = Duration::from_secs(1);

/// The device.
pub struct Vsock {
    cid: u64,
    path: Arc<Path>,
    door: Option<Door>,
    /// The source's socket, which may be replaced.
    source: Option<FileId>,
    /// When the path is tried again, and the wait after that.
    knock: Option<(Instant, Duration)>,
    /// Nobody is let in before.
    deaf: Option<Instant>,
    callers: Callers,
    muxer: Muxer,
    config: Arc<ConfigSpace>,
    /// The driver is ready.
    active: bool,
    /// The guest is to be told that its streams are gone.
    interrupted: bool,
    /// Packets that the guest put out before it could know that it was moved: answered by resets.
    stale: u16,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
}

impl Vsock {
    /// For a guest that boots, with context id `cid`; `path` is taken at once.
    pub fn boot(cid: u64, path: &Path) -> io::Result<Self> {
        let mut door = Door::new(path, None)?;
        door.open(None)?;
        Ok(Self::new(cid, path, door))
    }

    /// For a guest that comes in, whose socket was at `source`. The path is taken when it runs.
    pub fn arriving(cid: u64, path: &Path, source: Option<&Path>) -> io::Result<Self> {
        Ok(Self::new(cid, path, Door::new(path, source)?))
    }

    fn new(cid: u64, path: &Path, door: Door) -> Self {
        Self {
            cid,
            path: path.into(),
            door: Some(door),
            source: None,
            knock: None,
            deaf: None,
            callers: Callers::default(),
            muxer: Muxer::new(cid),
            config: Arc::new(ConfigSpace::new(cid.to_le_bytes().to_vec(), 0..0)),
            active: false,
            interrupted: false,
            stale: 0,
            incoming: vec![0; MAX_DATA_BYTES],
            // One byte more than anybody has credit for: it ends the stream.
            outgoing: vec![0; BUFFER_BYTES as usize + 1],
        }
    }

    /// Moves packets in both directions.
    fn serve(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        let path = Arc::clone(&self.path);
        let held_up = self.take(io, |port| dial(&path, port))?;
        self.give(io)?;
        if held_up && self.muxer.takes() {
            io.look_again(TRANSMIT);
        }
        Ok(())
    }

    /// Packets of the guest. Whether there are more that have to wait for resets to be taken.
    fn take(
        &mut self,
        io: &mut Io,
        dial: impl Fn(u32) -> io::Result<UnixStream>,
    ) -> Result<bool, DeviceError> {
        let (memory, now) = (io.memory(), Instant::now());
        for _ in 0..BATCH {
            if !self.muxer.takes() {
                io.notify(TRANSMIT)?;
                return Ok(true);
            }
            let Some(chain) = io.pop(TRANSMIT)? else {
                io.notify(TRANSMIT)?;
                return Ok(false);
            };
            let head = chain.head_index();
            let (header, bytes) = self.read(chain, &memory)?;
            let data = &self.outgoing[..bytes];
            match self.stale.checked_sub(1) {
                Some(left) => {
                    self.stale = left;
                    self.muxer.guest_sent(&header, data, now, |_| Err(io::ErrorKind::ConnectionReset.into()));
                }
                None => self.muxer.guest_sent(&header, data, now, &dial),
            }
            io.finish(TRANSMIT, head, 0)?;
        }
        io.look_again(TRANSMIT);
        io.notify(TRANSMIT)?;
        Ok(false)
    }

    /// A packet's header, and its data in `outgoing`.
    fn read(&mut self, chain: Chain, memory: &TrackedMemory) -> Result<(Header, usize), DeviceError> {
        let mut reader = chain.reader(memory)?;
        let mut header = Header::default();
        let whole = reader.read_exact(header.as_mut_bytes());
        whole.map_err(|_| DeviceError::Request("a packet has no whole header"))?;
        let bytes = header.len.get() as usize;
        if bytes > reader.available_bytes() {
            return Err(DeviceError::Request("a packet has less data than it says"));
        }
        let bytes = bytes.min(self.outgoing.len());
        reader.read_exact(&mut self.outgoing[..bytes]).map_err(DeviceError::Memory)?;
        Ok((header, bytes))
    }

    /// Packets to the guest, until there are none or it has no buffers.
    fn give(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        let (memory, now) = (io.memory(), Instant::now());
        for _ in 0..BATCH {
            if !self.muxer.has_news() {
                return io.notify(RECEIVE);
            }
            let Some(chain) = io.pop(RECEIVE)? else { return io.notify(RECEIVE) };
            let head = chain.head_index();
            let mut writer = chain.writer(&memory)?;
            let room = writer.available_bytes().checked_sub(HEADER_BYTES);
            let room = room.ok_or(DeviceError::Request("a buffer has no room for a packet"))?;
            let room = room.min(self.incoming.len());
            let Some((header, bytes)) = self.muxer.next(&mut self.incoming[..room], now) else {
                io.put_back(RECEIVE);
                return io.notify(RECEIVE);
            };
            writer.write_all(header.as_bytes()).map_err(DeviceError::Memory)?;
            writer.write_all(&self.incoming[..bytes]).map_err(DeviceError::Memory)?;
            io.finish(RECEIVE, head, (HEADER_BYTES + bytes) as u32)?;
        }
        io.look_again(RECEIVE);
        io.notify(RECEIVE)
    }

    /// Tells the guest that its streams are gone, as soon as it has a buffer for that; whatever it has
    /// begun since ends as well.
    fn tell_interrupted(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        if !self.interrupted {
            return Ok(());
        }
        let memory = io.memory();
        let Some(chain) = io.pop(EVENT)? else { return Ok(()) };
        let head = chain.head_index();
        let mut writer = chain.writer(&memory)?;
        let written = writer.write_all(&TRANSPORT_RESET);
        written.map_err(|_| DeviceError::Request("a buffer has no room for an event"))?;
        io.finish(EVENT, head, TRANSPORT_RESET.len() as u32)?;
        self.interrupted = false;
        self.muxer.clear();
        io.notify(EVENT)
    }

    /// Takes the path, or says when that is tried next.
    fn open_door(&mut self, wait: Duration) {
        let mut open = || {
            let door = match &mut self.door {
                Some(door) => door,
                none => none.insert(Door::new(&self.path, None)?),
            };
            door.open(self.source)
        };
        let Err(error) = open() else { return self.knock = None };
        if self.knock.is_none() {
            let path = self.path.display();
            tracing::warn!(
                "vsock {path}: {error}; programs of the host do not reach the guest until it is free"
            );
        }
        self.knock = Some((Instant::now() + wait, (wait * 2).min(DOOR_WAIT.1)));
    }

    /// Lets programs in, as many as there is room for.
    fn let_in(&mut self, io: &Io) {
        let now = Instant::now();
        // Whoever comes after the driver is ready must not be turned away for its not being so.
        while let Some(door) = self.door.as_ref().filter(|_| self.callers.has_room() && !io.is_wanted()) {
            match door.accept() {
                // Without a driver nobody will ever answer it.
                Ok(Some(socket)) if self.active => self.callers.admit(socket, now),
                Ok(Some(_)) => {}
                Ok(None) => return,
                Err(e) => {
                    tracing::warn!("vsock {}: {e}", self.path.display());
                    self.deaf = Some(now + DEAF);
                    return;
                }
            }
        }
    }
}

/// Connects to a service of the host.
fn dial(path: &Path, port: u32) -> io::Result<UnixStream> {
    let mut service = path.as_os_str().to_owned();
    service.push(format!("_{port}"));
    Ok(socket_file::connect_now(Path::new(&service))?.into())
}

/// The door's token, and that of a caller. No stream has such a port of the host.
const DOOR: usize = token(Ports { host: NO_PORT, guest: FIRST_FREE_NUMBER });

const fn token(ports: Ports) -> usize {
    (ports.host as usize) << 32 | ports.guest as usize
}

impl Device for Vsock {
    fn kind(&self) -> Kind {
        Kind::Vsock
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn properties(&self) -> BTreeMap<String, String> {
        BTreeMap::from([(CID_PROPERTY.to_owned(), self.cid.to_string())])
    }

    fn changes_beside(&self) -> Option<&Path> {
        Some(&self.path)
    }

    fn activate(&mut self, _: u64) {
        self.active = true;
    }

    fn reset(&mut self) {
        (self.active, self.interrupted, self.stale) = (false, false, 0);
        self.callers.clear();
        self.muxer.clear();
    }

    fn queue_kicked(&mut self, queue: usize, io: &mut Io) -> Result<(), DeviceError> {
        match queue {
            EVENT => self.tell_interrupted(io),
            _ => self.serve(io),
        }
    }

    fn watches(&self) -> Vec<Watch<'_>> {
        let lets_in = self.callers.has_room() && self.deaf.is_none();
        let door = self.door.as_ref().filter(|_| lets_in);
        let door = door.map(|door| Watch { fd: door.as_fd(), events: PollFlags::POLLIN, token: DOOR });
        let callers = self.callers.sockets().map(|(number, fd)| {
            let token = token(Ports { host: NO_PORT, guest: number });
            Watch { fd, events: PollFlags::POLLIN, token }
        });
        // One that is to be watched for nothing would wake by its hang-up for ever.
        let streams = self.muxer.streams().filter(|(_, stream)| !stream.interest().is_empty());
        let streams = streams.map(|(ports, stream)| Watch {
            fd: stream.as_fd(),
            events: stream.interest(),
            token: token(ports),
        });
        door.into_iter().chain(callers).chain(streams).collect()
    }

    fn ready(&mut self, token: usize, io: &mut Io) -> Result<(), DeviceError> {
        if io.is_wanted() {
            // The order may be that the driver is ready. What is ready here stays so until after it.
            return Ok(());
        }
        let now = Instant::now();
        match (Ports { host: (token >> 32) as u32, guest: token as u32 }, token) {
            (_, DOOR) => self.let_in(io),
            (Ports { host: NO_PORT, guest: number }, _) => {
                if let Some((socket, port)) = self.callers.heard(number) {
                    // One too many sees the end of its connection.
                    self.muxer.host_asks(socket, port, now);
                }
            }
            // Reading where there is nothing to be read does nothing.
            (ports, _) => self.muxer.host_moved(ports, PollFlags::POLLIN, now),
        }
        self.serve(io)
    }

    fn deadline(&self) -> Option<Instant> {
        let knock = self.knock.map(|(at, _)| at);
        let all = [knock, self.deaf, self.callers.deadline(), self.muxer.deadline()];
        all.into_iter().flatten().min()
    }

    fn timeout(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        let now = Instant::now();
        self.callers.expire(now);
        self.muxer.expire(now);
        self.deaf = self.deaf.filter(|at| now < *at);
        if let Some((_, wait)) = self.knock.filter(|(at, _)| now >= *at) {
            self.open_door(wait);
        }
        self.serve(io)
    }

    fn resume(&mut self, arrived: bool, io: &mut Io) -> Result<(), DeviceError> {
        self.open_door(DOOR_WAIT.0);
        if arrived && self.active {
            self.interrupted = true;
            self.stale = io.available(TRANSMIT)?;
            self.tell_interrupted(io)?;
        }
        Ok(())
    }

    fn save(&mut self) -> Result<Value, String> {
        let socket = self.door.as_ref().filter(|door| door.is_open()).map(|door| {
            let FileId { device, inode, made_ns } = door.id();
            SocketFile { device, inode, made_ns }
        });
        serde_json::to_value(VirtioVsockState { socket }).map_err(|e| e.to_string())
    }

    fn restore(&mut self, state: Value) -> Result<(), String> {
        let state: VirtioVsockState = serde_json::from_value(state).map_err(|e| e.to_string())?;
        self.source =
            state.socket.map(|SocketFile { device, inode, made_ns }| FileId { device, inode, made_ns });
        let door = self.door.as_ref().ok_or("it has no socket")?;
        door.may_open(self.source).map_err(|e| format!("{}: {e}", self.path.display()))
    }

    fn let_go(&mut self) {
        self.callers.clear();
        self.muxer.clear();
        self.door = None;
    }
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
