//! `vmrun`: boots one microVM, or waits for one to come, and hosts it.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use super::exit::{self, Exit};
use super::log::{self, LogLevel};
use super::output::{chain, complain};
use super::units::Size;
use crate::vmm::service::{Ending, Service, ServiceError};
use crate::vmm::{GuestExit, KernelSource, LocalConfig, MachineConfig, SerialBackend};

const NAME: &str = "vmrun";

/// Boots one microVM on KVM, or waits for one to come, and hosts it
///
/// vmrun holds the guest: KVM, its vCPUs, devices and memory. It opens no network connection. Other
/// programs speak to it on its control socket: vmctl to ask and tell, vmsend to move the guest
/// away, vmrecv to bring one in.
#[derive(Debug, Parser)]
#[command(name = NAME, version, after_long_help = after_help())]
pub struct Args {
    /// The kernel to boot: a PVH ELF, a bzImage, or builtin:heartbeat
    ///
    /// FILE is a PVH ELF (a vmlinux, or any ELF with the PVH note) or a bzImage.
    /// builtin:heartbeat is the trial guest that comes with this program: it dirties memory, checks
    /// it, and prints a heartbeat; its parameters are given with --cmdline.
    #[arg(long, value_name = "FILE|builtin:NAME", required_unless_present = "incoming")]
    pub kernel: Option<KernelSource>,

    /// An initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,

    /// The kernel's command line
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true,
        allow_hyphen_values = true
    )]
    pub cmdline: String,

    /// Guest memory: bytes, or 512M, 2G (powers of 1024)
    #[arg(long, short, value_name = "SIZE", default_value = "512M")]
    pub memory: Size,

    /// Number of vCPUs
    #[arg(long, short, value_name = "N", default_value_t = 1)]
    pub cpus: u32,

    /// What the serial port is connected to: stdio, file:PATH, pty or none
    ///
    /// stdio puts a terminal into raw mode, but for Ctrl-C. file: appends the output to the file.
    /// pty makes a pseudo-terminal and prints its path to standard error.
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    pub serial: SerialBackend,

    /// Listen for vmctl, vmsend and vmrecv on this Unix socket
    ///
    /// It is made with mode 0600, serves the same user and root, and is removed at the end. One that
    /// a live program listens on is never replaced. While it is open who owns the guest, that is
    /// written to SOCK.session.json.
    #[arg(long, value_name = "SOCK", required_if_eq("incoming", "true"))]
    pub control: Option<PathBuf>,

    /// The guest's name, in status and messages
    #[arg(long, default_value = "guest")]
    pub name: String,

    /// Do not start the guest before `vmctl SOCK resume`
    #[arg(long)]
    pub paused: bool,

    /// Hold no guest, and wait for one that vmrecv brings in
    #[arg(long, conflicts_with_all = ["kernel", "initrd", "cmdline", "memory", "cpus", "name", "paused"])]
    pub incoming: bool,

    /// How much to tell on standard error
    #[arg(long, value_name = "LEVEL", value_enum, default_value_t = LogLevel::Warn, env = "VMFERRY_LOG")]
    pub log: LogLevel,
}

/// The end of `--help`, and of the man page.
pub fn after_help() -> String {
    format!(
        "Examples:\n  \
         vmrun --kernel builtin:heartbeat --memory 512M --cpus 2 --control /run/user/1000/a.sock\n  \
         vmrun --kernel vmlinux --initrd initrd.img --cmdline 'console=ttyS0' --control a.sock\n  \
         vmrun --incoming --control b.sock --serial file:b.log\n\n\
         Signals:\n  \
         SIGINT, SIGTERM and SIGHUP end the guest and vmrun. While the guest is committed to another\n  \
         host, or held for its source, the first is refused; a second one within 5 seconds ends it\n  \
         all the same.\n\n\
         Files:\n  \
         SOCK               the control socket\n  \
         SOCK.session.json  who owns the guest, from its acknowledgement on; stays if that is open\n  \
         SOCK.session.json.old[.N]\n                     \
         records that an earlier vmrun left\n\n\
         Exit codes:\n{}",
        exit::table(exit::VMRUN_CODES)
    )
}

/// The program.
pub fn main() -> ExitCode {
    let args = Args::parse();
    log::start(args.log);
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
    let local = LocalConfig { serial: args.serial.clone(), ..LocalConfig::default() };
    let mut service = Service::open(args.control.as_deref(), local)?;
    if let Some(kernel) = args.kernel {
        let config = MachineConfig {
            name: args.name,
            uuid: uuid()?,
            memory_bytes: args.memory.0,
            vcpus: args.cpus,
            kernel,
            initrd: args.initrd,
            cmdline: args.cmdline,
            serial: args.serial,
        };
        service.boot(&config, args.paused)?;
    }
    service.run()
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
        let args = parse("vmrun --kernel builtin:heartbeat -m 1G -c 2").unwrap();
        assert_eq!(
            (args.kernel, args.memory),
            (Some(KernelSource::Builtin("heartbeat".into())), Size(1 << 30))
        );
    }
}
