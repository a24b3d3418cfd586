//! Starting other programs, also from inside the sandbox.
//!
//! A confined process cannot start anything, and what it started would be confined as it is. So before
//! it is confined it forks a *spawner* ([`fork_spawner`]), which knows the few programs that may be
//! wanted, and starts one of them each time it is told which. It takes nothing else from its parent,
//! and ends with it. Where there is no spawner ([`Program::start`] without one), programs are started
//! directly.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::{ForkResult, Pid, fork};

use super::fdpass;

/// A program, and what it is connected to. Its error output is ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// The file, and its arguments.
    pub argv: Vec<OsString>,
    /// Its standard input and output.
    pub io: Io,
}

/// What a program has for standard input and output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Io {
    /// Pipes to us.
    Pipes,
    /// Nothing to read, nowhere to write; in a process group of its own, so that Ctrl-C does not
    /// reach it.
    Apart,
    /// As `Apart`, with our standard output.
    ApartWithOutput,
}

/// A program that was started.
#[derive(Debug)]
pub struct Running {
    pid: u32,
    kind: Kind,
    /// Where it reads from and where it writes to, with [`Io::Pipes`].
    pub pipes: Option<(OwnedFd, OwnedFd)>,
}

#[derive(Debug)]
enum Kind {
    /// A child of ours.
    Child(Child),
    /// A child of the spawner, which writes its status to `end`.
    Told { end: UnixStream, pidfd: OwnedFd, status: Option<ExitStatus> },
}

/// Waits for the end of a program without taking its status.
#[derive(Debug)]
pub struct EndWatch(Watched);

#[derive(Debug)]
enum Watched {
    Child(Pid),
    Told(UnixStream),
}

impl Program {
    fn command(&self) -> Command {
        let mut command = Command::new(self.argv.first().map_or(OsStr::new(""), |program| program));
        command.args(self.argv.iter().skip(1));
        match self.io {
            Io::Pipes => command.stdin(Stdio::piped()).stdout(Stdio::piped()),
            Io::Apart => command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()),
            Io::ApartWithOutput => command.process_group(0).stdin(Stdio::null()),
        };
        command
    }

    /// Starts it, by way of the spawner where there is one.
    pub fn start(&self) -> io::Result<Running> {
        match SPAWNER.get() {
            Some(spawner) => spawner.start(self),
            None => {
                let mut child = self.command().spawn()?;
                let (pid, pipes) = (child.id(), take_pipes(&mut child));
                Ok(Running { pid, kind: Kind::Child(child), pipes })
            }
        }
    }
}

fn take_pipes(child: &mut Child) -> Option<(OwnedFd, OwnedFd)> {
    child.stdin.take().map(OwnedFd::from).zip(child.stdout.take().map(OwnedFd::from))
}

impl Running {
    /// Its process.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for its end, and gives its status.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        match &mut self.kind {
            Kind::Child(child) => child.wait(),
            Kind::Told { status: Some(status), .. } => Ok(*status),
            Kind::Told { end, status, .. } => {
                let mut raw = [0; 4];
                end.read_exact(&mut raw).map_err(|_| gone())?;
                Ok(*status.insert(ExitStatus::from_raw(i32::from_ne_bytes(raw))))
            }
        }
    }

    /// Its status, if it has ended.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        match &mut self.kind {
            Kind::Child(child) => child.try_wait(),
            // Told once: what comes after that is the spawner's hanging up, some time.
            Kind::Told { status: Some(status), .. } => Ok(Some(*status)),
            Kind::Told { end, .. } => match is_readable(end, PollTimeout::ZERO)? {
                true => self.wait().map(Some),
                false => Ok(None),
            },
        }
    }

    /// Kills it; one that has ended is no error.
    pub fn kill(&mut self) -> io::Result<()> {
        match &mut self.kind {
            Kind::Child(child) => child.kill(),
            Kind::Told { pidfd, .. } => {
                let no_info: *const libc::siginfo_t = std::ptr::null();
                // SAFETY: numbers and a null pointer, which means what kill(2) would say.
                let rc = unsafe {
                    libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), libc::SIGKILL, no_info, 0)
                };
                match Errno::result(rc) {
                    Ok(_) | Err(Errno::ESRCH) => Ok(()),
                    Err(errno) => Err(errno.into()),
                }
            }
        }
    }

    /// For a thread that waits for its end. Until [`Running::wait`] was called its pid is its own.
    pub fn watch(&self) -> io::Result<EndWatch> {
        Ok(EndWatch(match &self.kind {
            Kind::Child(child) => Watched::Child(Pid::from_raw(child.id() as i32)),
            Kind::Told { end, .. } => Watched::Told(end.try_clone()?),
        }))
    }
}

