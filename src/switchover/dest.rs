//! What the receiver does in the switchover: the mirror image of [`super::SourceStep`].

/// Where the receiver stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestStep {
    /// Pages and state are coming in; the source may go on without us at any time.
    Loading,
    /// READY is out: only the source's word counts (S4).
    InDoubt,
    /// The guest runs here.
    Running,
    /// This session will never run here.
    Refused,
}

/// What happens to the receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestInput {
    /// Devices are restored and all vCPUs synchronised.
    Loaded,
    /// Something here failed.
    LoadFailed,
    /// The connection is gone, or silent for too long.
    LinkLost,
    /// RUN for this session, of an epoch that is not stale.
    Run,
    /// REVOKE likewise.
    Revoke,
    /// ABORT likewise: the source never committed.
    Abort,
    /// The `vmrun` that held the guest is gone, and was never told to run it.
    GuestGone,
    /// The source has come back on a new connection.
    Reconnected,
}

/// What the receiver has to do, in order. When one fails, those after it are not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestAction {
    /// Record the promise in `vmrun` (S3); on failure comes `LoadFailed`.
    Promise,
    /// Say READY.
    SendReady,
    /// Record the ownership and let the vCPUs run (S1, S3).
    Run,
    /// Say RUNNING.
    SendRunning,
    /// Drop the guest, recording that this session was refused.
    GiveUp,
    /// Say REVOKED.
    SendRevoked,
    /// Say ABORT with the reason, as well as it goes.
    SendAbort,
    /// Wait for the source to come back; for ever, if need be.
    AwaitReconnect,
}

impl DestStep {
    /// The next step and what to do on the way. Duplicates are answered again and change
    /// nothing (S6).
    pub fn on(self, input: DestInput) -> (Self, &'static [DestAction]) {
        use DestAction as A;
        use DestInput::*;
        use DestStep::{InDoubt, Loading, Refused, Running};
        match (self, input) {
            (Loading, Loaded) => (InDoubt, &[A::Promise, A::SendReady]),
            (Loading, LoadFailed | GuestGone) => (Refused, &[A::GiveUp, A::SendAbort]),
            (Loading, LinkLost | Abort) => (Refused, &[A::GiveUp]),
            (Loading, Revoke) => (Refused, &[A::GiveUp, A::SendRevoked]),
            (InDoubt, Run) => (Running, &[A::Run, A::SendRunning]),
            (InDoubt, Revoke) => (Refused, &[A::GiveUp, A::SendRevoked]),
            (InDoubt, Abort) => (Refused, &[A::GiveUp]),
            (InDoubt, GuestGone) => (Refused, &[A::SendRevoked]),
            (InDoubt, LinkLost) => (InDoubt, &[A::AwaitReconnect]),
            (Running, Run | Revoke | Reconnected) => (Running, &[A::SendRunning]),
            (Refused, Run | Revoke) => (Refused, &[A::SendRevoked]),
            _ => (self, &[]),
        }
    }
}
