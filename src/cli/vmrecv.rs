//! The command line of `vmrecv`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use clap::{Parser, ValueHint};

use crate::control::Remap;
use crate::memory::RamPages;
use crate::migrate::dest;
use crate::migrate::host::HostOptions;
use crate::migrate::options::{Arrived, ReceiveOptions};
use crate::migrate::outcome::{Ending, MigrateError, Side};
use crate::sys::spawn::Program;
use crate::transport::{Address, needs_insecure};
use crate::vmm::SerialBackend;

use super::confine::{self, SandboxArgs};
use super::exit::{self, Exit};
use super::flags::{self, CONNECTION, OutputArgs, PeerArgs};
use super::log;
use super::manual::Manual;
use super::output::complain;
use super::progress::Display;
use super::units::duration;

/// Take a microVM in from another host
#[derive(Clone, Debug, Parser)]
#[command(
    name = NAME,
    version,
    long_about = LONG_ABOUT,
    after_long_help = MANUAL.after_help(),
    override_usage = "vmrecv [OPTIONS] --control <SOCK> <LISTEN>"
)]
pub struct Args {
    /// Where to wait for vmsend: tcp:HOST:PORT, unix:PATH, exec:COMMAND or -
    ///
    /// Port 0 takes any free port and says which. `exec:` runs a command with sh and speaks with it
    /// through its standard input and output; `-` is this program's own. An IPv6 address is put in
    /// brackets.
    #[arg(value_name = "LISTEN", required_unless_present = "resume")]
    pub listen: Option<Address>,

    /// Control socket of the vmrun that takes the guest
    #[arg(long, value_name = "SOCK", value_hint = ValueHint::FilePath)]
    pub control: PathBuf,

    /// Use the vmrun --incoming that listens on --control already
    ///
    /// Otherwise vmrecv starts one, which lives on after it.
    #[arg(long)]
    pub attach: bool,

    /// Take over from a vmrecv that was killed while the guest was acknowledged, or lacked pages
    ///
    /// Everything is still with the vmrun at --control, the place to listen included; LISTEN is
    /// needed only where no pages are missing.
    #[arg(long, conflicts_with_all = ["attach", "serial", "remap"])]
    pub resume: bool,

    /// What the guest's serial port is connected to: stdio, file:PATH, pty or none
    ///
    /// stdio has output only. file: appends the output to the file.
    #[arg(long, value_name = "WHERE", default_value = "none", conflicts_with = "attach")]
    pub serial: SerialBackend,

    /// Make the guest's memory of pages of this size: 4K, 2M or thp
    ///
    /// 2M takes huge pages out of the host's pool (hugetlb), all of them at the start. thp asks the
    /// host for transparent ones, which it gives where it can. As where the guest comes
    /// from by default.
    #[arg(long, value_name = "PAGES", conflicts_with_all = ["attach", "resume"])]
    pub hugepages: Option<RamPages>,

    /// Replace the host end of a device, as in serial0=file:/var/log/guest
    ///
    /// May be given more than once; for a disk it is PATH and its options as in --disk, for a network card the name of
    /// a tap here, as in net0=tap3, for vsock0 the path of its socket. `vmctl SOCK machine` at the
    /// source tells the devices.
    #[arg(long, value_name = "ID=VALUE", value_parser = remap)]
    pub remap: Vec<Remap>,

    /// The vmrun program to start; the one beside vmrecv by default
    #[arg(
        long,
        value_name = "PROGRAM",
        conflicts_with = "attach",
        value_hint = ValueHint::ExecutablePath
    )]
    pub vmrun: Option<PathBuf>,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub peer: PeerArgs,

    /// Wait this long for a source that was lost after the guest began to run here
    ///
    /// The guest runs meanwhile. What is waited for is the source's last word, that it has let its copy
    /// go: until then `vmsend --resume` may come back for it.
    #[arg(
        long,
        value_name = "TIME",
        default_value = "10m",
        value_parser = duration,
        help_heading = CONNECTION
    )]
    pub linger: Duration,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub sandbox: SandboxArgs,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub output: OutputArgs,
}

const NAME: &str = "vmrecv";

const LONG_ABOUT: &str = "\
Take a microVM in from another host.

vmrecv starts an empty vmrun (or attaches to one), waits for one vmsend, and leaves the guest \
running in that vmrun, from where it can be sent on at once. An attempt that fails leaves it waiting \
for the next, unless its one connection was given to it (exec: and -). Once the guest is \
acknowledged it is held until the source says RUN or REVOKE, for ever if need be: a time-out never \
decides.";

/// What the help and the man page say beside the flags.
pub const MANUAL: Manual = Manual {
    values: &[flags::TIME],
    examples: &[
        ("wait on loopback", "vmrecv --control /run/b.sock tcp:127.0.0.1:7070"),
        ("wait for any host, in the clear", "vmrecv --control /run/b.sock --insecure tcp:0.0.0.0:7070"),
        (
            "keep the guest's serial output",
            "vmrecv --control b.sock --serial file:guest.log tcp:127.0.0.1:7070",
        ),
        ("fill a vmrun that is there already", "vmrecv --attach --control /run/b.sock tcp:127.0.0.1:7070"),
        ("take over from a vmrecv that was killed in postcopy", "vmrecv --resume --control /run/b.sock"),
        (
            "take over a guest that is held, none of whose pages are missing",
            "vmrecv --resume --control /run/b.sock tcp:127.0.0.1:7070",
        ),
    ],
    exits: exit::RECV_CODES,
    signals: "SIGINT and SIGTERM end the wait and drop a guest that is being loaded. While the guest is \
              acknowledged and not yet handed over they are refused with a message.",
    files: &[
        ("SOCK", "the control socket of the vmrun that takes the guest"),
        (
            "SOCK.session.json",
            "vmrun's record of who owns the guest, from its acknowledgement on; it stays for as long as a \
             guest that came lives",
        ),
    ],
    environment: &[(
        flags::LOG_VARIABLE,
        "the LEVEL of --log, where that is not given; also that of the vmrun which vmrecv starts",
    )],
    see_also: &["vmctl", "vmrun", "vmsend"],
};

