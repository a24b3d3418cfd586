//! What one `vmrun` knows about who owns the guest, and every change that it allows.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Names one migration of one guest; random, chosen by the source `vmrun` when a sender attaches.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SessionId(pub [u8; 16]);

/// A session and the number of the connection within it. Within a session the epoch only grows:
/// each (re)connection takes the next one from the source `vmrun`, and what carries a smaller one
/// is stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Attempt {
    /// The migration.
    pub session: SessionId,
    /// The connection within it, from 1.
    pub epoch: u32,
}

/// Who owns the guest, as one `vmrun` sees it.
///
/// ```text
/// source:  Sole ──fence──► Committed ──released──► Released
///            ▲                 │
///            └──peer revoked───┘ (or the operator's word that the peer is fenced)
/// dest:    Empty ──prepare──► Loading ──promise──► InDoubt ──run──► Sole
///            ▲                   │                    │
///            └──────abort────────┴──abort or revoke───┘
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "kebab-case")]
pub enum Ownership {
    /// `vmrun --incoming` that holds nothing. `refused` is the last attempt that it gave up: a RUN
    /// for that one, however late it comes, is answered with REVOKED.
    Empty {
        /// The attempt that was aborted or revoked last.
        refused: Option<Attempt>,
    },
    /// A guest is being loaded; the source may go on without us at any time.
    Loading {
        /// The attempt that loads it.
        attempt: Attempt,
    },
    /// READY may have been sent: only the source's RUN, REVOKE or ABORT ends this (S4).
    InDoubt {
        /// The attempt that was acknowledged.
        attempt: Attempt,
    },
    /// The only copy that may run, here. `arrived` is the attempt that brought it, `sending` one
    /// that is taking it away and has not been committed.
    Sole {
        /// The attempt by which the guest came, if it was not booted here.
        arrived: Option<Attempt>,
        /// The attempt that is sending it, if any.
        sending: Option<Attempt>,
    },
    /// RUN may have been sent: the destination may run, this copy may not (S2).
    Committed {
        /// The attempt that was committed; its epoch grows with each reconnection.
        attempt: Attempt,
        /// Where the guest went, in the words of the sender's command line.
        dest: String,
    },
    /// The destination has said that it runs, and has all that it needs: nothing is held here.
    Released {
        /// The attempt that took the guest away.
        attempt: Attempt,
    },
}

/// Why an ownership change is refused. The text is for the operator and names the state.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// The change does not exist in this state.
    #[error("{wanted} is refused: this vmrun {state}")]
    WrongState {
        /// What was asked.
        wanted: &'static str,
        /// What holds instead.
        state: String,
    },
    /// The session is another one.
    #[error("{wanted} is refused: it is for session {got}, the session here is {have}")]
    WrongSession {
        /// What was asked.
        wanted: &'static str,
        /// The session that it named.
        got: SessionId,
        /// The session that is under way.
        have: SessionId,
    },
    /// The epoch is of an older connection.
    #[error("{wanted} is refused: it is of epoch {got}, and epoch {have} has been seen")]
    Stale {
        /// What was asked.
        wanted: &'static str,
        /// The epoch that it named.
        got: u32,
        /// The newest epoch here.
        have: u32,
    },
    /// The guest was committed to a destination that may run it.
    #[error(
        "{wanted} is refused: the guest was committed to {dest} (session {session}), which may run it; \
         if that host is fenced off for good, say so with --force --peer-fenced"
    )]
    MayRunElsewhere {
        /// What was asked.
        wanted: &'static str,
        /// Where it went.
        dest: String,
        /// By which session.
        session: SessionId,
    },
}

/// What an operator has declared on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OperatorWord {
    /// `--force`: do it although the protocol does not allow it.
    pub force: bool,
    /// `--peer-fenced`: the other host cannot run the guest, by the operator's own means.
    pub peer_fenced: bool,
}

impl Ownership {
    /// A machine that was booted here.
    pub fn booted() -> Self {
        Self::Sole { arrived: None, sending: None }
    }

    /// An incoming machine before anything came.
    pub fn empty() -> Self {
        Self::Empty { refused: None }
    }

    /// Whether vCPUs may enter guest mode. The only answer to that question in the whole project.
    pub fn may_run(&self) -> bool {
        matches!(self, Self::Sole { .. })
    }

