//! One test's hosts: a directory, the programs in it, and a watcher that counts who runs the guest.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use tempfile::TempDir;
use vmferry::control::{Client, RunState, Status};
use vmferry::switchover::Ownership;

use super::program::{End, PATIENCE, Program, until};

/// How often the watcher looks.
const WATCH_EVERY: Duration = Duration::from_millis(10);

/// Whether guests can run here. Says so when not; fails instead with REQUIRE_KVM=1.
pub fn kvm() -> bool {
    let there = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    there || skip("/dev/kvm is missing or may not be used")
}

/// Whether the programs were built with fault points.
pub fn fault_points() -> bool {
    cfg!(feature = "fault-points") || skip("this needs --features fault-points")
}

/// Says why a test is skipped, or fails where nothing may be skipped. False.
pub fn skip(why: &str) -> bool {
    assert_ne!(std::env::var("REQUIRE_KVM").as_deref(), Ok("1"), "{why}, and REQUIRE_KVM=1");
    // Not eprintln!, which the test harness keeps to itself when a test passes.
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    let _ = writeln!(std::io::stderr(), "SKIPPED {name}: {why}");
    false
}

/// A test's directory with everything in it. Whatever was started in it is ended when it is
/// dropped, also what the programs started.
pub struct Scene {
    dir: TempDir,
    watch: Arc<Watch>,
    watcher: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Watch {
    over: AtomicBool,
    sockets: Mutex<Vec<PathBuf>>,
    /// More than one runner was seen.
    broken: Mutex<Option<String>>,
}

/// A `vmrun` as seen from outside: its control socket and its guest's serial output.
#[derive(Clone, Debug)]
pub struct Host {
    pub control: PathBuf,
    pub log: PathBuf,
}

/// A `vmrun` that was started by the test.
pub struct Vmrun {
    pub host: Host,
    pub program: Program,
}

/// A `vmrecv`, and the `vmrun` that it started or attached to.
pub struct Receiver {
    pub host: Host,
    pub program: Program,
    /// Where it listens, as DEST for vmsend.
    pub address: String,
}

impl Scene {
    pub fn new() -> Self {
        // What vmrecv leaves behind becomes our child, so that it can be reaped.
        let _ = nix::sys::prctl::set_child_subreaper(true);
        let watch = Arc::new(Watch::default());
        let theirs = watch.clone();
        let watcher = std::thread::spawn(move || theirs.look());
        Self {
            dir: tempfile::Builder::new().prefix("vmferry").tempdir().unwrap(),
            watch,
            watcher: Some(watcher),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// One of the four programs, with absolute paths for all that is its own.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(binary(program));
        command.current_dir(self.dir.path()).env_remove("VMFERRY_FAULT_POINT");
        command
    }

    pub fn start(&self, name: &str, command: Command) -> Program {
        Program::start(self.dir.path(), name, command)
    }

    /// The host of that name, which the watcher looks at from here on.
    pub fn host(&self, name: &str) -> Host {
        let host =
            Host { control: self.path(&format!("{name}.sock")), log: self.path(&format!("{name}.log")) };
        let mut sockets = self.watch.sockets.lock().unwrap();
        if !sockets.contains(&host.control) {
            sockets.push(host.control.clone());
        }
        host
    }

    /// A heartbeat guest that has filled its memory and beats.
    pub fn guest(&self, name: &str, memory: &str, cpus: u32, cmdline: &str) -> Vmrun {
        self.guest_of("4K", name, memory, cpus, cmdline)
    }

    /// The same with memory of `pages`.
    pub fn guest_of(&self, pages: &str, name: &str, memory: &str, cpus: u32, cmdline: &str) -> Vmrun {
        let cmdline = format!("vcpus={cpus} {cmdline} beat=5 status=50");
        let args = [
            "--kernel",
            "builtin:heartbeat",
            "--memory",
            memory,
            "--hugepages",
            pages,
            "--cpus",
            &cpus.to_string(),
            "--cmdline",
            &cmdline,
        ];
        let vmrun = self.vmrun(name, &args);
        let filled = || fs::read_to_string(&vmrun.host.log).ok()?.contains("heartbeat: filled").then_some(());
        until("the guest has filled its memory", filled);
        vmrun
    }

    /// A small guest in a vmrun that `command` starts, with arguments of its own.
    pub fn guest_from(&self, name: &str, command: Command, args: &[&str]) -> Vmrun {
        let guest = ["--kernel", "builtin:heartbeat", "--memory", "32M"];
        let cmdline = ["--cmdline", "vcpus=1 fill=8M ws=1M rate=5 beat=5 status=50"];
        let vmrun = self.vmrun_from(name, command, &[&guest[..], &cmdline, args].concat());
        let filled = || fs::read_to_string(&vmrun.host.log).ok()?.contains("heartbeat: filled").then_some(());
        until("the guest has filled its memory", filled);
        vmrun
    }

    /// A small guest that is moved in a moment.
    pub fn small(&self, name: &str) -> Vmrun {
        self.guest(name, "32M", 1, "fill=8M ws=1M rate=5")
    }

    /// A guest that takes seconds to move with [`SLOW`].
    pub fn big(&self, name: &str) -> Vmrun {
        self.guest(name, "64M", 1, "fill=32M ws=1M rate=5")
    }

    pub fn vmrun(&self, name: &str, args: &[&str]) -> Vmrun {
        self.vmrun_from(name, self.command("vmrun"), args)
    }

    /// `command` is vmrun, or ends in starting it.
    pub fn vmrun_from(&self, name: &str, mut command: Command, args: &[&str]) -> Vmrun {
        let host = self.host(name);
        command.arg("--control").arg(&host.control).arg("--serial").arg(with("file:", &host.log)).args(args);
        let mut program = self.start(&format!("vmrun-{name}"), command);
        until("vmrun answers", || {
            assert!(program.is_running(), "vmrun ended: {}", program.stderr());
            Client::connect(&host.control, "test").ok()
        });
        Vmrun { host, program }
    }

    /// A `vmrecv` that waits at a free port of loopback.
    pub fn receiver(&self, name: &str, args: &[&str]) -> Receiver {
        self.receiver_at(name, "tcp:127.0.0.1:0", args)
    }

    pub fn receiver_at(&self, name: &str, listen: &str, args: &[&str]) -> Receiver {
        self.receiver_from(name, self.command("vmrecv"), listen, args)
    }

    /// `command` is vmrecv, or ends in starting it.
    pub fn receiver_from(&self, name: &str, mut command: Command, listen: &str, args: &[&str]) -> Receiver {
        let host = self.host(name);
        command.arg(listen).arg("--json").arg("--control").arg(&host.control).args(args);
        if !args.contains(&"--attach") {
            command.arg("--serial").arg(with("file:", &host.log));
        }
        let mut program = self.start(&format!("vmrecv-{name}"), command);
        let note = program.await_note("waiting for a machine at ");
        let address = note.rsplit(' ').next().unwrap_or_default().to_owned();
        Receiver { host, program, address }
    }

    /// A `vmsend --json` from `host` to `dest`.
    pub fn send(&self, host: &Host, dest: &str, args: &[&str]) -> Program {
        let mut command = self.command("vmsend");
        command.arg("--vm").arg(&host.control).arg("--json").arg(dest).args(args);
        if !args.contains(&"--peer-timeout") {
            // Making a VM takes KVM seconds where all CPUs are busy with guests, and a receiver that
            // does so for an attempt that has ended hears the next one late.
            command.args(["--peer-timeout", "30s"]);
        }
        self.start("vmsend", command)
    }

    /// `vmsend --resume`.
    pub fn resume(&self, host: &Host, args: &[&str]) -> Program {
        let mut command = self.command("vmsend");
        command.arg("--vm").arg(&host.control).args(["--json", "--resume"]).args(args);
        self.start("vmsend-resume", command)
    }
}

/// Arguments with which a migration of [`Scene::big`] takes seconds.
pub const SLOW: &[&str] = &["--bwlimit", "4M", "--peer-timeout", "2s"];

impl Drop for Scene {
    fn drop(&mut self) {
        self.watch.over.store(true, Ordering::Release);
        if let Some(watcher) = self.watcher.take() {
            let _ = watcher.join();
        }
        let ours = self.dir.path().as_os_str().to_owned();
        while let Some(pid) = process_with(&ours) {
            let _ = kill(pid, Signal::SIGKILL);
            let _ = waitpid(pid, None);
        }
        if std::thread::panicking() {
            self.tell();
        } else if let Some(broken) = self.watch.broken.lock().unwrap().take() {
            self.tell();
            panic!("two runners: {broken}");
        }
    }
}

impl Scene {
    /// What the programs had to say, for whoever looks into a failure.
    fn tell(&self) {
        let mut files: Vec<PathBuf> =
            fs::read_dir(self.dir.path()).into_iter().flatten().flatten().map(|f| f.path()).collect();
        // Nobody writes to a FIFO any more.
        files.retain(|path| path.is_file());
        files.sort();
        for path in files {
            let text = String::from_utf8_lossy(&fs::read(&path).unwrap_or_default()).into_owned();
            let lines: Vec<&str> = text.lines().filter(|l| !l.contains(r#""event":"progress""#)).collect();
            let tail = lines[lines.len().saturating_sub(12)..].join("\n    ");
            if !tail.is_empty() {
                eprintln!("--- {}\n    {tail}", path.file_name().unwrap_or_default().display());
            }
        }
    }
}

/// A live process with `text` in its command line.
fn process_with(text: &OsStr) -> Option<Pid> {
    let text = text.as_encoded_bytes();
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        line.windows(text.len()).any(|w| w == text).then_some(Pid::from_raw(pid))
    })
}

impl Watch {
    /// Two copies that run are an error whatever else a test looks at.
    fn look(&self) {
        let mut clients = HashMap::new();
        while !self.over.load(Ordering::Acquire) {
            let sockets = self.sockets.lock().unwrap().clone();
            let running = |clients: &mut HashMap<PathBuf, Client>| -> Vec<PathBuf> {
                sockets.iter().filter(|s| runs(clients, s)).cloned().collect()
            };
            // A guest that moves between two looks may be seen on both; not twice in a row.
            let first = running(&mut clients);
            if first.len() > 1 {
                let again = running(&mut clients);
                if again.len() > 1 {
                    self.broken.lock().unwrap().get_or_insert(format!("{first:?}, then {again:?}"));
                }
            }
            std::thread::sleep(WATCH_EVERY);
        }
    }
}

fn runs(clients: &mut HashMap<PathBuf, Client>, socket: &Path) -> bool {
    if !clients.contains_key(socket) {
        let Ok(client) = Client::connect_within(socket, "watch", Duration::from_secs(1)) else {
            return false;
        };
        clients.insert(socket.to_owned(), client);
    }
    match clients.get_mut(socket).map(Client::status) {
        Some(Ok(status)) => status.run_state == RunState::Running,
        _ => {
            clients.remove(socket);
            false
        }
    }
}

impl Host {
    pub fn client(&self) -> Client {
        let mut client = Client::connect(&self.control, "test").unwrap();
        client.set_timeout(PATIENCE);
        client
    }

