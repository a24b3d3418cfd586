//! A `vmrun` process in a directory of its own.

use std::fs;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vmferry::control::{Client, RunState, Status};
use vmferry::switchover::{Attempt, SessionId};

/// Long enough for any machine; what is waited for comes much sooner.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Whether guests can run here. Says so when not.
pub fn kvm() -> bool {
    let there = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    if !there {
        assert_ne!(
            std::env::var("REQUIRE_KVM").as_deref(),
            Ok("1"),
            "/dev/kvm is missing, and REQUIRE_KVM=1"
        );
        eprintln!("SKIPPED: /dev/kvm is missing or may not be used");
    }
    there
}

pub struct Vmrun {
    pub dir: TempDir,
    child: Child,
}

impl Vmrun {
    /// Starts with `args` and waits until the socket answers.
    pub fn start(args: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), args)
    }

    pub fn start_in(dir: TempDir, args: &[&str]) -> Self {
        Self::start_with(dir, args, &[])
    }

    /// With environment variables of its own.
    pub fn start_with(dir: TempDir, args: &[&str], vars: &[(&str, &str)]) -> Self {
        let child = command(dir.path(), args).envs(vars.iter().copied()).spawn().unwrap();
        let mut vmrun = Self { child, dir };
        let until = Instant::now() + PATIENCE;
        while Client::connect(&vmrun.socket(), "test").is_err() {
            if let Some(status) = vmrun.child.try_wait().unwrap() {
                panic!("vmrun ended: {status}: {}", vmrun.stderr());
            }
            assert!(Instant::now() < until, "vmrun does not answer");
            std::thread::sleep(Duration::from_millis(2));
        }
        vmrun
    }

    /// A running guest of 16 MiB.
    pub fn heartbeat() -> Self {
        Self::start(&["--kernel", "builtin:heartbeat", "--memory", "16M", "--serial", "file:log"])
    }

    pub fn incoming() -> Self {
        Self::start(&["--incoming", "--serial", "file:log"])
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.path("vm.sock")
    }

    pub fn record(&self) -> PathBuf {
        self.path("vm.sock.session.json")
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn client(&self) -> Client {
        let mut client = Client::connect(&self.socket(), "test").unwrap();
        client.set_timeout(PATIENCE);
        client
    }

    pub fn status(&self) -> Status {
        self.client().status().unwrap()
    }

    /// Waits for the run state, by events.
    pub fn wait_for(&self, state: RunState) -> Status {
        let mut client = self.client();
        client.subscribe().unwrap();
        let mut status = client.status().unwrap();
        while status.run_state != state {
            let event: Option<vmferry::control::Event> = client.next_event(Some(PATIENCE)).unwrap();
            status = event.unwrap_or_else(|| panic!("never {state:?}, but {status:?}")).status;
        }
        status
    }

    /// Waits for `what` to become true; for what sends no event.
    pub fn until(&self, what: &str, mut test: impl FnMut() -> bool) {
        let until = Instant::now() + PATIENCE;
        while !test() {
            assert!(Instant::now() < until, "never: {what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until the guest has printed one more heartbeat than now.
    pub fn beats(&self) {
        let beats = || {
            fs::read_to_string(self.path("log"))
                .unwrap_or_default()
                .lines()
                .filter(|l| l.starts_with("b "))
                .count()
        };
        let before = beats();
        self.until("a heartbeat", || beats() > before);
        assert!(!fs::read_to_string(self.path("log")).unwrap().contains("CORRUPT"));
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// Waits for the end; gives the exit code and standard error.
    pub fn end(&mut self) -> (i32, String) {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return (status.code().unwrap_or_else(|| -status.signal().unwrap_or(0)), self.stderr());
            }
            assert!(Instant::now() < until, "vmrun does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn stderr(&mut self) -> String {
        let mut text = String::new();
        self.child.stderr.as_mut().unwrap().read_to_string(&mut text).unwrap();
        text
    }
}

impl Drop for Vmrun {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmrun"));
    command.current_dir(dir).args(["--control", "vm.sock"]).args(args);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).env_remove("VMFERRY_LOG");
    command
}

/// Runs a `vmrun` that ends by itself at once.
pub fn vmrun_fails(dir: &Path, args: &[&str]) -> (i32, String) {
    let Output { status, stderr, .. } = command(dir, args).output().unwrap();
    (status.code().unwrap_or(-1), String::from_utf8(stderr).unwrap())
}

/// Runs `vmctl` on the socket.
pub fn vmctl(vmrun: &Vmrun, args: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
    let Output { status, stdout, stderr } = command.arg(vmrun.socket()).args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap_or(-1), text(stdout), text(stderr))
}

pub fn session(n: u8) -> SessionId {
    SessionId([n; 16])
}

pub fn attempt(n: u8, epoch: u32) -> Attempt {
    Attempt { session: session(n), epoch }
}
