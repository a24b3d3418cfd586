//! The serving end of a control socket, for a poll loop: nothing here blocks or starts a thread.
//!
//! The owner polls the [`Server`] for reading (it is one epoll descriptor), calls
//! [`Server::dispatch`], acts on what came, and answers now or later with the [`ReplyTo`] that each
//! call carries. `hello` is answered here; what the other requests mean is the owner's matter, so
//! `vmrun` and `vmsend` use the same server with requests of their own.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::connection::{Connection, Parsed};
use super::lines::to_line;
use super::listen::{Accepted, BindError, ListenSocket};
use super::{Answer, CONTROL_VERSION, Failure, FailureCode, Hello, Outcome};

/// The most connections at a time.
pub const MAX_CONNECTIONS: usize = 64;
/// Output that waits for a reader; beyond it the connection is dropped.
const MAX_WAITING_BYTES: usize = 16 << 20;
/// Output that waits when an event comes; a reader this slow is dropped.
const MAX_WAITING_EVENT_BYTES: usize = 256 << 10;
/// The listener's key in the epoll set; connections count from 1.
const LISTENER: u64 = 0;

/// Requests that a [`Server`] can take.
pub trait ControlRequest: DeserializeOwned {
    /// The version and the client's name when this is the `hello`, which opens every connection.
    fn hello(&self) -> Option<(u32, &str)>;
}

/// One connection, for as long as it lives; never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(u64);

/// Where an answer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyTo {
    /// The connection that asked.
    pub connection: ConnectionId,
    /// The number that it gave its request.
    pub id: u64,
}

/// What [`Server::dispatch`] found.
#[derive(Debug)]
pub enum Incoming<R> {
    /// A request to answer.
    Call {
        /// For the answer.
        reply: ReplyTo,
        /// What is asked.
        request: R,
        /// The descriptors that came with it, as many as the line says.
        fds: Vec<OwnedFd>,
    },
    /// The peer has gone, or was dropped.
    Closed(ConnectionId),
}

/// The serving end of a control socket. Its file is removed when it is dropped.
#[derive(Debug)]
pub struct Server<R> {
    listener: Option<ListenSocket>,
    program: &'static str,
    epoll: Epoll,
    connections: BTreeMap<u64, Connection>,
    next: u64,
    /// The listener was taken out of the epoll set until a connection ends.
    accepting: bool,
    /// Connections to be dropped, and told of, at the next dispatch.
    doomed: BTreeSet<u64>,
    requests: PhantomData<fn() -> R>,
}

impl<R: ControlRequest> Server<R> {
    /// Listens at `path` as `program`; see [`BindError`] for what is never overwritten.
    pub fn bind(path: &Path, program: &'static str) -> Result<Self, BindError> {
        let io = |source| BindError::Io { path: path.to_owned(), what: "poll it", source };
        let listener = ListenSocket::bind(path)?;
        let mut server = Self::unbound(program).map_err(io)?;
        server.add(&listener, LISTENER, EpollFlags::EPOLLIN).map_err(io)?;
        server.accepting = true;
        server.listener = Some(listener);
        Ok(server)
    }

    /// A server without a socket: nothing ever comes.
    pub fn unbound(program: &'static str) -> io::Result<Self> {
        Ok(Self {
            listener: None,
            program,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            connections: BTreeMap::new(),
            next: LISTENER + 1,
            accepting: false,
            doomed: BTreeSet::new(),
            requests: PhantomData,
        })
    }

    /// Takes in what is there now: new connections, requests, ends of connections. Never blocks.
    pub fn dispatch(&mut self) -> io::Result<Vec<Incoming<R>>> {
        let mut ready = [EpollEvent::empty(); MAX_CONNECTIONS + 1];
        let count = match self.epoll.wait(&mut ready, EpollTimeout::ZERO) {
            Ok(count) => count,
            Err(nix::errno::Errno::EINTR) => 0,
            Err(e) => return Err(e.into()),
        };
        let mut found = Vec::new();
        // Those of before this round: what is found now is answered before its connection goes.
        for key in std::mem::take(&mut self.doomed) {
            self.drop_connection(key, &mut found)?;
        }
        for event in &ready[..count] {
            match event.data() {
                LISTENER => self.accept()?,
                key => self.serve(key, event.events(), &mut found),
            }
        }
        Ok(found)
    }

    /// How long the owner may sleep on account of this server: zero when a connection is to be
    /// reported as closed already.
    pub fn next_wake(&self) -> Option<Duration> {
        (!self.doomed.is_empty()).then_some(Duration::ZERO)
    }

    /// Sends the final answer with descriptors.
    pub fn answer<T: Serialize>(&mut self, to: ReplyTo, outcome: Result<T, Failure>, fds: Vec<OwnedFd>) {
        let outcome = outcome.and_then(|value| {
            serde_json::to_value(value)
                .map_err(|e| Failure::new(FailureCode::Failed, format!("cannot write the answer: {e}")))
        });
        match outcome {
            Ok(value) => self.reply(to, Outcome::Ok(value), fds),
            Err(failure) => self.reply(to, Outcome::Error(failure), Vec::new()),
        }
    }

    /// Says that the answer comes later, and what it waits for.
    pub fn pending(&mut self, to: ReplyTo, why: impl Into<String>) {
        self.reply(to, Outcome::Pending(why.into()), Vec::new());
    }

