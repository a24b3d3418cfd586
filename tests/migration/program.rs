//! Child processes whose output is kept in files, and waiting for what they do.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// Long enough for any machine; what is waited for comes much sooner.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Looks again and again until `test` gives something; panics with `what` when it never does.
pub fn until<T>(what: &str, mut test: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = test() {
            return value;
        }
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(3));
    }
}

/// A process. Killed and reaped when dropped.
pub struct Program {
    child: Child,
    name: String,
    out: PathBuf,
    err: PathBuf,
}

/// How a process ended.
#[derive(Debug)]
pub struct End {
    /// The exit code; of a process that a signal killed, minus the signal's number.
    pub code: i32,
    pub stderr: String,
    /// The JSON objects that it printed.
    pub lines: Vec<Value>,
}

impl End {
    /// The last JSON line, which is the result.
    pub fn result(&self) -> &Value {
        let last = self.lines.last().unwrap_or_else(|| panic!("no JSON on standard output: {self:?}"));
        assert_eq!(last["event"], "result", "{self:?}");
        assert_eq!(last["exit_code"], self.code, "{self:?}");
        &last["result"]
    }

    /// Ended with this code, and says all of `words` on standard error.
    #[track_caller]
    pub fn expect(&self, code: i32, words: &[&str]) -> &Self {
        assert_eq!(self.code, code, "{self:#?}");
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} is not in {:?}", self.stderr);
        }
        self
    }
}

impl Program {
    /// Starts `command` with its output in files of `dir`.
    pub fn start(dir: &Path, name: &str, mut command: Command) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("{name}.{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let (out, err) = (dir.join(format!("{name}.out")), dir.join(format!("{name}.err")));
        command.stdin(Stdio::null()).env_remove("VMFERRY_LOG");
        command.stdout(File::create(&out).unwrap()).stderr(File::create(&err).unwrap());
        let child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        Self { child, name, out, err }
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Ends it as a crash would.
    pub fn crash(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub fn stderr(&self) -> String {
        fs::read_to_string(&self.err).unwrap_or_default()
    }

    /// The whole JSON lines that it has printed so far.
    pub fn lines(&self) -> Vec<Value> {
        let text = fs::read_to_string(&self.out).unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits until it has printed a JSON line that `pick` takes.
    pub fn await_line<T>(&mut self, what: &str, pick: impl Fn(&Value) -> Option<T>) -> T {
        until(what, || {
            let ended = !self.is_running();
            let found = self.lines().iter().find_map(&pick);
            assert!(found.is_some() || !ended, "{} ended before {what}: {}", self.name, self.stderr());
            found
        })
    }

    /// Waits until a note (a line of `--json`) contains `text`; gives the note.
    pub fn await_note(&mut self, text: &str) -> String {
        self.await_line(&format!("the note {text:?}"), |line| {
            line["text"].as_str().filter(|note| note.contains(text)).map(str::to_owned)
        })
    }

    /// Waits until it has ended by itself.
    pub fn end(&mut self) -> End {
        let name = self.name.clone();
        let status = until(&format!("{name} ends"), || self.child.try_wait().unwrap());
        let code = status.code().unwrap_or_else(|| -status.signal().unwrap_or(0));
        End { code, stderr: self.stderr(), lines: self.lines() }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
