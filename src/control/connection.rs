//! One connection of a server: what came and what waits to go.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::sys::epoll::EpollFlags;

use super::lines::{LineReader, LineWriter, ReadOutcome, to_line};
use super::server::ControlRequest;
use super::{Answer, CONTROL_VERSION, Call, Failure, FailureCode, Outcome};

/// A line that was understood.
pub(crate) enum Parsed<R> {
    /// The opening; its version is not checked yet.
    Hello { id: u64, version: u32 },
    /// A request.
    Call { id: u64, request: R, fds: Vec<OwnedFd> },
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: UnixStream,
    reader: LineReader,
    writer: LineWriter,
    /// The name given at a `hello` of the right version.
    client: Option<String>,
    /// Nothing more is read: the peer has closed, or was told to go. What waits is still sent.
    ended: bool,
    /// The owner of the server knows that it has ended.
    end_reported: bool,
}

impl Connection {
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            reader: LineReader::default(),
            writer: LineWriter::default(),
            client: None,
            ended: false,
            end_reported: false,
        }
    }

    pub fn ended(&self) -> bool {
        self.ended
    }

    pub fn client(&self) -> &str {
        self.client.as_deref().unwrap_or("")
    }

    pub fn waiting_bytes(&self) -> usize {
        self.writer.waiting_bytes()
    }

    /// What epoll should watch for.
    pub fn interest(&self) -> EpollFlags {
        let read =
            if self.ended { EpollFlags::empty() } else { EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP };
        let write = if self.writer.is_empty() { EpollFlags::empty() } else { EpollFlags::EPOLLOUT };
        read | write
    }

    /// Reads once and gives every line that is whole by now; what is wrong is answered here.
    pub fn read<R: ControlRequest>(&mut self) -> Vec<Parsed<R>> {
        let mut parsed = Vec::new();
        if self.ended {
            return parsed;
        }
        match self.reader.read(self.stream.as_fd()) {
            Ok(ReadOutcome::Nothing) => return parsed,
            Ok(ReadOutcome::Bytes) => {}
            Ok(ReadOutcome::End) => self.ended = true,
            Err(e) => {
                self.reply_and_end(Failure::new(FailureCode::Usage, e.to_string()));
                return parsed;
            }
        }
        loop {
            match self.reader.next_line() {
                Ok(Some(line)) if line.iter().all(u8::is_ascii_whitespace) => {}
                Ok(Some(line)) => match self.parse(&line) {
                    Ok(Some(one)) => parsed.push(one),
                    Ok(None) => {}
                    Err(()) => break,
                },
                Ok(None) => break,
                Err(e) => {
                    self.reply_and_end(Failure::new(FailureCode::Usage, e.to_string()));
                    break;
                }
            }
        }
        parsed
    }

    /// Understands one line. `Ok(None)`: it was answered with an error. `Err`: no JSON at all.
    fn parse<R: ControlRequest>(&mut self, line: &[u8]) -> Result<Option<Parsed<R>>, ()> {
        let value: serde_json::Value = match serde_json::from_slice(line) {
            Ok(value @ serde_json::Value::Object(_)) => value,
            other => {
                let why = other.err().map_or("not an object".to_owned(), |e| e.to_string());
                self.reply_and_end(Failure::new(FailureCode::Usage, format!("this is no JSON line: {why}")));
                return Err(());
            }
        };
        let id = value.get("id").and_then(serde_json::Value::as_u64).unwrap_or(0);
        match self.understand(value) {
            Ok(parsed) => Ok(Some(parsed)),
            Err(failure) => {
                self.reply(Answer { id, fds: 0, outcome: Outcome::Error(failure) }, Vec::new());
                Ok(None)
            }
        }
    }

    fn understand<R: ControlRequest>(&mut self, value: serde_json::Value) -> Result<Parsed<R>, Failure> {
        let usage = |why: String| Failure::new(FailureCode::Usage, why);
        // Taken first: descriptors of a line that is refused are closed with it.
        let promised = value.get("fds").and_then(serde_json::Value::as_u64).unwrap_or(0);
        let fds = u32::try_from(promised).ok().and_then(|n| self.reader.take_fds(n));
        let call: Call<R> = serde_json::from_value(value).map_err(|e| usage(e.to_string()))?;
        let fds =
            fds.ok_or_else(|| usage(format!("the line says {promised} file descriptors, fewer came")))?;
        if let Some((version, client)) = call.request.hello() {
            if version == CONTROL_VERSION {
                self.client = Some(client.chars().filter(|c| !c.is_control()).take(64).collect());
            }
            return Ok(Parsed::Hello { id: call.id, version });
        }
        if self.client.is_none() {
            return Err(usage(format!("the first request must be hello with version {CONTROL_VERSION}")));
        }
        Ok(Parsed::Call { id: call.id, request: call.request, fds })
    }

    pub fn push(&mut self, line: Vec<u8>, fds: Vec<OwnedFd>) {
        self.writer.push(line, fds);
    }

    pub fn reply(&mut self, answer: Answer, fds: Vec<OwnedFd>) {
        if let Ok(line) = to_line(&answer) {
            self.push(line, fds);
        }
    }

    /// Says why (as the answer to no request in particular) and reads no more.
    pub fn reply_and_end(&mut self, failure: Failure) {
        self.reply(Answer { id: 0, fds: 0, outcome: Outcome::Error(failure) }, Vec::new());
        self.ended = true;
        self.flush();
    }

    /// Sends what can go; a peer that takes nothing any more is given up.
    pub fn flush(&mut self) {
        if self.writer.flush(self.stream.as_fd()).is_err() {
            self.abandon();
        }
    }

    /// The peer is not there any more: nothing waits for it.
    pub fn abandon(&mut self) {
        self.ended = true;
        self.writer = LineWriter::default();
    }

    /// True the first time: the end is to be reported now.
    pub fn report_end(&mut self) -> bool {
        !std::mem::replace(&mut self.end_reported, true)
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
