//! When to switch over: a pure function of what the passes have shown so far.
//!
//! A pass sends what was dirtied during the pass before it. If a pass takes less time than the one
//! before, less is dirtied meanwhile, and so on until a floor that the guest's dirty rate and the
//! link's bandwidth set. `--downtime` is the most that the guest may stand still; below it, further
//! passes are made as long as each of them pays off, for the best moment is not the first one. On a
//! busy host the outlook goes up and down: whoever waited for better once, and got worse, takes what
//! is good enough next.

use std::time::Duration;

/// What one finished pass has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassReport {
    /// Pages that were read, whatever was found. Not those known to have no memory: these take no time, and what is
    /// dirtied has some.
    pub pages: u64,
    /// Bytes that went onto the wire.
    pub wire_bytes: u64,
    /// From the first page to the receiver's word that it has placed the last.
    pub elapsed: Duration,
    /// Pages dirtied meanwhile: what the next pass would send.
    pub dirty_after_pages: u64,
}

/// What the operator wants; may change while the migration runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The longest downtime that is acceptable.
    pub downtime: Duration,
    /// After this long, `on_timeout` decides.
    pub timeout: Option<Duration>,
    /// After this many passes, `on_timeout` decides.
    pub max_passes: Option<u32>,
    /// What happens then, or when the passes stop getting better.
    pub on_timeout: OnTimeout,
    /// The operator wants it now.
    pub switch_now: bool,
    /// Whether pages may come after the guest.
    pub mode: Mode,
}

/// When pages are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// All before the guest runs at the destination.
    Precopy,
    /// Passes first; what they cannot keep up with, after it.
    Hybrid,
    /// All after it, but what goes ahead in the warm-up.
    Postcopy,
}

/// What to do when precopy does not reach the downtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnTimeout {
    /// Give up; the guest stays.
    Cancel,
    /// Switch over all the same, whatever the downtime.
    Force,
    /// Let the guest run at the destination at once, and send the rest after it.
    Postcopy,
}

/// What to do after a pass.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// Send another pass.
    Continue,
    /// Pause the guest, send what is left, and hand it over.
    SwitchOver,
    /// Pause the guest, hand it over, and send what is left.
    PostcopyNow,
    /// Stop: the sentence says why, with the figures.
    GiveUp(String),
}

/// Passes in a row without a better outlook after which precopy counts as stalled, and how long they
/// have to have taken: a burst of work in the guest is shorter than that.
const STALLED_PASSES: usize = 8;
const STALLED_FOR: Duration = Duration::from_secs(5);
/// A pass pays off when it shortens the expected downtime to less than this part of what it was.
const PAYS_OFF: f64 = 0.8;
/// Below this no further pass is worth its bytes.
const GOOD_ENOUGH: Duration = Duration::from_millis(2);
/// Passes after which a hybrid migration goes over to postcopy as soon as one does not pay off.
const HYBRID_PASSES: usize = 3;
/// How many passes are spent on getting better than what was asked for.
const EXTRA_PASSES: usize = 8;

/// The downtime to expect if the guest were paused now: what is dirty at the bandwidth of the last
/// pass, and `fixed` for everything that does not depend on pages (pause, export, import).
/// `None` before the first pass.
pub fn expected_downtime(history: &[PassReport], fixed: Duration) -> Option<Duration> {
    let last = history.last()?;
    let seconds_per_page = last.elapsed.as_secs_f64() / last.pages.max(1) as f64;
    let pages_time = seconds_per_page * last.dirty_after_pages as f64;
    Some(fixed + Duration::try_from_secs_f64(pages_time).unwrap_or(Duration::MAX / 2))
}

