//! Whether a host can take a machine: a pure comparison, run before anything is sent.

use super::host::HostAbilities;
use super::virtio::{Kind, MAX_DEVICES};
use super::x86::{cpuid, features, msrs};
use crate::memory::{Granule, RamPages};
use crate::state::{
    CLOCK_VERSION, IRQCHIP_VERSION, MachineDescription, PIT_VERSION, Problem, SERIAL_VERSION,
};
use crate::sys::uffd::FaultFd;

/// How far apart two TSCs may be without scaling, in parts per million: what Linux's NTP can still
/// correct is 500, and QEMU draws the line here too.
const TSC_TOLERANCE_PPM: u64 = 250;
/// Kinds of devices that can be restored here, with the newest version of their saved state.
const DEVICE_KINDS: [(&str, u32); 4] = [
    ("irqchip", IRQCHIP_VERSION),
    ("pit", PIT_VERSION),
    ("clock", CLOCK_VERSION),
    ("serial", SERIAL_VERSION),
];
/// The longest CPUID table or MSR list that is looked at: a peer may send anything.
const MAX_LIST: usize = 4096;

/// Every reason why `host` cannot take the machine, each by name; none if it can.
pub fn problems(desc: &MachineDescription, host: &HostAbilities) -> Vec<Problem> {
    let mut out = Vec::new();
    let mut say = |topic: &str, text: String| out.push(Problem { topic: topic.into(), text });

    let bytes = desc.ram.total_bytes();
    if desc.ram_pages == RamPages::Huge {
        if !Granule::HUGE.fits(&desc.ram) {
            say("hugepages", "the machine's RAM regions are no multiples of 2 MiB".into());
        }
        host.huge_pages.problem(bytes).into_iter().for_each(|text| say("hugepages", text));
    } else if bytes > host.memory_available_bytes {
        let have = host.memory_available_bytes >> 20;
        let text =
            format!("the machine has {} MiB of RAM, the receiver has {have} MiB available", bytes >> 20);
        say("ram", text);
    }
    if desc.vcpus == 0 || desc.vcpus > host.max_vcpus {
        let text = format!(
            "the machine has {} vCPUs, the receiver's KVM can do 1 to {}",
            desc.vcpus, host.max_vcpus
        );
        say("vcpus", text);
    }
    if desc.cpuid.len() > cpuid::MAX_ENTRIES || desc.msrs.len() > MAX_LIST || desc.devices.len() > MAX_LIST {
        say("cpuid", "the machine's description has longer lists than any machine".into());
        return out;
    }
    for name in features::missing(&desc.cpuid, &host.cpuid) {
        say("cpuid", format!("the machine uses the CPU feature {name}, which the receiver's KVM lacks"));
    }
    for index in desc.msrs.iter().filter(|i| !host.msrs.contains(i)) {
        let text =
            format!("the machine has MSR {}, which the receiver's KVM cannot restore", msrs::name(*index));
        say("msr", text);
    }
    for name in desc.capabilities.iter().filter(|c| !host.has(c)) {
        say("capability", format!("the machine's state relies on {name}, which the receiver's KVM lacks"));
    }
    tsc_problem(desc.tsc.khz, host).into_iter().for_each(|text| say("tsc", text));
    if desc.xsave_bytes != host.xsave_bytes {
        let (theirs, ours) = (desc.xsave_bytes, host.xsave_bytes);
        let text = format!("the machine's XSAVE area has {theirs} bytes, the receiver's KVM takes {ours}");
        say("xsave", text);
    }
    for device in &desc.devices {
        let known = DEVICE_KINDS.iter().find(|(kind, _)| *kind == device.kind).map(|(_, newest)| *newest);
        match known.or(Kind::named(&device.kind).map(Kind::version)) {
            None => say(
                "device",
                format!(
                    "device {} is of kind {:?}, which the receiver does not know",
                    device.id, device.kind
                ),
            ),
            Some(newest) if device.version == 0 || device.version > newest => say(
                "device",
                format!(
                    "device {} writes version {}, the receiver reads up to {newest}",
                    device.id, device.version
                ),
            ),
            Some(_) => {}
        }
    }
    let virtio = desc.devices.iter().filter(|d| Kind::named(&d.kind).is_some()).count();
    if virtio > MAX_DEVICES {
        say("device", format!("the machine has {virtio} virtio devices, there is room for {MAX_DEVICES}"));
    }
    let mut ids = std::collections::BTreeSet::new();
    for device in desc.devices.iter().filter(|d| !ids.insert(&d.id)) {
        say("device", format!("two devices have the id {}", device.id));
    }
    out
}

/// Why page faults of a guest whose RAM is made of `pages` cannot be served here, if they cannot.
pub fn userfaultfd_problem(pages: RamPages) -> Option<Problem> {
    let made = match pages {
        RamPages::Huge => FaultFd::for_huge_pages(),
        RamPages::Small | RamPages::Transparent => FaultFd::new(),
    };
    let error = made.err()?;
    let text = format!(
        "pages are to come after the guest (postcopy), and the receiver cannot make a userfaultfd: {error} \
         (vmrun needs access to /dev/userfaultfd, or CAP_SYS_PTRACE; with 2M pages Linux 5.18)"
    );
    Some(Problem { topic: "userfaultfd".into(), text })
}

