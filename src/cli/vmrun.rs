//! `vmrun`: boots one microVM, or waits for one to come, and hosts it.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueHint};

use super::confine::{self, SandboxArgs};
use super::exit::{self, Exit};
use super::flags::{self, LogArgs};
use super::log;
use super::manual::Manual;
use super::output::{chain, complain};
use super::units::Size;
use crate::memory::RamPages;
use crate::vmm::service::{Ending, Service, ServiceError};
use crate::vmm::virtio::net::NetSpec;
use crate::vmm::virtio::vsock::{NoVsockSpec, VsockSpec};
use crate::vmm::virtio::{HostEnd, ImageConfig};
use crate::vmm::{
    DeviceConfig, GuestExit, HostAbilities, KernelSource, LocalConfig, MachineConfig, SerialBackend, open_kvm,
};

const NAME: &str = "vmrun";

/// Boot one microVM on KVM, or wait for one to come, and host it
#[derive(Debug, Parser)]
#[command(
    name = NAME,
    version,
    long_about = LONG_ABOUT,
    after_long_help = MANUAL.after_help(),
    override_usage = "vmrun [OPTIONS] --kernel <FILE|builtin:NAME>\n       vmrun [OPTIONS] --incoming --control <SOCK>"
)]
pub struct Args {
    /// Boot this kernel: a PVH ELF, a bzImage, or builtin:heartbeat
    ///
    /// FILE is a PVH ELF (a vmlinux, or any ELF with the PVH note) or a bzImage.
    /// builtin:heartbeat is the trial guest that comes with this program: it dirties memory, checks
    /// it, and prints a heartbeat; its parameters are given with --cmdline.
    #[arg(
        long,
        value_name = "FILE|builtin:NAME",
        required_unless_present = "incoming",
        value_hint = ValueHint::FilePath,
        help_heading = GUEST
    )]
    pub kernel: Option<KernelSource>,

    /// Give the kernel this initial RAM disk; none by default
    #[arg(
        long,
        value_name = "FILE",
        requires = "kernel",
        value_hint = ValueHint::FilePath,
        help_heading = GUEST
    )]
    pub initrd: Option<PathBuf>,

    /// Give the kernel this command line; empty by default
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true,
        allow_hyphen_values = true,
        help_heading = GUEST
    )]
    pub cmdline: String,

    /// Size of the guest's memory, a multiple of 2M
    #[arg(long, short, value_name = "SIZE", default_value = "512M", help_heading = GUEST)]
    pub memory: Size,

    /// Number of vCPUs, from 1 to what KVM allows
    #[arg(
        long,
        short,
        value_name = "N",
        default_value_t = 1,
        value_parser = clap::value_parser!(u32).range(1..),
        help_heading = GUEST
    )]
    pub cpus: u32,

    /// Make the guest's memory of pages of this size: 4K, 2M or thp
    ///
    /// thp, the default, asks the host for transparent huge pages, which it gives where it can: to root
    /// always, to others where the host's shmem_enabled says so. 2M takes huge pages out of the host's
    /// pool (hugetlb), all of them at the start. 4K takes the least memory. With --incoming the default
    /// is what the guest's memory is made of where it comes from.
    #[arg(long, value_name = "PAGES")]
    pub hugepages: Option<RamPages>,

    /// The guest's name, in status and messages
    #[arg(long, value_name = "NAME", default_value = "guest", help_heading = GUEST)]
    pub name: String,

    /// Give the guest a disk (virtio-block): a raw image, or a block device
    ///
    /// May be given more than once. The guest cannot write it with readonly; direct goes past the
    /// host's page cache (O_DIRECT). Their ids are disk0, disk1 and so on, by their order, unless id=
    /// names one. The image is locked while a guest has it; when it moves, vmrecv needs
    /// --remap ID=PATH for each disk, with the same data on shared storage.
    #[arg(
        long,
        value_name = "PATH[,readonly][,direct][,id=ID]",
        requires = "kernel",
        value_parser = disk,
        value_hint = ValueHint::FilePath,
        help_heading = GUEST
    )]
    pub disk: Vec<Disk>,

    /// Give the guest a source of random numbers (virtio-rng), with the id rng0
    #[arg(long, requires = "kernel", help_heading = GUEST)]
    pub rng: bool,

    /// Give the guest a network card (virtio-net) on a tap
    ///
    /// NAME is a tap of the host; new:NAME makes one, which goes with vmrun.
    /// The address is random and the id net0, net1 and so on, unless they are given. May be given more
    /// than once. When the guest moves, the destination needs a tap of the same name, or
    /// `vmrecv --remap ID=NAME`.
    #[arg(long, value_name = "tap=NAME[,mac=MAC][,id=ID]", requires = "kernel", help_heading = GUEST)]
    pub net: Vec<NetSpec>,

    /// Connect sockets of the guest (virtio-vsock) with Unix sockets of the host
    ///
    /// N is the guest's context id, from 3 on. Programs of the host connect to PATH, write
    /// "CONNECT PORT" and a line feed, and get "OK" and a number when the guest accepts; who listens at
    /// PATH_PORT is reached by the guest at PORT of the host (context id 2). The ids are vsock0, vsock1 and so
    /// on, unless id= names one. When the guest moves, its connections are reset, and vmrecv needs
    /// --remap ID=PATH.
    #[arg(
        long,
        value_name = "cid=N,path=PATH[,id=ID]",
        requires = "kernel",
        value_parser = vsock,
        help_heading = GUEST
    )]
    pub vsock: Vec<VsockSpec>,

    /// Do not start the guest before `vmctl SOCK resume`
    #[arg(long, requires = "control", help_heading = GUEST)]
    pub paused: bool,

    /// Hold no guest, and wait for one that vmrecv brings in
    #[arg(long, conflicts_with_all = ["kernel", "initrd", "cmdline", "memory", "cpus", "name", "disk", "rng", "net", "vsock", "paused"])]
    pub incoming: bool,

    /// Make a control socket for vmctl, vmsend and vmrecv; none by default
    ///
    /// It is made with mode 0600, serves the same user and root, and is removed at the end. One that
    /// a live program listens on is never replaced.
    #[arg(
        long,
        value_name = "SOCK",
        required_if_eq("incoming", "true"),
        value_hint = ValueHint::FilePath
    )]
    pub control: Option<PathBuf>,

    /// What the guest's serial port is connected to: stdio, file:PATH, pty or none
    ///
    /// stdio puts a terminal into raw mode, but for Ctrl-C. file: appends the output to the file.
    /// pty makes a pseudo-terminal and prints its path to standard error.
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    pub serial: SerialBackend,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub sandbox: SandboxArgs,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub log: LogArgs,
}