    /// Sends an event line; a reader that lags too far behind is dropped.
    pub fn event(&mut self, to: ConnectionId, event: &impl Serialize) {
        if self.connections.get(&to.0).is_some_and(|c| c.waiting_bytes() > MAX_WAITING_EVENT_BYTES) {
            tracing::warn!("a reader of events is too slow: its connection is closed");
            self.doomed.insert(to.0);
        } else if let Ok(line) = to_line(event) {
            self.send(to.0, line, Vec::new());
        }
    }

    /// Whether the connection is still open (its end may not have been reported yet).
    pub fn is_open(&self, connection: ConnectionId) -> bool {
        self.connections.get(&connection.0).is_some_and(|c| !c.ended())
    }

    /// The name that the client gave at `hello`.
    pub fn client_name(&self, connection: ConnectionId) -> &str {
        self.connections.get(&connection.0).map_or("", |c| c.client())
    }

    /// Whether an answer still waits to be taken by a reader.
    pub fn has_output(&self) -> bool {
        self.connections.values().any(|c| c.waiting_bytes() > 0)
    }

    fn accept(&mut self) -> io::Result<()> {
        let Some(listener) = &self.listener else { return Ok(()) };
        let stream = match listener.accept() {
            Ok(Accepted::Nobody) => return Ok(()),
            Ok(Accepted::Foreign(uid)) => {
                tracing::warn!("a connection of user {uid} was refused");
                return Ok(());
            }
            Ok(Accepted::Peer(stream)) => stream,
            Err(e) => {
                // Out of descriptors, most likely: no use in being woken again before one is free.
                tracing::warn!("control socket: accept: {e}");
                self.epoll.delete(listener)?;
                self.accepting = false;
                return Ok(());
            }
        };
        let mut connection = Connection::new(stream);
        if self.connections.len() >= MAX_CONNECTIONS {
            let why = format!("{MAX_CONNECTIONS} connections are open already");
            connection.reply_and_end(Failure::new(FailureCode::Busy, why));
            return Ok(());
        }
        let key = self.next;
        self.next += 1;
        self.add(&connection, key, connection.interest())?;
        self.connections.insert(key, connection);
        Ok(())
    }

    fn serve(&mut self, key: u64, events: EpollFlags, found: &mut Vec<Incoming<R>>) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        let id = ConnectionId(key);
        if events.intersects(
            EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR,
        ) {
            for parsed in connection.read::<R>() {
                match parsed {
                    Parsed::Hello { id, version } => {
                        let outcome = hello(self.program, version);
                        connection.reply(Answer { id, fds: 0, outcome }, Vec::new());
                    }
                    Parsed::Call { id: call, request, fds } => {
                        found.push(Incoming::Call {
                            reply: ReplyTo { connection: id, id: call },
                            request,
                            fds,
                        });
                    }
                }
            }
        }
        connection.flush();
        if events.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
            connection.abandon();
        }
        if connection.ended() {
            if connection.report_end() {
                found.push(Incoming::Closed(id));
            }
            if connection.waiting_bytes() == 0 {
                self.doomed.insert(key);
            }
        }
        self.watch(key);
    }

    fn reply(&mut self, to: ReplyTo, outcome: Outcome, fds: Vec<OwnedFd>) {
        let answer = Answer { id: to.id, fds: fds.len() as u32, outcome };
        match to_line(&answer) {
            Ok(line) => self.send(to.connection.0, line, fds),
            Err(e) => tracing::error!("an answer cannot be written: {e}"),
        }
    }

    fn send(&mut self, key: u64, line: Vec<u8>, fds: Vec<OwnedFd>) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        connection.push(line, fds);
        connection.flush();
        if connection.waiting_bytes() > MAX_WAITING_BYTES
            || connection.ended() && connection.waiting_bytes() == 0
        {
            self.doomed.insert(key);
        }
        self.watch(key);
    }

    /// Tells epoll what the connection waits for now.
    fn watch(&mut self, key: u64) {
        let Some(connection) = self.connections.get(&key) else { return };
        let mut event = EpollEvent::new(connection.interest(), key);
        if let Err(e) = self.epoll.modify(connection, &mut event) {
            tracing::warn!("control socket: epoll: {e}");
            self.doomed.insert(key);
        }
    }

    fn drop_connection(&mut self, key: u64, found: &mut Vec<Incoming<R>>) -> io::Result<()> {
        let Some(mut connection) = self.connections.remove(&key) else { return Ok(()) };
        if connection.report_end() {
            found.push(Incoming::Closed(ConnectionId(key)));
        }
        if connection.ended() && (1..=MAX_WAITING_BYTES).contains(&connection.waiting_bytes()) {
            // It was answered after its end, and takes the answer slowly.
            self.connections.insert(key, connection);
            return Ok(());
        }
        drop(connection);
        if let (false, Some(listener)) = (self.accepting, &self.listener) {
            self.epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
            self.accepting = true;
        }
        Ok(())
    }

    fn add(&self, fd: &impl AsFd, key: u64, flags: EpollFlags) -> io::Result<()> {
        Ok(self.epoll.add(fd, EpollEvent::new(flags, key))?)
    }
}

impl<R> AsFd for Server<R> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

fn hello(program: &str, version: u32) -> Outcome {
    if version != CONTROL_VERSION {
        let why = format!(
            "{program} speaks version {CONTROL_VERSION} of the control protocol, the client version {version}"
        );
        return Outcome::Error(Failure::new(FailureCode::Usage, why));
    }
    let hello = Hello {
        version: CONTROL_VERSION,
        program: program.to_owned(),
        release: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
    };
    match serde_json::to_value(hello) {
        Ok(value) => Outcome::Ok(value),
        Err(e) => Outcome::Error(Failure::new(FailureCode::Failed, e.to_string())),
    }
}
