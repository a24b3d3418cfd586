//! Every world that can be reached, breadth first, and what is wrong with any of them.

use indexmap::IndexSet;
use rustc_hash::FxBuildHasher;

use super::{MAX_FAULTS, Mutant, World, start};

/// Explores everything with so many faults in one history; gives the number of states, and of those from which the guest does not become
/// whole unless something more goes wrong. Or the rule that was broken, and where.
fn explore(mutant: Mutant, max_faults: u8) -> Result<(usize, usize), (&'static str, Box<World>)> {
    // In the order in which they were found, which is that of the search.
    let mut states = IndexSet::with_hasher(FxBuildHasher);
    states.insert(start());
    let mut before: Vec<Vec<usize>> = vec![vec![]];
    let mut i = 0;
    while let Some(world) = states.get_index(i) {
        if let Some(rule) = world.broken_rule() {
            return Err((rule, Box::new(world.clone())));
        }
        let next = if world.is_whole() { vec![] } else { world.successors(mutant, max_faults) };
        for (next, fault) in next {
            let (j, is_new) = states.insert_full(next);
            if is_new {
                before.push(vec![]);
            }
            if !fault {
                before[j].push(i);
            }
        }
        i += 1;
    }
    // Backwards from all that are whole.
    let mut good: Vec<bool> = states.iter().map(World::is_whole).collect();
    let mut queue: Vec<usize> = (0..good.len()).filter(|i| good[*i]).collect();
    while let Some(i) = queue.pop() {
        queue.extend(before[i].iter().filter(|j| !std::mem::replace(&mut good[**j], true)));
    }
    Ok((states.len(), good.iter().filter(|good| !**good).count()))
}

#[test]
fn the_guest_becomes_whole_whatever_is_lost_and_never_sees_a_wrong_page() {
    let (states, stuck) =
        explore(Mutant::None, MAX_FAULTS).unwrap_or_else(|(rule, world)| panic!("{rule}: {world:#?}"));
    println!("{states} states explored");
    assert!(states > 1000, "only {states} states: the exploration is not one");
    assert_eq!(stuck, 0, "states from which the guest does not become whole");
}

#[test]
fn every_broken_rule_of_the_recovery_is_noticed() {
    for (mutant, rule) in [
        (Mutant::MarkedFirst, Some("D1")),
        (Mutant::StaleTaken, Some("S6")),
        (Mutant::DoneEarly, Some("S5")),
        // What these break is that the guest becomes whole.
        (Mutant::OwedIsKept, None),
        (Mutant::ChannelLossIgnored, None),
    ] {
        // A rule that breaks ends the search; where none does, one fault is enough to see it.
        let max_faults = if rule.is_some() { MAX_FAULTS } else { 1 };
        match (explore(mutant, max_faults), rule) {
            (Err((broken, _)), Some(rule)) if broken.starts_with(rule) => {
                println!("{mutant:?} breaks {broken}")
            }
            (Ok((_, stuck @ 1..)), None) => println!("{mutant:?} leaves {stuck} states without an end"),
            (found, _) => panic!("{mutant:?}: {:?}", found.map_err(|(rule, _)| rule)),
        }
    }
}
