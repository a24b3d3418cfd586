//! `vmctl`: asks and tells a `vmrun` or a `vmsend` on its control socket.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, UNIX_EPOCH};

use clap::{Parser, Subcommand, ValueHint};
use serde::Serialize;
use serde_json::json;

use super::exit::{self, Exit};
use super::flags;
use super::manual::Manual;
use super::output;
use super::status;
use super::units::{Rate, Size, duration};
use crate::control::mover::{MoverEvent, MoverProgress, MoverRequest};
use crate::control::{Client, ClientError, Event, FailureCode, LinkState, Status};
use crate::state::MachineDescription;
use crate::switchover::OperatorWord;

const NAME: &str = "vmctl";

/// Ask and tell a hosted microVM, or a migration under way
#[derive(Debug, Parser)]
#[command(
    name = NAME,
    version,
    long_about = LONG_ABOUT,
    after_long_help = MANUAL.after_help(),
    override_usage = "vmctl [OPTIONS] <SOCK> <COMMAND>",
    disable_help_subcommand = true
)]
pub struct Args {
    /// Control socket of a vmrun or a vmsend
    #[arg(value_name = "SOCK", value_hint = ValueHint::FilePath)]
    pub socket: PathBuf,

    /// Print JSON on standard output, one object a line
    #[arg(long, global = true, display_order = 100)]
    pub json: bool,

    /// Give up when there is no answer after this time
    ///
    /// Every program answers within 100 ms. What takes longer (a pause) says so, and is then waited
    /// for as long again.
    #[arg(
        long,
        global = true,
        value_name = "TIME",
        default_value = "10s",
        value_parser = duration,
        display_order = 100
    )]
    pub timeout: Duration,

    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What can be asked.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Say who has the guest and what it does, or how far the migration is
    Status,
    /// Pause the guest until it is resumed; returns when every vCPU has stopped
    Pause,
    /// Let the guest go on
    ///
    /// Refused while the guest was committed to another host, which may run it: two copies of one
    /// guest destroy its data. If that host is certain never to run it again (it is powered off,
    /// its network is cut), --force --peer-fenced says so, and the guest goes on here.
    Resume {
        /// Do it although a migration has paused the guest, or (with --peer-fenced) has sent it away
        #[arg(long)]
        force: bool,
        /// The other host is certain not to run the guest: by your word, nothing here checks it
        #[arg(long, requires = "force")]
        peer_fenced: bool,
    },
    /// End the guest and its vmrun; returns when that is under way
    Quit {
        /// Do it also while a migration is under way or the guest may be the only copy
        #[arg(long)]
        force: bool,
    },
    /// Print what happens, until the program ends
    Events,
    /// Describe the machine as another host must be able to make it
    Machine,
    /// vmsend: say how far the migration is
    Progress,
    /// vmsend: change settings of the migration under way
    #[command(arg_required_else_help = true)]
    Set {
        /// Let the guest stand still for no longer than this
        #[arg(long, value_name = "TIME", value_parser = duration)]
        downtime: Option<Duration>,
        /// Send no more than this; 0 is no limit
        #[arg(long, value_name = "RATE")]
        bwlimit: Option<Rate>,
    },
    /// vmsend: give up; the guest stays at the source
    Cancel,
    /// vmsend: switch over as soon as possible, whatever downtime that costs
    SwitchNow,
}

const LONG_ABOUT: &str = "\
Ask and tell a hosted microVM, or a migration under way.

SOCK is the control socket of a vmrun (for status, pause, resume, quit, events, machine) or of a \
vmsend (for status, progress, set, switch-now, cancel, events).";

/// What the help and the man page say beside the flags.
pub const MANUAL: Manual = Manual {
    values: &[flags::TIME, flags::RATE],
    examples: &[
        ("who has the guest?", "vmctl /run/a.sock status"),
        ("what happens, for a program", "vmctl /run/a.sock --json events"),
        ("change a migration under way", "vmctl /run/send.sock set --downtime 50ms --bwlimit 1Gbit"),
        (
            "bring a guest back whose new host was powered off for good",
            "vmctl /run/a.sock resume --force --peer-fenced",
        ),
    ],
    exits: exit::VMCTL_CODES,
    signals: "",
    files: &[],
    environment: &[],
    see_also: &["vmrecv", "vmrun", "vmsend"],
};

/// What went wrong.
#[derive(Debug, thiserror::Error)]
enum CtlError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("{0}")]
    WrongProgram(String),
}

impl CtlError {
    fn code(&self) -> FailureCode {
        match self {
            Self::Client(e) => e.code().unwrap_or(FailureCode::Failed),
            Self::WrongProgram(_) => FailureCode::Usage,
        }
    }

    fn exit(&self) -> Exit {
        match self.code() {
            FailureCode::Usage => Exit::Usage,
            FailureCode::Refused | FailureCode::Busy | FailureCode::Unsuitable => Exit::Refused,
            FailureCode::Failed => Exit::Failed,
        }
    }
}

/// The program.
pub fn main() -> ExitCode {
    let args = Args::parse();
    let exit = match ask(&args) {
        Ok(()) => Exit::Done,
        Err(e) => {
            if args.json {
                output::json(&json!({ "error": { "code": e.code(), "message": e.to_string() } }));
            }
            output::complain(NAME, &e);
            e.exit()
        }
    };
    exit.into()
}