fn remap(text: &str) -> Result<Remap, String> {
    match text.split_once('=') {
        Some((id, value)) if !id.is_empty() && !value.is_empty() => {
            Ok(Remap { id: id.to_owned(), value: value.to_owned() })
        }
        _ => Err("ID=VALUE is wanted".to_owned()),
    }
}

impl Args {
    fn options(&self) -> std::io::Result<ReceiveOptions> {
        let vmrun = match &self.vmrun {
            Some(path) => path.clone(),
            None => std::env::current_exe()?.with_file_name("vmrun"),
        };
        Ok(ReceiveOptions {
            listen: self.listen.clone().unwrap_or(Address::Stdio),
            peer_timeout: self.peer.peer_timeout,
            linger: self.linger,
            host: HostOptions {
                control: self.control.clone(),
                attach: self.attach || self.resume,
                vmrun,
                sandbox: !self.sandbox.no_sandbox,
                serial: self.serial.to_string(),
                ram_pages: self.hugepages,
                remap: self.remap.clone(),
            },
        })
    }
}

/// Runs the program.
pub fn main() -> ExitCode {
    let args = Args::parse();
    log::start(args.output.log.level);
    if let Some(why) = args.listen.as_ref().and_then(needs_insecure).filter(|_| !args.peer.insecure) {
        complain(NAME, why);
        return Exit::Usage.into();
    }
    let stream_on_stdout = args.listen == Some(Address::Stdio);
    if stream_on_stdout && (args.output.json || args.serial == SerialBackend::Stdio) {
        complain(NAME, "the stream has standard output: neither --json nor --serial stdio goes with it");
        return Exit::Usage.into();
    }
    let options = match args.options() {
        Ok(options) => options,
        Err(error) => {
            complain(NAME, format_args!("cannot tell where this program is: {error}"));
            return Exit::Failed.into();
        }
    };
    let stop = Arc::new(AtomicUsize::new(0));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        if let Err(error) = signal_hook::flag::register_usize(signal, stop.clone(), signal as usize) {
            complain(NAME, format_args!("cannot handle signals: {error}"));
            return Exit::Failed.into();
        }
    }
    let mut display = Display::new(NAME, args.output.quiet, args.output.json);
    let result = match args.resume {
        true => take_over(&args, &options, &stop, &mut display),
        false => confine(&args, &options.listen, options.host.program())
            .and_then(|()| dest::receive(&options, &stop, &mut display)),
    };
    let exit = match result {
        Ok(arrived) => {
            display.done(&arrived, &arrived_text(&arrived));
            Exit::Done
        }
        Err(error) => display.failed(&error),
    };
    exit.into()
}

/// Where to listen may be known only once the guest was taken over.
fn take_over(
    args: &Args,
    options: &ReceiveOptions,
    stop: &AtomicUsize,
    display: &mut Display,
) -> Result<Arrived, MigrateError> {
    let takeover = dest::Takeover::from_vmrun(options, args.listen.clone())?;
    confine(args, takeover.listen(), None)?;
    takeover.resume(stop, display)
}

fn confine(args: &Args, listen: &Address, vmrun: Option<Program>) -> Result<(), MigrateError> {
    if args.sandbox.no_sandbox {
        return Ok(());
    }
    confine::receiver(&args.control, listen, vmrun).map_err(|e| {
        let what = format!("the sandbox cannot be entered: {e} (--no-sandbox does without)");
        MigrateError::new(Ending::Failed, Side::Destination, what)
    })
}

fn arrived_text(a: &Arrived) -> String {
    let waits = a.latency.filter(|l| l.count > 0).map_or_else(String::new, |l| {
        format!(
            "; it waited for {} pages: p50 {} µs, p99 {} µs, max {} µs",
            l.count, l.p50_us, l.p99_us, l.max_us
        )
    });
    format!(
        "{:?} has come in {:.2} s and runs here: {} data pages, {} zero pages; control socket {}{waits}",
        a.name,
        a.total_ms / 1e3,
        a.data_pages,
        a.zero_pages,
        a.control.display()
    )
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_flags_fit_together() {
        Args::command().debug_assert();
        let parse = |line: &str| Args::try_parse_from(line.split_whitespace());
        assert!(parse("vmrecv tcp:127.0.0.1:1").is_err());
        assert!(parse("vmrecv --control b --attach --serial stdio -").is_err());
        assert!(parse("vmrecv --control b --serial tty -").is_err());
        assert!(parse("vmrecv --control b --remap serial0= -").is_err());
        let args = parse("vmrecv --control b --remap serial0=none --linger 1m -").unwrap();
        assert_eq!((args.remap.len(), args.linger), (1, Duration::from_secs(60)));
    }
}
