//! The asking end of a control socket: blocking calls with a deadline.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use thiserror::Error;

use super::lines::{LineError, LineReader, LineWriter, ReadOutcome, to_line};
use super::{Answer, CONTROL_VERSION, Call, Failure, FailureCode, Hello, Outcome};

mod report;
mod requests;

/// How long an answer may take unless told otherwise. A server answers within 100 ms in every phase.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// Events kept for [`Client::next_event`] while calls are made; the oldest are dropped beyond it.
const MAX_KEPT_EVENTS: usize = 1024;

/// Why a request came to nothing. Every text names the socket.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nothing is there, nobody listens, or we may not.
    #[error("{path}: {why}")]
    NoServer {
        /// The socket.
        path: PathBuf,
        /// What was found instead.
        why: String,
    },
    /// Something answers, but not by this protocol.
    #[error("{path}: this is no control socket that this release understands: {why}")]
    NotControl {
        /// The socket.
        path: PathBuf,
        /// What it said.
        why: String,
    },
    /// The connection ended before the answer.
    #[error("{path}: the connection was closed while waiting for the answer to {request}")]
    Gone {
        /// The socket.
        path: PathBuf,
        /// What was asked.
        request: String,
    },
    /// No answer in time.
    #[error("{path}: no answer to {request} within {waited:?}{}", pending.as_deref().map(|p| format!(" (it waits for: {p})")).unwrap_or_default())]
    TimedOut {
        /// The socket.
        path: PathBuf,
        /// What was asked.
        request: String,
        /// For how long.
        waited: Duration,
        /// What the server said that it waits for.
        pending: Option<String>,
    },
    /// The server says no.
    #[error("{path}: {failure}")]
    Refused {
        /// The socket.
        path: PathBuf,
        /// Its answer.
        failure: Failure,
    },
    /// The socket failed.
    #[error("{path}: {source}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// How.
        source: io::Error,
    },
}

impl ClientError {
    /// The server's own words, when it was the server that said no.
    pub fn failure(&self) -> Option<&Failure> {
        match self {
            Self::Refused { failure, .. } => Some(failure),
            _ => None,
        }
    }

    /// The kind of the server's refusal.
    pub fn code(&self) -> Option<FailureCode> {
        self.failure().map(|f| f.code)
    }

    /// Whether the server cannot be asked again on this connection.
    pub fn is_disconnect(&self) -> bool {
        matches!(self, Self::Gone { .. } | Self::Io { .. } | Self::NoServer { .. })
    }
}

/// A connection to a `vmrun` or a `vmsend`.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    path: PathBuf,
    server: Hello,
    timeout: Duration,
    next_id: u64,
    reader: LineReader,
    events: VecDeque<Value>,
    /// The report whose answer has not come.
    reported: Option<u64>,
}

impl Client {
    /// Connects to the socket at `path` and says hello as `who` (`vmctl`, `vmsend`, …).
    pub fn connect(path: &Path, who: &str) -> Result<Self, ClientError> {
        Self::connect_within(path, who, DEFAULT_TIMEOUT)
    }

    /// As [`Client::connect`]; `timeout` is for the hello and becomes the time-out of every call.
    pub fn connect_within(path: &Path, who: &str, timeout: Duration) -> Result<Self, ClientError> {
        let stream = open(path)?;
        let server = Hello { version: 0, program: String::new(), release: String::new(), pid: 0 };
        let (reader, events) = (LineReader::default(), VecDeque::new());
        let path = path.to_owned();
        let mut client = Self { stream, path, server, timeout, next_id: 1, reader, events, reported: None };
        let hello = super::Request::Hello { version: CONTROL_VERSION, client: who.to_owned() };
        let (server, _): (Hello, _) = client.call(&hello, &[]).map_err(|e| match e {
            ClientError::Refused { path, failure } if failure.code == FailureCode::Usage => {
                ClientError::NotControl { path, why: failure.message }
            }
            ClientError::TimedOut { path, waited, .. } => {
                ClientError::NotControl { path, why: format!("it does not answer within {waited:?}") }
            }
            ClientError::Gone { path, .. } => {
                ClientError::NotControl { path, why: "it closes the connection".to_owned() }
            }
            other => other,
        })?;
        if server.version != CONTROL_VERSION {
            let why = format!("it speaks version {}, this program version {CONTROL_VERSION}", server.version);
            return Err(ClientError::NotControl { path: client.path, why });
        }
        client.server = server;
        Ok(client)
    }

