//! Lines with file descriptors over a non-blocking socket: the buffers that server and client share.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use thiserror::Error;

use super::{MAX_LINE_BYTES, MAX_LINE_FDS};
use crate::sys::fdpass;

/// How much is read at once; also bounds the work that one poll gives to one connection.
const READ_BYTES: usize = 64 << 10;

/// Why a connection cannot be read on.
#[derive(Debug, Error)]
pub(super) enum LineError {
    /// No newline within the limit.
    #[error("a line is longer than {MAX_LINE_BYTES} bytes")]
    TooLong,
    /// More descriptors than lines may carry.
    #[error("more than {MAX_LINE_FDS} file descriptors came with one line")]
    TooManyFds,
    /// The kernel could not install all descriptors.
    #[error("file descriptors were lost on the way: this process has too many open")]
    FdsLost,
    /// The socket failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What a read gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReadOutcome {
    /// Something came.
    Bytes,
    /// Nothing is there now.
    Nothing,
    /// The peer has closed its end.
    End,
}

/// Cuts what comes into lines and keeps the descriptors that came along, in their order.
#[derive(Debug, Default)]
pub(super) struct LineReader {
    buffer: Vec<u8>,
    /// Where the next line begins.
    start: usize,
    /// Up to where no newline was found.
    scanned: usize,
    fds: VecDeque<OwnedFd>,
}

impl LineReader {
    /// Reads once.
    pub fn read(&mut self, socket: BorrowedFd<'_>) -> Result<ReadOutcome, LineError> {
        self.buffer.drain(..self.start);
        self.scanned -= self.start;
        self.start = 0;
        if self.buffer.is_empty() {
            // What no line claimed is closed.
            self.fds.clear();
        }
        let had = self.buffer.len();
        self.buffer.resize(had + READ_BYTES, 0);
        let received = fdpass::receive(socket, &mut self.buffer[had..]);
        self.buffer.truncate(had + received.as_ref().map_or(0, |r| r.bytes));
        let received = match received {
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(ReadOutcome::Nothing);
            }
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(ReadOutcome::End),
            other => other?,
        };
        self.fds.extend(received.fds);
        if received.fds_lost {
            return Err(LineError::FdsLost);
        }
        if self.fds.len() > MAX_LINE_FDS {
            return Err(LineError::TooManyFds);
        }
        Ok(if received.bytes == 0 { ReadOutcome::End } else { ReadOutcome::Bytes })
    }

    /// The next whole line without its newline. An error when what is there can never become one.
    pub fn next_line(&mut self) -> Result<Option<Vec<u8>>, LineError> {
        let found = self.buffer[self.scanned..].iter().position(|b| *b == b'\n');
        let Some(at) = found.map(|n| self.scanned + n) else {
            self.scanned = self.buffer.len();
            return match self.buffer.len() - self.start {
                n if n > MAX_LINE_BYTES => Err(LineError::TooLong),
                _ => Ok(None),
            };
        };
        let line = self.buffer[self.start..at].to_vec();
        (self.start, self.scanned) = (at + 1, at + 1);
        if line.len() > MAX_LINE_BYTES { Err(LineError::TooLong) } else { Ok(Some(line)) }
    }

    /// Takes the `count` descriptors of the line that [`LineReader::next_line`] gave; `None` when so
    /// many did not come.
    pub fn take_fds(&mut self, count: u32) -> Option<Vec<OwnedFd>> {
        let count = usize::try_from(count).ok().filter(|n| *n <= self.fds.len())?;
        Some(self.fds.drain(..count).collect())
    }
}

/// Lines that wait to be sent.
#[derive(Debug, Default)]
pub(super) struct LineWriter {
    queue: VecDeque<OutLine>,
    bytes: usize,
}

#[derive(Debug)]
struct OutLine {
    text: Vec<u8>,
    sent: usize,
    fds: Vec<OwnedFd>,
}

impl LineWriter {
    /// Queues a line (which has its newline) with descriptors.
    pub fn push(&mut self, text: Vec<u8>, fds: Vec<OwnedFd>) {
        self.bytes += text.len();
        self.queue.push_back(OutLine { text, sent: 0, fds });
    }

    /// Bytes that wait.
    pub fn waiting_bytes(&self) -> usize {
        self.bytes
    }

    /// Whether everything has gone out.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Sends what the socket takes now.
    pub fn flush(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        while let Some(line) = self.queue.front_mut() {
            let fds: Vec<BorrowedFd<'_>> = line.fds.iter().map(AsFd::as_fd).collect();
            match fdpass::send(socket, &line.text[line.sent..], &fds) {
                Ok(n) => {
                    self.bytes -= n;
                    line.sent += n;
                    line.fds.clear();
                    if line.sent == line.text.len() {
                        self.queue.pop_front();
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// `value` as one line of JSON.
pub(super) fn to_line(value: &impl serde::Serialize) -> Result<Vec<u8>, serde_json::Error> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}
