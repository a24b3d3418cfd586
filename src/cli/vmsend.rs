//! The command line of `vmsend`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum, ValueHint};

use crate::migrate::convergence::{Mode, OnTimeout, Policy};
use crate::migrate::options::SendOptions;
use crate::migrate::outcome::{Ending, MigrateError, Side, Summary};
use crate::migrate::service::MoverService;
use crate::migrate::settings::Settings;
use crate::migrate::{handover, source};
use crate::transport::{Address, needs_insecure};

use super::confine::{self, SandboxArgs};
use super::exit::{self, Exit};
use super::flags::{self, CONNECTION, OutputArgs, PeerArgs};
use super::log;
use super::manual::Manual;
use super::output::complain;
use super::progress::{Display, size};
use super::units::{Rate, duration};

/// Move a running microVM to another host
#[derive(Clone, Debug, Parser)]
#[command(
    name = NAME,
    version,
    long_about = LONG_ABOUT,
    after_long_help = MANUAL.after_help(),
    override_usage = "vmsend [OPTIONS] --vm <SOCK> <DEST>\n       vmsend [OPTIONS] --vm <SOCK> --resume [--revoke]"
)]
pub struct Args {
    /// Control socket of the vmrun that has the guest
    #[arg(long, value_name = "SOCK", value_hint = ValueHint::FilePath)]
    pub vm: PathBuf,

    /// Make a control socket for vmctl: progress, set, switch-now, cancel, events
    ///
    /// It is made with mode 0600, serves the same user and root, and is removed at the end.
    #[arg(long, value_name = "SOCK", value_hint = ValueHint::FilePath)]
    pub control: Option<PathBuf>,

    /// Where the guest goes: tcp:HOST:PORT, unix:PATH, exec:COMMAND or -
    ///
    /// A vmrecv waits there. `exec:` runs a command with sh and speaks with it through its standard
    /// input and output, as in exec:'ssh hostb vmrecv --control /run/vm.sock -'; `-` is this
    /// program's own standard input and output. An IPv6 address is put in brackets.
    #[arg(value_name = "DEST", required_unless_present = "resume", conflicts_with = "resume")]
    pub dest: Option<Address>,

    /// When pages are sent
    #[arg(long, value_enum, value_name = "MODE", default_value = "precopy", help_heading = SWITCHOVER)]
    pub mode: ModeArg,

    /// Let the guest stand still for no longer than this
    ///
    /// Passes over memory are made until the expected downtime is below this, and on as long as
    /// each pass clearly shortens it. It is an aim: what the last pass and the state take is
    /// estimated from the passes before.
    #[arg(
        long,
        value_name = "TIME",
        default_value = "300ms",
        value_parser = duration,
        help_heading = SWITCHOVER
    )]
    pub downtime: Duration,

    /// After this time, do what --on-timeout says; no limit by default
    #[arg(long, value_name = "TIME", value_parser = duration, help_heading = SWITCHOVER)]
    pub timeout: Option<Duration>,

    /// After this many passes, do what --on-timeout says; no limit by default
    #[arg(
        long,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..),
        help_heading = SWITCHOVER
    )]
    pub max_passes: Option<u32>,

    /// What to do when the downtime is not reached
    ///
    /// This also decides when 8 passes in a row bring no improvement.
    #[arg(long, value_enum, value_name = "WHAT", default_value = "cancel", help_heading = SWITCHOVER)]
    pub on_timeout: OnTimeoutArg,

    /// Compare digests of all RAM before the switchover
    ///
    /// The guest stands still while both sides read all memory in use: seconds, for a few GiB.
    #[arg(long, help_heading = SWITCHOVER)]
    pub verify: bool,

    /// Leave the source's vmrun and the guest's remains, instead of ending it
    #[arg(long, help_heading = SWITCHOVER)]
    pub keep_source: bool,

    /// Send no more than this; 0 is no limit
    #[arg(long, value_name = "RATE", default_value = "0", help_heading = CONNECTION)]
    pub bwlimit: Rate,

    /// Number of connections that carry pages, 1 to 64
    ///
    /// tcp: and unix: can have more than one; exec: and - carry pages on their one connection.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 2,
        value_parser = clap::value_parser!(u32).range(1..=64),
        help_heading = CONNECTION
    )]
    pub channels: u32,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub peer: PeerArgs,

    /// Give up connecting after this time
    #[arg(
        long,
        value_name = "TIME",
        default_value = "5s",
        value_parser = duration,
        help_heading = CONNECTION
    )]
    pub connect_timeout: Duration,

    /// Go on with a migration whose vmsend ended after the guest was committed
    ///
    /// Where it goes is asked of vmrun. The destination is told to run the guest, or says that it
    /// does.
    #[arg(long, help_heading = RECOVERY)]
    pub resume: bool,

    /// With --resume: ask for the guest back if the destination has not run it
    // Both: clap waives a requirement that conflicts with what is given.
    #[arg(long, requires = "resume", conflicts_with = "dest", help_heading = RECOVERY)]
    pub revoke: bool,

    /// Try this long to reach the destination again; 1m, or for ever, by default
    ///
    /// When it is over, the exit code is 7 if it is not known whether the guest runs there, and 6 if
    /// it runs there and lacks pages; --resume goes on. The default is a minute in the first case, and
    /// for ever in the second.
    #[arg(long, value_name = "TIME", value_parser = duration, help_heading = RECOVERY)]
    pub recover_timeout: Option<Duration>,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub sandbox: SandboxArgs,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub output: OutputArgs,
}

