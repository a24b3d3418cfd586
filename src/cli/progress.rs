//! What a person, or a program, sees of a mover at work.

use std::io::IsTerminal;
use std::time::Duration;

use bytesize::ByteSize;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::control::LinkState;
use crate::control::mover::MoverProgress;
use crate::migrate::outcome::MigrateError;
use crate::migrate::report::Observer;
use crate::migrate::service::Board;

use super::exit::Exit;
use super::output;

/// Shows progress on standard error, events as JSON on standard output, both or neither. A closed
/// standard output or error changes nothing.
pub struct Display {
    program: &'static str,
    bar: Option<ProgressBar>,
    notes: bool,
    json: bool,
    board: Board,
}

#[derive(Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
enum Line<'a, T> {
    Progress { progress: &'a MoverProgress },
    Note { text: &'a str },
    Result { exit_code: u8, result: &'a T },
}

impl Display {
    /// For `program`; `quiet` leaves errors only, `json` puts one object a line on standard output.
    pub fn new(program: &'static str, quiet: bool, json: bool) -> Self {
        let bar = (!quiet && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10));
            if let Ok(style) = ProgressStyle::with_template("{spinner} {wide_msg}") {
                bar.set_style(style);
            }
            bar
        });
        Self { program, bar, notes: !quiet, json, board: Board::default() }
    }

    /// Where the control socket reads the progress.
    pub fn board(&self) -> Board {
        self.board.clone()
    }

    /// The last word of a success: JSON as the last line of standard output, or `text` for people.
    pub fn done<T: Serialize>(&mut self, result: &T, text: &str) {
        self.clear();
        if self.json {
            output::json(&Line::Result { exit_code: Exit::Done.code(), result });
        } else if self.notes {
            for line in text.lines() {
                output::complain(self.program, line);
            }
        }
    }

    /// The last word of a failure, on standard error in any case; gives the exit code.
    pub fn failed(&mut self, error: &MigrateError) -> Exit {
        self.clear();
        let exit = Exit::from(error.ending);
        if self.json {
            output::json(&Line::Result { exit_code: exit.code(), result: error });
        }
        output::complain(self.program, error);
        exit
    }

    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Observer for Display {
    fn progress(&mut self, progress: &MoverProgress) {
        self.board.show(progress);
        if let Some(bar) = &self.bar {
            bar.set_message(progress_line(progress));
            bar.tick();
        }
        if self.json {
            output::json(&Line::Progress::<()> { progress });
        }
    }

    fn note(&mut self, text: &str) {
        if self.json {
            output::json(&Line::Note::<()> { text });
        } else if let Some(bar) = &self.bar {
            bar.suspend(|| output::complain(self.program, text));
        } else if self.notes {
            output::complain(self.program, text);
        }
    }
}

/// Pass, sent, left, dirty rate, bandwidth, expected downtime, time.
fn progress_line(p: &MoverProgress) -> String {
    if p.link != LinkState::Up {
        return format!("{}: connection to {} {}", p.phase, p.dest, p.link);
    }
    let rate = |bytes: Option<u64>| bytes.map_or_else(|| "?".to_owned(), |b| format!("{}/s", size(b)));
    let downtime = p.expected_downtime_ms.map_or_else(|| "?".to_owned(), |ms| format!("{ms} ms"));
    format!(
        "{} pass {}  sent {}  left {}  dirtied {}  link {}  downtime now {}  {:.1} s",
        p.phase,
        p.pass,
        size(p.sent_bytes),
        size(p.left_bytes),
        rate(p.dirty_bytes_per_s),
        rate(p.bandwidth_bytes_per_s),
        downtime,
        Duration::from_millis(p.elapsed_ms).as_secs_f64(),
    )
}

/// Bytes in binary units, short.
pub fn size(bytes: u64) -> String {
    ByteSize::b(bytes).display().iec().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::mover::MoverSettings;

    #[test]
    fn the_line_shows_all_and_no_percentage() {
        let progress = MoverProgress {
            phase: "precopy".into(),
            dest: "tcp:b:7070".into(),
            attempt: None,
            pass: 3,
            sent_bytes: 512 << 20,
            left_bytes: 3 << 20,
            dirty_bytes_per_s: Some(100 << 20),
            bandwidth_bytes_per_s: None,
            expected_downtime_ms: Some(42),
            link: LinkState::Up,
            elapsed_ms: 1500,
            settings: MoverSettings { downtime_ms: 300, bandwidth_bytes_per_s: None },
        };
        assert_eq!(
            progress_line(&progress),
            "precopy pass 3  sent 512.0 MiB  left 3.0 MiB  dirtied 100.0 MiB/s  link ?  downtime now 42 ms  1.5 s"
        );
    }
}
