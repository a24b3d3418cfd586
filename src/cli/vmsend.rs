//! The command line of `vmsend`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum, ValueHint};

use crate::control::Client;
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
use super::progress::Display;
use super::units::{Rate, duration};
use super::{status, summary};

/// Move a running microVM to another host
#[derive(Clone, Debug, Parser)]
#[command(
    name = NAME,
    version,
    long_about = LONG_ABOUT,
    after_long_help = MANUAL.after_help(),
    override_usage = "vmsend [OPTIONS] --vm <SOCK> <DEST>\n       vmsend [OPTIONS] --vm <SOCK> --resume [--revoke] [DEST]\n       vmsend --vm <SOCK> --status [--json]"
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
    /// program's own standard input and output. An IPv6 address is put in brackets. With --resume it is
    /// where the destination is reached now, if no longer where it was.
    #[arg(value_name = "DEST", required_unless_present_any = ["resume", "status"])]
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
    ///
    /// In hybrid mode the guest then goes over, and the rest follows. A pass under way is cut short, but in precopy with
    /// --on-timeout force: what it still sends makes that downtime shorter.
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

    /// Postcopy: send the guest's kernel ahead for this long at most; 0s: not at all
    ///
    /// The code and the data of the guest's kernel, and then once what the guest has written to meanwhile, go while it
    /// still runs at the source: for these it would wait most, and most of them are never sent again. `switch-now` and
    /// --timeout end it as well. Without it (0s) the guest leaves at once.
    #[arg(
        long,
        value_name = "TIME",
        default_value = "5s",
        value_parser = duration,
        help_heading = SWITCHOVER
    )]
    pub warm_up: Duration,

    /// What to do when the downtime is not reached
    ///
    /// This also decides when 8 passes or more in a row, of at least 5 seconds in all, bring no
    /// improvement.
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
    /// 2 by default; 1 where vmsend may use one CPU only and the guest runs meanwhile, as it does in precopy. tcp: and unix:
    /// can have more than one; exec: and - carry pages on their one connection.
    #[arg(
        long,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=64),
        help_heading = CONNECTION
    )]
    pub channels: Option<u32>,

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
    /// Where it goes is asked of vmrun, unless DEST says otherwise. The destination is told to run the
    /// guest, or says that it does.
    #[arg(long, help_heading = RECOVERY)]
    pub resume: bool,

    /// Say who has the guest, what its migration does, and what it waits for; do nothing
    ///
    /// Asked of vmrun, and so answered whether or not a vmsend is at work. With --json it is the answer
    /// to `status` of docs/control.md.
    #[arg(long, conflicts_with_all = ["resume", "dest"], help_heading = RECOVERY)]
    pub status: bool,

    /// With --resume: ask for the guest back if the destination has not run it
    #[arg(long, requires = "resume", help_heading = RECOVERY)]
    pub revoke: bool,

    /// Try this long to reach the destination again; 1m, or for ever, by default
    ///
    /// When it is over, the exit code is 7 if it is not known whether the guest runs there, and 6 if
    /// it runs there and lacks pages; --resume goes on. The default is a minute in the first case, and
    /// for ever in the second, but a minute with exec:, whose command may never lead there again; - is
    /// not tried again.
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
    /// All after it, but its kernel: the guest moves at once and fetches its pages as it needs them
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
        ("the same, where a new vmrecv waits elsewhere", "vmsend --vm a.sock --resume tcp:127.0.0.1:7071"),
        ("what is waited for?", "vmsend --vm /run/a.sock --status"),
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

/// Two, so that reading and sending overlap; not more than CPUs while the guest runs beside them.
fn default_channels(beside_the_guest: bool) -> u32 {
    match beside_the_guest {
        true => std::thread::available_parallelism().map_or(2, |cpus| cpus.get().min(2) as u32),
        false => 2,
    }
}

