//! Saved state into a real machine, where this host has KVM: what a real export gave, changed by the
//! input. What KVM takes is run for a moment, and saved again.

use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use vmferry::memory::RamPages;
use vmferry::state::{MachineDescription, Section, read_sections, write_sections};
use vmferry::vmm::virtio::HostEnd;
use vmferry::vmm::{
    DeviceConfig, KernelSource, LocalConfig, Machine, MachineConfig, Notice, NoticeReceiver, NoticeSender,
    SerialBackend, open_kvm,
};

use super::input::{Reader, Writer};
use super::state::edited;

/// Far more than it takes on a machine that has other things to do.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a guest runs.
const MOMENT: Duration = Duration::from_millis(2);

/// A machine that is empty and can be filled, again as long as that fails.
static EMPTY: Mutex<Option<(Machine, NoticeReceiver)>> = Mutex::new(None);

pub fn run(data: &[u8]) {
    let Some((description, sections)) = exported() else { return };
    let mut input = Reader(data);
    let runs = input.u8() & 1 == 1;
    let mut empty = EMPTY.lock().unwrap_or_else(|e| e.into_inner());
    let (machine, notices) = match empty.take() {
        Some(there) => there,
        None => {
            let (sender, notices) = NoticeSender::channel().expect("a channel can be made");
            let made = Machine::prepare(description, LocalConfig::default(), sender);
            (made.expect("the machine can be made"), notices)
        }
    };
    machine.request_import(write_sections(&edited(sections.clone(), &mut input)));
    match next(&notices) {
        Notice::Synchronised(Ok(_)) => {
            assert!(machine.is_paused());
            if !runs || live(&machine, &notices) {
                machine.request_export();
                assert!(matches!(next(&notices), Notice::Exported(_)));
            }
        }
        Notice::Synchronised(Err(error)) => {
            let _ = error.to_string();
            *empty = Some((machine, notices));
        }
        other => panic!("an import was answered with {other:?}"),
    }
}

fn next(notices: &NoticeReceiver) -> Notice {
    notices.receiver.recv_timeout(PATIENCE).expect("the machine answers")
}

/// Lets the guest run, with registers that no guest has had; whether it is still there afterwards.
fn live(machine: &Machine, notices: &NoticeReceiver) -> bool {
    machine.run().expect("a guest that was loaded can run");
    if let Ok(Notice::Exit(exit)) = notices.receiver.recv_timeout(MOMENT) {
        let _ = format!("{exit:?}");
        return false;
    }
    machine.request_pause();
    matches!(next(notices), Notice::Paused)
}

/// A machine and its saved state; `None` where there is no KVM.
fn exported() -> Option<&'static (MachineDescription, Vec<Section>)> {
    static ONCE: OnceLock<Option<(MachineDescription, Vec<Section>)>> = OnceLock::new();
    ONCE.get_or_init(|| open_kvm().ok().map(|_| export())).as_ref()
}

fn export() -> (MachineDescription, Vec<Section>) {
    let config = MachineConfig {
        name: "fuzz".into(),
        uuid: "9f49ad95-6e38-431e-a18e-f7f3f3c7fc31".into(),
        memory_bytes: 16 << 20,
        ram_pages: RamPages::Small,
        vcpus: 1,
        kernel: KernelSource::Builtin("heartbeat".into()),
        initrd: None,
        cmdline: "fill=1M ws=1M".into(),
        serial: SerialBackend::None,
        devices: vec![DeviceConfig { id: "rng0".into(), host: HostEnd::Rng }],
    };
    let (sender, notices) = NoticeSender::channel().expect("a channel can be made");
    let machine = Machine::boot(&config, sender).expect("the machine boots");
    machine.request_export();
    match notices.receiver.recv_timeout(PATIENCE) {
        Ok(Notice::Exported(Ok(saved))) => {
            let sections = read_sections(&saved.state).expect("what was saved can be read");
            (machine.describe().clone(), sections)
        }
        other => panic!("the export gave {other:?}"),
    }
}

pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let edit = |section: u8, how: u8, at: u16, bytes: &[u8]| {
        Writer::default().u8(section & 1).u8(section).u8(how).u16(at).u8(bytes.len() as u8).raw(bytes).0
    };
    let mut seeds = vec![("whole".into(), Vec::new()), ("run".into(), vec![1])];
    for section in 0..6 {
        for at in [20, 200, 5000] {
            seeds.push((format!("edit-{section}-{at}"), edit(section, 0, at, b"ffff")));
        }
        seeds.push((format!("insert-{section}"), edit(section, 3, 30, b"9")));
        seeds.push((format!("left-out-{section}"), edit(section, 7, 0, b"")));
    }
    seeds
}
