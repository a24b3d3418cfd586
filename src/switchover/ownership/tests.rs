//! Every change in every state, and pairs of vmruns under arbitrary orders of what can be said.

use proptest::prelude::*;

use super::*;

type Change<'a> = dyn Fn(&mut Ownership) -> Result<(), Refusal> + 'a;

const A: SessionId = SessionId([0xa; 16]);
const B: SessionId = SessionId([0xb; 16]);

fn at(session: SessionId, epoch: u32) -> Attempt {
    Attempt { session, epoch }
}

/// One state of each kind, for session A and epoch 5 where there is one.
fn states() -> Vec<Ownership> {
    let attempt = at(A, 5);
    vec![
        Ownership::Empty { refused: None },
        Ownership::Empty { refused: Some(attempt) },
        Ownership::Loading { attempt },
        Ownership::InDoubt { attempt },
        Ownership::Sole { arrived: None, sending: None },
        Ownership::Sole { arrived: Some(attempt), sending: None },
        Ownership::Sole { arrived: None, sending: Some(attempt) },
        Ownership::Committed { attempt, dest: "d".into() },
        Ownership::Released { attempt },
    ]
}

/// What became of each of [`states`]: `-` refused without a change, `=` allowed without a change,
/// `E`mpty, `L`oading, `I`n doubt, `S`ole, `C`ommitted, `R`eleased.
fn outcomes(change: impl Fn(&mut Ownership) -> Result<(), Refusal>) -> String {
    let outcome = |before: Ownership| {
        let mut after = before.clone();
        match change(&mut after) {
            Err(refusal) => {
                assert_eq!(before, after, "a refusal changed something: {refusal}");
                assert!(!refusal.to_string().is_empty());
                '-'
            }
            Ok(()) if before == after => '=',
            Ok(()) => match after {
                Ownership::Empty { .. } => 'E',
                Ownership::Loading { .. } => 'L',
                Ownership::InDoubt { .. } => 'I',
                Ownership::Sole { .. } => 'S',
                Ownership::Committed { .. } => 'C',
                Ownership::Released { .. } => 'R',
            },
        }
    };
    states().into_iter().map(outcome).collect()
}

#[test]
fn every_change_in_every_state() {
    let (here, old, other) = (at(A, 5), at(A, 4), at(B, 5));
    let word = |force, peer_fenced| OperatorWord { force, peer_fenced };
    // Empty, Empty{refused}, Loading, InDoubt, Sole, Sole{arrived}, Sole{sending}, Committed, Released
    let table: &[(&str, &str, &Change<'_>)] = &[
        ("attach", "----SSS--", &|o| o.attach(B).map(drop)),
        ("reattach", "------SC-", &|o| o.reattach().map(drop)),
        ("fence", "------C=-", &|o| o.fence(here, "d")),
        ("fence, stale", "---------", &|o| o.fence(old, "d")),
        ("fence, other", "---------", &|o| o.fence(other, "d")),
        ("peer_revoked", "------=S-", &|o| o.peer_revoked(here)),
        ("peer_revoked, stale", "---------", &|o| o.peer_revoked(old)),
        ("peer_revoked, other", "---------", &|o| o.peer_revoked(other)),
        ("released", "-------R=", &|o| o.released(here)),
        ("released, other", "---------", &|o| o.released(other)),
        ("resume", "----===--", &|o| o.resume(word(false, false))),
        ("resume, force alone", "----===--", &|o| o.resume(word(true, false))),
        ("resume, fenced alone", "----===--", &|o| o.resume(word(false, true))),
        ("resume, both words", "---S===SS", &|o| o.resume(word(true, true))),
        ("prepare", "L--------", &|o| o.prepare(here)),
        ("prepare, other", "LL-------", &|o| o.prepare(other)),
        ("promise", "--I=-----", &|o| o.promise(here)),
        ("promise, stale", "---------", &|o| o.promise(old)),
        ("promise, other", "---------", &|o| o.promise(other)),
        ("run", "---S-=---", &|o| o.run(here)),
        ("run, stale", "-----=---", &|o| o.run(old)),
        ("run, other", "---------", &|o| o.run(other)),
        ("give_up", "-=EE-----", &|o| o.give_up(here)),
        ("give_up, stale", "-=-------", &|o| o.give_up(old)),
        ("give_up, other", "---------", &|o| o.give_up(other)),
        ("renew", "-===-=---", &|o| o.renew(here)),
        ("renew, newer", "-ELI-S---", &|o| o.renew(at(A, 6))),
        ("renew, stale", "---------", &|o| o.renew(old)),
        ("renew, other", "---------", &|o| o.renew(other)),
    ];
    for (name, expected, change) in table {
        assert_eq!(&outcomes(change), expected, "{name}");
    }
}

#[test]
fn a_refused_resume_says_where_the_guest_may_run_and_what_to_say() {
    let mut committed = Ownership::Committed { attempt: at(A, 1), dest: "tcp:b:7070".into() };
    let text = committed.resume(OperatorWord { force: false, peer_fenced: false }).unwrap_err().to_string();
    assert!(text.contains("tcp:b:7070") && text.contains("--force --peer-fenced"), "{text}");
}

/// What the destination may still hold of it, the next session's HELLO ends.
#[test]
fn a_guest_that_was_given_back_is_still_known_by_its_session() {
    let mut source = Ownership::Committed { attempt: at(A, 5), dest: "d".into() };
    for _ in 0..2 {
        source.peer_revoked(at(A, 5)).unwrap();
        assert_eq!(source, Ownership::Sole { arrived: None, sending: Some(at(A, 5)) });
    }
    assert_eq!(source.attach(B), Ok(Some(at(A, 5))));
}

#[test]
fn only_sole_may_run_and_all_survive_json() {
    for state in states() {
        assert_eq!(state.may_run(), matches!(state, Ownership::Sole { .. }));
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<Ownership>(&text).unwrap(), state);
    }
    for bad in ["", "zz", &"g".repeat(32), &"a".repeat(33), &"é".repeat(16)] {
        assert!(SessionId::try_from(bad.to_owned()).is_err(), "{bad}");
    }
}

