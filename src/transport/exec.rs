//! A child process at the other end of two pipes.

use std::io;
use std::process::ExitStatus;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};

use super::{Address, CancelToken, Stream, StreamError};
use crate::sys::spawn::{Io, Program, Running};

/// How long an error waits for the child's exit status, so that it can name it.
const STATUS_WAIT: Duration = Duration::from_millis(500);

/// How long a child may take to end after its input has ended, before it is killed.
const GRACE: Duration = Duration::from_secs(1);

/// The size of each pipe, where the system allows it.
const PIPE_BYTES: i32 = 1 << 20;

/// What connecting to `address` starts: for whoever confines this process.
pub fn program(address: &Address) -> Option<Program> {
    match address {
        Address::Exec(command) => Some(shell(command)),
        Address::Tcp { .. } | Address::Unix(_) | Address::Stdio => None,
    }
}

/// It ignores SIGINT: Ctrl-C reaches the whole foreground group, and after the fence the link must
/// not die of it.
fn shell(command: &str) -> Program {
    let script = format!("trap '' INT\n{command}");
    Program { argv: vec!["/bin/sh".into(), "-c".into(), script.into()], io: Io::Pipes }
}

/// Starts `sh -c command`; what it prints is read, what is written is its input. Its error output
/// is ours.
pub(super) fn connect(command: &str, cancel: &CancelToken) -> Result<Stream, StreamError> {
    let name = format!("exec:{command}");
    let failed = |e: io::Error| StreamError::Connect { peer: name.clone(), cause: e.to_string() };
    cancel.check()?;
    let mut child = shell(command).start().map_err(failed)?;
    let pipes = child.pipes.take();
    let child = Child::watch(child).map_err(failed)?;
    let (write, read) = pipes.ok_or_else(|| failed(io::Error::other("no pipes")))?;
    for pipe in [&read, &write] {
        let _ = fcntl(pipe, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES));
    }
    Stream::new(read, write, name.clone(), cancel.clone(), Some(child)).map_err(failed)
}

/// A child process whose end is watched. Dropped after the pipes have been closed: it then gets a
/// moment to end by itself, and is killed.
#[derive(Debug)]
pub(super) struct Child {
    state: Arc<State>,
    watcher: Option<std::thread::JoinHandle<()>>,
}

#[derive(Debug)]
struct State {
    child: Mutex<Watched>,
    ended: Condvar,
}

#[derive(Debug)]
struct Watched {
    child: Running,
    /// Set in the same breath as the child is reaped: while it is `None`, the pid is the child's.
    status: Option<io::Result<ExitStatus>>,
}

impl Child {
    fn watch(child: Running) -> io::Result<Self> {
        let end = child.watch()?;
        let state =
            Arc::new(State { child: Mutex::new(Watched { child, status: None }), ended: Condvar::new() });
        let theirs = state.clone();
        let watcher = std::thread::Builder::new().name("exec-wait".into()).spawn(move || {
            // Wait without reaping, then reap under the lock, so that nobody kills a stranger.
            end.wait();
            let mut watched = theirs.lock();
            watched.status = Some(watched.child.wait());
            theirs.ended.notify_all();
        });
        match watcher {
            Ok(watcher) => Ok(Self { state, watcher: Some(watcher) }),
            Err(e) => {
                let mut watched = state.lock();
                let _ = watched.child.kill();
                let _ = watched.child.wait();
                Err(e)
            }
        }
    }

    /// How it ended, or that it runs, in words.
    pub(super) fn describe(&self) -> String {
        match &self.state.wait(STATUS_WAIT).status {
            // ExitStatus says "exit status: 1" or "signal: 9 (SIGKILL)".
            Some(Ok(status)) => format!("the command ended with {status}"),
            Some(Err(e)) => format!("the command's end cannot be told ({e})"),
            None => "the command is still running".to_owned(),
        }
    }
}

impl State {
    fn lock(&self) -> MutexGuard<'_, Watched> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the end for at most `timeout`.
    fn wait(&self, timeout: Duration) -> MutexGuard<'_, Watched> {
        let until = Instant::now() + timeout;
        let mut watched = self.lock();
        while watched.status.is_none() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            watched = self.ended.wait_timeout(watched, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        watched
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let mut watched = self.state.wait(GRACE);
        if watched.status.is_none() {
            let _ = watched.child.kill();
        }
        drop(watched);
        if let Some(watcher) = self.watcher.take() {
            let _ = watcher.join();
        }
    }
}