/// `--on-timeout`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnTimeoutArg {
    /// Give up; the guest goes on at the source (exit code 4)
    Cancel,
    /// Switch over all the same, whatever the downtime
    Force,
    /// Switch over at once, and send the rest after the guest
    Postcopy,
}

/// `--mode`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ModeArg {
    /// All before the guest runs at the destination
    Precopy,
    /// Passes first; what they cannot keep up with, after it
    Hybrid,
    /// All after it: the guest moves at once and fetches its pages as it needs them
    Postcopy,
}

const NAME: &str = "vmsend";
const SWITCHOVER: &str = "Switchover";
const RECOVERY: &str = "Recovery";

const LONG_ABOUT: &str = "\
Move a running microVM to another host.

RAM is sent while the guest runs, then again what the guest has dirtied meanwhile, until what is \
left can be sent within --downtime. Then the guest is paused, the rest and the state of its devices \
and vCPUs follow, and the destination restores all of it before it acknowledges. Only then is the \
guest committed, and only then does the destination let it run. Whatever fails before, the guest \
goes on at the source; whatever fails after, at no time do two copies run.";

/// What the help and the man page say beside the flags.
pub const MANUAL: Manual = Manual {
    values: &[flags::TIME, flags::RATE],
    examples: &[
        ("move a guest over loopback", "vmsend --vm /run/a.sock tcp:127.0.0.1:7070"),
        ("to another host, in the clear", "vmsend --vm /run/a.sock --insecure tcp:hostb:7070"),
        (
            "through ssh, which encrypts and authenticates",
            "vmsend --vm a.sock exec:'ssh hostb vmrecv --control /run/b.sock -'",
        ),
        (
            "aim for 50 ms of downtime, and leave bandwidth to others",
            "vmsend --vm a.sock --downtime 50ms --bwlimit 200M tcp:127.0.0.1:7070",
        ),
        (
            "for a guest that may be too busy: switch over after 30 s all the same",
            "vmsend --vm a.sock --timeout 30s --on-timeout postcopy unix:b.mig",
        ),
        (
            "move at once, and let pages follow as they are needed",
            "vmsend --vm a.sock --mode postcopy tcp:127.0.0.1:7070",
        ),
        (
            "settle a migration whose vmsend was killed, or go on after exit code 6 or 7",
            "vmsend --vm /run/a.sock --resume",
        ),
    ],
    exits: exit::SEND_CODES,
    signals: "SIGINT and SIGTERM cancel the migration until the guest is committed; after that they are \
              refused with a message, and the migration goes on.",
    files: &[(
        "SOCK.session.json",
        "beside vmrun's control socket: vmrun's record of who owns the guest, there while the guest is \
         committed to another host",
    )],
    environment: &[(flags::LOG_VARIABLE, "the LEVEL of --log, where that is not given")],
    see_also: &["vmctl", "vmrecv", "vmrun"],
};

impl Args {
    fn options(&self) -> SendOptions {
        SendOptions {
            vm: self.vm.clone(),
            dest: self.dest.clone().unwrap_or(Address::Stdio),
            channels: self.channels,
            verify: self.verify,
            keep_source: self.keep_source,
            peer_timeout: self.peer.peer_timeout,
            connect_timeout: self.connect_timeout,
            recover_timeout: self.recover_timeout,
            policy: Policy {
                downtime: self.downtime,
                timeout: self.timeout,
                max_passes: self.max_passes,
                on_timeout: match self.on_timeout {
                    OnTimeoutArg::Cancel => OnTimeout::Cancel,
                    OnTimeoutArg::Force => OnTimeout::Force,
                    OnTimeoutArg::Postcopy => OnTimeout::Postcopy,
                },
                switch_now: false,
                mode: match self.mode {
                    ModeArg::Precopy => Mode::Precopy,
                    ModeArg::Hybrid => Mode::Hybrid,
                    ModeArg::Postcopy => Mode::Postcopy,
                },
            },
            bandwidth_limit: self.bwlimit.0,
        }
    }
}

