//! The switchover explored: every order of deliveries, losses, crashes, reconnections, refusals and
//! operator wishes, breadth first, over the very functions that production runs.

use super::{
    Attempt, DestAction, DestInput, DestStep, OperatorWord, Ownership, SessionId, SourceAction, SourceInput,
    SourceStep,
};

mod explore;

const SESSION: SessionId = SessionId([7; 16]);
/// How often the link may be lost in one history.
const MAX_EPOCH: u32 = 4;

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
    /// The epoch of the connection as each side has it; `None` when it knows that it is gone.
    source_link: Option<u32>,
    dest_link: Option<u32>,
    to_dest: Vec<(u32, Msg)>,
    to_source: Vec<(u32, Msg)>,
    cancelled: bool,
    wanted_back: bool,
    /// Whether each `vmrun` lives; with it goes its copy of the guest.
    source_lives: bool,
    dest_lives: bool,
    /// RUN was said, and the destination was let run at some time.
    run_said: bool,
    dest_ran: bool,
    /// The source was told REVOKED, or an operator has given both words.
    given_back: bool,
    /// The first rule that a step has broken.
    broken: Option<&'static str>,
}

/// What an operator does, beside the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    /// Nothing.
    Absent,
    /// Ends the destination's `vmrun` for good, and only then says --force --peer-fenced.
    Fences,
    /// Says --force --peer-fenced of a destination that is not fenced.
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
}

/// Takes what may happen, and adds the world that follows.
type Branch<'a> = &'a mut dyn FnMut(&dyn Fn(&mut World));

fn start() -> World {
    let attempt = Attempt { session: SESSION, epoch: 1 };
    let (mut source, mut dest) = (Ownership::booted(), Ownership::empty());
    source.attach(SESSION).unwrap();
    dest.prepare(attempt).unwrap();
    World {
        source,
        source_step: SourceStep::AwaitReady,
        dest,
        dest_step: DestStep::Loading,
        source_link: Some(1),
        dest_link: Some(1),
        to_dest: vec![],
        to_source: vec![],
        cancelled: false,
        wanted_back: false,
        source_lives: true,
        dest_lives: true,
        run_said: false,
        dest_ran: false,
        given_back: false,
        broken: None,
    }
}

impl World {
    fn say_to_dest(&mut self, msg: Msg) {
        if let Some(epoch) = self.source_link {
            self.to_dest.push((epoch, msg));
        }
    }

