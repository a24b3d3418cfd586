//! The switchover explored: every order of deliveries, losses, crashes, reconnections, refusals and
//! operator wishes, breadth first, over the very functions that production runs.

use super::{
    Attempt, DestAction, DestInput, DestStep, OperatorWord, Ownership, SessionId, SourceAction, SourceInput,
    SourceStep,
};

mod explore;
mod next;

/// The sessions of one history: when the guest stays, it may be sent once more.
const SESSIONS: [SessionId; 2] = [SessionId([7; 16]), SessionId([8; 16])];
/// How often the link may be lost in the first session, and in the second.
const MAX_EPOCH: [u32; 2] = [4, 2];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Msg {
    Ready,
    Run,
    Running,
    Revoke,
    Revoked,
    Abort,
}

/// Both hosts and what is on the wire between them, in order, as TCP has it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    source: Ownership,
    source_step: SourceStep,
    dest: Ownership,
    dest_step: DestStep,
    /// The connection as each side has it; `None` when it knows that it is gone.
    source_link: Option<Attempt>,
    dest_link: Option<Attempt>,
    to_dest: Vec<(Attempt, Msg)>,
    to_source: Vec<(Attempt, Msg)>,
    /// A word to the destination of a connection that was lost: it may still come.
    late: Option<(Attempt, Msg)>,
    cancelled: bool,
    wanted_back: bool,
    /// Whether each `vmrun` lives; with it goes its copy of the guest.
    source_lives: bool,
    dest_lives: bool,
    /// Of the session under way: RUN was said, it was heard, and the destination was let run.
    run_said: bool,
    run_heard: bool,
    dest_ran: bool,
    /// The source was told REVOKED, or an operator has given both words at the source.
    given_back: bool,
    /// An operator has given both words at the destination.
    forced: bool,
    /// The first rule that a step has broken.
    broken: Option<&'static str>,
}

/// What an operator does, beside the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    /// Nothing.
    Absent,
    /// Ends one side's `vmrun` for good, and only then says --force --peer-fenced at the other.
    Fences,
    /// Says --force --peer-fenced of a side that is not fenced.
    Lies,
}

/// Rules broken on purpose: the exploration must notice each of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutant {
    None,
    /// The destination runs when it has waited long enough.
    RunOnTimeout,
    /// The source says RUN without recording the fence.
    NoFence,
    /// The source resumes when the link is lost after the fence.
    ResumeOnLoss,
    /// The destination says READY before the guest is loaded and the promise recorded.
    AckBeforeSync,
    /// The destination drops an acknowledged guest when the link is lost.
    DropsOnLoss,
    /// The source's vmrun lets a committed guest go on at a mere wish.
    ResumeAfterFence,
    /// The source lets its copy go as soon as RUN is said.
    ReleaseBeforeRunning,
    /// A receiver that was started anew does not ask its vmrun whether the guest runs.
    ForgetsRunning,
    /// What comes of another session, or of an older connection, is taken.
    StaleTaken,
    /// READY that comes again while the fence is being recorded ends the migration.
    RepeatGivesUp,
    /// A receiver knows nothing of the guest that its vmrun holds acknowledged, when the source comes back.
    ForgetsPromise,
    /// The source does not connect anew when the link is lost after the fence.
    NeverReconnects,
}

fn start() -> World {
    let attempt = Attempt { session: SESSIONS[0], epoch: 1 };
    let (mut source, mut dest) = (Ownership::booted(), Ownership::empty());
    source.attach(SESSIONS[0]).unwrap();
    dest.prepare(attempt).unwrap();
    World {
        source,
        source_step: SourceStep::AwaitReady,
        dest,
        dest_step: DestStep::Loading,
        source_link: Some(attempt),
        dest_link: Some(attempt),
        to_dest: vec![],
        to_source: vec![],
        late: None,
        cancelled: false,
        wanted_back: false,
        source_lives: true,
        dest_lives: true,
        run_said: false,
        run_heard: false,
        dest_ran: false,
        given_back: false,
        forced: false,
        broken: None,
    }
}

impl World {
    fn say_to_dest(&mut self, msg: Msg) {
        if let Some(attempt) = self.source_link {
            self.to_dest.push((attempt, msg));
        }
    }

    fn say_to_source(&mut self, msg: Msg) {
        if let Some(attempt) = self.dest_link {
            self.to_source.push((attempt, msg));
        }
    }

