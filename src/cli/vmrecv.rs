//! The command line of `vmrecv`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use clap::Parser;

use crate::control::Remap;
use crate::migrate::dest;
use crate::migrate::host::HostOptions;
use crate::migrate::options::{Arrived, ReceiveOptions};
use crate::transport::{Address, needs_insecure};

use super::exit::{self, Exit};
use super::log::{self, LogLevel};
use super::output::complain;
use super::progress::Display;
use super::units::duration;

/// Takes a microVM in from another host.
#[derive(Clone, Debug, Parser)]
#[command(name = NAME, version, about, long_about = LONG_ABOUT, after_long_help = after_help())]
pub struct Args {
    /// Where to wait for vmsend: tcp:HOST:PORT, unix:PATH, exec:COMMAND or -
    ///
    /// Port 0 takes any free port and says which.
    #[arg(value_name = "LISTEN", required_unless_present = "resume")]
    pub listen: Option<Address>,

    /// Control socket of the vmrun that takes the guest
    #[arg(long, value_name = "SOCK")]
    pub control: PathBuf,

    /// Use the `vmrun --incoming` that listens on --control already
    #[arg(long)]
    pub attach: bool,

    /// Take over from a vmrecv that was killed while the guest was acknowledged, or lacked pages
    ///
    /// Everything is still with the vmrun at --control, the place to listen included; LISTEN is
    /// needed only where no pages are missing.
    #[arg(long, conflicts_with_all = ["attach", "serial", "vmrun", "remap"])]
    pub resume: bool,

    /// The guest's serial port: stdio (output only), file:PATH, pty or none
    #[arg(long, value_name = "WHERE", default_value = "none", conflicts_with = "attach")]
    pub serial: String,

    /// The vmrun program to start; the one beside vmrecv by default
    #[arg(long, value_name = "PROGRAM", conflicts_with = "attach")]
    pub vmrun: Option<PathBuf>,

    /// Replace the host end of a device, as in serial0=file:/var/log/guest
    #[arg(long, value_name = "ID=VALUE", value_parser = remap)]
    pub remap: Vec<Remap>,

    /// Take guests from beyond loopback without encryption or authentication
    #[arg(long)]
    pub insecure: bool,

    /// How long a silence of the other side counts as its death
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = duration)]
    pub peer_timeout: Duration,

    /// How long to wait for a source that was lost after the guest began to run here
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = duration)]
    pub linger: Duration,

    /// One JSON object a line on standard output, the result last
    #[arg(long)]
    pub json: bool,

    /// Errors only
    #[arg(short, long)]
    pub quiet: bool,

    /// What to tell on standard error beside that
    #[arg(long, value_enum, value_name = "LEVEL", default_value = "warn")]
    pub log: LogLevel,
}

const NAME: &str = "vmrecv";

const LONG_ABOUT: &str = "\
Takes a microVM in from another host.

Starts an empty vmrun (or attaches to one), waits for one vmsend, and leaves the guest running in
that vmrun, from where it can be sent on at once. An attempt that fails leaves it waiting for the
next. Once the guest is acknowledged it is held until the source says RUN or REVOKE, for ever if need
be: a time-out never decides.";

/// What the codes say on this side.
const CODES: &[(Exit, &str)] = &[
    (Exit::Done, "a guest has come and runs here"),
    (Exit::Failed, "failed: there is no guest here"),
    (Exit::Usage, "usage: nothing was touched"),
    (Exit::Refused, "this host cannot take the guest (where it cannot wait for another)"),
    (Exit::PeerFailed, "the peer, the link or the protocol failed (likewise)"),
    (Exit::Unknown, "outcome unknown: the guest is held here for the source's word"),
    (Exit::Lost, "the guest is lost"),
    (Exit::Signal(2), "SIGINT was honoured while waiting or loading: the source has its guest"),
    (Exit::Signal(15), "SIGTERM, likewise"),
];

fn after_help() -> String {
    format!(
        "\
EXAMPLES
  vmrecv --control /run/vm.sock tcp:127.0.0.1:7070
  vmrecv --control /run/vm.sock --serial file:/var/log/guest.log --insecure tcp:0.0.0.0:7070

EXIT CODES
{}
FILES
  SOCK.session.json  the record of who owns the guest, kept as long as it is acknowledged and not
                     yet handed over",
        exit::table(CODES)
    )
}

fn remap(text: &str) -> Result<Remap, String> {
    match text.split_once('=') {
        Some((id, value)) if !id.is_empty() && !value.is_empty() => {
            Ok(Remap { id: id.to_owned(), value: value.to_owned() })
        }
        _ => Err("ID=VALUE is wanted".to_owned()),
    }
}

impl Args {
    fn options(&self) -> ReceiveOptions {
        ReceiveOptions {
            listen: self.listen.clone().unwrap_or(Address::Stdio),
            peer_timeout: self.peer_timeout,
            linger: self.linger,
            host: HostOptions {
                control: self.control.clone(),
                attach: self.attach || self.resume,
                vmrun: self.vmrun.clone(),
                serial: self.serial.clone(),
                remap: self.remap.clone(),
            },
        }
    }
}

/// Runs the program.
pub fn main() -> ExitCode {
    let args = Args::parse();
    log::start(args.log);
    if let Some(why) = args.listen.as_ref().and_then(needs_insecure).filter(|_| !args.insecure) {
        complain(NAME, why);
        return Exit::Usage.into();
    }
    let stream_on_stdout = args.listen == Some(Address::Stdio);
    if stream_on_stdout && (args.json || args.serial == "stdio") {
        complain(NAME, "the stream has standard output: neither --json nor --serial stdio goes with it");
        return Exit::Usage.into();
    }
    let stop = Arc::new(AtomicUsize::new(0));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        if let Err(error) = signal_hook::flag::register_usize(signal, stop.clone(), signal as usize) {
            complain(NAME, format_args!("cannot handle signals: {error}"));
            return Exit::Failed.into();
        }
    }
    let mut display = Display::new(NAME, args.quiet, args.json);
    let result = match args.resume {
        true => dest::resume(&args.options(), args.listen.clone(), &stop, &mut display),
        false => dest::receive(&args.options(), &stop, &mut display),
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
