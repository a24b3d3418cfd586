//! What each program needs to reach once it is confined (docs/sandbox.md).

use std::io;
use std::net::IpAddr;
use std::path::Path;

use clap::Args;

use super::exit::Exit;
use crate::sys::sandbox::{self, BACKTRACE, Confinement, Keep, Reach};
use crate::sys::spawn::{self, Program};
use crate::transport::{self, Address};

/// The flag that all confined programs have.
#[derive(Clone, Copy, Debug, Args)]
pub struct SandboxArgs {
    /// Do not confine this program, for debugging
    ///
    /// Otherwise it gives up all system calls, files, ports and capabilities that it does not need:
    /// docs/sandbox.md lists what is left.
    #[arg(long, help_heading = "Debugging")]
    pub no_sandbox: bool,
}

/// What the C library reads to resolve names.
const RESOLVER: [&str; 6] =
    ["/etc", "/run/systemd/resolve", "/run/resolvconf", "/run/NetworkManager", "/run/nscd", "/var/lib/misc"];
/// The first port that anybody may listen on.
const FIRST_FREE_PORT: u16 = 1024;
/// Name servers answer on this one.
const DNS_PORT: u16 = 53;

/// Confines `vmsend`, which goes to `dest`, speaks to the `vmrun` at `vm` and may have a socket of its
/// own. Before it has any thread.
pub fn sender(vm: &Path, dest: &Address, control: Option<&Path>) -> io::Result<()> {
    let mut confinement = mover([vm])?;
    if let Address::Unix(path) = dest {
        confinement.use_path(path);
    }
    if let Address::Tcp { host, port } = dest {
        confinement.allowed.connect.push(*port);
        if host.parse::<IpAddr>().is_err() {
            confinement.allowed.read(RESOLVER);
            confinement.allowed.connect.push(DNS_PORT);
        }
    }
    if let Some(path) = control {
        confinement.change_beside(path);
    }
    enter("vmsend", transport::program(dest).into_iter().collect(), &confinement)
}

/// Confines `vmrecv`, which listens at `listen` and drives the `vmrun` at
/// `control`, which may have to be started. Before it has any thread.
pub fn receiver(control: &Path, listen: &Address, vmrun: Option<Program>) -> io::Result<()> {
    let mut confinement = mover([control])?;
    match listen {
        Address::Unix(path) => {
            confinement.change_beside(path);
        }
        Address::Tcp { host, port } => {
            confinement.allowed.listen.push(*port);
            if (1..FIRST_FREE_PORT).contains(port) {
                confinement.keep.push(Keep::NetBindService);
            }
            if host.parse::<IpAddr>().is_err() {
                confinement.allowed.read(RESOLVER);
                confinement.allowed.connect.push(DNS_PORT);
            }
        }
        Address::Exec(_) | Address::Stdio => {}
    }
    let programs = transport::program(listen).into_iter().chain(vmrun).collect();
    enter("vmrecv", programs, &confinement)
}

/// Confines `vmrun`. Before it has any thread.
pub fn host(control: Option<&Path>) -> io::Result<()> {
    let mut later = Confinement::default();
    later.allowed.read(BACKTRACE.into_iter().chain(["/proc/meminfo"]));
    if let Some(path) = control {
        // The session record beside it, and its own file at the end.
        later.change_beside(path);
    }
    sandbox::enter_vmrun(later)
}

/// What both movers need, with the sockets that they connect to.
fn mover<'a>(sockets: impl IntoIterator<Item = &'a Path>) -> io::Result<Confinement> {
    let mut confinement = Confinement::default();
    confinement.allowed.read(BACKTRACE.into_iter().chain(["/proc/sys/kernel/hostname", "/dev/urandom"]));
    confinement.allowed.paths.push((std::env::current_exe()?, Reach::Read));
    sockets.into_iter().for_each(|path| confinement.use_path(path));
    Ok(confinement)
}

fn enter(name: &'static str, programs: Vec<Program>, confinement: &Confinement) -> io::Result<()> {
    if !programs.is_empty() {
        spawn::fork_spawner(programs)?;
    }
    sandbox::enter_mover(name, Exit::Confined.code(), confinement)
}