/// Decides what follows the last pass of `history`. `elapsed` is the time since the start.
pub fn decide(history: &[PassReport], elapsed: Duration, fixed: Duration, policy: &Policy) -> Decision {
    let Some(now) = expected_downtime(history, fixed) else {
        return Decision::Continue;
    };
    let late = if policy.mode == Mode::Precopy { Decision::SwitchOver } else { Decision::PostcopyNow };
    if policy.switch_now {
        return if now <= policy.downtime { Decision::SwitchOver } else { late };
    }
    let outlooks: Vec<Duration> =
        (1..=history.len()).filter_map(|n| expected_downtime(&history[..n], fixed)).collect();
    let is_late = policy.timeout.is_some_and(|t| elapsed >= t);
    if now <= policy.downtime {
        return if !is_late && worth_another(&outlooks, fixed, policy) {
            Decision::Continue
        } else {
            Decision::SwitchOver
        };
    }
    if policy.mode == Mode::Hybrid && (outlooks.len() >= HYBRID_PASSES && !pays_off(&outlooks, fixed)) {
        return Decision::PostcopyNow;
    }
    let why = if is_late {
        format!("--timeout {} has passed", humantime::format_duration(policy.timeout.unwrap_or_default()))
    } else if policy.max_passes.is_some_and(|n| history.len() >= n as usize) {
        format!("{} passes were made", history.len())
    } else if let Some(passes) = stalled(history, &outlooks) {
        format!("{passes} passes brought no improvement")
    } else {
        return Decision::Continue;
    };
    match policy.on_timeout {
        _ if policy.mode != Mode::Precopy => Decision::PostcopyNow,
        OnTimeout::Postcopy => Decision::PostcopyNow,
        OnTimeout::Force => Decision::SwitchOver,
        OnTimeout::Cancel => {
            Decision::GiveUp(format!("did not converge: {why}; {}; {ADVICE}", figures(history, now, policy)))
        }
    }
}

/// Whether a pass under way is to end before all of it is sent, `elapsed` after the start: time is up, or the operator
/// wants it now, and what is left goes after the guest, or the guest stays. Where it has to move whatever the downtime,
/// the pass makes that shorter.
pub fn cuts_short(elapsed: Duration, policy: &Policy) -> bool {
    let rest_may_follow = policy.mode != Mode::Precopy;
    let is_late = policy.timeout.is_some_and(|t| elapsed >= t);
    is_late && (rest_may_follow || policy.on_timeout != OnTimeout::Force)
        || policy.switch_now && rest_may_follow
}

/// Within the downtime already: whether one more pass is likely to make it clearly shorter.
fn worth_another(outlooks: &[Duration], fixed: Duration, policy: &Policy) -> bool {
    let within = outlooks.iter().rev().take_while(|d| **d <= policy.downtime).count();
    let lost = outlooks[..outlooks.len() - within].iter().any(|d| *d <= policy.downtime);
    let Some(now) = outlooks.last() else { return false };
    !lost && within <= EXTRA_PASSES && *now > fixed + GOOD_ENOUGH && pays_off(outlooks, fixed)
}

/// Whether one of the last two passes has clearly shortened what is to be expected; the first two
/// always have. One pass alone says little: a busy host spoils it.
fn pays_off(outlooks: &[Duration], fixed: Duration) -> bool {
    let beyond = |d: &Duration| d.saturating_sub(fixed).as_secs_f64();
    let [.., first, second, third] = outlooks else { return true };
    beyond(third) < PAYS_OFF * beyond(second) || beyond(second) < PAYS_OFF * beyond(first) && third <= second
}

/// How many passes there were last whose best outlook is no better than what came before them, where
/// those are enough.
fn stalled(history: &[PassReport], outlooks: &[Duration]) -> Option<usize> {
    let mut took = Duration::ZERO;
    let long_enough = history.iter().rev().position(|pass| {
        took += pass.elapsed;
        took >= STALLED_FOR
    })?;
    let passes = STALLED_PASSES.max(long_enough + 1);
    let split = outlooks.len().checked_sub(passes).filter(|n| *n > 0)?;
    let best = |part: &[Duration]| part.iter().min().copied().unwrap_or(Duration::MAX);
    let no_better = best(&outlooks[split..]).as_secs_f64() > 0.95 * best(&outlooks[..split]).as_secs_f64();
    no_better.then_some(passes)
}

