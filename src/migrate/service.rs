//! The small control socket of a `vmsend`: progress, settings, cancel, switch now.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::control::mover::{MoverEvent, MoverProgress, MoverRequest};
use crate::control::{BindError, ConnectionId, Failure, Incoming, ReplyTo, Server};

use super::settings::Settings;

/// How often the service looks at what the migration has to tell.
const STEP_MS: u8 = 50;

/// What the migration tells its control socket.
#[derive(Clone, Debug, Default)]
pub struct Board(Arc<Mutex<Told>>);

#[derive(Debug, Default)]
struct Told {
    progress: Option<MoverProgress>,
    changes: u64,
    /// `Some` at the end: whether the source has the guest.
    source_has_it: Option<bool>,
}

impl Board {
    /// Shows where things stand.
    pub fn show(&self, progress: &MoverProgress) {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        told.progress = Some(progress.clone());
        told.changes += 1;
    }

    fn read(&self) -> (Option<MoverProgress>, u64, Option<bool>) {
        let told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (told.progress.clone(), told.changes, told.source_has_it)
    }
}

/// The socket with its thread, until the migration ends.
#[derive(Debug)]
pub struct MoverService {
    board: Board,
    thread: Option<JoinHandle<()>>,
}

impl MoverService {
    /// Serves at `path`.
    pub fn start(path: &Path, settings: Settings, board: Board) -> Result<Self, BindError> {
        let server = Server::bind(path, "vmsend")?;
        let theirs = board.clone();
        let thread = std::thread::spawn(move || {
            Desk { server, settings, board: theirs, cancels: vec![], watchers: vec![], told: 0 }.serve();
        });
        Ok(Self { board, thread: Some(thread) })
    }

    /// The migration is over: the last answers go out, and the socket goes away.
    pub fn end(mut self, source_has_it: bool) {
        self.board.0.lock().unwrap_or_else(PoisonError::into_inner).source_has_it = Some(source_has_it);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Desk {
    server: Server<MoverRequest>,
    settings: Settings,
    board: Board,
    /// Cancels that wait for their outcome, with the count of refusals when they came.
    cancels: Vec<(ReplyTo, u64)>,
    watchers: Vec<ConnectionId>,
    told: u64,
}

impl Desk {
    fn serve(mut self) {
        loop {
            let mut fds = [PollFd::new(self.server.as_fd(), PollFlags::POLLIN)];
            let _ = poll(&mut fds, PollTimeout::from(STEP_MS));
            let incoming = match self.server.dispatch() {
                Ok(incoming) => incoming,
                Err(error) => {
                    tracing::warn!("control socket: {error}");
                    return;
                }
            };
            for item in incoming {
                match item {
                    Incoming::Call { reply, request, .. } => self.answer(reply, request),
                    Incoming::Closed(connection) => self.watchers.retain(|w| *w != connection),
                }
            }
            let (progress, changes, end) = self.board.read();
            if let Some(progress) = progress.filter(|_| changes != self.told) {
                self.told = changes;
                self.tell("progress", progress);
            }
            self.settle_cancels(end);
            if end.is_some() {
                return;
            }
        }
    }

    fn answer(&mut self, reply: ReplyTo, request: MoverRequest) {
        let done = Ok(serde_json::json!({}));
        match request {
            MoverRequest::Hello { .. } => self.server.answer(reply, done, vec![]),
            MoverRequest::Progress => {
                let shown = self.board.read().0;
                // The settings as they are now, not as they were when the progress was shown.
                let progress = shown
                    .map(|shown| MoverProgress { settings: self.settings.for_control(), ..shown })
                    .ok_or_else(|| Failure::refused("the migration has not begun"));
                self.server.answer(reply, progress, vec![]);
            }
            MoverRequest::Events => {
                self.watchers.push(reply.connection);
                self.server.answer(reply, done, vec![]);
            }
            MoverRequest::Set { downtime_ms, bandwidth_bytes_per_s } => {
                if let Some(downtime_ms) = downtime_ms {
                    self.settings.set_downtime(Duration::from_millis(downtime_ms));
                }
                if let Some(limit) = bandwidth_bytes_per_s {
                    self.settings.set_bandwidth_limit(limit);
                }
                self.server.answer(reply, Ok(self.settings.for_control()), vec![]);
            }
            MoverRequest::SwitchNow => {
                self.settings.switch_now();
                self.server.answer(reply, done, vec![]);
            }
            MoverRequest::Cancel => {
                self.cancels.push((reply, self.settings.refused_cancels()));
                self.settings.cancel();
                self.server.pending(reply, "the migration to stop");
            }
        }
    }

    /// Answers the cancels whose outcome is known.
    fn settle_cancels(&mut self, end: Option<bool>) {
        let refusals = self.settings.refused_cancels();
        let too_late = "too late to cancel: the guest is committed to the destination";
        for (reply, before) in std::mem::take(&mut self.cancels) {
            match end {
                Some(true) => self.server.answer(reply, Ok(serde_json::json!({})), vec![]),
                Some(false) => self.server.answer::<()>(reply, Err(Failure::refused(too_late)), vec![]),
                None if refusals > before => {
                    self.server.answer::<()>(reply, Err(Failure::refused(too_late)), vec![]);
                }
                None => self.cancels.push((reply, before)),
            }
        }
    }

    fn tell(&mut self, event: &str, progress: MoverProgress) {
        let time_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        let event = MoverEvent { event: event.to_owned(), time_ms, progress };
        for watcher in &self.watchers {
            self.server.event(*watcher, &event);
        }
    }
}
