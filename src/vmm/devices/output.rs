//! Serial output on its way out: vCPUs append to a queue, a thread writes it.
//!
//! The lock is held for an append or a swap, never for a write: a reader that has stopped reading
//! holds up the writer thread only. When the queue is full, vCPUs wait for room, so that nothing is
//! lost; a machine that is being paused or stopped lets them pass, since a pause must not depend on
//! whoever reads the output. What the guest has printed before it is saved is written by then
//! ([`Output::drain`]), so that it is not lost with this process once the guest runs elsewhere.

use std::fs::File;
use std::io::{self, Write};
use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::sys::sandbox;

/// A vCPU waits when this much is queued.
const QUEUE_BYTES: usize = 1 << 20;
/// This much is written without waiting for a line to end.
const WRITE_BYTES: usize = 4096;
/// The longest that the beginning of a line waits for its end.
const LINE_WAIT: Duration = Duration::from_millis(10);
/// The longest that the end of a machine waits for its output to be written.
const CLOSE_WAIT: Duration = Duration::from_millis(500);
/// The longest that a saved machine waits for its output to be written, and the longest that one
/// write may have taken by then. It is part of the downtime, but only where the reader does not read.
const DRAIN_WAIT: Duration = Duration::from_millis(100);

#[derive(Default)]
struct State {
    queue: Vec<u8>,
    /// When the oldest byte of the queue came.
    since: Option<Instant>,
    has_line: bool,
    /// When the writer thread began the write that it is in.
    writing_since: Option<Instant>,
    passing: bool,
    closed: bool,
    /// The writer thread has ended: by an error, or because all is written after the close.
    finished: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// The writer waits for bytes.
    filled: Condvar,
    /// vCPUs wait for room, the close for the end.
    emptied: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The guest's end of the queue, for the device.
#[derive(Clone)]
pub(super) struct Output(Option<Arc<Shared>>);

impl Output {
    /// Starts the writer thread for `file`; without a file all output is dropped. `lossy` drops
    /// what would block.
    pub(super) fn start(file: Option<File>, lossy: bool) -> io::Result<(Self, Writer)> {
        let Some(file) = file else { return Ok((Self(None), Writer { shared: None, thread: None })) };
        let shared = Arc::new(Shared::default());
        let writer = Arc::clone(&shared);
        let thread = thread::Builder::new().name("serial-out".into()).spawn(move || {
            sandbox::confine_worker(None);
            write_all(&writer, file, lossy);
        })?;
        Ok((Self(Some(Arc::clone(&shared))), Writer { shared: Some(shared), thread: Some(thread) }))
    }
}

impl Output {
    /// Waits until all that was printed is written. A reader that has stopped reading is not waited
    /// for: not at all where that has been so for a while, else for a moment. Only while the output
    /// is passing.
    pub(super) fn drain(&self) {
        let Some(shared) = &self.0 else { return };
        let mut state = shared.lock();
        let deadline = Instant::now() + DRAIN_WAIT;
        while !state.finished && (!state.queue.is_empty() || state.writing_since.is_some()) {
            let stuck = state.writing_since.is_some_and(|since| since.elapsed() >= DRAIN_WAIT);
            let left = deadline.saturating_duration_since(Instant::now());
            if stuck || left.is_zero() {
                tracing::warn!("the reader of the serial output does not read: what is queued may be lost");
                return;
            }
            state = shared.emptied.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(shared) = &self.0 else { return Ok(bytes.len()) };
        let mut state = shared.lock();
        while state.queue.len() >= QUEUE_BYTES && !state.passing && !state.finished {
            state = shared.emptied.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.finished {
            return Ok(bytes.len());
        }
        let first = state.queue.is_empty();
        let line = !state.has_line && bytes.contains(&b'\n');
        if first {
            state.since = Some(Instant::now());
        }
        state.has_line |= line;
        state.queue.extend_from_slice(bytes);
        if first || line || state.queue.len() == WRITE_BYTES {
            shared.filled.notify_one();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The host's end: lets vCPUs pass, and closes.
pub(super) struct Writer {
    shared: Option<Arc<Shared>>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// While `passing`, a full queue holds up nobody, and nothing waits for the end of its line.
    pub(super) fn set_passing(&self, passing: bool) {
        if let Some(shared) = &self.shared {
            shared.lock().passing = passing;
            shared.emptied.notify_all();
            shared.filled.notify_all();
        }
    }

    /// Has the rest written, and waits for that for a moment at most.
    pub(super) fn close(&mut self) {
        let (Some(shared), Some(thread)) = (self.shared.take(), self.thread.take()) else { return };
        let mut state = shared.lock();
        state.closed = true;
        state.passing = true;
        shared.filled.notify_all();
        shared.emptied.notify_all();
        let deadline = Instant::now() + CLOSE_WAIT;
        while !state.finished {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return; // the writer sits in a write that nobody reads; it ends with the process
            }
            state = shared.emptied.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        let _ = thread.join();
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.close();
    }
}

/// The writer thread.
fn write_all(shared: &Shared, mut file: File, lossy: bool) {
    let mut piece = Vec::new();
    while let Some(()) = next_piece(shared, &mut piece) {
        let written = match file.write_all(&piece) {
            Err(e) if lossy && e.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        };
        if let Err(e) = written {
            // The guest goes on without its output, as a machine does when its console is unplugged.
            tracing::warn!("serial output is lost from here on: {e}");
            break;
        }
        piece.clear();
    }
    let mut state = shared.lock();
    state.finished = true;
    state.queue = Vec::new();
    shared.emptied.notify_all();
}

/// Waits for something worth a write and swaps it into `piece`; `None` at the end.
fn next_piece(shared: &Shared, piece: &mut Vec<u8>) -> Option<()> {
    let mut state = shared.lock();
    if state.writing_since.take().is_some() {
        shared.emptied.notify_all();
    }
    loop {
        let waited = state.since.map_or(Duration::ZERO, |since| since.elapsed());
        let whole = state.has_line || state.queue.len() >= WRITE_BYTES;
        let ready = whole || state.passing || waited >= LINE_WAIT;
        if !state.queue.is_empty() && ready {
            mem::swap(&mut state.queue, piece);
            (state.since, state.has_line) = (None, false);
            state.writing_since = Some(Instant::now());
            shared.emptied.notify_all();
            return Some(());
        }
        if state.closed {
            return None;
        }
        state = match state.since {
            None => shared.filled.wait(state).unwrap_or_else(PoisonError::into_inner),
            Some(_) => {
                let left = LINE_WAIT.saturating_sub(waited);
                shared.filled.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, pipe};
    use std::os::fd::OwnedFd;

    use super::*;

    #[test]
    fn everything_arrives_in_order_also_half_lines() {
        let (mut reader, writer) = pipe().unwrap();
        let (mut output, mut host) = Output::start(Some(OwnedFd::from(writer).into()), false).unwrap();
        output.write_all(b"one\ntwo").unwrap();
        let mut got = [0; 7];
        reader.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"one\ntwo");
        output.write_all(b" and the rest").unwrap();
        host.close();
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, " and the rest");
    }

    #[test]
    fn a_reader_that_stopped_does_not_hold_up_a_pause_or_the_end() {
        let (_reader, writer) = pipe().unwrap();
        let (mut output, mut host) = Output::start(Some(OwnedFd::from(writer).into()), false).unwrap();
        let vcpu = thread::spawn(move || {
            for _ in 0..QUEUE_BYTES / 1000 * 3 {
                output.write_all(&[b'x'; 1000]).unwrap();
            }
        });
        host.set_passing(true);
        vcpu.join().unwrap();
        host.close();
    }

    #[test]
    fn what_was_printed_is_written_when_the_machine_is_saved() {
        let file = tempfile::tempfile().unwrap();
        let (mut output, host) = Output::start(Some(file.try_clone().unwrap()), false).unwrap();
        for n in 0..100 {
            output.write_all(&[b'x'; 1000][..n * 10]).unwrap();
            host.set_passing(true);
            output.drain();
            assert_eq!(file.metadata().unwrap().len(), (0..=n as u64).map(|n| n * 10).sum::<u64>());
            host.set_passing(false);
        }
    }

    #[test]
    fn a_reader_that_stopped_does_not_hold_up_a_drain() {
        let (_reader, writer) = pipe().unwrap();
        let (mut output, host) = Output::start(Some(OwnedFd::from(writer).into()), false).unwrap();
        host.set_passing(true);
        output.write_all(&[b'x'; QUEUE_BYTES]).unwrap();
        output.drain();
        assert!(output.0.unwrap().lock().writing_since.is_some(), "it is still not written");
    }

    #[test]
    fn a_closed_reader_changes_nothing_for_the_guest() {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let (mut output, _host) = Output::start(Some(OwnedFd::from(writer).into()), false).unwrap();
        for _ in 0..QUEUE_BYTES / 1000 * 3 {
            output.write_all(&[b'\n'; 1000]).unwrap();
        }
    }
}