impl EndWatch {
    /// Waits for the end.
    pub fn wait(&self) {
        match &self.0 {
            Watched::Child(pid) => {
                while waitid(Id::Pid(*pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) == Err(Errno::EINTR)
                {
                }
            }
            Watched::Told(end) => while matches!(is_readable(end, PollTimeout::NONE), Ok(false)) {},
        }
    }
}

/// Whether `stream` has something to read, or has ended.
fn is_readable(stream: &UnixStream, timeout: PollTimeout) -> io::Result<bool> {
    match poll(&mut [PollFd::new(stream.as_fd(), PollFlags::POLLIN)], timeout) {
        Ok(n) => Ok(n > 0),
        Err(Errno::EINTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

fn gone() -> io::Error {
    io::Error::other("the process that starts other programs is gone")
}

/// This process's spawner.
static SPAWNER: OnceLock<Spawner> = OnceLock::new();

/// Our end of it.
#[derive(Debug)]
struct Spawner {
    line: Mutex<UnixStream>,
    programs: Vec<Program>,
}

/// Forks the spawner, for `programs` and no others, from a process that has no other thread. From
/// here on nothing else can be started.
pub fn fork_spawner(programs: Vec<Program>) -> io::Result<()> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("a spawner is forked before there are threads"));
    }
    if programs.len() > usize::from(u8::MAX) {
        return Err(io::Error::other("too many programs"));
    }
    let (ours, theirs) = UnixStream::pair()?;
    // SAFETY: this process has one thread, as was just seen, so that the child is a whole copy of it:
    // no lock is held by a thread that is missing there.
    match unsafe { fork() }? {
        ForkResult::Parent { .. } => {
            let spawner = Spawner { line: Mutex::new(ours), programs };
            SPAWNER.set(spawner).map_err(|_| io::Error::other("there is a spawner already"))
        }
        ForkResult::Child => {
            drop(ours);
            let _ = be_a_spawner().and_then(|()| serve(theirs, &programs));
            // SAFETY: `_exit` runs no destructor: what is the parent's stays as it is.
            unsafe { libc::_exit(0) }
        }
    }
}

/// The answer to a start: an error, or 0 and the pid.
const ANSWER_BYTES: usize = 8;

impl Spawner {
    fn start(&self, program: &Program) -> io::Result<Running> {
        let at = self.programs.iter().position(|p| p == program).ok_or_else(|| {
            let what = program.argv.last().cloned().unwrap_or_default();
            io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!(
                    "{} was not among the commands at the start: the sandbox starts no other",
                    what.display()
                ),
            )
        })?;
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        line.write_all(&[at as u8]).map_err(|_| gone())?;
        while !is_readable(&line, PollTimeout::NONE)? {}
        let mut answer = [0; ANSWER_BYTES];
        let received = fdpass::receive(line.as_fd(), &mut answer)?;
        if received.bytes != ANSWER_BYTES {
            return Err(gone());
        }
        let [error, pid] = [0, 4].map(|at| i32::from_ne_bytes(std::array::from_fn(|n| answer[at + n])));
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        let mut fds = received.fds.into_iter();
        let (Some(pidfd), Some(end)) = (fds.next(), fds.next()) else {
            return Err(io::Error::other("descriptors of a started program were lost"));
        };
        let kind = Kind::Told { end: end.into(), pidfd, status: None };
        Ok(Running { pid: pid as u32, kind, pipes: fds.next().zip(fds.next()) })
    }
}

fn be_a_spawner() -> io::Result<()> {
    nix::sys::prctl::set_name(c"spawner")?;
    // Ctrl-C is for the others of its group. Not ignored, which its children would inherit.
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)))?;
    }
    Ok(())
}

