//! The devices of a machine: opened, for one that boots and one that comes in, and described.

use std::collections::{BTreeMap, BTreeSet};

use crate::state::{
    CLOCK_VERSION, DeviceDescription, IRQCHIP_VERSION, MachineDescription, PIT_VERSION, Problem,
    SERIAL_VERSION, TscFrequency,
};
use crate::vmm::VmmError;
use crate::vmm::config::{LocalConfig, MachineConfig};
use crate::vmm::host::HostAbilities;
use crate::vmm::memory::GuestRam;
use crate::vmm::virtio::{Device, HostEnd, Kind, MAX_DEVICES};
use crate::vmm::x86::cpuid;

/// The id of the serial port in descriptions and for `--remap`.
pub(super) const SERIAL_ID: &str = "serial0";

/// Virtio devices with their ids, in the order of their slots.
pub(super) type Opened = Vec<(String, Box<dyn Device>)>;

/// Opens what the devices of a machine to boot are connected to.
pub(super) fn open_devices(config: &MachineConfig) -> Result<Opened, VmmError> {
    let count = config.devices.len();
    if count > MAX_DEVICES {
        return Err(VmmError::TooManyDevices { devices: count, max: MAX_DEVICES });
    }
    let taken = ["irqchip0", "pit0", "clock0", SERIAL_ID];
    let mut opened = Opened::new();
    for device in &config.devices {
        let fail = |reason: String| VmmError::Device { id: device.id.clone(), reason };
        if taken.contains(&&*device.id) || opened.iter().any(|(id, _)| *id == device.id) {
            return Err(fail("another device has that id".into()));
        }
        opened
            .push((device.id.clone(), device.host.open(&device.id, None).map_err(|e| fail(e.to_string()))?));
    }
    Ok(opened)
}

/// Opens what the virtio devices of a machine that comes in are connected to here, and says so in
/// its description; adds everything that keeps this host from it to `problems`.
pub(super) fn arriving_devices(
    description: &mut MachineDescription,
    local: &LocalConfig,
    problems: &mut Vec<Problem>,
) -> Opened {
    let mut opened = Vec::new();
    for device in &mut description.devices {
        let Some(kind) = Kind::named(&device.kind) else { continue };
        let mut say = |text: String| {
            problems.push(Problem { topic: "device".into(), text: format!("device {}: {text}", device.id) });
        };
        let theirs = device.host.as_ref();
        let ours = local.remaps.get(&device.id);
        let Some(text) = ours.or(theirs.filter(|_| HostEnd::is_for_the_peer_to_say(kind))) else {
            let theirs = theirs.map_or("something", |text| text);
            say(format!(
                "it is connected to {theirs} at the source: --remap {}=VALUE says to what here",
                device.id
            ));
            continue;
        };
        let found = HostEnd::parse(kind, text).map_err(|e| e.to_string());
        match found
            .and_then(|end| Ok((end.open(&device.id, Some(&*device)).map_err(|e| e.to_string())?, end)))
        {
            Err(reason) => say(reason),
            Ok((ours, end)) => {
                let here = ours.properties();
                let names = device.properties.keys().chain(here.keys());
                for name in names.collect::<BTreeSet<_>>() {
                    let (there, here) = (device.properties.get(name), here.get(name));
                    if there != here {
                        let show = |value: Option<&String>| value.map_or("none", |v| v).to_owned();
                        say(format!("its {name} is {} at the source, {} here", show(there), show(here)));
                    }
                }
                device.host = Some(end.to_string());
                opened.push((device.id.clone(), ours));
            }
        }
    }
    opened
}

/// What another host must know of a machine to boot.
pub(super) fn describe(
    config: &MachineConfig,
    ram: &GuestRam,
    host: &HostAbilities,
    opened: &[(String, Box<dyn Device>)],
) -> MachineDescription {
    let device = |id: &str, kind: &str, version, host| DeviceDescription {
        id: id.into(),
        kind: kind.into(),
        version,
        host,
        properties: BTreeMap::new(),
    };
    let mut devices = vec![
        device("irqchip0", "irqchip", IRQCHIP_VERSION, None),
        device("pit0", "pit", PIT_VERSION, None),
        device("clock0", "clock", CLOCK_VERSION, None),
        device(SERIAL_ID, "serial", SERIAL_VERSION, Some(config.serial.to_string())),
    ];
    devices.extend(config.devices.iter().zip(opened).map(|(config, (_, opened))| {
        let kind = opened.kind();
        let host = Some(config.host.to_string());
        DeviceDescription {
            properties: opened.properties(),
            ..device(&config.id, kind.name(), kind.version(), host)
        }
    }));
    MachineDescription {
        name: config.name.clone(),
        uuid: config.uuid.clone(),
        vcpus: config.vcpus,
        ram: ram.map().clone(),
        ram_pages: ram.pages(),
        cpuid: cpuid::for_vcpu(&host.cpuid, 0, config.vcpus),
        msrs: host.msrs.clone(),
        capabilities: host.capabilities.clone(),
        tsc: TscFrequency { khz: host.tsc_khz },
        xsave_bytes: host.xsave_bytes,
        devices,
    }
}
