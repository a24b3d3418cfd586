//! Peers that lie in postcopy: the guest never sees a wrong page, the source never lets its copy go for a
//! lie, strangers disturb nobody.

use std::sync::{Arc, Mutex};

use vmferry::control::RunState;
use vmferry::switchover::Attempt;
use vmferry::wire::{
    Abort, Done, FrameType, JsonBody, Message, PAGES_HEAD_BYTES, PageBitmap, RUN_BYTES, Refused, RefusedCode,
    RunKind, Side,
};

use crate::guest::check_beats;
use crate::peer::{Peer, attempt, hello, machine};
use crate::postcopy::{Pair, SLOWLY, await_serving, check_answers, lacks_pages};
use crate::program::{Program, until};
use crate::proxy::{Kind, Way};
use crate::scene::{kvm, vmctl};

/// Nothing but the slow background sends, and signs of life come often, so that the next one on the main channel
/// can be made something else.
const LIVELY: &[&str] = &["--mode", "postcopy", "--bwlimit", "256K", "--peer-timeout", "2s"];

/// A migration of a guest that its operator has paused, whose pages come for a minute and a half; until the end of
/// what `during` does. It is then let go, and comes to an end.
fn while_it_comes_slowly(during: impl FnOnce(&Pair)) {
    let mut pair = Pair::new();
    let control = pair.scene.path("send.sock");
    pair.a.vmctl(&["pause"]).expect(0, &[]);
    let args = [LIVELY, &["--control", control.to_str().unwrap()]].concat();
    let mut send = pair.scene.send(&pair.a, &pair.link.address, &args);
    pair.b.await_status("it lacks pages", |s| s.run_state == RunState::Paused && s.missing_pages > Some(0));
    await_serving(&mut send);
    during(&pair);
    vmctl(&control, &["set", "--bwlimit", "0"]).expect(0, &[]);
    pair.b.vmctl(&["resume"]).expect(0, &[]);
    send.end().expect(0, &[]);
    pair.check_moved();
}

/// The kind of a run whose pages are in the frame.
const DATA: u32 = RunKind::Data as u32;

/// What a frame of pages says.
struct Table {
    /// First page, pages, kind.
    runs: Vec<(u64, u32, u32)>,
    data: Vec<u8>,
}

impl Table {
    fn of(payload: &[u8]) -> Self {
        let count = u32::from_le_bytes(payload[..4].try_into().unwrap()) as usize;
        let (table, data) = payload[PAGES_HEAD_BYTES..].split_at(count * RUN_BYTES);
        let run = |run: &[u8]| {
            let number = |at: usize| u32::from_le_bytes(run[at..at + 4].try_into().unwrap());
            (u64::from_le_bytes(run[..8].try_into().unwrap()), number(8), number(12))
        };
        Self { runs: table.chunks_exact(RUN_BYTES).map(run).collect(), data: data.to_vec() }
    }

    fn payload(&self) -> Vec<u8> {
        let mut bytes = vec![0; PAGES_HEAD_BYTES];
        bytes[..4].copy_from_slice(&(self.runs.len() as u32).to_le_bytes());
        bytes[4..8].copy_from_slice(&4096u32.to_le_bytes());
        for (first, pages, kind) in &self.runs {
            bytes.extend(first.to_le_bytes());
            bytes.extend(pages.to_le_bytes());
            bytes.extend(kind.to_le_bytes());
        }
        bytes.extend(&self.data);
        bytes
    }
}

/// How often `program` has noted `text`.
fn notes(program: &Program, text: &str) -> usize {
    program.lines().iter().filter(|l| l["text"].as_str().is_some_and(|note| note.contains(text))).count()
}

/// Waits until the receiver has given a connection up and the source has come back; the guest lives.
#[track_caller]
fn await_new_connection(pair: &Pair, before: usize) {
    until("the connection is given up", || {
        (notes(&pair.b.program, "the connection is lost") > before).then_some(())
    });
    until("the source has come back", || (notes(&pair.b.program, "has come back") > before).then_some(()));
    assert!(check_answers(&pair.b).missing_pages > Some(0), "too late for this lie");
    assert!(pair.a.is_committed());
}