/// The spawner's life: it ends when its parent does.
fn serve(mut line: UnixStream, programs: &[Program]) -> io::Result<()> {
    let mut which = [0];
    loop {
        match line.read(&mut which) {
            Ok(0) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            other => other.map(drop)?,
        }
        let Some(program) = programs.get(usize::from(which[0])) else { return Ok(()) };
        let (number, fds) = match start_watched(program) {
            Ok((pid, fds)) => ([0, pid], fds),
            Err(e) => ([e.raw_os_error().unwrap_or(libc::EIO), 0], vec![]),
        };
        let answer: Vec<u8> = number.iter().flat_map(|n: &i32| n.to_ne_bytes()).collect();
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        fdpass::send(line.as_fd(), &answer, &fds)?;
    }
}

/// Starts `program` with a thread that tells of its end; gives its pid, its pidfd, the line on which
/// its end is told, and its pipes.
fn start_watched(program: &Program) -> io::Result<(i32, Vec<OwnedFd>)> {
    let (theirs, mut ours) = UnixStream::pair()?;
    let mut child = program.command().spawn()?;
    let pid = child.id() as i32;
    // SAFETY: plain numbers. The child is not waited for yet, so that the pid is its own.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let pidfd = match Errno::result(pidfd) {
        // SAFETY: the kernel has just opened it for us, close-on-exec.
        Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd as i32) },
        Err(errno) => {
            let _ = child.kill();
            let _ = child.wait();
            return Err(errno.into());
        }
    };
    let mut fds = vec![pidfd, theirs.into()];
    fds.extend(take_pipes(&mut child).into_iter().flat_map(|(write, read)| [write, read]));
    std::thread::Builder::new().name("watch".into()).spawn(move || {
        if let Ok(status) = child.wait() {
            let _ = ours.write_all(&status.into_raw().to_ne_bytes());
        }
    })?;
    Ok((pid, fds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(text: &str, io: Io) -> Program {
        Program { argv: ["/bin/sh", "-c", text].map(OsString::from).to_vec(), io }
    }

    #[test]
    fn programs_are_started_watched_and_killed() {
        let mut failing = shell("exit 3", Io::Apart).start().unwrap();
        failing.watch().unwrap().wait();
        assert_eq!(failing.wait().unwrap().code(), Some(3));
        let mut sleeping = shell("cat; exec sleep 60", Io::Pipes).start().unwrap();
        assert!(sleeping.pipes.is_some() && sleeping.try_wait().unwrap().is_none());
        sleeping.kill().unwrap();
        assert_eq!(sleeping.wait().unwrap().signal(), Some(9));
        assert!(Program { argv: vec!["/nowhere".into()], io: Io::Apart }.start().is_err());
    }

    #[test]
    fn what_the_spawner_starts_is_told_of() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let programs = vec![shell("read x; exit $x", Io::Pipes), shell("exec sleep 60", Io::Apart)];
        let known = programs.clone();
        let thread = std::thread::spawn(move || serve(theirs, &known));
        let spawner = Spawner { line: Mutex::new(ours.try_clone().unwrap()), programs };
        let mut reader = spawner.start(&shell("read x; exit $x", Io::Pipes)).unwrap();
        assert!(reader.try_wait().unwrap().is_none());
        let (write, _read) = reader.pipes.take().unwrap();
        std::fs::File::from(write).write_all(b"7\n").unwrap();
        reader.watch().unwrap().wait();
        assert_eq!(reader.wait().unwrap().code(), Some(7));
        assert_eq!(reader.try_wait().unwrap().and_then(|s| s.code()), Some(7));
        let mut sleeper = spawner.start(&shell("exec sleep 60", Io::Apart)).unwrap();
        sleeper.kill().unwrap();
        assert_eq!(sleeper.wait().unwrap().signal(), Some(9));
        sleeper.kill().unwrap();
        let refused = spawner.start(&shell("id", Io::Apart)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        // It ends with whoever asks it.
        ours.shutdown(std::net::Shutdown::Both).unwrap();
        let _ = ours.read(&mut [0]);
        thread.join().unwrap().unwrap();
    }
}