const GUEST: &str = "Guest";
/// `--disk`: an image and, if it is given, the disk's id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The image.
    pub image: ImageConfig,
    /// `id=ID`.
    pub id: Option<String>,
}

fn disk(text: &str) -> Result<Disk, String> {
    let (image, id) = ImageConfig::parse_with_id(text)?;
    // Other hosts are told it, who have other working directories.
    let path = std::path::absolute(&image.path).map_err(|e| e.to_string())?;
    Ok(Disk { image: ImageConfig { path, ..image }, id })
}

fn vsock(text: &str) -> Result<VsockSpec, String> {
    let spec: VsockSpec = text.parse().map_err(|e: NoVsockSpec| e.to_string())?;
    // As for disks; and the whole path must not be too long.
    let path = std::path::absolute(&spec.path.0).map_err(|e| e.to_string())?;
    let path = path.display().to_string().parse().map_err(|e: NoVsockSpec| e.to_string())?;
    Ok(VsockSpec { path, ..spec })
}

/// The id of the source of random numbers.
const RNG_ID: &str = "rng0";

const LONG_ABOUT: &str = "\
Boot one microVM on KVM, or wait for one to come, and host it.

vmrun holds the guest: KVM, its vCPUs, devices and memory. It opens no network connection. Other \
programs speak to it on its control socket: vmctl to ask and tell, vmsend to move the guest away, \
vmrecv to bring one in.";