#[test]
fn frames_of_pages_that_cannot_be() {
    if !kvm() {
        return;
    }
    type Lie = fn(&mut Table, u64);
    let lies: [(&str, Lie); 6] = [
        ("outside RAM", |table, total| table.runs[0].0 = total),
        ("at the end of the world", |table, _| table.runs[0].0 = u64::MAX),
        ("over the end of RAM", |table, total| table.runs[0].0 = total - u64::from(table.runs[0].1) + 1),
        ("more than there is", |table, _| match table.runs.iter_mut().find(|run| run.2 == DATA) {
            Some(run) => run.1 += 1,
            // More zero pages would be no lie that can be seen.
            None => table.data.push(0),
        }),
        ("half a page", |table, _| match table.data.len().checked_sub(2048) {
            Some(rest) => table.data.truncate(rest),
            None => table.data.resize(2048, 0),
        }),
        ("of an unknown kind", |table, _| table.runs[0].2 = 9),
    ];
    while_it_comes_slowly(|pair| {
        let total = machine(&pair.a).ram.total_pages();
        for (lied, (what, lie)) in lies.into_iter().enumerate() {
            eprintln!("pages {what}");
            pair.link.rewrite_bytes(Way::ToDest, FrameType::Pages, move |payload| {
                let mut table = Table::of(payload);
                lie(&mut table, total);
                table.payload()
            });
            await_new_connection(pair, lied);
        }
    });
}

// Pages that are there come again with other contents, and pages that nobody has missed: those that went
// ahead (what the vCPU has at hand), those that came, those that are holes.
#[test]
fn pages_that_are_there_come_again_and_are_other_ones() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let there: Arc<Mutex<Vec<u64>>> = Arc::default();
    let remember = |way, kind| {
        let there = there.clone();
        pair.link.rewrite_bytes(way, kind, move |payload| {
            let runs = Table::of(payload).runs;
            there.lock().unwrap().extend(runs.iter().flat_map(|r| r.0..r.0 + u64::from(r.1)));
            payload.to_vec()
        });
    };
    remember(Way::ToDest, FrameType::Pages);
    let holes: Arc<Mutex<Vec<u64>>> = Arc::default();
    let theirs = holes.clone();
    pair.link.rewrite_bytes(Way::ToDest, FrameType::Missing, move |part| {
        let missing = |page: u64| part[8 + page as usize / 8] & (1 << (page % 8)) != 0;
        let pages = (part.len() as u64 - 8) * 8;
        theirs.lock().unwrap().extend((0..pages).rev().filter(|page| !missing(*page)).take(8));
        part.to_vec()
    });
    let mut send = pair.in_postcopy();
    for _ in 0..4 {
        remember(Way::ToDest, FrameType::Pages);
        let missing = pair.b.await_status("it lacks pages", lacks_pages).missing_pages.unwrap();
        pair.b.await_status("they are there", |s| s.missing_pages.unwrap_or(0) + 64 < missing);
        let known = there.lock().unwrap().clone();
        assert!(known.len() > 1 && !holes.lock().unwrap().is_empty());
        let lies: Vec<u64> = known.iter().rev().take(64).chain(&*holes.lock().unwrap()).copied().collect();
        pair.link.rewrite_bytes(Way::ToDest, FrameType::Pages, move |payload| {
            let mut table = Table::of(payload);
            let zeros = lies.len() / 2;
            table.runs.extend(lies[..zeros].iter().map(|page| (*page, 1, 1)));
            table.runs.extend(lies[zeros..].iter().map(|page| (*page, 1, 0)));
            table.data.extend(vec![0xa5; (lies.len() - zeros) * 4096]);
            table.payload()
        });
        check_beats(&[&pair.a, &pair.b]);
    }
    send.end().expect(0, &[]);
    pair.check_moved();
}