    /// The attempt that is under way or has ended here, if any.
    pub fn attempt(&self) -> Option<Attempt> {
        match self {
            Self::Empty { refused } => *refused,
            Self::Sole { arrived, sending } => sending.or(*arrived),
            Self::Loading { attempt }
            | Self::InDoubt { attempt }
            | Self::Committed { attempt, .. }
            | Self::Released { attempt } => Some(*attempt),
        }
    }

    /// A sender attaches for a new session. Refused unless the guest is ours alone: so a new
    /// session is proof that the one before it was never committed.
    /// `Sole` → `Sole{sending}`; gives the session that this one supersedes.
    pub fn attach(&mut self, session: SessionId) -> Result<Option<Attempt>, Refusal> {
        match self {
            Self::Sole { sending, .. } => Ok(sending.replace(Attempt { session, epoch: 1 })),
            _ => Err(self.not_now("a new migration")),
        }
    }

    /// A sender comes back for the session that is under way: the next epoch.
    pub fn reattach(&mut self) -> Result<Attempt, Refusal> {
        match self {
            Self::Committed { attempt, .. } | Self::Sole { sending: Some(attempt), .. } => {
                attempt.epoch = attempt.epoch.saturating_add(1);
                Ok(*attempt)
            }
            _ => Err(self.not_now("resuming a migration")),
        }
    }

    /// The destination of a committed guest is reached at another address from now on. Where nothing is
    /// committed nothing changes.
    pub fn redirect(&mut self, now_at: &str) {
        if let Self::Committed { dest, .. } = self {
            now_at.clone_into(dest);
        }
    }

    /// Fences this copy: from here on it does not run (S2, S3). A repeat changes nothing.
    pub fn fence(&mut self, attempt: Attempt, dest: &str) -> Result<(), Refusal> {
        match self {
            Self::Sole { sending: Some(have), .. } => {
                check("the fence", attempt, *have)?;
                *self = Self::Committed { attempt, dest: dest.to_owned() };
                Ok(())
            }
            Self::Committed { attempt: have, .. } => check("the fence", attempt, *have),
            _ => Err(self.not_now("the fence")),
        }
    }

    /// The destination has answered REVOKED: it never ran and never will (S2).
    /// `Committed` → `Sole`.
    pub fn peer_revoked(&mut self, attempt: Attempt) -> Result<(), Refusal> {
        match self {
            Self::Committed { attempt: have, .. } => {
                check("taking the guest back", attempt, *have)?;
                *self = Self::Sole { arrived: None, sending: Some(attempt) };
                Ok(())
            }
            // The answer to a repeated REVOKE.
            Self::Sole { sending: Some(have), .. } => check("taking the guest back", attempt, *have),
            _ => Err(self.not_now("taking the guest back")),
        }
    }

    /// The destination runs and needs nothing more from here: `Committed` → `Released`.
    pub fn released(&mut self, attempt: Attempt) -> Result<(), Refusal> {
        match self {
            Self::Committed { attempt: have, .. } => {
                check("the release", attempt, *have)?;
                *self = Self::Released { attempt };
                Ok(())
            }
            Self::Released { attempt: have } => check("the release", attempt, *have),
            _ => Err(self.not_now("the release")),
        }
    }

    /// Whether the vCPUs may go on at an operator's or a mover's wish; with both words of the
    /// operator a committed guest comes back: `Committed` → `Sole`.
    pub fn resume(&mut self, word: OperatorWord) -> Result<(), Refusal> {
        match self {
            Self::Sole { .. } => Ok(()),
            Self::Committed { .. } | Self::Released { .. } if word.force && word.peer_fenced => {
                *self = Self::Sole { arrived: None, sending: None };
                Ok(())
            }
            Self::Committed { attempt, dest } => Err(Refusal::MayRunElsewhere {
                wanted: "resuming",
                dest: dest.clone(),
                session: attempt.session,
            }),
            // The operator's word that the source is gone stands for its RUN.
            Self::InDoubt { attempt } if word.force && word.peer_fenced => {
                *self = Self::Sole { arrived: Some(*attempt), sending: None };
                Ok(())
            }
            _ => Err(self.not_now("resuming")),
        }
    }

    /// A receiver begins to load a guest: `Empty` → `Loading`.
    pub fn prepare(&mut self, attempt: Attempt) -> Result<(), Refusal> {
        match self {
            Self::Empty { refused: Some(old) } if old.session == attempt.session => {
                Err(Refusal::Stale { wanted: "loading", got: attempt.epoch, have: old.epoch })
            }
            Self::Empty { .. } => {
                *self = Self::Loading { attempt };
                Ok(())
            }
            _ => Err(self.not_now("loading a guest")),
        }
    }

