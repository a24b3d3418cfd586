//! Breadth first through everything that may happen, and what must hold in every state.

use std::fmt;

use indexmap::IndexSet;
use rustc_hash::FxBuildHasher;

use super::{MAX_EPOCH, Mutant, Operator, World, start};

/// A rule that was broken, and where.
struct Broken {
    rule: &'static str,
    world: World,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:#?}", self.rule, self.world)
    }
}

/// Explores everything; gives the number of states and of those from which nobody ever runs again,
/// although both `vmrun`s live.
fn explore(mutant: Mutant, operator: Operator) -> Result<(usize, usize), Box<Broken>> {
    // In the order in which they were found, which is that of the search.
    let mut states = IndexSet::with_hasher(FxBuildHasher);
    states.insert(start());
    let mut before: Vec<Vec<usize>> = vec![vec![]];
    let mut i = 0;
    while let Some(world) = states.get_index(i) {
        if let Some(rule) = world.broken_rule() {
            return Err(Box::new(Broken { rule, world: world.clone() }));
        }
        for next in world.successors(mutant, operator) {
            let (j, is_new) = states.insert_full(next);
            if is_new {
                before.push(vec![]);
            }
            before[j].push(i);
        }
        i += 1;
    }
    // Backwards from all states in which somebody may run.
    let runs = |world: &World| world.source_runs() || world.dest_runs();
    let mut alive: Vec<bool> = states.iter().map(runs).collect();
    let mut queue: Vec<usize> = (0..alive.len()).filter(|i| alive[*i]).collect();
    while let Some(i) = queue.pop() {
        queue.extend(before[i].iter().filter(|j| !std::mem::replace(&mut alive[**j], true)));
    }
    // Histories cut short by the bound on reconnections prove nothing about liveness.
    let may_be_stuck = |world: &World| {
        let (session, epoch) = world.session();
        world.source_lives && world.dest_lives && epoch < MAX_EPOCH[session]
    };
    let stuck = states.iter().zip(alive).filter(|(world, alive)| !alive && may_be_stuck(world)).count();
    Ok((states.len(), stuck))
}

#[test]
fn the_rules_hold_and_somebody_can_always_run_in_the_end() {
    for operator in [Operator::Absent, Operator::Fences] {
        let found = explore(Mutant::None, operator);
        let (states, stuck) = found.unwrap_or_else(|broken| panic!("{operator:?}: {broken}"));
        println!("operator {operator:?}: {states} states explored, no rule broken, nobody stuck");
        assert!(states > 1000, "only {states} states: the exploration is not one");
        assert_eq!(stuck, 0, "states from which nobody ever runs again");
    }
}

#[test]
fn every_broken_rule_is_noticed() {
    for (mutant, rule) in [
        (Mutant::RunOnTimeout, "S1"),
        (Mutant::NoFence, "S3"),
        (Mutant::ResumeOnLoss, "S2"),
        (Mutant::ResumeAfterFence, "S2"),
        (Mutant::AckBeforeSync, "S3"),
        (Mutant::DropsOnLoss, "S4"),
        (Mutant::ReleaseBeforeRunning, "S5"),
        (Mutant::ForgetsRunning, "two copies"),
        (Mutant::StaleTaken, "S1"),
        (Mutant::RepeatGivesUp, "S6"),
    ] {
        let Err(broken) = explore(mutant, Operator::Absent) else { panic!("{mutant:?} went unnoticed") };
        println!("{mutant:?} breaks {}", broken.rule);
        assert!(broken.rule.starts_with(rule), "{mutant:?}: {broken}");
    }
}

#[test]
fn a_guest_that_is_forgotten_or_left_alone_is_noticed() {
    for mutant in [Mutant::ForgetsPromise, Mutant::NeverReconnects] {
        let Ok((_, stuck)) = explore(mutant, Operator::Absent) else { panic!("{mutant:?} breaks a rule") };
        println!("{mutant:?} leaves {stuck} states from which nobody ever runs again");
        assert!(stuck > 0, "{mutant:?} went unnoticed");
    }
}

/// Both words without the deed can make two runners, which is why they are asked for.
#[test]
fn an_operator_who_says_fenced_and_has_not_fenced_can_break_it() {
    let Err(broken) = explore(Mutant::None, Operator::Lies) else {
        panic!("the model does not tell them apart")
    };
    println!("operator Lies: {}", broken.rule);
    assert_eq!(broken.rule, "two copies may run");
}
