//! Saved state and machine descriptions, without KVM: a state that is right, changed by the input.

use std::cell::Cell;
use std::ops::Range;

use vmferry::fuzzing::{self, Layout};
use vmferry::memory::{PAGE_BYTES, PageIndex};
use vmferry::state::{
    CLOCK_VERSION, ClockState, CpuidEntry, HexBytes, IRQCHIP_VERSION, IrqchipState, MachineDescription,
    MsrValue, PIT_VERSION, PitState, SERIAL_VERSION, Section, SectionKind, SerialState, SpecialRegisters,
    VCPU_VERSION, VcpuState, VirtioQueueState, VirtioState, VirtioTransportState, read_sections,
    write_sections,
};
use vmferry::vmm::virtio::Kind;

use super::input::{Reader, Writer};
use super::messages::machine;

const LAYOUT: Layout = Layout { msrs: &[0x10, 0x12, 0x277], xsave_bytes: 64, sregs2: true, tsc_offset: true };
const VIRTIO: [Kind; 4] = [Kind::Block, Kind::Net, Kind::Rng, Kind::Vsock];

pub fn run(data: &[u8]) {
    let mut input = Reader(data);
    match input.u8() % 4 {
        0 => description(input.rest()),
        1 => sections(input.rest()),
        2 => vcpu(&mut input),
        _ => {
            let changed = edited(whole(), &mut input);
            let raw = write_sections(&changed);
            match fuzzing::check_state(&raw, 1, &LAYOUT, &VIRTIO) {
                Ok(()) => assert_eq!(changed.len(), whole().len()),
                Err(error) => drop(error.to_string()),
            }
        }
    }
}

/// What a receiver does with a description before it makes a machine.
fn description(json: &[u8]) {
    let Ok(machine) = serde_json::from_slice::<MachineDescription>(json) else { return };
    for problem in fuzzing::problems(&machine) {
        assert!(!problem.text.is_empty());
    }
    let map = &machine.ram;
    let pages = map.total_pages();
    for page in [0, 1, pages / 2, pages - 1].map(PageIndex) {
        let at = map.address_of(page).expect("the page is in the map");
        assert_eq!(map.page_of(at), Some(page));
    }
    assert_eq!(map.total_bytes(), pages * PAGE_BYTES);
    assert_eq!(map.address_of(PageIndex(pages)), None);
}

/// Bytes as they come, and with their beginning and their checksums put right.
fn sections(bytes: &[u8]) {
    let mut raw = [b"VMSTATE1", bytes].concat();
    let _ = read_sections(&raw);
    let mut at = 8;
    while let Some(header) = raw.get(at..at + 24) {
        let field = |n: usize| u32::from_le_bytes([header[n], header[n + 1], header[n + 2], header[n + 3]]);
        let (kind, length) = (field(0), field(16) as usize);
        let Some(body) = raw.get(at + 24..(at + 24).saturating_add(length)) else { break };
        let crc = fuzzing::crc32c(body);
        if kind != 0 {
            raw[at + 20..at + 24].copy_from_slice(&crc.to_le_bytes());
        }
        at += 24 + length;
    }
    match read_sections(&raw) {
        Ok(sections) => assert_eq!(write_sections(&sections), raw),
        Err(error) => drop(error.to_string()),
    }
}

/// A vCPU by its JSON, and the pages that its registers lead to in a memory full of the input.
fn vcpu(input: &mut Reader<'_>) {
    let memory = input.chunk();
    let Ok(state) = serde_json::from_slice::<VcpuState>(input.rest()) else { return };
    let read = |at: u64| {
        let at = usize::try_from(at % (memory.len() as u64).max(1)).ok()?;
        let bytes = memory.get(at..at + 8)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    };
    // Eight registers, and for each of them no more than the levels of its page table and its page.
    assert!(fuzzing::touched(&state, read).len() <= 14 + 8 * 6);
    // Tables without end are tested elsewhere; here they end, so that more is tried.
    let reads = Cell::new(0);
    let read = |at: u64| {
        reads.set(reads.get() + 1);
        (reads.get() < 1 << 14).then(|| read(at)).flatten()
    };
    let is_whole =
        |stretch: &Range<u64>| [stretch.start, stretch.end].iter().all(|at| at.is_multiple_of(PAGE_BYTES));
    assert!(fuzzing::kernel_image(&state, read).iter().all(is_whole));
}

/// Changes to sections: bodies are overwritten, cut and lengthened, headers changed, sections doubled
/// and left out.
pub fn edited(mut sections: Vec<Section>, input: &mut Reader<'_>) -> Vec<Section> {
    for _ in 0..16 {
        if input.is_empty() || sections.is_empty() {
            break;
        }
        let which = usize::from(input.u8()) % sections.len();
        let (how, at, bytes) = (input.u8(), usize::from(input.u16()), input.u8() % 64);
        let bytes = input.bytes(bytes.into());
        let section = &mut sections[which];
        let at = at.min(section.body.len());
        match how % 8 {
            0..=2 => {
                let end = (at + bytes.len()).min(section.body.len());
                section.body[at..end].copy_from_slice(&bytes[..end - at]);
            }
            3 => drop(section.body.splice(at..at, bytes.iter().copied())),
            4 => {
                let end = (at + usize::from(how / 8) * 4).min(section.body.len());
                section.body.drain(at..end);
            }
            5 => section.version = u32::from(how / 8),
            6 => section.instance = u32::from(how / 8),
            _ => {
                let section = sections.remove(which);
                (0..how / 8 % 3).for_each(|_| sections.push(section.clone()));
            }
        }
    }
    sections
}