    /// On a connection that stands, to a server that was heard.
    #[cfg(any(fuzzing, test))]
    pub(crate) fn of_stream(stream: UnixStream) -> Self {
        let server =
            Hello { version: CONTROL_VERSION, program: String::new(), release: String::new(), pid: 0 };
        let (reader, events) = (LineReader::default(), VecDeque::new());
        Self {
            stream,
            path: PathBuf::new(),
            server,
            timeout: DEFAULT_TIMEOUT,
            next_id: 1,
            reader,
            events,
            reported: None,
        }
    }

    /// Who answers: the program, its release and its process.
    pub fn server(&self) -> &Hello {
        &self.server
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The time-out of every call from here on.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Whether the server's end is still open. Does not block and reads nothing. To be told instead
    /// of asking, poll the client ([`AsFd`]) with no events: `POLLHUP` comes all the same.
    pub fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::empty())];
        let gone = PollFlags::POLLHUP | PollFlags::POLLERR;
        !matches!(poll(&mut fds, PollTimeout::ZERO), Ok(n) if n > 0)
            || !fds[0].revents().is_some_and(|r| r.intersects(gone))
    }

    /// Asks and waits for the final answer, past any `pending`. The first answer and, after a
    /// `pending`, the final one have each the client's time-out.
    pub fn call<Q: Serialize, T: DeserializeOwned>(
        &mut self,
        request: &Q,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(T, Vec<OwnedFd>), ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        let asked = self.send(id, request, fds)?;
        let mut pending = None;
        loop {
            let (answer, fds) = self.answer(id, &asked, pending.as_deref())?;
            match answer.outcome {
                Outcome::Pending(why) => pending = Some(why),
                Outcome::Error(failure) => {
                    return Err(ClientError::Refused { path: self.path.clone(), failure });
                }
                Outcome::Ok(value) => {
                    let value = serde_json::from_value(value).map_err(|e| {
                        self.not_control(format!("its answer to {asked} has another form: {e}"))
                    })?;
                    return Ok((value, fds));
                }
            }
        }
    }

    /// The next event, of those that `events` has asked for; `Ok(None)` when none comes in time
    /// (`None`: wait for ever).
    pub fn next_event<E: DeserializeOwned>(
        &mut self,
        timeout: Option<Duration>,
    ) -> Result<Option<E>, ClientError> {
        let until = timeout.map(|t| Instant::now() + t);
        let value = loop {
            if let Some(value) = self.events.pop_front() {
                break value;
            }
            match self.line(until, "events")? {
                None => return Ok(None),
                Some(line) => drop(self.sort(&line)?),
            }
        };
        serde_json::from_value(value)
            .map(Some)
            .map_err(|e| self.not_control(format!("an event has another form: {e}")))
    }

    /// The events as they come, until the connection ends.
    pub fn events<E: DeserializeOwned>(&mut self) -> impl Iterator<Item = Result<E, ClientError>> + '_ {
        let mut over = false;
        std::iter::from_fn(move || {
            if over {
                return None;
            }
            match self.next_event(None) {
                Err(ClientError::Gone { .. }) => None,
                other => {
                    over = other.is_err();
                    other.transpose()
                }
            }
        })
    }

    /// Sends the request; gives its name for messages.
    fn send<Q: Serialize>(
        &mut self,
        id: u64,
        request: &Q,
        fds: &[BorrowedFd<'_>],
    ) -> Result<String, ClientError> {
        let io = |source| ClientError::Io { path: self.path.clone(), source };
        let mut owned = Vec::new();
        for fd in fds {
            owned.push(fd.try_clone_to_owned().map_err(io)?);
        }
        let call = Call { id, fds: fds.len() as u32, request };
        let value = serde_json::to_value(&call).map_err(|e| io(e.into()))?;
        let name = value.get("cmd").and_then(Value::as_str).unwrap_or("the request").to_owned();
        let mut writer = LineWriter::default();
        writer.push(to_line(&value).map_err(|e| io(e.into()))?, owned);
        let until = Instant::now() + self.timeout;
        loop {
            if let Err(e) = writer.flush(self.stream.as_fd()) {
                // A server that hung up may have said why before.
                return match e.kind() {
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Ok(name),
                    _ => Err(io(e)),
                };
            }
            if writer.is_empty() {
                return Ok(name);
            }
            if !self.wait(PollFlags::POLLOUT, Some(until))? {
                return Err(self.timed_out(&name, None));
            }
        }
    }

    /// Waits for the next answer to call `id`.
    fn answer(
        &mut self,
        id: u64,
        asked: &str,
        pending: Option<&str>,
    ) -> Result<(Answer, Vec<OwnedFd>), ClientError> {
        let until = Instant::now() + self.timeout;
        loop {
            let Some(line) = self.line(Some(until), asked)? else {
                return Err(self.timed_out(asked, pending));
            };
            let Some(answer) = self.sort(&line)? else { continue };
            let Some(fds) = self.reader.take_fds(answer.fds) else {
                return Err(self.not_control(format!("its answer to {asked} lacks file descriptors")));
            };
            // Answers to calls that timed out before are dropped here with what came along; id 0
            // is the server's last word before it hangs up.
            if answer.id == id || answer.id == 0 {
                return Ok((answer, fds));
            }
        }
    }

    /// An answer, or `None` for an event, which is kept.
    fn sort(&mut self, line: &[u8]) -> Result<Option<Answer>, ClientError> {
        let value: Value =
            serde_json::from_slice(line).map_err(|e| self.not_control(format!("it says no JSON: {e}")))?;
        if value.get("id").is_none() && value.get("event").is_some() {
            if self.events.len() == MAX_KEPT_EVENTS {
                self.events.pop_front();
            }
            self.events.push_back(value);
            return Ok(None);
        }
        let answer: Answer =
            serde_json::from_value(value).map_err(|e| self.not_control(format!("it says no answer: {e}")))?;
        if self.reported == Some(answer.id) {
            self.reported = None;
        }
        Ok(Some(answer))
    }

    /// The next line; `None` when the time is up.
    fn line(&mut self, until: Option<Instant>, asked: &str) -> Result<Option<Vec<u8>>, ClientError> {
        loop {
            let line = self.reader.next_line();
            if let Some(line) = line.map_err(|e| self.not_control(e.to_string()))? {
                return Ok(Some(line));
            }
            if !self.wait(PollFlags::POLLIN, until)? {
                return Ok(None);
            }
            match self.reader.read(self.stream.as_fd()) {
                Ok(ReadOutcome::Bytes | ReadOutcome::Nothing) => {}
                Ok(ReadOutcome::End) => {
                    return Err(ClientError::Gone { path: self.path.clone(), request: asked.to_owned() });
                }
                Err(LineError::Io(source)) => {
                    return Err(ClientError::Io { path: self.path.clone(), source });
                }
                Err(other) => return Err(self.not_control(other.to_string())),
            }
        }
    }

    /// Waits until the socket is ready for `what` or has ended; false when the time is up.
    fn wait(&self, what: PollFlags, until: Option<Instant>) -> Result<bool, ClientError> {
        loop {
            let timeout = match until {
                None => PollTimeout::NONE,
                Some(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    // Rounded up, so that the last millisecond is not spent spinning.
                    PollTimeout::try_from(left.as_millis().saturating_add(1)).unwrap_or(PollTimeout::MAX)
                }
            };
            let mut fds = [PollFd::new(self.stream.as_fd(), what)];
            match poll(&mut fds, timeout) {
                Ok(0) if until.is_some_and(|u| Instant::now() < u) => {}
                Ok(n) => return Ok(n > 0),
                Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(ClientError::Io { path: self.path.clone(), source: e.into() }),
            }
        }
    }

    fn timed_out(&self, asked: &str, pending: Option<&str>) -> ClientError {
        ClientError::TimedOut {
            path: self.path.clone(),
            request: asked.to_owned(),
            waited: self.timeout,
            pending: pending.map(str::to_owned),
        }
    }

    fn not_control(&self, why: String) -> ClientError {
        ClientError::NotControl { path: self.path.clone(), why }
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Connects, and says what was found where no server of ours is.
fn open(path: &Path) -> Result<UnixStream, ClientError> {
    let none = |why: &str| ClientError::NoServer { path: path.to_owned(), why: why.to_owned() };
    let stream = UnixStream::connect(path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => none("no such control socket"),
        io::ErrorKind::PermissionDenied => {
            none("this control socket belongs to someone else (permission denied)")
        }
        io::ErrorKind::ConnectionRefused => match std::fs::metadata(path) {
            Ok(meta) if !meta.file_type().is_socket() => none("this is no socket"),
            _ => none("nobody listens on this socket: the program that made it has ended"),
        },
        _ => none(&e.to_string()),
    })?;
    let io = |source| ClientError::Io { path: path.to_owned(), source };
    stream.set_nonblocking(true).map_err(io)?;
    let peer = getsockopt(&stream, PeerCredentials).map_err(|e| io(e.into()))?;
    // What it hands out is mapped and believed: root and ourselves only.
    if peer.uid() != 0 && peer.uid() != nix::unistd::geteuid().as_raw() && !nix::unistd::geteuid().is_root() {
        return Err(none(&format!("this control socket is served by user {}, not by us", peer.uid())));
    }
    Ok(stream)
}