    fn say_to_source(&mut self, msg: Msg) {
        if let Some(epoch) = self.dest_link {
            self.to_source.push((epoch, msg));
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
        for action in actions {
            match action {
                SourceAction::Fence if mutant == Mutant::NoFence => {}
                SourceAction::Fence => self.source.fence(attempt, "b").unwrap(),
                SourceAction::SendRun => {
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
                    self.given_back = true;
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

    fn dest_input(&mut self, input: DestInput) {
        let (step, actions) = self.dest_step.on(input);
        let attempt = self.dest.attempt().unwrap();
        let held = matches!(self.dest, Ownership::InDoubt { .. });
        self.dest_step = step;
        for action in actions {
            match action {
                DestAction::Promise => self.dest.promise(attempt).unwrap(),
                DestAction::SendReady => self.say_ready(),
                DestAction::Run => {
                    self.dest.run(attempt).unwrap();
                    self.dest_ran = true;
                }
                DestAction::SendRunning => self.say_to_source(Msg::Running),
                DestAction::GiveUp => self.dest.give_up(attempt).unwrap(),
                DestAction::SendRevoked => self.say_to_source(Msg::Revoked),
                DestAction::SendAbort => self.say_to_source(Msg::Abort),
                DestAction::AwaitReconnect => {}
            }
        }
        let word = matches!(input, DestInput::Run | DestInput::Revoke | DestInput::Abort);
        if held && !word && !matches!(self.dest, Ownership::InDoubt { .. }) {
            self.breaks("S4: the destination has decided without the source's word");
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
            (dest && !self.run_said, "S1: the destination runs without RUN"),
            (source && self.run_said && !self.given_back, "S2: the source runs after RUN was said"),
            (released && !self.dest_ran, "S5: the source has let go before the destination ran"),
            // Last, so that the rule that led here is named.
            (source && dest, "two copies may run"),
        ];
        self.broken.or_else(|| rules.iter().find(|(broken, _)| *broken).map(|(_, rule)| *rule))
    }

    /// Every world that may follow.
    fn successors(&self, mutant: Mutant, operator: Operator) -> Vec<World> {
        let mut next = Vec::new();
        let mut branch = |change: &dyn Fn(&mut World)| {
            let mut world = self.clone();
            change(&mut world);
            if world != *self {
                next.push(world);
            }
        };
        // Deliver the next message of either direction, or a duplicate of it.
        for keep in [false, true] {
            if let Some(&(epoch, msg)) = self.to_dest.first() {
                branch(&|w| {
                    if !keep {
                        w.to_dest.remove(0);
                    }
                    if w.dest_link == Some(epoch) {
                        w.dest_input(match msg {
                            Msg::Run => DestInput::Run,
                            Msg::Revoke => DestInput::Revoke,
                            _ => DestInput::Abort,
                        });
                    }
                });
            }
            if let Some(&(epoch, msg)) = self.to_source.first() {
                branch(&|w| {
                    if !keep {
                        w.to_source.remove(0);
                    }
                    if w.source_link == Some(epoch) {
                        w.source_input(
                            match msg {
                                Msg::Ready => SourceInput::Ready,
                                Msg::Running => SourceInput::Running,
                                Msg::Revoked => SourceInput::Revoked,
                                _ => SourceInput::PeerAborted,
                            },
                            mutant,
                        );
                    }
                });
            }
        }
        // The link dies; either side notices when it does.
        if self.source_link.is_some() {
            branch(&|w| {
                w.to_dest.clear();
                w.source_link = None;
                w.source_input(SourceInput::LinkLost, mutant);
            });
        }
        if self.dest_link.is_some() {
            branch(&|w| {
                w.to_source.clear();
                w.dest_link = None;
                if mutant == Mutant::DropsOnLoss && w.dest_step == DestStep::InDoubt {
                    w.dest_input(DestInput::Abort);
                    w.breaks("S4: the destination has decided without the source's word");
                }
                w.dest_input(DestInput::LinkLost);
            });
        }
        self.reconnections(&mut branch, mutant);
        self.local_events(&mut branch, mutant);
        self.deaths_and_words(&mut branch, mutant, operator);
        next.retain(|w| w.to_dest.len() <= 3 && w.to_source.len() <= 3);
        next
    }

    /// The sender (or one started anew with --resume) connects with the next epoch.
    fn reconnections(&self, branch: Branch<'_>, mutant: Mutant) {
        let epoch = self.source.attempt().map_or(0, |a| a.epoch);
        let lives = self.source_lives && self.dest_lives;
        if !lives || self.source_link.is_some() || epoch >= MAX_EPOCH || self.source_step.is_over() {
            return;
        }
        branch(&|w| {
            let Ok(attempt) = w.source.reattach() else { return };
            // The receiver takes the new connection for the old one and answers with its phase.
            if w.dest_link.take().is_some() {
                w.dest_input(DestInput::LinkLost);
            }
            w.to_source.clear();
            if w.dest.renew(attempt).is_err() {
                return;
            }
            w.source_link = Some(attempt.epoch);
            w.dest_link = Some(attempt.epoch);
            w.dest_input(DestInput::Reconnected);
            let phase = match w.dest_step {
                DestStep::InDoubt => SourceInput::PeerInDoubt,
                DestStep::Running => SourceInput::Running,
                DestStep::Refused => SourceInput::Revoked,
                DestStep::Loading => SourceInput::PeerForgot,
            };
            w.source_input(phase, mutant);
        });
    }

    /// What happens on one host alone.
    fn local_events(&self, branch: Branch<'_>, mutant: Mutant) {
        if self.source_step == SourceStep::Fencing && self.source_lives {
            branch(&|w| w.source_input(SourceInput::Fenced, mutant));
            if self.source.may_run() {
                branch(&|w| w.source_input(SourceInput::FenceRefused, mutant));
            }
        }
        if mutant == Mutant::AckBeforeSync && self.dest_step == DestStep::Loading {
            branch(&|w| w.say_ready());
        }
        if self.dest_step == DestStep::Loading && self.dest_lives {
            branch(&|w| w.dest_input(DestInput::Loaded));
            branch(&|w| w.dest_input(DestInput::LoadFailed));
        }
        if mutant == Mutant::RunOnTimeout && self.dest_step == DestStep::InDoubt {
            branch(&|w| w.dest_input(DestInput::Run));
        }
        if !self.cancelled {
            branch(&|w| {
                w.cancelled = true;
                w.source_input(SourceInput::Cancel, mutant);
            });
        }
        if !self.wanted_back {
            branch(&|w| {
                w.wanted_back = true;
                w.source_input(SourceInput::WantBack, mutant);
            });
        }
        // vmsend dies: before the fence vmrun resumes by itself; after it, --resume starts here.
        branch(&|w| {
            w.source_link = None;
            w.to_dest.clear();
            w.source_step = match w.source {
                Ownership::Sole { .. } => SourceStep::Back,
                Ownership::Committed { .. } => SourceStep::AwaitRunning,
                _ => SourceStep::Moved,
            };
        });
        // vmrecv dies: before the promise vmrun drops the guest; after it, --resume starts here.
        branch(&|w| {
            w.dest_link = None;
            w.to_source.clear();
            w.dest_step = match w.dest {
                Ownership::Loading { attempt } => {
                    w.dest.give_up(attempt).unwrap();
                    DestStep::Refused
                }
                Ownership::InDoubt { .. } => DestStep::InDoubt,
                Ownership::Sole { .. } if mutant != Mutant::ForgetsRunning => DestStep::Running,
                _ => DestStep::Refused,
            };
        });
    }

    /// A `vmrun` dies with its copy of the guest; an operator has the last word.
    fn deaths_and_words(&self, branch: Branch<'_>, mutant: Mutant, operator: Operator) {
        if self.source_lives && mutant == Mutant::None {
            branch(&|w| {
                w.source_lives = false;
                // A sender that has said RUN goes on without it; any other ends.
                if !matches!(w.source, Ownership::Committed { .. }) {
                    w.source_link = None;
                }
            });
        }
        if self.dest_lives && (mutant == Mutant::None || operator == Operator::Fences) {
            branch(&|w| {
                w.dest_lives = false;
                if w.dest_step != DestStep::Running {
                    // Not a decision: there is nothing left that could run.
                    let (step, _) = w.dest_step.on(DestInput::GuestGone);
                    if w.dest_step == DestStep::InDoubt {
                        w.say_to_source(Msg::Revoked);
                    }
                    w.dest_step = step;
                }
            });
        }
        let committed = matches!(self.source, Ownership::Committed { .. });
        let word = OperatorWord { force: true, peer_fenced: true };
        let fenced = operator == Operator::Lies || operator == Operator::Fences && !self.dest_lives;
        if committed && fenced {
            branch(&|w| {
                w.source.resume(word).unwrap();
                w.given_back = true;
                w.source_step = SourceStep::Back;
            });
        }
        if committed {
            branch(&|w| {
                // The wish alone is refused, and changes nothing.
                let refused = w.source.resume(OperatorWord { force: true, peer_fenced: false }).is_err();
                if mutant == Mutant::ResumeAfterFence && refused {
                    w.source.resume(word).unwrap();
                }
            });
        }
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