#[test]
fn a_source_that_says_what_it_may_not() {
    if !kvm() {
        return;
    }
    while_it_comes_slowly(|pair| {
        let description = machine(&pair.a);
        let words = vec![u64::MAX; description.ram.total_pages() as usize / 64];
        let end = r#"{"passes":0,"pages":0,"zero_pages":0,"postcopy":true}"#;
        let lies = [
            Message::Done(Done { pages: 0, zero_pages: 0, digest: None, latency: None }),
            Message::Released,
            Message::Missing(PageBitmap { first: 0, words }),
            Message::State(vec![7; 100]),
            Message::End(serde_json::from_str(end).unwrap()),
            Message::Machine(JsonBody::of(&description).unwrap()),
            Message::Barrier { pass: 1 },
        ];
        for (lied, lie) in lies.into_iter().enumerate() {
            eprintln!("{}", lie.kind());
            pair.link.replace(Way::ToDest, Kind::SignOfLife, lie);
            await_new_connection(pair, lied);
        }
        // What has been decided is said again, and changes nothing.
        let lost = notes(&pair.b.program, "the connection is lost");
        let abort = Abort { side: Side::Source, reason: "a lie".to_owned() };
        for again in [Message::Run, Message::Revoke, Message::Abort(abort)] {
            let before = pair.link.passed(Way::ToDest, Kind::SignOfLife);
            pair.link.replace(Way::ToDest, Kind::SignOfLife, again);
            until("it was said", || (pair.link.passed(Way::ToDest, Kind::SignOfLife) > before).then_some(()));
        }
        let more = pair.link.passed(Way::ToDest, Kind::SignOfLife);
        until("and heard", || (pair.link.passed(Way::ToDest, Kind::SignOfLife) > more + 1).then_some(()));
        assert_eq!(notes(&pair.b.program, "the connection is lost"), lost);
        let status = check_answers(&pair.b);
        assert!(status.missing_pages > Some(0) && pair.a.is_committed(), "{status:?}");
    });
}

#[test]
fn requests_for_pages_that_are_none_or_not_owed() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let total = machine(&pair.a).ram.total_pages();
    let mut send = pair.in_postcopy();
    // Those that nobody owes are no answer's worth; what was asked for in truth comes in the background.
    for lie in [vec![total, u64::MAX, u64::MAX - 7, total - 1], vec![0; 4096], vec![]] {
        let before = pair.link.passed(Way::ToSource, FrameType::PageRequest);
        let bytes = lie.iter().flat_map(|page: &u64| page.to_le_bytes()).collect::<Vec<u8>>();
        pair.link.rewrite_bytes(Way::ToSource, FrameType::PageRequest, move |_| bytes);
        until("it was said", || {
            (pair.link.passed(Way::ToSource, FrameType::PageRequest) > before).then_some(())
        });
        assert!(lacks_pages(&check_answers(&pair.b)), "too late for {lie:?}");
        assert!(pair.a.is_committed() && send.is_running());
        // The page that it stands at is asked for anew.
        pair.link.cut();
        pair.link.heal();
        until("the next request", || {
            (pair.link.passed(Way::ToSource, FrameType::PageRequest) > before + 1).then_some(())
        });
    }
    // A request that is no list of pages ends its connection.
    let before = notes(&send, "the connection is lost");
    pair.link.rewrite_bytes(Way::ToSource, FrameType::PageRequest, |payload| payload[..7].to_vec());
    until("it is given up", || (notes(&send, "the connection is lost") > before).then_some(()));
    send.end().expect(0, &[]);
    pair.check_moved();
}

/// Whatever was said: the source holds its copy, and the guest becomes whole when the truth is told.
#[track_caller]
fn check_held_and_resumed(mut pair: Pair) {
    assert!(pair.a.is_committed());
    assert!(lacks_pages(&check_answers(&pair.b)));
    assert!(pair.b.program.is_running());
    pair.scene.resume(&pair.a, &[]).end().expect(0, &[]);
    pair.check_moved();
}

#[test]
fn a_destination_that_says_done_early_is_not_believed() {
    if !kvm() {
        return;
    }
    let pair = Pair::new();
    let mut send = pair.in_postcopy();
    let done = Done { pages: 6144, zero_pages: 0, digest: None, latency: None };
    pair.link.replace(Way::ToSource, FrameType::PageRequest, Message::Done(done));
    send.end().expect(6, &["every page", "were never sent", "on the destination", "vmsend --resume"]);
    check_held_and_resumed(pair);
}

