//! Breadth first through everything that may happen, and what must hold in every state.

use std::collections::{HashMap, HashSet, VecDeque};

use super::{MAX_EPOCH, Mutant, Operator, World, start};

/// A rule that was broken, and where.
#[derive(Debug)]
struct Broken {
    rule: &'static str,
    #[allow(dead_code)] // for whoever looks into a failure
    world: World,
}

/// Explores everything; gives the number of states and of those from which nobody ever runs again,
/// although both `vmrun`s live.
fn explore(mutant: Mutant, operator: Operator) -> Result<(usize, usize), Box<Broken>> {
    let mut index = HashMap::from([(start(), 0usize)]);
    let mut states = vec![start()];
    let mut before: Vec<Vec<usize>> = vec![vec![]];
    let mut queue = VecDeque::from([0]);
    while let Some(i) = queue.pop_front() {
        if let Some(rule) = states[i].broken_rule() {
            return Err(Box::new(Broken { rule, world: states[i].clone() }));
        }
        for next in states[i].clone().successors(mutant, operator) {
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
    let runs = |world: &World| world.source_runs() || world.dest_runs();
    let mut alive: HashSet<usize> = (0..states.len()).filter(|i| runs(&states[*i])).collect();
    let mut queue: Vec<usize> = alive.iter().copied().collect();
    while let Some(i) = queue.pop() {
        queue.extend(before[i].iter().filter(|j| alive.insert(**j)));
    }
    // Histories cut short by the bound on reconnections prove nothing about liveness.
    let stuck = (0..states.len())
        .filter(|i| !alive.contains(i))
        .filter(|i| states[*i].source_lives && states[*i].dest_lives)
        .filter(|i| states[*i].source.attempt().is_some_and(|a| a.epoch < MAX_EPOCH))
        .count();
    Ok((states.len(), stuck))
}

#[test]
fn the_rules_hold_and_somebody_can_always_run_in_the_end() {
    for operator in [Operator::Absent, Operator::Fences] {
        let found = explore(Mutant::None, operator);
        let (states, stuck) = found.unwrap_or_else(|broken| panic!("{operator:?}: {broken:#?}"));
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
    ] {
        let broken = explore(mutant, Operator::Absent).expect_err(&format!("{mutant:?} went unnoticed"));
        println!("{mutant:?} breaks {}", broken.rule);
        assert!(broken.rule.starts_with(rule), "{mutant:?}: {broken:#?}");
    }
}

/// Both words without the deed can make two runners, which is why they are asked for.
#[test]
fn an_operator_who_says_fenced_and_has_not_fenced_can_break_it() {
    let broken = explore(Mutant::None, Operator::Lies).expect_err("the model does not tell them apart");
    println!("operator Lies: {}", broken.rule);
    assert_eq!(broken.rule, "two copies may run");
}