/// What the help and the man page say beside the flags.
pub const MANUAL: Manual = Manual {
    values: &[flags::SIZE],
    examples: &[
        (
            "the trial guest, ready to be moved",
            "vmrun --kernel builtin:heartbeat --memory 512M --control /run/a.sock",
        ),
        ("a disk that is only read", "vmrun --kernel vmlinux --disk root.img,readonly,id=root"),
        ("a Linux guest", "vmrun --kernel vmlinux --initrd initrd.img --cmdline console=ttyS0"),
        ("with a network card", "vmrun --kernel vmlinux --net tap=tap0 --control /run/a.sock"),
        ("with sockets to the host", "vmrun --kernel vmlinux --vsock cid=3,path=/run/a.vsock"),
        ("an empty one, for vmrecv --attach", "vmrun --incoming --control /run/b.sock --serial file:b.log"),
    ],
    exits: exit::VMRUN_CODES,
    signals: "SIGINT, SIGTERM and SIGHUP end the guest and vmrun. While the guest is committed to another \
              host, or held for its source, the first is refused; a second one within 5 seconds ends it \
              all the same.",
    files: &[
        ("SOCK", "the control socket"),
        ("PATH of --vsock", "the socket at which programs of the host reach the guest, with mode 0600"),
        (
            "SOCK.session.json",
            "who owns the guest, as soon as another host has or had a part in it; it stays when vmrun ends \
             while that is open",
        ),
        (
            "SOCK.session.json.new",
            "lies ready for the next record while a migration may need one, and goes with vmrun",
        ),
        (
            "SOCK.session.json.old, SOCK.session.json.old.1, ...",
            "records that an earlier vmrun left: set aside when the next one starts, never overwritten",
        ),
    ],
    environment: &[(flags::LOG_VARIABLE, "the LEVEL of --log, where that is not given")],
    see_also: &["vmctl", "vmrecv", "vmsend"],
};

/// The program.
pub fn main() -> ExitCode {
    let args = Args::parse();
    log::start(args.log.level);
    if !args.sandbox.no_sandbox
        && let Err(e) = confine::host(args.control.as_deref())
    {
        complain(NAME, format_args!("the sandbox cannot be entered: {e} (--no-sandbox does without)"));
        return Exit::Failed.into();
    }
    let exit = match host(args) {
        Ok(ending) => tell(&ending),
        Err(e) => {
            complain(NAME, chain(&e));
            Exit::Failed
        }
    };
    exit.into()
}

fn host(args: Args) -> Result<Ending, ServiceError> {
    let local =
        LocalConfig { serial: args.serial.clone(), ram_pages: args.hugepages, ..LocalConfig::default() };
    if args.incoming {
        // Asked once in a process, and slow on a busy host: done before anybody waits for it.
        HostAbilities::of_this_host(&open_kvm()?)?;
    }
    let mut service = Service::open(args.control.as_deref(), local)?;
    if let Some(kernel) = args.kernel {
        let devices = devices(args.disk, args.rng, args.net, args.vsock);
        let config = MachineConfig {
            name: args.name,
            uuid: uuid()?,
            memory_bytes: args.memory.0,
            ram_pages: args.hugepages.unwrap_or(RamPages::Transparent),
            vcpus: args.cpus,
            kernel,
            initrd: args.initrd,
            cmdline: args.cmdline,
            serial: args.serial,
            devices,
        };
        service.boot(&config, args.paused)?;
    }
    service.run()
}