/// A state that passes every check.
fn whole() -> Vec<Section> {
    let section = |kind, instance, version, body: serde_json::Result<Vec<u8>>| Section {
        kind,
        instance,
        version,
        body: body.expect("it can be written"),
    };
    // `struct kvm_irqchip` begins with its number.
    let chip = |number: u8| HexBytes([&[number], &[0; 519][..]].concat());
    let irqchip = IrqchipState { pic_master: chip(0), pic_slave: chip(1), ioapic: chip(2) };
    let pit = PitState { pit2: HexBytes(vec![0; 112]) };
    let clock = ClockState { kvmclock_ns: 7, realtime_ns: Some(1 << 60), host_tsc: Some(9) };
    let serial = SerialState {
        baud_divisor_low: 12,
        baud_divisor_high: 0,
        interrupt_enable: 1,
        interrupt_identification: 1,
        line_control: 3,
        line_status: 0x60,
        modem_control: 8,
        modem_status: 0xb0,
        scratch: 0,
        in_buffer: b"ls".to_vec(),
    };
    let mut sections = vec![
        section(SectionKind::Vcpu, 0, VCPU_VERSION, serde_json::to_vec(&a_vcpu())),
        section(SectionKind::Irqchip, 0, IRQCHIP_VERSION, serde_json::to_vec(&irqchip)),
        section(SectionKind::Pit, 0, PIT_VERSION, serde_json::to_vec(&pit)),
        section(SectionKind::Clock, 0, CLOCK_VERSION, serde_json::to_vec(&clock)),
        section(SectionKind::Serial, 0, SERIAL_VERSION, serde_json::to_vec(&serial)),
    ];
    for (slot, kind) in (0..).zip(VIRTIO) {
        let device = match kind {
            Kind::Net => serde_json::json!({"seen_v4": ["10.0.0.9"], "seen_v6": [], "announce": false}),
            Kind::Vsock => serde_json::json!({"socket": {"device": 1, "inode": 2, "made_ns": 3}}),
            _ => serde_json::json!({}),
        };
        let body = serde_json::to_vec(&VirtioState { transport: a_transport(), device });
        sections.push(section(kind.section(), slot, kind.version(), body));
    }
    sections
}

/// Registers of a device with one queue that is in use.
pub fn a_transport() -> VirtioTransportState {
    let (descriptors, available, used) = (0x1000, 0x2000, 0x3000);
    let (next_available, next_used) = (3, 3);
    VirtioTransportState {
        device_features_select: 0,
        driver_features_select: 1,
        driver_features: 1 << 32,
        queue_select: 0,
        status: 15,
        interrupt_status: 1,
        config_generation: 0,
        queues: vec![VirtioQueueState {
            size: 8,
            ready: true,
            descriptors,
            available,
            used,
            next_available,
            next_used,
        }],
    }
}

fn a_vcpu() -> VcpuState {
    let msrs = LAYOUT.msrs.iter().map(|index| MsrValue { index: *index, value: 0x5001 });
    VcpuState {
        cpuid: vec![CpuidEntry { function: 1, index: 0, flags: 0, eax: 6, ebx: 5, ecx: 1, edx: 9 }],
        tsc_khz: 2_400_000,
        tsc_offset: Some(1),
        regs: HexBytes(vec![1; 144]),
        sregs: SpecialRegisters::Sregs2(HexBytes(vec![0x80; 320])),
        xcrs: HexBytes(vec![0; 392]),
        xsave: HexBytes(vec![0; LAYOUT.xsave_bytes as usize]),
        debugregs: HexBytes(vec![0; 128]),
        lapic: HexBytes(vec![0; 1024]),
        msrs: msrs.collect(),
        events: HexBytes(vec![0; 64]),
        mp_state: 0,
    }
}

pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let json = |value: serde_json::Result<Vec<u8>>| value.expect("it can be written");
    let description = json(serde_json::to_vec(&machine(1 << 20)));
    let few: Vec<Section> = whole().into_iter().skip(2).take(3).collect();
    let raw = write_sections(&few);
    let memory: Vec<u8> = (0..64u64).flat_map(|n| (n << 12 | 1).to_le_bytes()).collect();
    let vcpu = Writer::default().u8(2).chunk(&memory).raw(&json(serde_json::to_vec(&a_vcpu())));
    let edit = |section, how, at, bytes: &[u8]| {
        Writer::default().u8(3).u8(section).u8(how).u16(at).u8(bytes.len() as u8).raw(bytes).0
    };
    vec![
        ("description".into(), Writer::default().u8(0).raw(&description).0),
        ("sections".into(), Writer::default().u8(1).raw(&raw[8..]).0),
        ("vcpu".into(), vcpu.0),
        ("whole".into(), vec![3]),
        ("edit".into(), edit(4, 0, 20, b"255")),
        ("insert".into(), edit(5, 3, 60, b"0")),
        ("cut".into(), edit(0, 12, 60, b"")),
        ("version".into(), edit(1, 21, 0, b"")),
        ("left-out".into(), edit(2, 7, 0, b"")),
    ]
}