    fn source_input(&mut self, input: SourceInput, mutant: Mutant) {
        // Not where an operator's word has ended the session.
        let Some(attempt) = self.source.attempt() else { return };
        let (step, actions) = self.source_step.on(input);
        self.source_step = step;
        if mutant == Mutant::ResumeOnLoss
            && input == SourceInput::LinkLost
            && step == SourceStep::AwaitRunning
        {
            self.source = Ownership::Sole { arrived: None, sending: Some(attempt) };
            self.source_step = SourceStep::Back;
            return;
        }
        if mutant == Mutant::RepeatGivesUp && input == SourceInput::Ready && actions.is_empty() {
            self.source_step = SourceStep::Back;
        }
        for action in actions {
            match action {
                // vmrun records it or refuses, at a time of its own.
                SourceAction::Fence => {}
                SourceAction::SendRun => {
                    if step == SourceStep::AwaitRevoked {
                        self.breaks("S2: RUN is said of a guest that is wanted back");
                    }
                    if !matches!(self.source, Ownership::Committed { .. }) {
                        self.breaks("S3: RUN is said before the commitment is recorded");
                    }
                    self.run_said = true;
                    self.say_to_dest(Msg::Run);
                    if mutant == Mutant::ReleaseBeforeRunning {
                        let _ = self.source.released(attempt);
                    }
                }
                SourceAction::SendRevoke => self.say_to_dest(Msg::Revoke),
                SourceAction::SendAbort => self.say_to_dest(Msg::Abort),
                SourceAction::TakeBack => {
                    // Not where a mutant, or the operator's word, has decided already.
                    let taken = self.source.peer_revoked(attempt);
                    assert!(taken.is_ok() || mutant != Mutant::None, "{taken:?}");
                }
                SourceAction::Resume if !self.source.may_run() => {
                    self.breaks("S2: the mover resumes a guest that is fenced");
                }
                SourceAction::Resume => {}
                SourceAction::Reconnect | SourceAction::RefuseCancel => {}
            }
        }
        if step == SourceStep::Moved {
            let _ = self.source.released(attempt);
        }
    }

    fn dest_input(&mut self, input: DestInput, mutant: Mutant) {
        let before = (self.dest_step, self.dest.clone());
        let attempt = self.dest.attempt().unwrap();
        let taken = match input {
            DestInput::LinkLost if mutant == Mutant::DropsOnLoss => DestInput::Abort,
            other => other,
        };
        let (step, actions) = self.dest_step.on(taken);
        self.dest_step = step;
        for action in actions {
            match action {
                DestAction::Promise => self.dest.promise(attempt).unwrap(),
                DestAction::SendReady => self.say_ready(),
                DestAction::Run => {
                    self.dest.run(attempt).unwrap();
                    self.dest_ran = true;
                }
                DestAction::SendRunning => {
                    if !self.dest.may_run() {
                        self.breaks("S3: RUNNING is said before the ownership is recorded");
                    }
                    self.say_to_source(Msg::Running);
                }
                DestAction::GiveUp => {
                    if self.dest.give_up(attempt).is_err() {
                        // What follows is not done: the receiver ends, and the next one asks vmrun.
                        self.receiver_starts_anew(mutant);
                        break;
                    }
                }
                DestAction::SendRevoked => {
                    if self.dest_lives && !matches!(self.dest, Ownership::Empty { .. }) {
                        self.breaks("S2: REVOKED is said of a guest that was not given up");
                    }
                    self.say_to_source(Msg::Revoked);
                }
                DestAction::SendAbort => self.say_to_source(Msg::Abort),
                DestAction::AwaitReconnect => {}
            }
        }
        let word = matches!(input, DestInput::Run | DestInput::Revoke | DestInput::Abort);
        let holds = |step, dest: &Ownership| (step, matches!(dest, Ownership::InDoubt { .. }));
        if !word && holds(before.0, &before.1) == (DestStep::InDoubt, true) {
            let now = holds(self.dest_step, &self.dest);
            if now != (DestStep::InDoubt, true) && input != DestInput::GuestGone {
                self.breaks("S4: the destination has decided without the source's word");
            }
        }
    }

    fn say_ready(&mut self) {
        if !matches!(self.dest, Ownership::InDoubt { .. }) {
            self.breaks("S3: READY is said before the guest is loaded and the promise recorded");
        }
        self.say_to_source(Msg::Ready);
    }

    fn breaks(&mut self, rule: &'static str) {
        self.broken.get_or_insert(rule);
    }

    /// The rule that this world breaks.
    fn broken_rule(&self) -> Option<&'static str> {
        let (source, dest) = (self.source_runs(), self.dest_runs());
        let released = matches!(self.source, Ownership::Released { .. });
        let rules = [
            (dest && !self.run_heard && !self.forced, "S1: the destination runs without RUN for its session"),
            (source && self.run_said && !self.given_back, "S2: the source runs after RUN was said"),
            (
                released && !self.dest_ran && !self.forced,
                "S5: the source has let go before the destination ran",
            ),
            // Last, so that the rule that led here is named.
            (source && dest, "two copies may run"),
        ];
        self.broken.or_else(|| rules.iter().find(|(broken, _)| *broken).map(|(_, rule)| *rule))
    }

    /// A source that has resumed runs; one that is merely paused may not count as a runner yet, but
    /// it is free to run at any moment: that is what must not be the case twice.
    fn source_runs(&self) -> bool {
        self.source_lives && self.source.may_run()
    }

    fn dest_runs(&self) -> bool {
        self.dest_lives && self.dest.may_run()
    }
}