#[test]
fn a_destination_that_says_to_have_what_was_never_sent_is_not_believed() {
    if !kvm() {
        return;
    }
    for lie in ["all of it", "beyond the end", "nothing is missing"] {
        eprintln!("{lie}");
        let pair = Pair::new();
        let mut send = pair.in_postcopy();
        pair.link.cut();
        let words: &[&str] = match lie {
            "all of it" => {
                pair.link.rewrite_bytes(Way::ToSource, FrameType::Received, |part| {
                    part.iter().enumerate().map(|(i, byte)| if i < 8 { *byte } else { 0xff }).collect()
                });
                &["were never sent"]
            }
            "beyond the end" => {
                pair.link
                    .rewrite_bytes(Way::ToSource, FrameType::Received, |part| [part, &[0xff; 8]].concat());
                &["RECEIVED"]
            }
            _ => {
                pair.link.rewrite(Way::ToSource, FrameType::HelloAck, |ack| ack["fetching"] = false.into());
                &["every page", "were never sent"]
            }
        };
        pair.link.heal();
        send.end().expect(6, words).expect(6, &["on the destination"]);
        check_held_and_resumed(pair);
    }
}

#[test]
fn a_destination_that_says_the_guest_is_lost_frees_nothing() {
    if !kvm() {
        return;
    }
    let pair = Pair::new();
    let mut send = pair.in_postcopy();
    send.await_line("it has heard RUNNING", |line| (line["progress"]["phase"] == "postcopy").then_some(()));
    let abort = Abort { side: Side::Destination, reason: "a lie".to_owned() };
    pair.link.replace(Way::ToSource, FrameType::PageRequest, Message::Abort(abort));
    send.end().expect(8, &["a lie", "on the destination"]);
    check_held_and_resumed(pair);
}

// Point 5: stale sessions and epochs are refused, in postcopy as before.
#[test]
fn strangers_and_the_past_are_refused_in_postcopy() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let mut send = pair.scene.send(&pair.a, &pair.link.address, SLOWLY);
    pair.await_postcopy();
    await_serving(&mut send);
    pair.link.cut();
    pair.link.heal();
    pair.b.program.await_note("has come back");
    let ours = pair.b.status().ownership.attempt().unwrap();
    assert!(ours.epoch > 1);
    let calls = |attempt: Attempt, message: Message| {
        let mut peer = Peer::connect(&pair.b.address, 0);
        peer.attempt = attempt;
        peer.say(&message);
        peer.hear_all()
    };
    let new = hello(&machine(&pair.a));
    let again = vmferry::wire::Hello { resume: true, ..new.clone() };
    let superseding = vmferry::wire::Hello { superseded: Some(ours), ..new.clone() };
    let before = Attempt { epoch: ours.epoch - 1, ..ours };
    let later = Attempt { epoch: ours.epoch + 7, ..ours };
    for (attempt, message, code) in [
        (attempt(9, 1), Message::Hello(new.clone()), RefusedCode::Busy),
        (attempt(9, 1), Message::Hello(superseding), RefusedCode::Busy),
        (attempt(9, 7), Message::Hello(again.clone()), RefusedCode::Busy),
        (ours, Message::Hello(again.clone()), RefusedCode::Stale),
        (before, Message::Hello(again), RefusedCode::Stale),
        (ours, Message::Hello(new), RefusedCode::Busy),
        (attempt(9, 1), Message::Join { index: 1 }, RefusedCode::Session),
        (before, Message::Join { index: 1 }, RefusedCode::Session),
        (later, Message::Join { index: 1 }, RefusedCode::Session),
        (ours, Message::Join { index: 1 }, RefusedCode::Session),
        (ours, Message::Join { index: 64 }, RefusedCode::Session),
        (ours, Message::Run, RefusedCode::Protocol),
    ] {
        let answers = calls(attempt, message.clone());
        assert!(
            matches!(&answers[..], [Message::Refused(Refused { code: got, .. })] if *got == code),
            "{message:?}: {answers:?}"
        );
    }
    // None of it was noticed by those who are at work.
    assert_eq!(notes(&pair.b.program, "the connection is lost"), 1);
    assert_eq!(pair.b.status().ownership.attempt(), Some(ours));
    assert!(lacks_pages(&check_answers(&pair.b)));
    send.end().expect(0, &[]);
    pair.check_moved();
}