    pub fn status(&self) -> Status {
        self.client().status().unwrap()
    }

    /// Waits until its status is as `test` wants it.
    pub fn await_status(&self, what: &str, test: impl Fn(&Status) -> bool) -> Status {
        let mut client = self.client();
        until(&format!("{}: {what}", self.control.display()), || client.status().ok().filter(|s| test(s)))
    }

    pub fn await_running(&self) -> Status {
        self.await_status("the guest runs", |s| s.run_state == RunState::Running)
    }

    pub fn await_gone(&self) {
        until("vmrun is gone", || Client::connect(&self.control, "test").err());
    }

    /// Holds a guest that it has committed to somebody else, and does not run it.
    pub fn is_committed(&self) -> bool {
        let status = self.status();
        matches!(status.ownership, Ownership::Committed { .. }) && status.run_state == RunState::Paused
    }

    /// Holds an acknowledged guest, and does not run it.
    pub fn is_in_doubt(&self) -> bool {
        let status = self.status();
        matches!(status.ownership, Ownership::InDoubt { .. }) && status.run_state == RunState::Paused
    }

    pub fn is_empty(&self) -> bool {
        self.status().run_state == RunState::Empty
    }

    /// Ends the vmrun as a crash would.
    pub fn crash(&self) {
        let pid = Pid::from_raw(self.status().pid as i32);
        kill(pid, Signal::SIGKILL).unwrap();
        self.await_gone();
    }