/// What an operator can do about it.
const ADVICE: &str = "--mode hybrid or --on-timeout postcopy sends the rest after the guest, --on-timeout force takes \
                      that downtime, and so does a longer --downtime";

fn figures(history: &[PassReport], now: Duration, policy: &Policy) -> String {
    let Some(last) = history.last() else { return String::new() };
    let seconds = last.elapsed.as_secs_f64().max(1e-6);
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    format!(
        "the guest dirties {:.1} MiB/s, the link took {:.1} MiB/s, expected downtime {:.0} ms, wanted {:.0} ms",
        mib(last.dirty_after_pages as f64 * 4096.0) / seconds,
        mib(last.wire_bytes as f64) / seconds,
        now.as_secs_f64() * 1e3,
        policy.downtime.as_secs_f64() * 1e3,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn policy() -> Policy {
        Policy {
            downtime: 300 * MS,
            timeout: None,
            max_passes: None,
            on_timeout: OnTimeout::Cancel,
            switch_now: false,
            mode: Mode::Precopy,
        }
    }

    fn pass(pages: u64, ms: u32, dirty: u64) -> PassReport {
        PassReport { pages, wire_bytes: pages * 4096, elapsed: ms * MS, dirty_after_pages: dirty }
    }

    /// A guest that dirties `rate` pages per ms of a set of `set`, over a link of `link` pages per ms.
    fn simulate(set: u64, rate: u64, link: u64, policy: &Policy) -> (Vec<PassReport>, Decision) {
        let mut history = Vec::new();
        let mut pages = 100_000;
        loop {
            let ms = (pages / link).max(1);
            let dirty = (rate * ms).min(set);
            history.push(pass(pages, ms as u32, dirty));
            pages = dirty.max(1);
            let elapsed = history.iter().map(|p| p.elapsed).sum();
            match decide(&history, elapsed, 5 * MS, policy) {
                Decision::Continue => assert!(history.len() < 200, "never decides"),
                other => return (history, other),
            }
        }
    }

    #[test]
    fn an_idle_guest_goes_at_once() {
        assert_eq!(decide(&[pass(1000, 10, 0)], 10 * MS, 5 * MS, &policy()), Decision::SwitchOver);
    }

    #[test]
    fn a_guest_slower_than_the_link_goes_at_its_floor_not_at_the_limit() {
        let (history, decision) = simulate(16_384, 100, 300, &policy());
        assert_eq!(decision, Decision::SwitchOver);
        assert!(expected_downtime(&history, 5 * MS).unwrap() < 15 * MS, "{history:?}");
    }

    #[test]
    fn a_guest_faster_than_the_link_is_given_up_with_figures_or_forced() {
        let slow = Policy { downtime: 30 * MS, ..policy() };
        let (_, decision) = simulate(16_384, 1000, 100, &slow);
        let Decision::GiveUp(why) = decision else { panic!("{decision:?}") };
        assert!(why.contains("MiB/s") && why.contains("wanted 30 ms") && why.ends_with(ADVICE), "{why}");
        let forced = Policy { on_timeout: OnTimeout::Force, ..slow };
        assert_eq!(simulate(16_384, 1000, 100, &forced).1, Decision::SwitchOver);
    }

    #[test]
    fn a_hybrid_goes_over_when_passes_do_not_pay_off_and_only_then() {
        let hybrid = Policy { mode: Mode::Hybrid, downtime: 30 * MS, ..policy() };
        let (history, decision) = simulate(16_384, 1000, 100, &hybrid);
        assert_eq!(decision, Decision::PostcopyNow);
        assert!(history.len() <= 4, "{history:?}");
        assert_eq!(simulate(16_384, 100, 300, &hybrid).1, Decision::SwitchOver);
        let timed = Policy { mode: Mode::Precopy, on_timeout: OnTimeout::Postcopy, ..hybrid };
        assert_eq!(simulate(16_384, 1000, 100, &timed).1, Decision::PostcopyNow);
        let now = Policy { switch_now: true, ..hybrid };
        assert_eq!(decide(&[pass(1000, 100, 900)], 100 * MS, 5 * MS, &now), Decision::PostcopyNow);
    }

    // What a guest on a busy host with one CPU has shown, in ms; wanted are 300.
    #[test]
    fn who_waited_for_better_in_vain_takes_what_is_good_enough() {
        let outlooks = [575, 872, 721, 759, 330, 352, 542, 306, 327, 307, 216, 391, 476, 342, 182];
        let history: Vec<_> = outlooks.map(|ms| pass(1000, 1000, ms)).into();
        for passes in 1..=history.len() {
            let decision = decide(&history[..passes], Duration::ZERO, Duration::ZERO, &policy());
            let last = passes == history.len();
            let want = if last { Decision::SwitchOver } else { Decision::Continue };
            assert_eq!(decision, want, "after pass {passes}");
        }
    }

    #[test]
    fn a_burst_of_work_is_waited_for() {
        let after_nine = |ms: u32| {
            let mut history = vec![pass(100_000, 1000, 400 * 100)];
            history.extend([pass(1000, ms, 500_000 / u64::from(ms)); 9]);
            decide(&history, Duration::ZERO, Duration::ZERO, &policy())
        };
        assert_eq!(after_nine(400), Decision::Continue);
        assert!(matches!(after_nine(700), Decision::GiveUp(why) if why.contains("8 passes brought")));
    }

    #[test]
    fn a_pass_ends_with_the_time_but_for_who_has_to_move_whatever_the_downtime() {
        let timed = Policy { timeout: Some(900 * MS), ..policy() };
        let cuts = |elapsed, mode, on_timeout| cuts_short(elapsed, &Policy { mode, on_timeout, ..timed });
        for on_timeout in [OnTimeout::Cancel, OnTimeout::Postcopy, OnTimeout::Force] {
            let is_forced = on_timeout == OnTimeout::Force;
            assert_eq!(cuts(900 * MS, Mode::Precopy, on_timeout), !is_forced);
            assert!(cuts(900 * MS, Mode::Hybrid, on_timeout));
            assert!(!cuts(899 * MS, Mode::Hybrid, on_timeout));
        }
        assert!(!cuts_short(900 * MS, &policy()));
    }

    #[test]
    fn the_operators_word_ends_a_pass_where_the_rest_may_follow() {
        let now = |mode| cuts_short(Duration::ZERO, &Policy { mode, switch_now: true, ..policy() });
        assert_eq!([Mode::Precopy, Mode::Hybrid, Mode::Postcopy].map(now), [false, true, true]);
    }

    #[test]
    fn limits_and_the_operators_word() {
        let history = [pass(100_000, 1000, 90_000)];
        let at = |elapsed, p: &Policy| decide(&history, elapsed, 5 * MS, p);
        assert_eq!(at(1000 * MS, &policy()), Decision::Continue);
        assert_eq!(at(1000 * MS, &Policy { switch_now: true, ..policy() }), Decision::SwitchOver);
        let timed = Policy { timeout: Some(900 * MS), ..policy() };
        assert!(matches!(at(1000 * MS, &timed), Decision::GiveUp(why) if why.contains("--timeout 900ms")));
        // Time is up: nothing is waited for any more, though one more pass would pay off.
        let within = [pass(100_000, 1000, 20_000)];
        let decision = |p: &Policy| decide(&within, 1000 * MS, 5 * MS, p);
        assert_eq!((decision(&policy()), decision(&timed)), (Decision::Continue, Decision::SwitchOver));
        let counted = Policy { max_passes: Some(1), ..policy() };
        assert!(matches!(at(1000 * MS, &counted), Decision::GiveUp(why) if why.contains("1 passes")));
    }
}
