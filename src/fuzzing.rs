//! Entrances for the fuzzer (`fuzz/`, docs/reliability.md) where the library has none that is public.
//! There are only as many as it takes; nothing else calls them. In the library's own tests they
//! serve to try every input that was kept once more.

use std::ops::{ControlFlow, Range};
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use crate::control::{Client, Connection, ControlRequest};
use crate::migrate::dest::{Arrival, Event, Surroundings};
use crate::migrate::host::Host;
use crate::migrate::intake::Caller;
use crate::migrate::options::{Arrived, ReceiveOptions};
use crate::migrate::outcome::MigrateError;
use crate::migrate::report::Silent;
use crate::state::{MachineDescription, Problem, VcpuState};
use crate::vmm::pool::HugePool;
use crate::vmm::virtio::Kind;
use crate::vmm::x86::paging::{self, Sregs};
use crate::vmm::x86::save::VcpuLayout;
use crate::vmm::x86::touched::Roots;
use crate::vmm::{HostAbilities, VmmError, preflight, saved};

pub use crate::vmm::virtio::driven::{DrivenDevice, GuestMemory, Wire};

/// The longest that a receiver may go on with a source that has hung up.
const PATIENCE: Duration = Duration::from_secs(8);

/// The checksum of frames and sections, which the fuzzer puts right.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
}

/// What a machine's vCPUs have.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)] // as in `VcpuLayout`
pub struct Layout {
    pub msrs: &'static [u32],
    pub xsave_bytes: u32,
    pub sregs2: bool,
    pub tsc_offset: bool,
}

/// Checks a saved state as an import does before it touches KVM.
pub fn check_state(state: &[u8], vcpus: u32, layout: &Layout, virtio: &[Kind]) -> Result<(), VmmError> {
    let layout = VcpuLayout {
        msrs: layout.msrs.to_vec(),
        xsave_bytes: layout.xsave_bytes,
        sregs2: layout.sregs2,
        tsc_offset: layout.tsc_offset,
    };
    saved::check(state, vcpus, &layout, virtio).map(drop)
}

/// What a host of some kind has against a machine.
pub fn problems(machine: &MachineDescription) -> Vec<Problem> {
    let host = HostAbilities {
        cpuid: Vec::new(),
        msrs: vec![0x10, 0x277],
        capabilities: vec!["KVM_CAP_SREGS2".into()],
        tsc_control: false,
        tsc_khz: 2_000_000,
        xsave_bytes: 4096,
        max_vcpus: 4,
        memory_available_bytes: 1 << 30,
        huge_pages: HugePool { free: 4, total: 8 },
    };
    let mut problems = preflight::problems(machine, &host);
    problems.extend(preflight::unknown_remaps(machine, [&"disk7".to_owned()]));
    problems
}

/// The addresses that a vCPU touches first, by a memory that gives 8 bytes.
pub fn touched(vcpu: &VcpuState, read: impl Fn(u64) -> Option<u64>) -> Vec<u64> {
    let roots = Roots::of(vcpu);
    [roots.shared(), &roots.first(read)].concat()
}

/// The stretches of guest-physical addresses that are a vCPU's kernel, by a memory that gives 8 bytes.
pub fn kernel_image(vcpu: &VcpuState, read: impl Fn(u64) -> Option<u64>) -> Vec<Range<u64>> {
    let translation = Sregs::of(&vcpu.sregs).paging();
    let mut all = Vec::new();
    paging::kernel_image(translation.as_slice(), read, |stretch| {
        all.push(stretch);
        ControlFlow::Continue(())
    });
    all
}

/// Serves a client that has said all that it says and has hung up; `listen` is called for it to take
/// answers. Gives how many requests were understood, and the most bytes of answers that waited.
pub fn serve_lines<R: ControlRequest>(socket: UnixStream, listen: &mut dyn FnMut()) -> (usize, usize) {
    let mut connection = Connection::new(socket);
    let (mut understood, mut waiting) = (0, 0);
    while !connection.ended() {
        understood += connection.read::<R>().len();
        waiting = waiting.max(connection.waiting_bytes());
        connection.flush();
        listen();
    }
    (understood, waiting)
}

/// A client of a server that is at the other end of `socket`.
pub fn client_of(socket: UnixStream) -> Client {
    Client::of_stream(socket)
}

/// Where more channels of a connection come in.
#[derive(Clone, Debug)]
pub struct Door(Sender<Event>);

impl Door {
    /// A caller who has said who they are.
    pub fn call(&self, caller: Caller) {
        let _ = self.0.send(Event::Caller(caller));
    }
}

/// A receiver without a listener: `rounds` are the main channels of one connection after the other.
/// `begin` is called when one is in. It ends when the last has hung up, if not before.
pub fn receive(
    options: &ReceiveOptions,
    rounds: Vec<Caller>,
    mut begin: impl FnMut(Door),
) -> Result<Option<Arrived>, MigrateError> {
    let mut host = Host::open(&options.host)?;
    let (events, inbox) = channel();
    let (signal, address, mut observer) = (AtomicUsize::new(0), options.listen.clone(), Silent);
    let around = Surroundings { options, signal: &signal, events: &events, inbox: &inbox, address: &address };
    let mut arrival = Arrival::new(around, &mut host, &mut observer);
    for caller in rounds {
        arrival.on_event(Event::Caller(caller))?;
        begin(Door(events.clone()));
        let began = Instant::now();
        while arrival.is_connected() {
            assert!(began.elapsed() < PATIENCE, "the receiver does not see that its source has gone");
            let came = match inbox.recv_timeout(Duration::from_millis(100)) {
                Ok(event) => arrival.on_event(event)?,
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => unreachable!("`events` is here"),
            };
            let arrived = if came.is_some() { came } else { arrival.look_after()? };
            if arrived.is_some() {
                return Ok(arrived);
            }
        }
    }
    arrival.abandon();
    Ok(None)
}

#[cfg(test)]
#[path = "../fuzz/src/lib.rs"]
mod targets;

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    use super::targets::{TARGETS, target};

    fn inputs(folder: &str, target: &str) -> Vec<PathBuf> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(folder).join(target);
        let entries = fs::read_dir(folder).into_iter().flatten();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    #[test]
    fn targets_are_known_by_their_names() {
        for (n, one) in TARGETS.iter().enumerate() {
            let found = TARGETS.iter().position(|t| Some(t.name) == target(one.name).map(|t| t.name));
            assert_eq!(found, Some(n), "{} is there twice", one.name);
        }
        assert!(target("nothing").is_none());
    }

    #[test]
    fn every_input_that_was_kept_does_no_harm() {
        for target in TARGETS {
            assert!((1..=64).contains(&target.limit_mib), "{} has no bound", target.name);
            let kept = inputs("corpus", target.name);
            assert!(!kept.is_empty(), "{} has no corpus", target.name);
            for path in kept.into_iter().chain(inputs("regressions", target.name)) {
                println!("{}", path.display());
                (target.run)(&fs::read(path).unwrap());
            }
            for (name, bytes) in (target.seeds)() {
                println!("{} {name}", target.name);
                (target.run)(&bytes);
            }
        }
    }
}
