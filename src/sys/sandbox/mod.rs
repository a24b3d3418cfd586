//! Confinement of the programs: no new privileges, a filter of system calls, no capabilities, and only
//! the files and ports that are needed.
//!
//! Everything here is for the calling thread and the threads that it starts afterwards. A mover enters
//! once, before it has any other thread ([`enter_mover`]). `vmrun` enters likewise, with a filter that has room
//! for making a machine; then each of its threads gives up the rest as soon as it can do without
//! ([`confine_thread`]).

mod caps;
mod filter;
mod names;
mod paths;
mod refused;

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::OnceLock;

pub use caps::Keep;
pub use paths::{Allowed, Reach};
pub use refused::Refusal;

use filter::Filter;
use landlock::RulesetStatus;

/// A mover's confinement.
#[derive(Clone, Debug, Default)]
pub struct Confinement {
    /// Files and ports that it needs from here on.
    pub allowed: Allowed,
    /// Capabilities that it cannot do without.
    pub keep: Vec<Keep>,
}

impl Confinement {
    /// The thread makes, replaces and removes files beside `path`.
    pub fn change_beside(&mut self, path: &Path) {
        self.allowed.change_beside(path);
        self.use_path(path);
    }

    /// Root has to stay able to use the file at `path` where that, or its directory, is another user's.
    pub fn use_path(&mut self, path: &Path) {
        let us = nix::unistd::geteuid().as_raw();
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let foreign = |path: &Path| path.metadata().is_ok_and(|m| m.uid() != us);
        // A directory of root's own, or one like /tmp that everybody may use, needs nothing.
        let closed = |path: &Path| path.metadata().is_ok_and(|m| m.mode() & 0o003 != 0o003);
        let needed = foreign(path) || (foreign(parent) && closed(parent));
        if needed && !self.keep.contains(&Keep::DacOverride) {
            self.keep.push(Keep::DacOverride);
        }
    }
}

/// What a thread of `vmrun` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role<'a> {
    /// Runs a vCPU: it is where a guest that breaks out finds itself.
    Vcpu,
    /// Serves a device, or does one piece of work, with what is open already.
    Worker,
    /// The same, and makes and removes files beside that path.
    Keeper(&'a Path),
    /// Serves the control socket and writes session records, once the guest runs.
    Service,
}

/// What [`confine_thread`] is to leave to [`Role::Service`]; set when `vmrun` has entered.
static VMRUN: OnceLock<Confinement> = OnceLock::new();

/// Confines `vmsend` or `vmrecv`, whose name is `program`, for good. `refused_exit` is its exit code
/// when it tries what it may not.
pub fn enter_mover(program: &'static str, refused_exit: u8, confinement: &Confinement) -> io::Result<()> {
    refused::install(program, Refusal::Exit(refused_exit.into()))?;
    give_up(program, confinement)?;
    apply(Filter::Mover)
}

/// Confines `vmrun` before it has any other thread. `later` is what the service needs when the guest
/// runs.
pub fn enter_vmrun(later: Confinement) -> io::Result<()> {
    refused::install("vmrun", Refusal::Fail)?;
    apply(Filter::Vmrun)?;
    VMRUN.get_or_init(|| later);
    tracing::debug!("sandbox: system calls are filtered");
    Ok(())
}

/// Takes from a thread of `vmrun` what its role does without. Does nothing where `vmrun` has not
/// entered (`--no-sandbox`).
pub fn confine_thread(role: Role) -> io::Result<()> {
    let Some(service) = VMRUN.get() else { return Ok(()) };
    match role {
        Role::Service => give_up("service", service),
        Role::Worker => give_up("worker", &Confinement::default()),
        Role::Keeper(path) => {
            let mut confinement = Confinement::default();
            confinement.change_beside(path);
            give_up("worker", &confinement)
        }
        Role::Vcpu => {
            let mut confinement = Confinement::default();
            // For the backtrace of a panic.
            confinement.allowed.read(BACKTRACE);
            give_up("vcpu", &confinement)?;
            apply(Filter::Vcpu)
        }
    }
}

/// [`confine_thread`] for a thread that works on all the same where that fails, which is told; `beside`
/// is the path of [`Role::Keeper`].
pub fn confine_worker(beside: Option<&Path>) {
    if let Err(error) = confine_thread(beside.map_or(Role::Worker, Role::Keeper)) {
        tracing::warn!("sandbox: a thread cannot be confined further: {error}");
    }
}

/// What a backtrace is made from, beside the program's own file.
pub const BACKTRACE: [&str; 4] = ["/proc/self", "/usr/lib", "/lib", "/lib64"];

fn give_up(who: &str, confinement: &Confinement) -> io::Result<()> {
    // Landlock wants it, and it is right anyway. (Not a condition of seccomp: that sets it as well.)
    nix::sys::prctl::set_no_new_privs()?;
    let landlock = match paths::restrict(&confinement.allowed)? {
        RulesetStatus::FullyEnforced => "landlock",
        RulesetStatus::PartiallyEnforced => "landlock (as far as this kernel has it)",
        RulesetStatus::NotEnforced => "no landlock (this kernel has none)",
    };
    caps::drop_all_but(&confinement.keep)?;
    let kept: Vec<&str> = confinement.keep.iter().map(|k| k.name()).collect();
    let kept = if kept.is_empty() { "none".to_owned() } else { kept.join(", ") };
    tracing::debug!("sandbox of {who}: {landlock}, capabilities: {kept}");
    Ok(())
}

fn apply(filter: Filter) -> io::Result<()> {
    filter
        .compile()?
        .iter()
        .try_for_each(|program| seccompiler::apply_filter(program).map_err(io::Error::other))
}

/// Tries what is forbidden, where the environment variable VMFERRY_FORBIDDEN names `place`: a system call
/// that no filter allows; with `place:truncate` one that movers may not make; with `place:file` or `place:port` a file or a TCP port that landlock does not
/// name; with `place:panic` it panics, for the backtrace. For tests, and nowhere else.
#[cfg(feature = "fault-points")]
pub fn try_forbidden(place: &str) {
    let Ok(wanted) = std::env::var("VMFERRY_FORBIDDEN") else { return };
    let Some(what) = wanted.strip_prefix(place) else { return };
    match what {
        "" => {
            // SAFETY: no such request exists, so that it changes nothing where it is let through.
            let rc = unsafe { libc::syscall(libc::SYS_ptrace, -1, 0, 0, 0) };
            tracing::info!("ptrace gave {rc}: {}", io::Error::last_os_error());
        }
        ":truncate" => {
            // SAFETY: there is no such descriptor, so that it changes nothing where it is let through.
            let rc = unsafe { libc::ftruncate(-1, 0) };
            tracing::warn!("ftruncate gave {rc}: {}", io::Error::last_os_error());
        }
        ":file" => tracing::warn!("the file gave {:?}", std::fs::File::open("/etc/passwd").map(drop)),
        ":port" => {
            // Nobody listens there: ECONNREFUSED where it is let through.
            let port = std::net::TcpStream::connect("127.0.0.1:1").map(drop);
            tracing::warn!("the port gave {port:?}");
        }
        ":panic" => panic!("as it was asked to"),
        _ => {}
    }
}

/// See the one with fault points.
#[cfg(not(feature = "fault-points"))]
pub fn try_forbidden(_: &str) {}
