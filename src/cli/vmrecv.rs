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

use super::progress::Display;

/// Takes a microVM in from another host.
#[derive(Clone, Debug, Parser)]
#[command(name = "vmrecv", version, about, long_about = LONG_ABOUT, after_long_help = AFTER_HELP)]
pub struct Args {
    /// Where to wait for vmsend: tcp:HOST:PORT, unix:PATH, exec:COMMAND or -
    ///
    /// Port 0 takes any free port and says which.
    #[arg(value_name = "LISTEN")]
    pub listen: Address,

    /// Control socket of the vmrun that takes the guest
    #[arg(long, value_name = "SOCK")]
    pub control: PathBuf,

    /// Use the `vmrun --incoming` that listens on --control already
    #[arg(long)]
    pub attach: bool,

    /// The guest's serial port: file:PATH, pty or none
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
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = humantime::parse_duration)]
    pub peer_timeout: Duration,

    /// How long to wait for a source that was lost after the guest began to run here
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = humantime::parse_duration)]
    pub linger: Duration,

    /// One JSON object a line on standard output, the result last
    #[arg(long)]
    pub json: bool,

    /// Errors only
    #[arg(short, long)]
    pub quiet: bool,
}

const LONG_ABOUT: &str = "\
Takes a microVM in from another host.

Starts an empty vmrun (or attaches to one), waits for one vmsend, and leaves the guest running in
that vmrun, from where it can be sent on at once. An attempt that fails leaves it waiting for the
next. Once the guest is acknowledged it is held until the source says RUN or REVOKE, for ever if need
be: a time-out never decides.";

const AFTER_HELP: &str = "\
EXAMPLES
  vmrecv --control /run/vm.sock tcp:127.0.0.1:7070
  vmrecv --control /run/vm.sock --serial file:/var/log/guest.log --insecure tcp:0.0.0.0:7070

EXIT CODES
  0    a guest has come and runs here
  1    failed: there is no guest here
  2    wrong usage
  3    this host cannot take the guest (only where it cannot wait for another)
  5    peer, link or protocol failure (likewise)
  7    outcome unknown: the guest is held here for the source's word
  8    the guest is lost
  130  stopped by SIGINT while waiting or loading: the source has its guest
  143  stopped by SIGTERM, likewise

FILES
  SOCK.session.json  the record of who owns the guest, kept as long as it is acknowledged and not
                     yet handed over";

fn remap(text: &str) -> Result<Remap, String> {
    match text.split_once('=') {
        Some((id, value)) if !id.is_empty() && !value.is_empty() => Ok(Remap { id: id.to_owned(), value: value.to_owned() }),
        _ => Err("ID=VALUE is wanted".to_owned()),
    }
}

impl Args {
    fn options(&self) -> ReceiveOptions {
        ReceiveOptions {
            listen: self.listen.clone(),
            peer_timeout: self.peer_timeout,
            linger: self.linger,
            host: HostOptions {
                control: self.control.clone(),
                attach: self.attach,
                vmrun: self.vmrun.clone(),
                serial: self.serial.clone(),
                remap: self.remap.clone(),
            },
        }
    }
}

/// Runs the program.
pub fn run(args: &Args) -> ExitCode {
    if let Some(why) = needs_insecure(&args.listen).filter(|_| !args.insecure) {
        eprintln!("vmrecv: {why}");
        return ExitCode::from(2);
    }
    let mut display = Display::new("vmrecv", args.quiet, args.json);
    let stop = Arc::new(AtomicUsize::new(0));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        if let Err(error) = signal_hook::flag::register_usize(signal, stop.clone(), signal as usize) {
            eprintln!("vmrecv: cannot handle signals: {error}");
            return ExitCode::from(1);
        }
    }
    match dest::receive(&args.options(), &stop, &mut display) {
        Ok(arrived) => {
            display.end(0, &arrived, &arrived_text(&arrived));
            ExitCode::SUCCESS
        }
        Err(error) => {
            let code = error.ending.exit_code();
            display.end(code, &super::failure(&error), &error.to_string());
            ExitCode::from(code)
        }
    }
}

fn arrived_text(a: &Arrived) -> String {
    format!(
        "{:?} has come in {:.2} s and runs here: {} data pages, {} zero pages; control socket {}",
        a.name,
        a.total_ms / 1e3,
        a.data_pages,
        a.zero_pages,
        a.control.display()
    )
}
