//! The heart of `vmrun`: one thread, one poll loop, which holds the machine, its ownership, the
//! leases and the control socket.
//!
//! Nothing here waits for the guest, for KVM or for a disk: what takes time is asked of the machine,
//! and answered when its notice comes, or is done beside the loop; a client that has
//! waited for 50 ms is told so meanwhile.

mod beside;
mod calls;
mod ending;
mod hosted;
mod incoming;
mod lease;
mod outgoing;
mod postcopy;
mod record;
mod report;
mod told;

use std::collections::{BTreeSet, VecDeque};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use serde_json::Value;
use thiserror::Error;

use self::beside::{Beside, Chore};
use self::calls::{Deferred, Task, Wait};
use self::ending::Signals;
use self::hosted::{Activity, Hosted};
use self::lease::PausedBy;
use self::record::RecordFile;
use self::told::Told;
use super::{LocalConfig, Machine, MachineConfig, Notice, NoticeSender, VmmError};
use crate::control::{BindError, ConnectionId, Failure, FailureCode, Request, Server};
use crate::switchover::{OperatorWord, Ownership, Refusal};

pub use ending::Ending;
pub use record::SessionRecord;

/// A request that is not done by then is answered with `pending` first.
const PENDING_AFTER: Duration = Duration::from_millis(50);
/// How long the last answers may take to be read when `vmrun` ends.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Why a service could not start, or had to stop.
#[derive(Debug, Error)]
pub enum ServiceError {
    /// The control socket.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The session record of an earlier vmrun.
    #[error("session record {path}: {source}")]
    Record {
        /// The file.
        path: PathBuf,
        /// What failed.
        source: io::Error,
    },
    /// The machine.
    #[error(transparent)]
    Machine(#[from] VmmError),
    /// Polling, or a signal handler.
    #[error("event loop: {0}")]
    Loop(#[from] io::Error),
}

/// What a handler says.
enum Reply {
    /// The final answer.
    Now(Value, Vec<OwnedFd>),
    /// It comes when the task is done.
    Later(Task),
}

type Handled = Result<Reply, Failure>;

/// Hosts one machine; see the module.
pub struct Service {
    server: Server<Request>,
    signals: Signals,
    record: Option<RecordFile>,
    local: LocalConfig,
    hosted: Option<Hosted>,
    ownership: Ownership,
    paused_by: PausedBy,
    /// The connection of the sender or receiver, while it lives.
    mover: Option<ConnectionId>,
    told: Told,
    /// The control socket, in words.
    control: String,
    listeners: BTreeSet<ConnectionId>,
    waits: Vec<Wait>,
    beside: Beside,
    /// The chores under way that orders have to wait for.
    chores: VecDeque<Chore>,
    /// A change of ownership is on its way to the disk.
    changing: bool,
    /// The guest has run: this thread and the one beside have given up what they do without.
    confined: bool,
    deferred: VecDeque<Deferred>,
    ending: Option<Ending>,
    linger_until: Option<Instant>,
    refused_signal: Option<Instant>,
}

impl Service {
    /// Takes the control socket (if there is to be one) and the signals that end a `vmrun`. It holds
    /// no machine yet; `local` is for one that comes in.
    pub fn open(control: Option<&Path>, local: LocalConfig) -> Result<Self, ServiceError> {
        let (server, record) = match control {
            None => (Server::unbound("vmrun")?, None),
            Some(path) => {
                let server = Server::bind(path, "vmrun")?;
                (server, Some(open_record(path)?))
            }
        };
        Ok(Self {
            server,
            signals: Signals::register()?,
            record,
            local,
            hosted: None,
            ownership: Ownership::empty(),
            paused_by: PausedBy::default(),
            mover: None,
            told: Told::default(),
            control: control.map(|path| path.display().to_string()).unwrap_or_default(),
            listeners: BTreeSet::new(),
            waits: Vec::new(),
            beside: Beside::start()?,
            chores: VecDeque::new(),
            changing: false,
            confined: false,
            deferred: VecDeque::new(),
            ending: None,
            linger_until: None,
            refused_signal: None,
        })
    }

    /// Boots a machine; it runs as soon as [`Service::run`] does, unless it is to start `paused`.
    pub fn boot(&mut self, config: &MachineConfig, paused: bool) -> Result<(), ServiceError> {
        let (sender, notices) = NoticeSender::channel()?;
        let machine = Machine::boot(config, sender)?;
        tell_terminal(&machine);
        self.hosted = Some(Hosted::new(machine, notices, true));
        self.ownership = Ownership::booted();
        self.paused_by.operator = paused;
        Ok(())
    }

    /// Serves until the machine ends. The socket file is gone when this returns; the session record
    /// stays only where the ownership is open.
    pub fn run(mut self) -> Result<Ending, ServiceError> {
        self.settle().map_err(|e| io::Error::other(e.message))?;
        loop {
            self.wait()?;
            self.take_signals();
            self.take_notices();
            self.take_done();
            for incoming in self.server.dispatch()? {
                self.take_in(Deferred::new(incoming));
            }
            self.tell_pending();
            if self.is_over() {
                return self.finish();
            }
        }
    }

    /// Sleeps until something happens or a time is up.
    fn wait(&mut self) -> io::Result<()> {
        let now = Instant::now();
        let until = self
            .next_pending()
            .into_iter()
            .chain(self.linger_until)
            .min()
            .map(|at| at.saturating_duration_since(now));
        let sleep = until.into_iter().chain(self.server.next_wake()).min();
        let timeout = match sleep {
            None => PollTimeout::NONE,
            Some(Duration::ZERO) => PollTimeout::ZERO,
            Some(time) => PollTimeout::try_from(time.as_millis() + 1).unwrap_or(PollTimeout::MAX),
        };
        let mut fds = vec![
            PollFd::new(self.server.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.beside.fd(), PollFlags::POLLIN),
        ];
        fds.extend(self.signals.fds().map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        fds.extend(self.hosted.as_ref().map(|h| PollFd::new(h.notices.wake.as_fd(), PollFlags::POLLIN)));
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    fn take_notices(&mut self) {
        let Some(hosted) = &self.hosted else { return };
        // Emptied before the channel is: a notice that comes in between wakes once more.
        let _ = hosted.notices.wake.read();
        let notices: Vec<Notice> = hosted.notices.receiver.try_iter().collect();
        for notice in notices {
            match notice {
                Notice::Paused => self.parked(),
                Notice::Exported(saved) => self.exported(saved),
                Notice::Synchronised(outcome) => self.synchronised(outcome),
                Notice::Exit(exit) => self.guest_ended(exit),
            }
        }
    }

    fn parked(&mut self) {
        match &mut self.hosted {
            Some(hosted) if hosted.activity == Activity::Pausing && hosted.ended.is_none() => {
                hosted.activity = Activity::Parked;
            }
            _ => return,
        }
        self.emit("run-state", None);
        let status = self.status();
        self.finish_tasks(Task::Pause, || Reply::now(status));
        // Whoever paused it may have changed their mind, or gone.
        let _ = self.settle();
    }

    fn decide(&mut self, from: ConnectionId, request: Request, fds: Vec<OwnedFd>) -> Handled {
        match request {
            Request::Hello { .. } => Reply::done(),
            Request::Status => Reply::now(self.status()),
            Request::Report { report } => self.report(from, *report),
            Request::Events => {
                self.listeners.insert(from);
                Reply::done()
            }
            Request::Machine => Reply::now(self.live()?.machine.describe()),
            Request::Ram => {
                let (ram, fds) = self.live()?.ram()?;
                Reply::with_fds(ram, fds)
            }
            Request::Attach { session, dest } => self.attach(from, session, dest),
            Request::DirtyStart => self.dirty_start(from),
            Request::KernelImage => self.kernel_image(from),
            Request::DirtyTake => self.dirty_take(from),
            Request::DirtyClear { first, pages } => self.dirty_clear(from, first, pages),
            Request::DirtyPutBack => self.dirty_put_back(from),
            Request::DirtyStop => self.dirty_stop(from),
            Request::Pause { lease } => self.pause(from, lease),
            Request::Resume { force, peer_fenced } => self.resume(from, OperatorWord { force, peer_fenced }),
            Request::Export => self.export(from),
            Request::Fence { attempt, dest } => self.fence(from, attempt, &dest),
            Request::PeerRevoked { attempt } => self.peer_revoked(from, attempt),
            Request::Release { attempt, keep } => self.release(from, attempt, keep),
            Request::Quit { force } => self.quit(from, force),
            Request::Prepare { attempt, machine, remap, postcopy } => {
                self.prepare(from, attempt, &machine, remap, postcopy)
            }
            Request::PostcopyArm { attempt, listen } => self.postcopy_arm(from, attempt, listen),
            Request::PostcopyAdopt => self.postcopy_adopt(from),
            Request::PostcopyDone { attempt } => self.postcopy_done(from, attempt),
            Request::Import { attempt, bytes } => self.import(attempt, bytes, fds),
            Request::Promise { attempt, paused } => self.promise(from, attempt, paused),
            Request::Run { attempt } => self.run_here(from, attempt),
            Request::Revoke { attempt } => self.revoke(from, attempt),
            Request::Renew { attempt } => self.renew(from, attempt),
        }
    }

    /// The machine, when there is one whose guest has not ended.
    fn live(&self) -> Result<&Hosted, Failure> {
        let hosted = self.hosted.as_ref().ok_or_else(|| Failure::refused("this vmrun holds no guest"))?;
        match &hosted.ended {
            None => Ok(hosted),
            Some(exit) => {
                Err(Failure::refused(format!("the guest has ended: {}", report::describe_exit(exit))))
            }
        }
    }

    fn live_mut(&mut self) -> Result<&mut Hosted, Failure> {
        self.live()?;
        self.hosted.as_mut().ok_or_else(|| Failure::refused("this vmrun holds no guest"))
    }

    /// Changes the ownership; the record follows when it can. For changes that no host could take
    /// wrongly if they were forgotten.
    fn change<T>(&mut self, change: impl FnOnce(&mut Ownership) -> Result<T, Refusal>) -> Result<T, Failure> {
        let mut next = self.ownership.clone();
        let given = change(&mut next).map_err(|e| Failure::refused(e.to_string()))?;
        if next != self.ownership {
            let write = self.record_of(&next);
            self.beside.give(Chore::Record, move || {
                if let Err(e) = write() {
                    tracing::warn!("the session record cannot be brought up to date: {e}");
                }
                None
            });
        }
        self.set_ownership(next);
        Ok(given)
    }

    /// Changes the ownership when the change is on disk, or not at all (S3); then goes on with `then`.
    fn change_recorded<T: Send + 'static>(
        &mut self,
        change: impl FnOnce(&mut Ownership) -> Result<T, Refusal>,
        then: impl FnOnce(&mut Self, T) -> Handled + Send + 'static,
    ) -> Handled {
        let mut next = self.ownership.clone();
        let given = change(&mut next).map_err(|e| Failure::refused(e.to_string()))?;
        let Some(record) = self.record.as_ref().filter(|_| next != self.ownership) else {
            self.set_ownership(next);
            return then(self, given);
        };
        let path = record.path().display().to_string();
        let (write, back) = (self.record_of(&next), self.record_of(&self.ownership));
        self.changing = true;
        self.start(Chore::Record, move || {
            let written = write();
            if written.is_err() {
                // It may have got as far as the file, and not be certain to stay: back to what holds.
                let _ = back();
            }
            Box::new(move |service: &mut Self| {
                service.changing = false;
                written.map_err(|e| {
                    hosted::failed(format!(
                        "the session record {path} cannot be written, so nothing was changed: {e}"
                    ))
                })?;
                service.set_ownership(next);
                then(service, given)
            })
        })
    }

    /// A migration begins: its record is written while the guest stands still, into a file that is made
    /// now. A disk that does not take it now is asked again then.
    fn make_record_ready(&mut self) {
        let Some(record) = self.record.clone() else { return };
        self.beside.give(Chore::ReadyRecord, move || {
            if let Err(e) = record.make_ready() {
                tracing::warn!("no file can be made for the session record {}: {e}", record.path().display());
            }
            None
        });
    }

    fn set_ownership(&mut self, next: Ownership) {
        if next != self.ownership {
            self.ownership = next;
            tracing::info!("this vmrun {}", self.ownership);
            self.emit("ownership", None);
        }
    }

    /// Writes what must outlive a crash; anything else needs no record, and has none. The closure is
    /// for the thread beside the loop.
    fn record_of(&self, ownership: &Ownership) -> impl FnOnce() -> io::Result<()> + Send + 'static {
        let (record, ownership) = (self.record.clone(), ownership.clone());
        let description = self.hosted.as_ref().map(|h| h.machine.describe());
        let (name, uuid) = description.map(|d| (d.name.clone(), d.uuid.clone())).unzip();
        move || match (record, &ownership) {
            (None, _) => Ok(()),
            (
                Some(record),
                Ownership::Committed { .. }
                | Ownership::InDoubt { .. }
                | Ownership::Released { .. }
                | Ownership::Sole { arrived: Some(_), .. },
            ) => record.write(name.as_deref(), uuid.as_deref(), &ownership),
            (
                Some(record),
                Ownership::Empty { .. } | Ownership::Loading { .. } | Ownership::Sole { arrived: None, .. },
            ) => record.remove(),
        }
    }

    /// The end: last answers out, machine closed, record removed unless the ownership is open.
    fn finish(mut self) -> Result<Ending, ServiceError> {
        let until = Instant::now() + LAST_WORDS;
        while self.server.has_output() && Instant::now() < until {
            let mut fds = [PollFd::new(self.server.as_fd(), PollFlags::POLLIN)];
            let _ = poll(&mut fds, PollTimeout::from(50u8));
            // Whatever is still asked gets no answer: the connection ends.
            self.server.dispatch()?;
        }
        let (held, hosted) = (self.held(), self.hosted.take());
        if let Some(hosted) = &hosted {
            hosted.machine.stop();
        }
        // After what is still to be written, where the disk lets it.
        self.beside.drain(LAST_WORDS);
        match &self.record {
            Some(record) if held => record.clear(),
            Some(record) => {
                if let Err(e) = record.end() {
                    tracing::warn!("session record {}: {e}", record.path().display());
                }
            }
            None => {}
        }
        // Nobody waits for an answer while KVM and the memory go, which may take a second.
        drop(self.server);
        drop(hosted);
        Ok(self.ending.take().unwrap_or(Ending::Quit))
    }
}

impl Reply {
    fn now(value: impl Serialize) -> Handled {
        Self::with_fds(value, Vec::new())
    }

    fn done() -> Handled {
        Ok(Self::Now(Value::Object(serde_json::Map::new()), Vec::new()))
    }

    fn with_fds(value: impl Serialize, fds: Vec<OwnedFd>) -> Handled {
        let value = serde_json::to_value(value);
        let value =
            value.map_err(|e| Failure::new(FailureCode::Failed, format!("cannot write the answer: {e}")))?;
        Ok(Self::Now(value, fds))
    }
}

/// Finds the record's place; says what an earlier `vmrun` left there.
fn open_record(control: &Path) -> Result<RecordFile, ServiceError> {
    let (record, left) = RecordFile::open(control)
        .map_err(|source| ServiceError::Record { path: control.to_owned(), source })?;
    if let Some(left) = left {
        tracing::warn!(
            "a vmrun with this control socket ended without settling who owns its guest; its session record is now {left}"
        );
    }
    Ok(record)
}

/// Prints where the serial port is to be found, where a pseudo-terminal was made for it.
fn tell_terminal(machine: &Machine) {
    if let Some(path) = machine.serial_path() {
        let _ = writeln!(io::stderr(), "vmrun: the serial port is {}", path.display());
    }
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_millis() as u64)
}