    /// Everything is loaded and synchronised, READY is about to be sent: `Loading` → `InDoubt`.
    pub fn promise(&mut self, attempt: Attempt) -> Result<(), Refusal> {
        match self {
            Self::Loading { attempt: have } | Self::InDoubt { attempt: have } => {
                check("the promise", attempt, *have)?;
                *self = Self::InDoubt { attempt };
                Ok(())
            }
            _ => Err(self.not_now("the promise")),
        }
    }

    /// RUN has come: `InDoubt` → `Sole`. A repeat changes nothing.
    pub fn run(&mut self, attempt: Attempt) -> Result<(), Refusal> {
        match self {
            Self::InDoubt { attempt: have } => {
                check("RUN", attempt, *have)?;
                *self = Self::Sole { arrived: Some(attempt), sending: None };
                Ok(())
            }
            Self::Sole { arrived: Some(have), .. } if have.session == attempt.session => Ok(()),
            _ => Err(self.not_now("RUN")),
        }
    }

    /// REVOKE or ABORT has come, or the load has failed: this copy will never run for `attempt`'s
    /// session. `Loading`, `InDoubt` → `Empty`. A repeat changes nothing; refused once it runs.
    pub fn give_up(&mut self, attempt: Attempt) -> Result<(), Refusal> {
        match self {
            Self::Loading { attempt: have } | Self::InDoubt { attempt: have } => {
                check("revoking", attempt, *have)?;
                *self = Self::Empty { refused: Some(attempt) };
                Ok(())
            }
            Self::Empty { refused: Some(have) } if have.session == attempt.session => Ok(()),
            _ => Err(self.not_now("revoking")),
        }
    }

    /// A new connection of the session that is under way carries a larger epoch: older ones are
    /// stale from here on.
    pub fn renew(&mut self, attempt: Attempt) -> Result<(), Refusal> {
        match self {
            Self::InDoubt { attempt: have }
            | Self::Loading { attempt: have }
            | Self::Sole { arrived: Some(have), .. }
            | Self::Empty { refused: Some(have) } => {
                check("reconnecting", attempt, *have)?;
                *have = attempt;
                Ok(())
            }
            _ => Err(self.not_now("reconnecting")),
        }
    }

    fn not_now(&self, wanted: &'static str) -> Refusal {
        match self {
            Self::Committed { attempt, dest } => {
                Refusal::MayRunElsewhere { wanted, dest: dest.clone(), session: attempt.session }
            }
            _ => Refusal::WrongState { wanted, state: self.to_string() },
        }
    }
}

/// The same session, and an epoch that is not older.
fn check(wanted: &'static str, got: Attempt, have: Attempt) -> Result<(), Refusal> {
    if got.session != have.session {
        return Err(Refusal::WrongSession { wanted, got: got.session, have: have.session });
    }
    if got.epoch < have.epoch {
        return Err(Refusal::Stale { wanted, got: got.epoch, have: have.epoch });
    }
    Ok(())
}

impl fmt::Display for Ownership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty { .. } => f.write_str("holds no guest"),
            Self::Loading { attempt } => write!(f, "is loading a guest (session {})", attempt.session),
            Self::InDoubt { attempt } => {
                write!(
                    f,
                    "holds an acknowledged guest and waits for the source's word (session {})",
                    attempt.session
                )
            }
            Self::Sole { sending: None, .. } => f.write_str("owns its guest"),
            Self::Sole { sending: Some(a), .. } => {
                write!(f, "owns its guest and is sending it (session {})", a.session)
            }
            Self::Committed { attempt, dest } => {
                write!(f, "has committed its guest to {dest} (session {})", attempt.session)
            }
            Self::Released { attempt } => write!(f, "has sent its guest away (session {})", attempt.session),
        }
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SessionId({self})")
    }
}

impl From<SessionId> for String {
    fn from(id: SessionId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for SessionId {
    type Error = String;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        let bytes = text.as_bytes();
        if bytes.len() != 32 || !bytes.iter().all(u8::is_ascii_hexdigit) {
            return Err(format!("{text:?} is no session id (32 hexadecimal digits)"));
        }
        let mut id = [0; 16];
        for (byte, pair) in id.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let digit = |c: u8| (c as char).to_digit(16).unwrap_or(0) as u8;
            *byte = digit(pair[0]) << 4 | digit(pair[1]);
        }
        Ok(Self(id))
    }
}

#[cfg(test)]
mod tests;
