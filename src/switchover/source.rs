//! What the sender does in the switchover, as a function of where it stands and what happens.

/// Where the sender stands, from the moment the guest is paused and everything is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceStep {
    /// The guest is paused; nothing is fenced; any trouble ends with the guest running here.
    AwaitReady,
    /// READY has come; the fence is being recorded in `vmrun`.
    Fencing,
    /// The guest is committed; RUN has been said, or will be on the next connection.
    AwaitRunning,
    /// The guest is committed and wanted back: REVOKE has been said, or will be.
    AwaitRevoked,
    /// The destination runs.
    Moved,
    /// The guest runs here.
    Back,
    /// The destination cannot tell whether the guest ran: only an operator can decide.
    Unknown,
}

/// What happens to the sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceInput {
    /// READY for this attempt.
    Ready,
    /// `vmrun` has recorded the fence.
    Fenced,
    /// `vmrun` has refused the fence or could not record it.
    FenceRefused,
    /// The destination runs the guest.
    Running,
    /// The destination never ran the guest and never will.
    Revoked,
    /// The destination gave up before READY.
    PeerAborted,
    /// The connection is gone, or silent for too long.
    LinkLost,
    /// A new connection stands, and the destination holds the guest acknowledged.
    PeerInDoubt,
    /// A new connection stands, and the destination knows nothing of the session.
    PeerForgot,
    /// A signal or the operator wants to stop the migration.
    Cancel,
    /// The operator wants a committed guest back.
    WantBack,
}

/// What the sender has to do, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceAction {
    /// Record the commitment in `vmrun` (S3); then comes `Fenced` or `FenceRefused`.
    Fence,
    /// Say RUN.
    SendRun,
    /// Say REVOKE.
    SendRevoke,
    /// Say ABORT, as well as it goes.
    SendAbort,
    /// Tell `vmrun` that the destination has revoked.
    TakeBack,
    /// Let the guest run here.
    Resume,
    /// Connect anew, with the next epoch.
    Reconnect,
    /// Tell whoever asked that it is too late to cancel.
    RefuseCancel,
}

impl SourceStep {
    /// The next step and what to do on the way. Inputs that mean nothing where the sender stands,
    /// such as duplicates, change nothing (S6).
    pub fn on(self, input: SourceInput) -> (Self, &'static [SourceAction]) {
        use SourceAction::*;
        use SourceInput as I;
        use SourceStep::*;
        match (self, input) {
            (AwaitReady, I::Ready) => (Fencing, &[Fence]),
            // READY that crosses a lost link is the destination's matter: it holds, and learns
            // that the session is over from ABORT or from the next session (S4).
            (AwaitReady, I::PeerAborted | I::LinkLost | I::Cancel | I::Revoked | I::PeerForgot) => {
                (Back, &[Resume, SendAbort])
            }
            (Fencing, I::Fenced) => (AwaitRunning, &[SendRun]),
            (Fencing, I::FenceRefused) => (Back, &[Resume, SendAbort]),
            (AwaitRunning | AwaitRevoked, I::Running) => (Moved, &[]),
            (AwaitRunning | AwaitRevoked, I::Revoked) => (Back, &[TakeBack, Resume]),
            (AwaitRunning | AwaitRevoked, I::LinkLost) => (self, &[Reconnect]),
            (AwaitRunning, I::PeerInDoubt) => (AwaitRunning, &[SendRun]),
            (AwaitRevoked, I::PeerInDoubt) => (AwaitRevoked, &[SendRevoke]),
            (AwaitRunning | AwaitRevoked, I::PeerForgot | I::PeerAborted) => (Unknown, &[]),
            (AwaitRunning, I::WantBack) => (AwaitRevoked, &[SendRevoke]),
            (Fencing | AwaitRunning | AwaitRevoked, I::Cancel) => (self, &[RefuseCancel]),
            _ => (self, &[]),
        }
    }

    /// Whether nothing more will happen.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Moved | Self::Back | Self::Unknown)
    }
}
