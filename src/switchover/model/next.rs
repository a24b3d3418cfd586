//! What may happen next in a world of the model: deliveries, losses, reconnections, the next session,
//! what happens on one host alone, deaths, and an operator's words.

use super::*;

/// Takes what may happen, and adds the world that follows.
type Branch<'a> = &'a mut dyn FnMut(&dyn Fn(&mut World));

impl World {
    /// Every world that may follow.
    pub(super) fn successors(&self, mutant: Mutant, operator: Operator) -> Vec<World> {
        let mut next = Vec::new();
        let mut branch = |change: &dyn Fn(&mut World)| {
            let mut world = self.clone();
            change(&mut world);
            if world != *self {
                next.push(world);
            }
        };
        // Deliver the next message of either direction, or a duplicate of it, or a late one.
        for keep in [false, true] {
            if let Some(&(attempt, msg)) = self.to_dest.first() {
                branch(&|w| {
                    if !keep {
                        w.to_dest.remove(0);
                    }
                    w.arrives_at_dest(attempt, msg, mutant);
                });
            }
            if let Some(&(attempt, msg)) = self.to_source.first() {
                branch(&|w| {
                    if !keep {
                        w.to_source.remove(0);
                    }
                    w.arrives_at_source(attempt, msg, mutant);
                });
            }
        }
        if let Some((attempt, msg)) = self.late {
            branch(&|w| {
                w.late = None;
                w.arrives_at_dest(attempt, msg, mutant);
            });
        }
        // The link dies; either side notices when it does.
        if self.source_link.is_some() {
            branch(&|w| {
                w.lose_at_source();
                w.source_input(SourceInput::LinkLost, mutant);
            });
        }
        if self.dest_link.is_some() {
            branch(&|w| {
                w.to_source.clear();
                w.dest_link = None;
                w.dest_input(DestInput::LinkLost, mutant);
            });
        }
        self.reconnections(&mut branch, mutant);
        self.next_session(&mut branch, mutant);
        self.local_events(&mut branch, mutant);
        self.deaths_and_words(&mut branch, mutant, operator);
        next.retain(|w| w.to_dest.len() <= 3 && w.to_source.len() <= 3);
        next
    }

    /// What was on its way to the destination is lost, but for one word that may come late.
    fn lose_at_source(&mut self) {
        self.late = self.to_dest.drain(..).next_back().or(self.late);
        self.source_link = None;
    }

    /// S6: of another session or connection it is not taken, and a second time it changes nothing.
    fn arrives_at_dest(&mut self, attempt: Attempt, msg: Msg, mutant: Mutant) {
        let current = self.dest_link == Some(attempt);
        if !current && (mutant != Mutant::StaleTaken || self.dest_link.is_none()) {
            return;
        }
        let input = match msg {
            Msg::Run => DestInput::Run,
            Msg::Revoke => DestInput::Revoke,
            _ => DestInput::Abort,
        };
        self.run_heard |= current && input == DestInput::Run;
        self.dest_input(input, mutant);
        let mut again = self.clone();
        again.dest_input(input, mutant);
        self.unchanged_by_repeat(&again);
    }

    fn arrives_at_source(&mut self, attempt: Attempt, msg: Msg, mutant: Mutant) {
        if self.source_link != Some(attempt) {
            return;
        }
        let input = match msg {
            Msg::Ready => SourceInput::Ready,
            Msg::Running => SourceInput::Running,
            Msg::Revoked => SourceInput::Revoked,
            _ => SourceInput::PeerAborted,
        };
        self.given_back |= input == SourceInput::Revoked;
        self.source_input(input, mutant);
        let mut again = self.clone();
        again.source_input(input, mutant);
        self.unchanged_by_repeat(&again);
    }

    fn unchanged_by_repeat(&mut self, again: &World) {
        let state = |w: &World| (w.source.clone(), w.source_step, w.dest.clone(), w.dest_step);
        if state(self) != state(again) {
            self.breaks("S6: a duplicate changes something");
        }
    }

    /// The number of the session under way, and the newest epoch in it.
    pub(super) fn session(&self) -> (usize, u32) {
        let attempt = self.source.attempt();
        let number = SESSIONS.iter().position(|s| attempt.is_some_and(|a| a.session == *s));
        (number.unwrap_or(0), attempt.map_or(0, |a| a.epoch))
    }