fn ask(args: &Args) -> Result<(), CtlError> {
    let mut client = Client::connect_within(&args.socket, NAME, args.timeout)?;
    let mover = client.server().program == "vmsend";
    check_program(&client, &args.command, mover)?;
    let show = Show { json: args.json };
    match &args.command {
        Command::Status if mover => show.progress(&client.mover_progress()?),
        Command::Status => show.status(&client.status()?),
        Command::Pause => show.status(&client.pause(false)?),
        Command::Resume { force, peer_fenced } => {
            let word = OperatorWord { force: *force, peer_fenced: *peer_fenced };
            show.status(&client.resume(word)?)
        }
        Command::Quit { force } => {
            client.quit(*force)?;
            show.done("the guest is ended")
        }
        Command::Events => events(&mut client, &show, mover)?,
        Command::Machine => show.machine(&client.machine()?),
        Command::Progress => show.progress(&client.mover_progress()?),
        Command::Set { downtime, bwlimit } => {
            let downtime_ms = downtime.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX));
            let now = client.mover_set(downtime_ms, bwlimit.map(|r| r.0))?;
            let limit = now.bandwidth_bytes_per_s.map_or("none".into(), |r| Rate(r).to_string());
            show.either(&now, || format!("downtime {} ms, bandwidth limit {limit}", now.downtime_ms));
        }
        Command::Cancel => {
            client.mover_cancel()?;
            show.done("cancelled: the guest stays at the source")
        }
        Command::SwitchNow => {
            client.mover_switch_now()?;
            show.done("it switches over as soon as it can")
        }
    }
    Ok(())
}

/// A vmsend's commands are for a vmsend, and a vmrun's for a vmrun.
fn check_program(client: &Client, command: &Command, mover: bool) -> Result<(), CtlError> {
    let wants = match command {
        Command::Status | Command::Events => return Ok(()),
        Command::Pause | Command::Resume { .. } | Command::Quit { .. } | Command::Machine => "vmrun",
        Command::Progress | Command::Set { .. } | Command::Cancel | Command::SwitchNow => "vmsend",
    };
    if (wants == "vmsend") == mover {
        return Ok(());
    }
    let (path, program) = (client.path().display(), &client.server().program);
    Err(CtlError::WrongProgram(format!(
        "{path}: this is the socket of a {program}; that command is for a {wants}"
    )))
}

fn events(client: &mut Client, show: &Show, mover: bool) -> Result<(), CtlError> {
    if mover {
        let _: (serde_json::Value, _) = client.call(&MoverRequest::Events, &[])?;
        for event in client.events::<MoverEvent>() {
            let event = event?;
            let text =
                || format!("{} {}: {}", time(event.time_ms), event.event, progress_line(&event.progress));
            if !show.either(&event, text) {
                break;
            }
        }
        return Ok(());
    }
    client.subscribe()?;
    for event in client.events::<Event>() {
        let event = event?;
        let text = || {
            let detail = event.detail.as_deref().map(|d| format!(" ({d})")).unwrap_or_default();
            format!("{} {}: {}{detail}", time(event.time_ms), event.event, event.status.summary)
        };
        if !show.either(&event, text) {
            break;
        }
    }
    Ok(())
}

fn time(ms: u64) -> String {
    humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_millis(ms.min(u64::from(u32::MAX) * 1000)))
        .to_string()
}

/// Prints results for people or for programs.
struct Show {
    json: bool,
}

impl Show {
    fn either(&self, value: &impl Serialize, text: impl FnOnce() -> String) -> bool {
        if self.json { output::json(value) } else { output::line(text()) }
    }

    fn done(&self, text: &str) {
        self.either(&json!({}), || text.to_owned());
    }

    fn status(&self, status: &Status) {
        self.either(status, || status::text(status));
    }

    fn machine(&self, machine: &MachineDescription) {
        self.either(machine, || {
            let memory = Size(machine.ram.total_bytes());
            let mut text =
                format!("{} ({})\n  vCPUs: {}, memory: {memory}", machine.name, machine.uuid, machine.vcpus);
            text += &format!(
                "\n  TSC {} kHz, {} MSRs, {} CPUID entries",
                machine.tsc.khz,
                machine.msrs.len(),
                machine.cpuid.len()
            );
            for device in &machine.devices {
                let host = device.host.as_deref().map(|h| format!(" at {h}")).unwrap_or_default();
                text += &format!("\n  {} ({} version {}){host}", device.id, device.kind, device.version);
            }
            text
        });
    }

    fn progress(&self, progress: &MoverProgress) {
        self.either(progress, || progress_line(progress));
    }
}

fn progress_line(p: &MoverProgress) -> String {
    let rate = |r: Option<u64>| r.map_or("?".to_owned(), |r| Rate(r).to_string());
    let downtime = p.expected_downtime_ms.map_or("?".to_owned(), |ms| format!("{ms} ms"));
    if p.link != LinkState::Up {
        let (phase, dest, left, link) = (&p.phase, &p.dest, Size(p.left_bytes), &p.link);
        return format!("{phase} to {dest}: connection {link}, left {left}");
    }
    format!(
        "{} to {}: pass {}, sent {}, left {}, dirty rate {}, bandwidth {}, expected downtime {downtime} (aim {} ms), {:.1} s",
        p.phase,
        p.dest,
        p.pass,
        Size(p.sent_bytes),
        Size(p.left_bytes),
        rate(p.dirty_bytes_per_s),
        rate(p.bandwidth_bytes_per_s),
        p.settings.downtime_ms,
        p.elapsed_ms as f64 / 1000.0
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
        assert!(parse("vmctl a.sock resume --peer-fenced").is_err());
        assert!(parse("vmctl a.sock set").is_err());
        assert!(parse("vmctl a.sock --json status").is_ok());
        assert!(parse("vmctl a.sock events --json --timeout 2s").is_ok());
    }
}
