//! How a `vmrun` ends.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::libc::{SIGHUP, SIGINT, SIGTERM};

use super::report::describe_exit;
use super::{Handled, Reply, Service};
use crate::control::{ConnectionId, Failure, FailureCode};
use crate::switchover::Ownership;
use crate::vmm::GuestExit;

/// A second signal within this time ends a `vmrun` that refused the first.
const SECOND_SIGNAL: Duration = Duration::from_secs(5);
/// How long a mover may still ask after the guest has ended.
const LINGER: Duration = Duration::from_secs(5);

/// Why the service has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest ended by itself.
    Guest(GuestExit),
    /// The guest runs elsewhere.
    Migrated {
        /// Where, in the words of the sender.
        dest: String,
    },
    /// `quit`.
    Quit,
    /// A signal, by its number.
    Signal(i32),
}

/// The signals that end a `vmrun`, each with the end of a pipe that its handler writes to.
pub(super) struct Signals(Vec<(i32, UnixStream)>);

impl Signals {
    pub fn register() -> io::Result<Self> {
        let mut all = Vec::new();
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            let (read, write) = UnixStream::pair()?;
            read.set_nonblocking(true)?;
            signal_hook::low_level::pipe::register(signal, write)?;
            all.push((signal, read));
        }
        Ok(Self(all))
    }

    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(|(_, read)| read.as_fd())
    }

    /// The signals that have come, each once for each time it was seen.
    fn take(&mut self) -> Vec<i32> {
        let mut came = Vec::new();
        for (signal, read) in &mut self.0 {
            let mut buffer = [0; 16];
            while let Ok(n @ 1..) = read.read(&mut buffer) {
                came.extend(std::iter::repeat_n(*signal, n));
            }
        }
        came
    }
}

impl Service {
    pub(super) fn quit(&mut self, from: ConnectionId, force: bool) -> Handled {
        if !force {
            if self.held() {
                return Err(Failure::refused(format!(
                    "quitting is refused: this vmrun {}, and what it holds may be the only copy (--force ends it)",
                    self.ownership
                )));
            }
            if let Some(mover) = self.mover.filter(|m| *m != from) {
                let who = self.server.client_name(mover);
                let why = format!(
                    "quitting is refused: a mover ({who}) is attached (--force ends it all the same)"
                );
                return Err(Failure::new(FailureCode::Busy, why));
            }
        }
        self.ending.get_or_insert(Ending::Quit);
        self.linger_until = None;
        Reply::done()
    }

    /// Whether this copy may be the only one, and this vmrun cannot know.
    pub(super) fn held(&self) -> bool {
        matches!(self.ownership, Ownership::Committed { .. } | Ownership::InDoubt { .. })
    }

    pub(super) fn take_signals(&mut self) {
        for signal in self.signals.take() {
            let again = self.refused_signal.is_some_and(|at| at.elapsed() < SECOND_SIGNAL);
            if self.held() && !again {
                self.refused_signal = Some(Instant::now());
                tracing::warn!(
                    "signal {signal} is refused: this vmrun {}, and what it holds may be the only copy; \
                     a second signal within {} s ends it all the same",
                    self.ownership,
                    SECOND_SIGNAL.as_secs()
                );
            } else {
                self.ending = Some(Ending::Signal(signal));
                self.linger_until = None;
            }
        }
    }

    /// The guest has ended by itself.
    pub(super) fn guest_ended(&mut self, exit: GuestExit) {
        let Some(hosted) = &mut self.hosted else { return };
        if hosted.ended.is_some() {
            return;
        }
        let why = describe_exit(&exit);
        hosted.ended = Some(exit.clone());
        for wait in std::mem::take(&mut self.waits) {
            let refused = Failure::refused(format!("the guest has ended: {why}"));
            self.server.answer::<()>(wait.reply, Err(refused), Vec::new());
        }
        self.emit("guest-exit", Some(why));
        self.ending.get_or_insert(Ending::Guest(exit));
        // A mover is told at its next request, rather than by a connection that breaks.
        self.linger_until = self.mover.map(|_| Instant::now() + LINGER);
    }

    /// Whether it is time to go.
    pub(super) fn is_over(&self) -> bool {
        self.ending.is_some()
            && (self.mover.is_none() || self.linger_until.is_none_or(|until| Instant::now() >= until))
    }
}