    /// The sender (or one started anew with --resume) connects with the next epoch.
    fn reconnections(&self, branch: Branch<'_>, mutant: Mutant) {
        let (session, epoch) = self.session();
        let lives = self.source_lives && mutant != Mutant::NeverReconnects;
        if !lives || self.source_link.is_some() || epoch >= MAX_EPOCH[session] || self.source_step.is_over() {
            return;
        }
        if !self.dest_lives {
            // Another receiver may listen where the one that is gone did.
            branch(&|w| {
                if w.source.reattach().is_ok() {
                    w.source_input(SourceInput::PeerForgot, mutant);
                }
            });
            return;
        }
        branch(&|w| {
            let Ok(attempt) = w.source.reattach() else { return };
            // The receiver takes the new connection for the old one and answers with its phase.
            if w.dest_link.take().is_some() {
                w.dest_input(DestInput::LinkLost, mutant);
            }
            w.to_source.clear();
            if w.dest.renew(attempt).is_err() {
                return;
            }
            w.source_link = Some(attempt);
            w.dest_link = Some(attempt);
            w.dest_input(DestInput::Reconnected, mutant);
            let phase = match w.dest_step {
                DestStep::InDoubt if mutant == Mutant::ForgetsPromise => SourceInput::PeerForgot,
                DestStep::InDoubt => SourceInput::PeerInDoubt,
                DestStep::Running => SourceInput::Running,
                DestStep::Refused => SourceInput::Revoked,
                DestStep::Loading => SourceInput::PeerForgot,
            };
            w.given_back |= phase == SourceInput::Revoked;
            w.source_input(phase, mutant);
        });
    }

    /// The guest has stayed, and is sent once more: HELLO names the session that this one supersedes,
    /// which tells the receiver that the old one was never committed.
    fn next_session(&self, branch: Branch<'_>, mutant: Mutant) {
        let lives = self.source_lives && self.dest_lives;
        if !lives || self.session().0 > 0 || self.source_step != SourceStep::Back || !self.source_runs() {
            return;
        }
        branch(&|w| {
            let session = SESSIONS[1];
            let Ok(superseded) = w.source.attach(session) else { return };
            let attempt = Attempt { session, epoch: 1 };
            w.lose_at_source();
            w.to_source.clear();
            (w.source_step, w.source_link) = (SourceStep::AwaitReady, Some(attempt));
            (w.run_said, w.run_heard, w.dest_ran, w.given_back) = (false, false, false, false);
            if superseded.is_some() && w.dest_step != DestStep::Running {
                w.dest_link = None;
                w.dest_input(DestInput::Abort, mutant);
            }
            if w.dest.prepare(attempt).is_ok() {
                (w.dest_step, w.dest_link) = (DestStep::Loading, Some(attempt));
            }
        });
    }

    /// vmrecv dies: before the promise vmrun drops the guest; after it, --resume starts here.
    pub(super) fn receiver_starts_anew(&mut self, mutant: Mutant) {
        self.dest_link = None;
        self.to_source.clear();
        self.dest_step = match self.dest {
            Ownership::Loading { attempt } => {
                self.dest.give_up(attempt).unwrap();
                DestStep::Refused
            }
            Ownership::InDoubt { .. } => DestStep::InDoubt,
            Ownership::Sole { .. } if mutant != Mutant::ForgetsRunning => DestStep::Running,
            _ => DestStep::Refused,
        };
    }

    /// What happens on one host alone.
    fn local_events(&self, branch: Branch<'_>, mutant: Mutant) {
        if self.source_step == SourceStep::Fencing && self.source_lives {
            let fenced = matches!(self.source, Ownership::Committed { .. });
            if fenced || mutant == Mutant::NoFence {
                branch(&|w| w.source_input(SourceInput::Fenced, mutant));
            }
            if !fenced {
                branch(&|w| {
                    // Not where a mutant has given the session up.
                    let fenced = w.source.attempt().map(|attempt| w.source.fence(attempt, "b"));
                    assert!(matches!(fenced, Some(Ok(_))) || mutant != Mutant::None, "{fenced:?}");
                });
                branch(&|w| w.source_input(SourceInput::FenceRefused, mutant));
            }
        }
        if mutant == Mutant::AckBeforeSync && self.dest_step == DestStep::Loading {
            branch(&|w| w.say_ready());
        }
        if self.dest_step == DestStep::Loading && self.dest_lives {
            branch(&|w| w.dest_input(DestInput::Loaded, mutant));
            branch(&|w| w.dest_input(DestInput::LoadFailed, mutant));
        }
        if mutant == Mutant::RunOnTimeout && self.dest_step == DestStep::InDoubt {
            branch(&|w| w.dest_input(DestInput::Run, mutant));
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
            w.lose_at_source();
            w.source_step = match w.source {
                Ownership::Sole { .. } => SourceStep::Back,
                Ownership::Committed { .. } => SourceStep::AwaitRunning,
                _ => SourceStep::Moved,
            };
        });
        branch(&|w| w.receiver_starts_anew(mutant));
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
        let fenced =
            |other_lives: bool| operator == Operator::Lies || operator == Operator::Fences && !other_lives;
        if committed && self.source_lives && fenced(self.dest_lives) {
            branch(&|w| {
                w.source.resume(word).unwrap();
                w.given_back = true;
                w.source_step = SourceStep::Back;
            });
        }
        if matches!(self.dest, Ownership::InDoubt { .. }) && self.dest_lives && fenced(self.source_lives) {
            branch(&|w| {
                w.dest.resume(word).unwrap();
                w.forced = true;
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
}
