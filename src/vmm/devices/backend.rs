//! What a serial port is connected to on the host.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::str::FromStr;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::openpty;
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::{getpgrp, tcgetpgrp, ttyname};

use crate::vmm::VmmError;

/// `--serial`: what the guest's serial port is connected to.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum SerialBackend {
    /// Output is dropped, there is no input.
    #[default]
    None,
    /// This process's standard input and output. A terminal is put into raw mode while the machine
    /// lives, but for Ctrl-C, which still ends `vmrun`.
    Stdio,
    /// Output is appended to a file, which is made if it is not there. No input.
    File(PathBuf),
    /// A new pseudo-terminal (`Machine::serial_path` tells which). What nobody reads is dropped.
    Pty,
}

/// Text that is no serial backend.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no serial port: use stdio, file:PATH, pty or none")]
pub struct NoSerialBackend(String);

impl FromStr for SerialBackend {
    type Err = NoSerialBackend;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "none" => Ok(Self::None),
            "stdio" => Ok(Self::Stdio),
            "pty" => Ok(Self::Pty),
            _ => match text.strip_prefix("file:") {
                Some(path) if !path.is_empty() => Ok(Self::File(path.into())),
                _ => Err(NoSerialBackend(text.into())),
            },
        }
    }
}

impl fmt::Display for SerialBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Stdio => f.write_str("stdio"),
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Pty => f.write_str("pty"),
        }
    }
}

/// A backend that has been opened.
pub(super) struct Opened {
    /// Where output goes.
    pub output: Option<File>,
    /// Whether output that would block is dropped, since nobody may ever read it.
    pub lossy: bool,
    /// Where input comes from.
    pub input: Option<File>,
    /// The path of the terminal that was made.
    pub path: Option<PathBuf>,
    /// What has to be kept, and undone at the end.
    pub keep: Keep,
}

/// Held while the backend is in use.
#[derive(Default)]
pub(super) struct Keep {
    /// The other end of a pseudo-terminal: without it, reads fail when nobody has it open.
    _slave: Option<OwnedFd>,
    terminal: Option<(OwnedFd, Termios)>,
}

impl Drop for Keep {
    fn drop(&mut self) {
        if let Some((terminal, saved)) = &self.terminal {
            let _ = tcsetattr(terminal, SetArg::TCSADRAIN, saved);
        }
    }
}

impl SerialBackend {
    /// Opens it. Nothing is read or written yet, but a file is made, and a terminal put into raw mode.
    pub(super) fn open(&self) -> Result<Opened, VmmError> {
        let none = Opened { output: None, lossy: false, input: None, path: None, keep: Keep::default() };
        let opened = match self {
            Self::None => Ok(none),
            Self::Stdio => open_stdio(),
            Self::File(path) => OpenOptions::new()
                .append(true)
                .create(true)
                .open(path)
                .map(|file| Opened { output: Some(file), ..none }),
            Self::Pty => open_pty(),
        };
        opened.map_err(|source| VmmError::Serial { backend: self.to_string(), source })
    }
}

fn open_stdio() -> io::Result<Opened> {
    let input = io::stdin().as_fd().try_clone_to_owned()?;
    let output = io::stdout().as_fd().try_clone_to_owned()?;
    let mut keep = Keep::default();
    let mut readable = true;
    if let Ok(saved) = tcgetattr(&input) {
        // A process in the background would be stopped for touching its terminal.
        readable = tcgetpgrp(&input) == Ok(getpgrp());
        if readable {
            let mut raw = saved.clone();
            cfmakeraw(&mut raw);
            raw.local_flags |= nix::sys::termios::LocalFlags::ISIG;
            raw.output_flags = saved.output_flags;
            tcsetattr(&input, SetArg::TCSANOW, &raw)?;
            keep.terminal = Some((input.try_clone()?, saved));
        }
    }
    let input = readable.then(|| File::from(input));
    Ok(Opened { output: Some(output.into()), lossy: false, input, path: None, keep })
}

fn open_pty() -> io::Result<Opened> {
    let pty = openpty(None, None)?;
    let mut raw = tcgetattr(&pty.slave)?;
    cfmakeraw(&mut raw);
    tcsetattr(&pty.slave, SetArg::TCSANOW, &raw)?;
    fcntl(&pty.master, FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK))?;
    let path = ttyname(&pty.slave)?;
    let master = File::from(pty.master);
    Ok(Opened {
        output: Some(master.try_clone()?),
        lossy: true,
        input: Some(master),
        path: Some(path),
        keep: Keep { _slave: Some(pty.slave), terminal: None },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        for text in ["none", "stdio", "pty", "file:/tmp/a b"] {
            assert_eq!(text.parse::<SerialBackend>().unwrap().to_string(), text);
        }
        for bad in ["", "file:", "tty", "file"] {
            assert!(bad.parse::<SerialBackend>().unwrap_err().to_string().contains("stdio, file:PATH"));
        }
    }
}
