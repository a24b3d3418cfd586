//! Text: command lines and what stands in them, addresses, session ids, records of ownership.

use clap::Parser;
use vmferry::cli::units::{self, Rate, Size};
use vmferry::cli::{vmctl, vmrecv, vmrun, vmsend};
use vmferry::memory::RamPages;
use vmferry::switchover::{Attempt, Ownership, SessionId};
use vmferry::transport::{Address, needs_insecure};
use vmferry::vmm::service::SessionRecord;
use vmferry::vmm::virtio::net::{MacAddress, NetSpec, TapSpec};
use vmferry::vmm::virtio::vsock::{SocketPath, VsockSpec};
use vmferry::vmm::virtio::{HostEnd, Kind, is_device_id};
use vmferry::vmm::{KernelSource, SerialBackend};

use super::input::Writer;

/// The most words of a command line.
const MAX_WORDS: usize = 64;

pub fn run(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else { return };
    let text = String::from_utf8_lossy(rest);
    match kind % 8 {
        0 => quantities(&text),
        1 => addresses(&text),
        2 => devices(&text),
        3 => records(rest),
        program => command_line(program - 4, &text),
    }
}

fn quantities(text: &str) {
    if let Ok(size) = text.parse::<Size>() {
        let _ = size.to_string();
    }
    if let Ok(rate) = text.parse::<Rate>() {
        let _ = rate.to_string();
    }
    if let Err(error) = units::duration(text) {
        assert!(error.contains("unit"));
    }
    if let Ok(pages) = text.parse::<RamPages>() {
        assert_eq!(pages.to_string(), text);
    }
}

fn addresses(text: &str) {
    match text.parse::<Address>() {
        Ok(address) => {
            assert_eq!(address.to_string().parse(), Ok(address.clone()));
            let _ = needs_insecure(&address);
        }
        Err(error) => drop(error.to_string()),
    }
    if let Ok(backend) = text.parse::<SerialBackend>() {
        assert_eq!(backend.to_string().parse(), Ok(backend));
    }
    let Ok(KernelSource::File(_) | KernelSource::Builtin(_)) = text.parse();
}

fn devices(text: &str) {
    for kind in Kind::ALL {
        match HostEnd::parse(*kind, text) {
            Ok(end) => assert_eq!(HostEnd::parse(*kind, &end.to_string()), Ok(end)),
            Err(error) => drop(error.to_string()),
        }
    }
    if let Ok(card) = text.parse::<NetSpec>() {
        assert_eq!(card.tap.to_string().parse::<TapSpec>().as_ref(), Ok(&card.tap));
        assert!(card.id.is_none_or(|id| is_device_id(&id)));
    }
    if let Ok(mac) = text.parse::<MacAddress>() {
        assert_eq!(mac.to_string().parse(), Ok(mac));
    }
    match text.parse::<VsockSpec>() {
        Ok(spec) => assert_eq!(spec.path.to_string().parse::<SocketPath>(), Ok(spec.path)),
        Err(error) => drop(error.to_string()),
    }
}

fn records(bytes: &[u8]) {
    if let Ok(record) = serde_json::from_slice::<SessionRecord>(bytes) {
        let _ = record.ownership.to_string();
        let again = serde_json::to_vec(&record).expect("what was read can be written");
        assert_eq!(serde_json::from_slice::<SessionRecord>(&again).expect("and read again"), record);
    }
    if let Ok(session) = serde_json::from_slice::<SessionId>(bytes) {
        assert_eq!(session.to_string().len(), 32);
    }
}

/// One of the four programs with these words, one a line.
fn command_line(program: u8, text: &str) {
    let words = std::iter::once("program").chain(text.split('\n').take(MAX_WORDS));
    let refused = match program {
        0 => vmrun::Args::try_parse_from(words).err(),
        1 => vmsend::Args::try_parse_from(words).err(),
        2 => vmrecv::Args::try_parse_from(words).err(),
        _ => vmctl::Args::try_parse_from(words).err(),
    };
    if let Some(error) = refused {
        let _ = error.to_string();
    }
}

pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let attempt = Attempt { session: SessionId([0x9f; 16]), epoch: 2 };
    let record = |ownership| {
        let name = Some("guest".to_owned());
        let record = SessionRecord { version: 1, pid: 4711, time_ms: 1, name, uuid: None, ownership };
        serde_json::to_string_pretty(&record).expect("it can be written")
    };
    let committed = record(Ownership::Committed { attempt, dest: "tcp:hostb:7070".into() });
    let arrived = record(Ownership::Sole { arrived: Some(attempt), sending: None });
    let texts: &[(u8, &str)] = &[
        (0, "512M"),
        (0, "1.5GiB"),
        (0, "800Mbit/s"),
        (0, "1m 30s"),
        (0, "thp"),
        (1, "tcp:[fe80::1%eth0]:7070"),
        (1, "tcp:hostb:7070"),
        (1, "unix:/run/a:b"),
        (1, "exec:ssh b vmrecv -"),
        (1, "file:/var/log/guest"),
        (2, "/images/guest,readonly,direct,id=disk0"),
        (2, "tap=new:tap0,mac=52:54:00:12:34:56,id=net0"),
        (2, "cid=3,path=/run/vm.vsock,id=v"),
        (2, "52:54:00:12:34:56"),
        (3, &committed),
        (3, &arrived),
        (3, "\"9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f9f\""),
        (
            4,
            "--kernel\nbuiltin:heartbeat\n--memory\n64M\n--vcpus\n2\n--serial\nstdio\n--control\n/run/vm.sock",
        ),
        (4, "--incoming\n--control\n/run/vm.sock\n--hugepages\n2M"),
        (5, "--vm\n/run/vm.sock\ntcp:127.0.0.1:7070\n--mode\nhybrid\n--downtime\n50ms\n--bandwidth\n1Gbit"),
        (6, "--control\n/run/vm.sock\nunix:/run/in\n--remap\nserial0=file:/log\n--json"),
        (7, "/run/vm.sock\nresume\n--force\n--peer-fenced"),
    ];
    let name = |n: usize, kind: &u8| format!("{kind}-{n}");
    texts
        .iter()
        .enumerate()
        .map(|(n, (kind, text))| (name(n, kind), Writer::default().u8(*kind).raw(text.as_bytes()).0))
        .collect()
}
