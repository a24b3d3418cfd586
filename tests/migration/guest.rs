//! What the heartbeat guest tells on its serial port, over all the hosts that it was on.

use std::fs;

use super::program::until;
use super::scene::Host;

/// The lines that say that something is wrong with the guest.
const ALARMS: &[&str] = &["CORRUPT", "FAULT", "STALLED", "CLOCK BACK", "did not start", "bad value"];

/// The serial output of the guest on `hosts`, in the order in which it was on them. A line that was
/// begun on one and ended on the next is whole in it.
pub fn output(hosts: &[&Host]) -> String {
    let read = |host: &&Host| fs::read(&host.log).unwrap_or_default();
    String::from_utf8_lossy(&hosts.iter().flat_map(read).collect::<Vec<u8>>()).into_owned()
}

/// The whole lines of `text`.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'))
}

/// Checks the whole story of a guest: no alarm, and every heartbeat exactly once, in order. Gives
/// the number of the last beat.
#[track_caller]
pub fn check_story(hosts: &[&Host]) -> u64 {
    let text = output(hosts);
    let mut last = 0;
    for line in lines(&text) {
        assert!(!ALARMS.iter().any(|alarm| line.contains(alarm)), "the guest says: {line}");
        if let Some(count) = line.strip_prefix("b ").and_then(|n| n.parse::<u64>().ok()) {
            assert_eq!(count, last + 1, "heartbeats are not in order, near {line:?}");
            last = count;
        }
    }
    last
}

/// Waits until the guest, which now is on the last of `hosts`, has verified all of its memory anew
/// from here on, and checks its whole story.
#[track_caller]
pub fn check_alive(hosts: &[&Host]) {
    let passes = || {
        check_story(hosts);
        lines(&output(hosts)).filter_map(|l| l.strip_prefix("verified all pass ")?.parse::<u64>().ok()).max()
    };
    // Two more: the first may have begun before.
    let before = passes().unwrap_or(0);
    until("the guest has verified all its memory again", || passes().filter(|now| *now >= before + 2));
}

/// Waits until the guest, on the last of `hosts`, has printed a few heartbeats more.
#[track_caller]
pub fn check_beats(hosts: &[&Host]) {
    let before = check_story(hosts);
    until("more heartbeats", || (check_story(hosts) >= before + 3).then_some(()));
}

/// Waits until the guest of tests/guests/other.S has ticked so often, and checks that no tick is missing or twice.
pub fn await_ticks(hosts: &[&Host], count: u64) {
    until("the guest ticks", || (ticks(hosts) >= count).then_some(()));
}

/// How often it has ticked.
pub fn ticks(hosts: &[&Host]) -> u64 {
    let text = output(hosts);
    let mut next = None;
    for line in lines(&text).filter(|l| *l != "other: up") {
        let tick = line.strip_prefix("tick ").and_then(|n| n.parse().ok());
        let tick: u64 = tick.unwrap_or_else(|| panic!("the guest says: {line}"));
        assert!(next.is_none_or(|n| n == tick), "ticks are not in order, near {line:?}");
        next = Some(tick + 1);
    }
    next.unwrap_or(0)
}