/// Runs the program.
pub fn main() -> ExitCode {
    let args = Args::parse();
    log::start(args.output.log.level);
    let dest = args.dest.as_ref();
    if let Some(why) = dest.and_then(needs_insecure).filter(|_| !args.peer.insecure) {
        complain(NAME, why);
        return Exit::Usage.into();
    }
    if args.output.json && dest == Some(&Address::Stdio) {
        complain(NAME, "--json and the stream cannot both have standard output");
        return Exit::Usage.into();
    }
    let options = args.options();
    if args.verify && options.wants_postcopy() {
        complain(
            NAME,
            "--verify compares all RAM before the guest runs, and postcopy sends some of it after",
        );
        return Exit::Usage.into();
    }
    if !args.sandbox.no_sandbox
        && let Err(e) = confine(&args, &options)
    {
        complain(NAME, format_args!("the sandbox cannot be entered: {e} (--no-sandbox does without)"));
        return Exit::Failed.into();
    }
    let settings = Settings::new(options.policy, options.bandwidth_limit);
    let mut display = Display::new(NAME, args.output.quiet, args.output.json);
    let exit = match send(&args, &options, &settings, &mut display) {
        Ok(summary) => {
            display.done(&summary, &summary_text(&summary));
            Exit::Done
        }
        Err(error) => display.failed(&error),
    };
    exit.into()
}

/// Where a migration that is taken up again goes is asked of vmrun first.
fn confine(args: &Args, options: &SendOptions) -> std::io::Result<()> {
    let recorded = if args.resume { handover::recorded_destination(&args.vm) } else { None };
    let dest = recorded.unwrap_or_else(|| options.dest.clone());
    confine::sender(&args.vm, &dest, args.control.as_deref())
}

fn send(
    args: &Args,
    options: &SendOptions,
    settings: &Settings,
    display: &mut Display,
) -> Result<Summary, MigrateError> {
    let here = |e: String| MigrateError::new(Ending::Failed, Side::Source, e);
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register_usize(signal, settings.signal_slot(), signal as usize)
            .map_err(|e| here(e.to_string()))?;
    }
    if args.revoke {
        settings.want_back();
    }
    let service = match &args.control {
        Some(path) => Some(
            MoverService::start(path, settings.clone(), display.board()).map_err(|e| here(e.to_string()))?,
        ),
        None => None,
    };
    let result = match args.resume {
        true => handover::resume(options, settings.clone(), display),
        false => source::send(options, settings.clone(), display),
    };
    if let Some(service) = service {
        let source_has_it = matches!(&result, Err(e) if !matches!(e.ending, Ending::Unknown | Ending::Resumable | Ending::Lost));
        service.end(source_has_it);
    }
    result
}

/// The closing summary for people.
fn summary_text(s: &Summary) -> String {
    let d = &s.downtime;
    let waits = s.latency.as_ref().map_or_else(String::new, |latency| {
        let us = |name: &str| latency.get(name).and_then(serde_json::Value::as_u64).unwrap_or(0);
        format!(
            "\n{} pages came after the guest, which waited for {}: p50 {} µs, p90 {} µs, p99 {} µs, max {} µs, {:.1} ms in all",
            s.postcopy_pages.unwrap_or(0),
            us("count"),
            us("p50_us"),
            us("p90_us"),
            us("p99_us"),
            us("max_us"),
            us("total_us") as f64 / 1e3
        )
    });
    format!(
        "moved in {:.2} s: {} passes, {} on the wire over {} channel{}, {} data pages, {} zero pages of {} RAM\n\
         downtime {:.1} ms: pause {:.1}, export {:.1}, last pass {:.1}, verify {:.1}, import {:.1}, synchronise {:.1}, \
         ready {:.1}, fence {:.1}, run {:.1}{waits}",
        s.total_ms / 1e3,
        s.passes,
        size(s.wire_bytes),
        s.channels.max(1),
        if s.channels > 1 { "s" } else { "" },
        s.data_pages,
        s.zero_pages,
        size(s.memory_bytes),
        d.total_ms,
        d.pause_ms,
        d.export_ms,
        d.last_pass_ms,
        d.verify_ms,
        d.import_ms,
        d.sync_ms,
        d.ready_ms,
        d.fence_ms,
        d.run_ms,
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
        assert!(parse("vmsend --vm a").is_err());
        assert!(parse("vmsend --vm a --resume tcp:b:1").is_err());
        assert!(parse("vmsend --vm a --revoke tcp:b:1").is_err());
        assert!(parse("vmsend --vm a --resume --revoke").is_ok());
        assert!(parse("vmsend --vm a --channels 65 tcp:b:1").is_err());
        let args = parse("vmsend --vm a -q --bwlimit 1Gbit tcp:b:1").unwrap();
        assert_eq!((args.bwlimit, args.output.quiet), (Rate(125_000_000), true));
    }
}