/// Two vmruns, and what has been said between them and may arrive at any time, any number of times.
#[derive(Default)]
struct Said {
    run: Vec<Attempt>,
    revoked: Vec<Attempt>,
    running: Vec<Attempt>,
    sessions: u8,
}

fn pick(of: &[Attempt], n: u8) -> Option<Attempt> {
    of.get(usize::from(n) % of.len().max(1)).copied()
}

/// Does the `what`th thing that can happen; `n` chooses among what was said.
fn step(source: &mut Ownership, dest: &mut Ownership, said: &mut Said, what: u8, n: u8) {
    let unforced = OperatorWord { force: n & 1 == 1, peer_fenced: n & 1 == 0 };
    let now = source.attempt();
    match what {
        0 => {
            said.sessions += 1;
            let _ = source.attach(SessionId([said.sessions; 16]));
        }
        1 => drop(source.reattach()),
        2 => {
            if let Some(now) = now
                && source.fence(now, "d").is_ok()
            {
                said.run.push(now);
            }
        }
        3 => drop(pick(&said.revoked, n).map(|a| source.peer_revoked(a))),
        4 => drop(pick(&said.running, n).map(|a| source.released(a))),
        5 => drop(source.resume(unforced)),
        6 => drop(now.map(|a| dest.prepare(a))),
        7 => drop(now.map(|a| dest.promise(a))),
        8 => {
            if let Some(a) = pick(&said.run, n)
                && dest.run(a).is_ok()
            {
                said.running.push(a);
            }
        }
        9 => {
            if let Some(now) = now
                && dest.give_up(now).is_ok()
            {
                said.revoked.push(now);
            }
        }
        10 => drop(now.map(|a| dest.renew(a))),
        _ => drop(dest.resume(unforced)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]
    #[test]
    fn never_two_runners_whatever_the_order(steps in prop::collection::vec((0u8..12, any::<u8>()), 0..60)) {
        let (mut source, mut dest, mut said) = (Ownership::booted(), Ownership::empty(), Said::default());
        for (what, n) in steps {
            step(&mut source, &mut dest, &mut said, what, n);
            prop_assert!(!(source.may_run() && dest.may_run()), "{source:?} and {dest:?}");
        }
    }
}
