//! The switchover explored: every order of deliveries, losses, crashes, reconnections, refusals and
//! operator wishes, breadth first, over the very functions that production runs.

use std::collections::{HashMap, HashSet, VecDeque};

use super::{
    Attempt, DestAction, DestInput, DestStep, Ownership, SessionId, SourceAction, SourceInput, SourceStep,
};

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
        let (step, actions) = self.source_step.on(input);
        self.source_step = step;
        let attempt = self.source.attempt().unwrap();
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
                SourceAction::SendRun => self.say_to_dest(Msg::Run),
                SourceAction::SendRevoke => self.say_to_dest(Msg::Revoke),
                SourceAction::SendAbort => self.say_to_dest(Msg::Abort),
                SourceAction::TakeBack => self.source.peer_revoked(attempt).unwrap(),
                SourceAction::Resume => assert!(self.source.may_run(), "resumes while fenced: {self:?}"),
                SourceAction::Reconnect | SourceAction::RefuseCancel => {}
            }
        }
        if step == SourceStep::Moved && mutant != Mutant::NoFence {
            self.source.released(attempt).unwrap();
        }
    }

    fn dest_input(&mut self, input: DestInput) {
        let (step, actions) = self.dest_step.on(input);
        let attempt = self.dest.attempt().unwrap();
        self.dest_step = step;
        for action in actions {
            match action {
                DestAction::Promise => self.dest.promise(attempt).unwrap(),
                DestAction::SendReady => self.say_to_source(Msg::Ready),
                DestAction::Run => self.dest.run(attempt).unwrap(),
                DestAction::SendRunning => self.say_to_source(Msg::Running),
                DestAction::GiveUp => self.dest.give_up(attempt).unwrap(),
                DestAction::SendRevoked => self.say_to_source(Msg::Revoked),
                DestAction::SendAbort => self.say_to_source(Msg::Abort),
                DestAction::AwaitReconnect => {}
            }
        }
    }

    /// Every world that may follow.
    fn successors(&self, mutant: Mutant) -> Vec<World> {
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
                w.dest_input(DestInput::LinkLost);
            });
        }
        self.reconnections(&mut branch, mutant);
        self.local_events(&mut branch, mutant);
        next.retain(|w| w.to_dest.len() <= 3 && w.to_source.len() <= 3);
        next
    }

    /// The sender (or one started anew with --resume) connects with the next epoch.
    fn reconnections(&self, branch: Branch<'_>, mutant: Mutant) {
        let epoch = self.source.attempt().map_or(0, |a| a.epoch);
        if self.source_link.is_some() || epoch >= MAX_EPOCH || self.source_step.is_over() {
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
        if self.source_step == SourceStep::Fencing {
            branch(&|w| w.source_input(SourceInput::Fenced, mutant));
            if self.source.may_run() {
                branch(&|w| w.source_input(SourceInput::FenceRefused, mutant));
            }
        }
        if self.dest_step == DestStep::Loading {
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

    fn runners(&self) -> usize {
        // A source that has resumed runs; one that is merely paused may not count as a runner yet,
        // but it is free to run at any moment: that is what must not be the case twice.
        usize::from(self.source.may_run()) + usize::from(self.dest.may_run())
    }
}

/// Explores everything; gives the number of states and of those from which nobody ever runs again.
fn explore(mutant: Mutant) -> Result<(usize, usize), Box<World>> {
    let mut index = HashMap::from([(start(), 0usize)]);
    let mut states = vec![start()];
    let mut before: Vec<Vec<usize>> = vec![vec![]];
    let mut queue = VecDeque::from([0]);
    while let Some(i) = queue.pop_front() {
        if states[i].runners() > 1 {
            return Err(Box::new(states[i].clone()));
        }
        for next in states[i].clone().successors(mutant) {
            let j = *index.entry(next.clone()).or_insert_with(|| {
                states.push(next);
                before.push(vec![]);
                queue.push_back(states.len() - 1);
                states.len() - 1
            });
            before[j].push(i);
        }
    }
    // Backwards from all states in which somebody may run.
    let mut alive: HashSet<usize> = (0..states.len()).filter(|i| states[*i].runners() == 1).collect();
    let mut queue: Vec<usize> = alive.iter().copied().collect();
    while let Some(i) = queue.pop() {
        queue.extend(before[i].iter().filter(|j| alive.insert(**j)));
    }
    // Histories cut short by the bound on reconnections prove nothing about liveness.
    let stuck = (0..states.len())
        .filter(|i| !alive.contains(i))
        .filter(|i| states[*i].source.attempt().is_some_and(|a| a.epoch < MAX_EPOCH))
        .count();
    Ok((states.len(), stuck))
}

#[test]
fn never_two_runners_and_always_one_in_the_end() {
    let (states, stuck) = explore(Mutant::None).unwrap_or_else(|world| panic!("two runners: {world:#?}"));
    println!("{states} states explored");
    assert!(states > 1000, "only {states} states: the exploration is not one");
    assert_eq!(stuck, 0, "states from which nobody ever runs again");
}

#[test]
fn every_broken_rule_is_noticed() {
    for mutant in [Mutant::RunOnTimeout, Mutant::NoFence, Mutant::ResumeOnLoss, Mutant::ForgetsRunning] {
        assert!(explore(mutant).is_err(), "{mutant:?} went unnoticed");
    }
}