/// Ids in `remaps` that name no device of the machine.
pub fn unknown_remaps<'a>(
    desc: &MachineDescription,
    remaps: impl IntoIterator<Item = &'a String>,
) -> Vec<Problem> {
    let known = |id: &str| desc.devices.iter().any(|d| d.id == id && d.host.is_some());
    let unknown = remaps.into_iter().filter(|id| !known(id));
    unknown
        .map(|id| Problem {
            topic: "device".into(),
            text: format!(
                "--remap names {id}, and the machine has no device of that id with something to remap"
            ),
        })
        .collect()
}

fn tsc_problem(khz: u32, host: &HostAbilities) -> Option<String> {
    let difference = u64::from(khz.abs_diff(host.tsc_khz)) * 1_000_000;
    let near = difference <= u64::from(host.tsc_khz) * TSC_TOLERANCE_PPM;
    (khz == 0 || (!near && !host.tsc_control)).then(|| {
        format!(
            "the machine's TSC runs at {khz} kHz, the receiver's at {} kHz, and its KVM cannot scale (KVM_CAP_TSC_CONTROL)",
            host.tsc_khz
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestPhysAddr, RamMap, RamRegion};
    use crate::state::{CpuidEntry, DeviceDescription, TscFrequency};
    use crate::vmm::pool::HugePool;

    fn machine() -> MachineDescription {
        let leaf1 = CpuidEntry { function: 1, index: 0, flags: 0, eax: 0, ebx: 0, ecx: 1 << 28, edx: 0 };
        MachineDescription {
            name: "m".into(),
            uuid: "u".into(),
            vcpus: 2,
            ram: RamMap::new(vec![RamRegion { start: GuestPhysAddr(0), bytes: 64 << 20 }]).unwrap(),
            ram_pages: RamPages::Small,
            cpuid: vec![leaf1],
            msrs: vec![0x277],
            capabilities: vec!["KVM_CAP_SREGS2".into()],
            tsc: TscFrequency { khz: 2_000_000 },
            xsave_bytes: 4096,
            devices: vec![DeviceDescription {
                id: "serial0".into(),
                kind: "serial".into(),
                version: 1,
                host: Some("none".into()),
                properties: Default::default(),
            }],
        }
    }

    fn host() -> HostAbilities {
        HostAbilities {
            cpuid: machine().cpuid,
            msrs: vec![0x10, 0x277],
            capabilities: vec!["KVM_CAP_SREGS2".into()],
            tsc_control: false,
            tsc_khz: 2_000_000,
            xsave_bytes: 4096,
            max_vcpus: 4,
            memory_available_bytes: 1 << 30,
            huge_pages: HugePool { free: 4, total: 8 },
        }
    }

    #[test]
    fn a_host_like_the_machines_own_takes_it() {
        assert_eq!(problems(&machine(), &host()), vec![]);
    }

    /// One thing that is wrong, the topic it belongs to, and a piece of the message.
    type Case = (fn(&mut MachineDescription, &mut HostAbilities), &'static str, &'static str);

    #[test]
    fn each_thing_that_is_missing_is_named() {
        let cases: &[Case] = &[
            (|_, h| h.memory_available_bytes = 1 << 20, "ram", "64 MiB of RAM, the receiver has 1 MiB"),
            (
                |m, _| m.ram_pages = RamPages::Huge,
                "hugepages",
                "32 free huge pages of 2 MiB are needed, 4 of 8",
            ),
            (|m, _| m.vcpus = 5, "vcpus", "5 vCPUs"),
            (|m, _| m.vcpus = 0, "vcpus", "0 vCPUs"),
            (|_, h| h.cpuid.clear(), "cpuid", "avx (CPUID 0x1.0 ECX bit 28)"),
            (|_, h| h.msrs.clear(), "msr", "IA32_PAT (0x277)"),
            (|_, h| h.capabilities.clear(), "capability", "KVM_CAP_SREGS2"),
            (|_, h| h.tsc_khz = 2_001_000, "tsc", "2000000 kHz, the receiver's at 2001000"),
            (|m, _| m.tsc.khz = 0, "tsc", "0 kHz"),
            (|_, h| h.xsave_bytes = 8192, "xsave", "4096 bytes, the receiver's KVM takes 8192"),
            (|m, _| m.devices[0].kind = "floppy".into(), "device", "floppy"),
            (|m, _| m.devices[0].version = 2, "device", "version 2"),
        ];
        for (change, topic, text) in cases {
            let (mut m, mut h) = (machine(), host());
            change(&mut m, &mut h);
            let found = problems(&m, &h);
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!(found[0].topic, *topic);
            assert!(found[0].text.contains(text), "{}", found[0].text);
        }
    }

    #[test]
    fn a_near_tsc_or_one_that_can_be_scaled_is_taken() {
        let (m, mut h) = (machine(), host());
        h.tsc_khz = 2_000_400;
        assert_eq!(problems(&m, &h), vec![]);
        (h.tsc_khz, h.tsc_control) = (3_000_000, true);
        assert_eq!(problems(&m, &h), vec![]);
    }

    #[test]
    fn remaps_name_devices_that_have_something_to_remap() {
        assert!(unknown_remaps(&machine(), [&"serial0".to_string()]).is_empty());
        let found = unknown_remaps(&machine(), [&"disk7".to_string()]);
        assert!(found[0].text.contains("disk7"));
    }
}
