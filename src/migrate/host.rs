//! The `vmrun --incoming` that a receiver fills: started or attached to, and driven over its
//! control socket.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::control::{Client, ClientError, DEFAULT_TIMEOUT, Imported, Remap};
use crate::memory::RamPages;
use crate::state::MachineDescription;
use crate::switchover::{Attempt, Ownership};
use crate::sys::memfd;
use crate::sys::spawn::{Io, Program, Running};

use super::outcome::{Ending, MigrateError, Side};
use super::ram::Ram;

/// How long a `vmrun` that lives may take until its control socket answers: it probes KVM first,
/// which waits like making a machine does.
const START_TIMEOUT: Duration = Duration::from_secs(120);

/// How long making a machine may take. On a host whose CPUs are all busy with guests, KVM waits for
/// each of them several times while it makes a VM: over a minute has been seen.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(120);

/// Which `vmrun` takes the guest.
#[derive(Clone, Debug)]
pub struct HostOptions {
    /// Its control socket.
    pub control: PathBuf,
    /// Use the one that listens there already instead of starting one.
    pub attach: bool,
    /// The program to start.
    pub vmrun: PathBuf,
    /// Whether it confines itself; else it is told `--no-sandbox`.
    pub sandbox: bool,
    /// Its `--serial`.
    pub serial: String,
    /// What RAM is made of there; as at the source when `None`.
    pub ram_pages: Option<RamPages>,
    /// Host ends of devices, by id.
    pub remap: Vec<Remap>,
}

/// A connection to that `vmrun`, and the process when it was started here.
#[derive(Debug)]
pub struct Host {
    options: HostOptions,
    /// The control connection.
    pub client: Client,
    child: Option<Running>,
}

impl Host {
    /// Starts `vmrun --incoming`, or attaches to one.
    pub fn open(options: &HostOptions) -> Result<Self, MigrateError> {
        let start = |program: Program| {
            program.start().map_err(|e| failed(format!("cannot start {}: {e}", options.vmrun.display())))
        };
        let mut child = options.program().map(start).transpose()?;
        let client = match &mut child {
            None => Client::connect(&options.control, "vmrecv").map_err(failed)?,
            Some(child) => match await_socket(&options.control, child) {
                Ok(client) => client,
                Err(error) => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(error);
                }
            },
        };
        Ok(Self { options: options.clone(), client, child })
    }

    /// Makes the machine, empty, and gives its RAM. `postcopy`: pages may come after the guest.
    pub fn prepare(
        &mut self,
        attempt: Attempt,
        machine: &MachineDescription,
        postcopy: bool,
    ) -> Result<Ram, ClientError> {
        self.client.set_timeout(PREPARE_TIMEOUT);
        let prepared = self.client.prepare(attempt, machine, self.options.remap.clone(), postcopy);
        self.client.set_timeout(DEFAULT_TIMEOUT);
        let (prepared, memfds) = prepared?;
        let path = || self.client.path().to_owned();
        Ram::writable(&prepared.ram, memfds, postcopy)
            .map_err(|source| ClientError::Io { path: path(), source })
    }

    /// The control socket.
    pub fn path(&self) -> &Path {
        &self.options.control
    }

    /// A second connection, for the import, which may take long.
    pub fn second(&self) -> Result<Client, ClientError> {
        Client::connect(&self.options.control, "vmrecv")
    }

    /// Ends an empty `vmrun` that was started here; one that was attached to is left as it is.
    pub fn close(mut self) {
        if let Some(mut child) = self.child.take() {
            if self.client.quit(false).is_err() {
                let _ = child.kill();
            }
            let _ = child.wait();
        }
    }

    /// Whether it can take a guest, or what it holds instead.
    pub fn check_empty(&mut self) -> Result<(), MigrateError> {
        let status = self.client.status().map_err(failed)?;
        match status.ownership {
            Ownership::Empty { .. } => Ok(()),
            _ => Err(MigrateError::new(
                Ending::Failed,
                Side::Destination,
                format!("the vmrun at {} {}", self.options.control.display(), status.ownership),
            )),
        }
    }
}

/// Restores devices and synchronises the vCPUs from `state`, on a connection of its own.
pub fn import(mut client: Client, attempt: Attempt, state: &[u8]) -> Result<Imported, ClientError> {
    let io = |source| ClientError::Io { path: client.path().to_owned(), source };
    let memfd = memfd::sealed_with(c"vm-state", state).map_err(io)?;
    client.import(attempt, &memfd, state.len() as u64)
}

impl HostOptions {
    /// The `vmrun` that is started; `None` when one is attached to. It outlives us, also when a
    /// terminal's Ctrl-C reaches our process group.
    pub fn program(&self) -> Option<Program> {
        let (control, serial) = (self.control.clone().into(), self.serial.clone().into());
        let mut argv = vec![
            self.vmrun.clone().into(),
            "--incoming".into(),
            "--control".into(),
            control,
            "--serial".into(),
            serial,
        ];
        if let Some(pages) = self.ram_pages {
            argv.extend(["--hugepages".into(), pages.to_string().into()]);
        }
        if !self.sandbox {
            argv.push("--no-sandbox".into());
        }
        // Our standard output may be the stream.
        let io = if self.serial == "stdio" { Io::ApartWithOutput } else { Io::Apart };
        (!self.attach).then_some(Program { argv, io })
    }
}

/// Connects as soon as the new `vmrun` listens. A pause of 2 ms between tries: there is no event
/// to wait for before the socket exists.
fn await_socket(control: &Path, child: &mut Running) -> Result<Client, MigrateError> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().map_err(failed)? {
            return Err(failed(format!("vmrun ended at once ({status})")));
        }
        match Client::connect(control, "vmrecv") {
            Ok(client) if client.server().pid == child.pid() => return Ok(client),
            Ok(_) => {
                return Err(failed(format!(
                    "{} belongs to another vmrun (--attach uses it)",
                    control.display()
                )));
            }
            Err(e) if start.elapsed() > START_TIMEOUT => return Err(failed(e)),
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

fn failed(error: impl std::fmt::Display) -> MigrateError {
    MigrateError::new(Ending::Failed, Side::Destination, error)
}