    /// Runs `vmctl` on its socket.
    pub fn vmctl(&self, args: &[&str]) -> End {
        vmctl(&self.control, args)
    }
}

/// Runs `vmctl SOCKET`.
pub fn vmctl(socket: &Path, args: &[&str]) -> End {
    let output = Command::new(binary("vmctl")).arg(socket).args(args).stdin(Stdio::null()).output().unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    End {
        code: output.status.code().unwrap_or(-1),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        lines: stdout.lines().filter_map(|l| serde_json::from_str(l).ok()).collect(),
    }
}

/// Says which events `host` emits from now on until `done`; whether its guest ever stopped.
pub fn never_paused<T>(host: &Host, during: impl FnOnce() -> T) -> T {
    let mut client = host.client();
    client.subscribe().unwrap();
    let result = during();
    while let Ok(Some(event)) = client.next_event::<vmferry::control::Event>(Some(Duration::from_millis(50)))
    {
        assert_eq!(event.status.run_state, RunState::Running, "{event:?}");
    }
    assert_eq!(host.status().run_state, RunState::Running);
    result
}

pub fn binary(program: &str) -> &'static str {
    match program {
        "vmrun" => env!("CARGO_BIN_EXE_vmrun"),
        "vmsend" => env!("CARGO_BIN_EXE_vmsend"),
        "vmrecv" => env!("CARGO_BIN_EXE_vmrecv"),
        _ => env!("CARGO_BIN_EXE_vmctl"),
    }
}

fn with(prefix: &str, path: &Path) -> String {
    format!("{prefix}{}", path.display())
}

impl Deref for Vmrun {
    type Target = Host;
    fn deref(&self) -> &Host {
        &self.host
    }
}

impl Deref for Receiver {
    type Target = Host;
    fn deref(&self) -> &Host {
        &self.host
    }
}

impl DerefMut for Receiver {
    fn deref_mut(&mut self) -> &mut Host {
        &mut self.host
    }
}