/// The virtio devices, in the order of their slots. Disks first: a guest finds its root disk at the same
/// place with and without the rest.
fn devices(disks: Vec<Disk>, rng: bool, cards: Vec<NetSpec>, sockets: Vec<VsockSpec>) -> Vec<DeviceConfig> {
    let rng = rng.then(|| DeviceConfig { id: RNG_ID.into(), host: HostEnd::Rng });
    let card = |(number, card): (usize, NetSpec)| DeviceConfig {
        id: card.id.unwrap_or_else(|| format!("net{number}")),
        host: HostEnd::Net { tap: card.tap, mac: card.mac },
    };
    let disk = |(number, Disk { image, id }): (usize, Disk)| DeviceConfig {
        id: id.unwrap_or_else(|| format!("disk{number}")),
        host: HostEnd::Image(image),
    };
    let socket = |(number, socket): (usize, VsockSpec)| DeviceConfig {
        id: socket.id.unwrap_or_else(|| format!("vsock{number}")),
        host: HostEnd::Vsock { path: socket.path, cid: Some(socket.cid) },
    };
    disks
        .into_iter()
        .enumerate()
        .map(disk)
        .chain(rng)
        .chain(cards.into_iter().enumerate().map(card))
        .chain(sockets.into_iter().enumerate().map(socket))
        .collect()
}

/// A random uuid, from the kernel.
fn uuid() -> Result<String, std::io::Error> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim().to_owned())
}

fn tell(ending: &Ending) -> Exit {
    match ending {
        Ending::Guest(GuestExit::Shutdown) => complain(NAME, "the guest has powered off"),
        Ending::Guest(GuestExit::Reset) => {
            complain(NAME, "the guest has asked for a reset: it is not started again")
        }
        Ending::Guest(GuestExit::TripleFault) => {
            complain(NAME, "the guest has reset itself by a triple fault")
        }
        Ending::Guest(GuestExit::Error(why)) => {
            complain(NAME, format_args!("KVM cannot go on with the guest: {why}"));
            return Exit::Failed;
        }
        Ending::Migrated { dest } => complain(NAME, format_args!("migrated to {dest}")),
        Ending::Quit => {}
        Ending::Signal(number) => return Exit::Signal(*number),
    }
    Exit::Done
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_flags_fit_together() {
        Args::command().debug_assert();
        let parse = |line: &str| Args::try_parse_from(line.split_whitespace());
        assert!(parse("vmrun").is_err());
        assert!(parse("vmrun --incoming").is_err());
        assert!(parse("vmrun --incoming --control s --kernel k").is_err());
        assert!(parse("vmrun --incoming --control s --serial none").is_ok());
        assert!(parse("vmrun --kernel k --cpus 0").is_err());
        assert!(parse("vmrun --kernel k --paused").is_err());
        assert!(parse("vmrun --incoming --control s --disk d").is_err());
        let args = parse("vmrun --kernel k --disk /d,readonly --disk /e,id=data --rng").unwrap();
        let made = devices(args.disk, args.rng, args.net, args.vsock);
        let shown: Vec<_> = made.iter().map(|d| format!("{}={}", d.id, d.host)).collect();
        assert_eq!(shown, ["disk0=/d,readonly", "data=/e", "rng0=kernel"]);
        assert!(parse("vmrun --kernel k --net tap0").is_err());
        assert!(parse("vmrun --incoming --control s --net tap=a").is_err());
        let args = parse("vmrun --kernel k --rng --net tap=a --net tap=b,id=lan --net tap=c").unwrap();
        let ids: Vec<_> =
            devices(args.disk, args.rng, args.net, args.vsock).into_iter().map(|d| d.id).collect();
        assert_eq!(ids, ["rng0", "net0", "lan", "net2"]);
        assert!(parse("vmrun --kernel k --vsock path=/v").is_err());
        assert!(parse("vmrun --incoming --control s --vsock cid=3,path=/v").is_err());
        let args = parse("vmrun --kernel k --vsock cid=3,path=/v").unwrap();
        let made = devices(args.disk, args.rng, args.net, args.vsock);
        assert_eq!((&*made[0].id, made[0].host.to_string()), ("vsock0", "/v".to_owned()));
        let args = parse("vmrun --kernel builtin:heartbeat -m 1G -c 2").unwrap();
        assert_eq!(
            (args.kernel, args.memory),
            (Some(KernelSource::Builtin("heartbeat".into())), Size(1 << 30))
        );
    }
}
