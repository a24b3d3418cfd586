//! One message of each kind, as a source or a destination says it.

use std::collections::BTreeMap;

use vmferry::memory::{GuestPhysAddr, RamMap, RamPages, RamRegion};
use vmferry::state::{CpuidEntry, DeviceDescription, MachineDescription, TscFrequency};
use vmferry::switchover::{Attempt, SessionId};
use vmferry::wire::{self, JsonBody, Message, PageBitmap};

/// A machine of one vCPU with a disk, a card and a serial port.
pub fn machine(ram_bytes: u64) -> MachineDescription {
    let device = |id: &str, kind: &str, host: Option<&str>| DeviceDescription {
        id: id.into(),
        kind: kind.into(),
        version: 1,
        host: host.map(str::to_owned),
        properties: BTreeMap::from([("bytes".to_owned(), "1048576".to_owned())]),
    };
    MachineDescription {
        name: "guest".into(),
        uuid: "9f49ad95-6e38-431e-a18e-f7f3f3c7fc31".into(),
        vcpus: 1,
        ram: RamMap::new(vec![RamRegion { start: GuestPhysAddr(0), bytes: ram_bytes }]).expect("a map"),
        ram_pages: RamPages::Small,
        cpuid: vec![CpuidEntry { function: 1, index: 0, flags: 0, eax: 6, ebx: 5, ecx: 1 << 28, edx: 9 }],
        msrs: vec![0x10, 0x277],
        capabilities: vec!["KVM_CAP_SREGS2".into()],
        tsc: TscFrequency { khz: 2_400_000 },
        xsave_bytes: 4096,
        devices: vec![
            device("serial0", "serial", Some("none")),
            device("disk0", "virtio-block", Some("/images/guest,direct")),
            device("net0", "virtio-net", Some("new:tap0")),
        ],
    }
}

/// HELLO with so many bulk channels.
pub fn hello(channels: u32, postcopy: bool) -> wire::Hello {
    wire::Hello {
        version_min: wire::VERSION,
        version_max: wire::VERSION,
        release: "0.1.0".into(),
        host: "hosta".into(),
        vm_uuid: "9f49ad95-6e38-431e-a18e-f7f3f3c7fc31".into(),
        vm_name: "guest".into(),
        resume: false,
        superseded: None,
        channels,
        features: if postcopy { vec![wire::POSTCOPY.to_owned()] } else { Vec::new() },
        verify: false,
        peer_timeout_ms: 5000,
    }
}

/// One of each.
pub fn samples() -> Vec<Message> {
    let old = Attempt { session: SessionId([7; 16]), epoch: 3 };
    let problem = wire::Problem { topic: "ram".into(), text: "too much of it".into() };
    vec![
        Message::Hello(wire::Hello { superseded: Some(old), ..hello(2, true) }),
        Message::HelloAck(wire::HelloAck {
            version: 1,
            features: vec![wire::POSTCOPY.to_owned()],
            resume_phase: Some(wire::ResumePhase::InDoubt),
            release: "0.1.0".into(),
            host: "hostb".into(),
            peer_timeout_ms: 5000,
            fetching: true,
        }),
        Message::Refused(wire::Refused {
            code: wire::RefusedCode::Unsuitable,
            message: "the destination cannot take the machine".into(),
            problems: vec![problem],
        }),
        Message::Machine(JsonBody::of(&machine(1 << 20)).expect("it can be written")),
        Message::Accepted,
        Message::Join { index: 1 },
        Message::Joined { index: 1 },
        Message::Barrier { pass: 1 },
        Message::PassDone(wire::PassDone { pass: 1, pages_placed: 256, bytes: 4096, elapsed_us: 10 }),
        Message::State(b"VMSTATE1".to_vec()),
        Message::End(wire::End {
            passes: 1,
            pages: 1,
            zero_pages: 255,
            digest: Some("00".into()),
            stays_paused: true,
            postcopy: true,
            ahead: vec![2, 1 << 40],
        }),
        Message::Missing(PageBitmap { first: 0, words: vec![5, 0, u64::MAX] }),
        Message::PageRequest(vec![1, 200]),
        Message::Received(PageBitmap { first: 64, words: vec![1] }),
        Message::Ready(wire::Ready { import_us: 900, sync_us: 400, digest: None }),
        Message::Run,
        Message::Running(wire::Running { run_us: 300 }),
        Message::Revoke,
        Message::Revoked,
        Message::Abort(wire::Abort { side: wire::Side::Source, reason: "an operator's word".into() }),
        Message::Done(wire::Done {
            pages: 1,
            zero_pages: 255,
            digest: None,
            latency: Some(serde_json::json!({"p50_us": 1.5, "faults": [1, 2]})),
        }),
        Message::Released,
        Message::Ping { nonce: 7 },
        Message::Pong { nonce: 7 },
    ]
}
