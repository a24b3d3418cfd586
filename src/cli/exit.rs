//! Exit codes. Of the movers' they say who has the guest, so that a script need not read messages.

use std::process::ExitCode;

use crate::migrate::outcome::Ending;

/// How a program ends. The texts are in the man pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// 0.
    Done,
    /// 1.
    Failed,
    /// 2.
    Usage,
    /// 3.
    Refused,
    /// 4.
    NotConverged,
    /// 5.
    PeerFailed,
    /// 6.
    Resumable,
    /// 7.
    Unknown,
    /// 8.
    Lost,
    /// 9.
    Confined,
    /// 128 + the signal's number: 130 for SIGINT, 143 for SIGTERM.
    Signal(i32),
}

/// What each code of `vmsend` says, for its man page and its help.
pub const SEND_CODES: &[(Exit, &str)] = &[
    (Exit::Done, "done: the destination runs the guest"),
    (Exit::Failed, "failed: the source runs the guest"),
    (Exit::Usage, "usage: nothing was touched"),
    (Exit::Refused, "refused by the destination before anything was sent: both sides are untouched"),
    (Exit::NotConverged, "did not converge: the source runs the guest"),
    (Exit::PeerFailed, "the peer, the link or the protocol failed: the source runs the guest"),
    (Exit::Resumable, "interrupted, and resumable: the guest runs at the destination and lacks pages"),
    (Exit::Unknown, "outcome unknown: the source holds still, and the destination may run the guest"),
    (Exit::Lost, "the guest is lost"),
    (Exit::Confined, CONFINED),
    (Exit::Signal(2), "SIGINT was honoured: the source runs the guest"),
    (Exit::Signal(15), "SIGTERM was honoured: the source runs the guest"),
];

/// What both movers say of [`Exit::Confined`].
const CONFINED: &str = "the sandbox has refused a system call, which is named: the guest is with its vmrun, as \
                        after a kill, and `vmctl SOCK status` says in which state";

/// What each code of `vmrecv` says.
pub const RECV_CODES: &[(Exit, &str)] = &[
    (Exit::Done, "a guest has come and runs here"),
    (Exit::Failed, "failed: there is no guest here"),
    (Exit::Usage, "usage: nothing was touched"),
    (Exit::Refused, "this host cannot take the guest (only where no other can come: exec: and -)"),
    (Exit::PeerFailed, "the peer, the link or the protocol failed (likewise)"),
    (
        Exit::Resumable,
        "interrupted, and resumable: the guest runs here and lacks pages (only where the connection cannot come \
         again: exec: and -)",
    ),
    (Exit::Unknown, "outcome unknown: vmrun holds the guest here for the source's word"),
    (Exit::Lost, "vmrun has ended while it ran the guest, or was told to"),
    (Exit::Confined, CONFINED),
    (Exit::Signal(2), "SIGINT was honoured while waiting or loading: the source has its guest"),
    (Exit::Signal(15), "SIGTERM, likewise"),
];

/// What each code of `vmrun` says.
pub const VMRUN_CODES: &[(Exit, &str)] = &[
    (Exit::Done, "the guest has ended (power-off, reset), was sent away, or quit was said"),
    (Exit::Failed, "the machine could not be started, or KVM could not go on with it"),
    (Exit::Usage, "usage: nothing was touched"),
    (Exit::Signal(1), "ended by SIGHUP"),
    (Exit::Signal(2), "ended by SIGINT"),
    (Exit::Signal(15), "ended by SIGTERM"),
];

/// What each code of `vmctl` says.
pub const VMCTL_CODES: &[(Exit, &str)] = &[
    (Exit::Done, "done"),
    (Exit::Failed, "failed: nobody answers at the socket, or what was asked went wrong"),
    (Exit::Usage, "usage: nothing was asked, or the program at the socket does not know the command"),
    (
        Exit::Refused,
        "refused: the state of the guest or of its ownership does not allow it, or another client has it",
    ),
];

impl Exit {
    /// The number.
    pub fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Refused => 3,
            Self::NotConverged => 4,
            Self::PeerFailed => 5,
            Self::Resumable => 6,
            Self::Unknown => 7,
            Self::Lost => 8,
            Self::Confined => 9,
            Self::Signal(number) => 128 | (number & 0x7f) as u8,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

impl From<Ending> for Exit {
    fn from(ending: Ending) -> Self {
        match ending {
            Ending::Moved => Self::Done,
            Ending::Failed => Self::Failed,
            Ending::Unsuitable => Self::Refused,
            Ending::NotConverged => Self::NotConverged,
            Ending::PeerFailed => Self::PeerFailed,
            Ending::Resumable => Self::Resumable,
            Ending::Unknown => Self::Unknown,
            Ending::Lost => Self::Lost,
            Ending::Signalled(number) => Self::Signal(number),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_said_as_shells_do() {
        assert_eq!((Exit::Signal(2).code(), Exit::Signal(15).code()), (130, 143));
        let codes: Vec<u8> = SEND_CODES.iter().map(|(e, _)| e.code()).collect();
        assert_eq!(codes, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 130, 143]);
    }
}