impl Args {
    fn options(&self) -> SendOptions {
        // What is taken up again has been paused here, and mostly runs at the destination.
        let beside_the_guest = !self.resume && self.mode != ModeArg::Postcopy;
        SendOptions {
            vm: self.vm.clone(),
            dest: self.dest.clone().unwrap_or(Address::Stdio),
            redirect: self.dest.clone().filter(|_| self.resume),
            channels: self.channels.unwrap_or_else(|| default_channels(beside_the_guest)),
            verify: self.verify,
            keep_source: self.keep_source,
            peer_timeout: self.peer.peer_timeout,
            connect_timeout: self.connect_timeout,
            recover_timeout: self.recover_timeout,
            warm_up: self.warm_up,
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
    if args.status {
        return match status::print(&args.vm, args.output.json) {
            Ok(()) => Exit::Done.into(),
            Err(error) => {
                let left = status::left_behind(&args.vm).map(|left| format!("; {left}")).unwrap_or_default();
                complain(NAME, format_args!("{error}{left}"));
                Exit::Failed.into()
            }
        };
    }
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
    if args.resume
        && let Some(lost) = lost_with_its_vmrun(&args.vm)
    {
        return Display::new(NAME, args.output.quiet, args.output.json).failed(&lost).into();
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
            display.done(&summary, &summary::text(&summary));
            Exit::Done
        }
        Err(error) => display.failed(&error),
    };
    exit.into()
}

/// A migration that cannot be taken up again, since the vmrun at `vm` has ended with its guest committed.
fn lost_with_its_vmrun(vm: &Path) -> Option<MigrateError> {
    let error = Client::connect(vm, NAME).err()?;
    let left = status::left_behind(vm)?;
    Some(MigrateError::new(Ending::Unknown, Side::Source, format!("{error}; {left}")))
}

/// Where a migration that is taken up again goes is asked of vmrun first, unless that is said.
fn confine(args: &Args, options: &SendOptions) -> std::io::Result<()> {
    let is_asked = args.resume && args.dest.is_none();
    let recorded = if is_asked { handover::recorded_destination(&args.vm) } else { None };
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

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn no_more_channels_than_cpus_while_the_guest_runs() {
        use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
        use nix::unistd::Pid;
        let this = Pid::from_raw(0);
        let all = sched_getaffinity(this).unwrap();
        let may: Vec<usize> = (0..CpuSet::count()).filter(|cpu| all.is_set(*cpu).unwrap()).collect();
        for cpus in 1..=may.len().min(3) {
            let few = std::thread::spawn({
                let may = may[..cpus].to_vec();
                move || {
                    let mut set = CpuSet::new();
                    may.iter().for_each(|cpu| set.set(*cpu).unwrap());
                    sched_setaffinity(this, &set).unwrap();
                    ["", "--mode hybrid", "--mode postcopy", "--resume", "--channels 7"].map(|words| {
                        let line = format!("vmsend --vm a {words} tcp:b:1");
                        Args::try_parse_from(line.split_whitespace()).unwrap().options().channels
                    })
                }
            });
            let beside_the_guest = cpus.min(2) as u32;
            assert_eq!(few.join().unwrap(), [beside_the_guest, beside_the_guest, 2, 2, 7]);
        }
    }

    #[test]
    fn the_flags_fit_together() {
        Args::command().debug_assert();
        let parse = |line: &str| Args::try_parse_from(line.split_whitespace());
        assert!(parse("vmsend --vm a").is_err());
        assert!(parse("vmsend --vm a --resume tcp:b:1").is_ok());
        assert!(parse("vmsend --vm a --revoke tcp:b:1").is_err());
        assert!(parse("vmsend --vm a --status tcp:b:1").is_err());
        assert!(parse("vmsend --vm a --status --resume").is_err());
        assert!(parse("vmsend --vm a --status --json").is_ok());
        assert!(parse("vmsend --vm a --resume --revoke").is_ok());
        assert!(parse("vmsend --vm a --channels 65 tcp:b:1").is_err());
        let args = parse("vmsend --vm a -q --bwlimit 1Gbit tcp:b:1").unwrap();
        assert_eq!((args.bwlimit, args.output.quiet), (Rate(125_000_000), true));
    }
}
