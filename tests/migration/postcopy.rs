//! Postcopy: the guest runs at the destination and its pages follow, whatever dies or is lost.

use std::time::{Duration, Instant};

use vmferry::control::{RunState, Status};
use vmferry::switchover::Ownership;
use vmferry::wire::FrameType;

use crate::guest::{check_alive, check_beats};
use crate::program::{End, Program, until};
use crate::proxy::{Proxy, Way};
use crate::scene::{Host, Receiver, Scene, Vmrun, kvm};

/// Switches at once, and pushes so slowly that the guest is first at most of its pages, which takes
/// the guest of [`Pair`] seconds.
pub const SLOWLY: &[&str] = &["--mode", "postcopy", "--bwlimit", "512K"];

/// How soon a control socket has to answer: generous, as all CPUs are busy with guests.
const AT_ONCE: Duration = Duration::from_secs(1);

/// A guest that visits all of its memory in three seconds, and a receiver that is reached through a
/// link in the test's hand.
pub struct Pair {
    pub a: Vmrun,
    pub b: Receiver,
    pub link: Proxy,
    pub scene: Scene,
}

impl Pair {
    pub fn new() -> Self {
        Self::with("")
    }

    pub fn with(cmdline: &str) -> Self {
        Self::of("4K", cmdline)
    }

    /// With memory of `pages`, on both sides.
    pub fn of(pages: &str, cmdline: &str) -> Self {
        let scene = Scene::new();
        let cmdline = format!("fill=24M ws=1M rate=2 scan=1 {cmdline}");
        let a = scene.guest_of(pages, "a", "64M", 1, &cmdline);
        let b = scene.receiver("b", &[]);
        let link = Proxy::to(&b.address);
        Self { a, b, link, scene }
    }

    /// A migration whose guest runs at the destination, with pages missing.
    pub fn in_postcopy(&self) -> Program {
        let mut send = self.scene.send(&self.a, &self.link.address, SLOWLY);
        self.await_postcopy();
        await_serving(&mut send);
        send
    }

    pub fn await_postcopy(&self) {
        self.b.await_status("it runs without all its pages", lacks_pages);
    }

    pub fn resume_receiver(&mut self) {
        let mut command = self.scene.command("vmrecv");
        command.arg("--json").arg("--resume").arg("--control").arg(&self.b.control);
        self.b.program = self.scene.start("vmrecv-resume", command);
    }

    /// It is over, and the guest is whole at the destination.
    #[track_caller]
    pub fn check_moved(&mut self) {
        self.b.program.end().expect(0, &[]);
        self.a.program.end().expect(0, &["migrated to"]);
        check_whole(&[&self.a, &self.b]);
    }
}

/// The sender has heard RUNNING: a connection that is lost from here on is lost in postcopy.
pub fn await_serving(send: &mut Program) {
    send.await_line("it serves pages", |line| (line["progress"]["phase"] == "postcopy").then_some(()));
}

pub fn lacks_pages(status: &Status) -> bool {
    status.run_state == RunState::Running && status.missing_pages.is_some_and(|n| n > 0)
}

/// The guest, on the last of `hosts`, has all its pages and they are right.
#[track_caller]
pub fn check_whole(hosts: &[&Host]) {
    let status = hosts[hosts.len() - 1].await_running();
    assert_eq!(status.missing_pages, None, "{status:?}");
    check_alive(hosts);
}

/// The control socket of `host` answers a new caller soon.
#[track_caller]
pub fn check_answers(host: &Host) -> Status {
    let asked = Instant::now();
    let status = host.status();
    assert!(asked.elapsed() < AT_ONCE, "{:?}: {status:?}", asked.elapsed());
    status
}

/// The result tells of pages that came after the guest.
#[track_caller]
pub fn check_result(end: &End) {
    let result = end.expect(0, &[]).result();
    assert!(result["postcopy_pages"].as_u64().unwrap() > 0, "{result}");
    let latency = &result["latency"];
    let of = |name: &str| latency[name].as_u64().unwrap_or_else(|| panic!("no {name} in {result}"));
    assert!(of("count") > 0 && of("p50_us") <= of("p99_us") && of("p99_us") <= of("max_us"), "{result}");
}

/// Moves a guest to a new receiver by postcopy and checks all of it. `args` limit the bandwidth:
/// without that, all of so small a guest may be there before its first fault is read, and then nobody
/// has waited.
fn moves(cpus: u32, cmdline: &str, args: &[&str]) -> serde_json::Value {
    let scene = Scene::new();
    let mut a = scene.guest("a", "64M", cpus, cmdline);
    let mut b = scene.receiver("b", &[]);
    let end = scene.send(&a, &b.address, args).end();
    check_result(&end);
    let arrived = b.program.end();
    arrived.expect(0, &[]);
    // Both sides agree on what was sent and has come.
    for count in ["data_pages", "zero_pages"] {
        assert_eq!(end.result()[count], arrived.result()[count], "{count}");
    }
    assert!(!end.lines.iter().any(|l| l["text"].as_str().is_some_and(|t| t.contains("counts differ"))));
    a.program.end().expect(0, &["migrated to"]);
    check_whole(&[&a, &b]);
    assert_eq!(b.status().vcpus, cpus);
    end.result().clone()
}

#[test]
fn postcopy_with_one_vcpu() {
    if kvm() {
        moves(1, "fill=24M ws=8M rate=20", &["--mode", "postcopy", "--bwlimit", "8M"]);
    }
}

#[test]
fn postcopy_with_two_vcpus_random_order_with_the_clock_page() {
    if kvm() {
        let cmdline = "fill=24M ws=8M rate=20 order=random place=spread kvmclock=1";
        moves(2, cmdline, &["--mode", "postcopy", "--channels", "2", "--bwlimit", "8M"]);
    }
}

#[test]
fn postcopy_with_four_vcpus_that_dirty_all_they_can() {
    if kvm() {
        moves(4, "fill=16M ws=8M rate=0", &["--mode", "postcopy", "--channels", "1", "--bwlimit", "8M"]);
    }
}

#[test]
fn hybrid_switches_by_itself_where_precopy_cannot_follow() {
    if kvm() {
        moves(1, "fill=16M ws=8M rate=20", &["--mode", "hybrid", "--bwlimit", "10M", "--downtime", "20ms"]);
    }
}

// Point 1: the operator's `switch-now` means postcopy, where what is left does not fit the downtime.
#[test]
fn switch_now_in_hybrid_goes_over_at_once() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.guest("a", "64M", 1, "fill=24M ws=8M rate=20");
    let mut b = scene.receiver("b", &[]);
    let socket = scene.path("send.sock");
    let args =
        ["--mode", "hybrid", "--bwlimit", "8M", "--downtime", "1ms", "--control", socket.to_str().unwrap()];
    let mut send = scene.send(&a, &b.address, &args);
    send.await_line("pages on their way", |l| {
        (l["progress"]["phase"] == "precopy" && l["progress"]["sent_bytes"].as_u64()? > 1 << 20).then_some(())
    });
    crate::scene::vmctl(&socket, &["switch-now"]).expect(0, &[]);
    let end = send.end();
    check_result(&end);
    assert_eq!(end.result()["passes"], 1);
    b.program.end().expect(0, &[]);
    check_whole(&[&a, &b]);
}

// Point 3: what is asked for has a channel of its own, which a stuck background never blocks.
#[test]
fn a_background_that_is_stuck_holds_up_no_request() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    // Paused, so that nothing but the background sends.
    pair.a.vmctl(&["pause"]).expect(0, &[]);
    let args = ["--mode", "postcopy", "--channels", "1", "--bwlimit", "1M"];
    let mut send = pair.scene.send(&pair.a, &pair.link.address, &args);
    let missing =
        pair.b.await_status("pages are missing", |s| s.missing_pages.is_some()).missing_pages.unwrap();
    pair.b.await_status("the background sends", |s| s.missing_pages.is_some_and(|n| n + 64 < missing));
    await_serving(&mut send);
    let stuck = pair.link.hold(Way::ToDest, FrameType::Pages).caught();
    let before = pair.link.passed(Way::ToDest, FrameType::Pages);
    pair.b.vmctl(&["resume"]).expect(0, &[]);
    until("requests are answered", || {
        (pair.link.passed(Way::ToDest, FrameType::Pages) >= before + 3).then_some(())
    });
    stuck.pass();
    send.end().expect(0, &[]);
    pair.check_moved();
}

// Row 23, by policy.
#[test]
fn precopy_that_times_out_goes_on_as_postcopy() {
    if kvm() {
        let args = ["--mode", "precopy", "--bwlimit", "10M", "--downtime", "20ms", "--max-passes", "4"];
        moves(1, "fill=16M ws=8M rate=20", &[&args[..], &["--on-timeout", "postcopy"]].concat());
    }
}

// Row 23, by time: the first pass would take three seconds. More than half of the memory is holes, which are told in no
// time: they must not make what is left look like less than the downtime.
#[test]
fn a_pass_that_takes_too_long_is_cut_short() {
    if !kvm() {
        return;
    }
    for args in [["--mode", "hybrid"], ["--on-timeout", "postcopy"]] {
        let limits = ["--bwlimit", "8M", "--timeout", "300ms", "--downtime", "1s"];
        let result = moves(1, "fill=24M ws=4M rate=20", &[&args[..], &limits].concat());
        assert_eq!(result["passes"], 1, "{result}");
        let later = result["postcopy_pages"].as_u64().expect("pages that came after the guest");
        assert!((2000..6144).contains(&later), "{result}");
    }
}

// Rows 16 and 17.
#[test]
fn the_link_is_cut_five_times_in_postcopy() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let mut send = pair.in_postcopy();
    // A frame is held each time, the next one before the link is up again: it is never too late for a cut.
    let mut frame = pair.link.hold(Way::ToDest, FrameType::Pages).caught();
    for _ in 1..=5 {
        assert!(lacks_pages(&check_answers(&pair.b)));
        pair.link.cut();
        assert!(pair.a.is_committed());
        frame.lose();
        let next = pair.link.hold(Way::ToDest, FrameType::Pages);
        check_answers(&pair.b);
        pair.link.heal();
        frame = next.caught();
    }
    frame.pass();
    send.end().expect(0, &[]);
    pair.check_moved();
}

// Row 17: nothing of the recovery itself may be lost for good.
#[test]
fn the_link_is_cut_in_the_recovery_handshake() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let mut send = pair.in_postcopy();
    for (way, kind) in [
        (Way::ToSource, FrameType::HelloAck),
        (Way::ToSource, FrameType::Received),
        (Way::ToSource, FrameType::Joined),
        (Way::ToDest, FrameType::Join),
    ] {
        pair.link.cut();
        pair.link.cut_at(way, kind);
        pair.link.heal();
        pair.link.await_cut();
        assert!(lacks_pages(&check_answers(&pair.b)));
        assert!(pair.a.is_committed());
    }
    pair.link.heal();
    send.end().expect(0, &[]);
    pair.check_moved();
}

// Row 18.
#[test]
fn the_sender_is_killed_in_postcopy() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let mut send = pair.in_postcopy();
    send.crash();
    assert!(lacks_pages(&check_answers(&pair.b)));
    check_answers(&pair.a);
    pair.a.vmctl(&["resume"]).expect(3, &[]);
    pair.scene.resume(&pair.a, &[]).end().expect(0, &[]);
    pair.check_moved();
}

// Row 19.
#[test]
fn the_receiver_is_killed_in_postcopy() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let mut send = pair.in_postcopy();
    pair.b.program.crash();
    for _ in 0..5 {
        assert!(lacks_pages(&check_answers(&pair.b)));
        pair.b.vmctl(&["status"]).expect(0, &[]);
    }
    assert!(pair.b.status().summary.contains("nobody takes them"));
    send.await_note("the connection is lost");
    pair.resume_receiver();
    send.end().expect(0, &[]);
    pair.check_moved();
}

#[test]
fn both_movers_are_killed_in_postcopy() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let mut send = pair.in_postcopy();
    send.crash();
    pair.b.program.crash();
    assert!(lacks_pages(&check_answers(&pair.b)));
    assert!(pair.a.is_committed());
    pair.resume_receiver();
    pair.scene.resume(&pair.a, &[]).end().expect(0, &[]);
    pair.check_moved();
}

// What KVM touches while vCPUs are synchronised is there before that begins.
#[test]
fn nobody_waits_for_pages_while_the_vcpus_are_synchronised() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::with("kvmclock=1");
    let ready = pair.link.hold(Way::ToSource, FrameType::Ready);
    let mut send = pair.scene.send(&pair.a, &pair.link.address, &["--mode", "postcopy"]);
    let ready = ready.caught();
    assert_eq!(pair.link.passed(Way::ToSource, FrameType::PageRequest), 0);
    assert_eq!(pair.link.passed(Way::ToDest, FrameType::Pages), 1, "the pages that went ahead");
    ready.pass();
    send.end().expect(0, &[]);
    pair.check_moved();
}

// Row 8.
#[test]
fn the_link_is_dead_while_the_vcpus_are_synchronised() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::with("kvmclock=1");
    // The pages that this touches have gone ahead: the destination is told that it lacks all of them.
    pair.link.rewrite_bytes(Way::ToDest, FrameType::Missing, |part| {
        part.iter().enumerate().map(|(i, byte)| if i < 8 { *byte } else { 0xff }).collect()
    });
    pair.link.rewrite(Way::ToDest, FrameType::End, |end| end["ahead"] = serde_json::json!([]));
    let request = pair.link.hold(Way::ToSource, FrameType::PageRequest);
    let args = ["--mode", "postcopy", "--peer-timeout", "3s"];
    let mut send = pair.scene.send(&pair.a, &pair.link.address, &args);
    let request = request.caught();
    pair.link.freeze();
    drop(request);
    assert_eq!(pair.link.passed(Way::ToSource, FrameType::Ready), 0);
    while send.is_running() {
        check_answers(&pair.a);
        assert_ne!(check_answers(&pair.b).run_state, RunState::Running);
    }
    send.end().expect(5, &["the source has the guest"]);
    pair.a.await_running();
    check_beats(&[&pair.a]);
    pair.link.cut();
    pair.link.heal();
    pair.scene.send(&pair.a, &pair.link.address, &["--mode", "postcopy"]).end().expect(0, &[]);
    pair.check_moved();
}

#[test]
fn there_and_back_and_there_in_postcopy() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let mut send = pair.in_postcopy();
    send.end().expect(0, &[]);
    pair.check_moved();
    let Pair { a, b, scene, .. } = pair;
    // Out of the way of the guest's next stay there.
    let first = Host { log: scene.path("log.1"), ..a.host.clone() };
    std::fs::rename(&a.log, &first.log).unwrap();
    let mut back = scene.receiver("a", &[]);
    // Limited for the reason that `moves` gives.
    check_result(&scene.send(&b, &back.address, &["--mode", "postcopy", "--bwlimit", "4M"]).end());
    back.program.end().expect(0, &[]);
    check_whole(&[&first, &b, &back]);
    let second = Host { log: scene.path("log.2"), ..b.host.clone() };
    std::fs::rename(&b.log, &second.log).unwrap();
    let mut there = scene.receiver("b", &[]);
    check_result(&scene.send(&back, &there.address, &["--mode", "postcopy", "--bwlimit", "4M"]).end());
    there.program.end().expect(0, &[]);
    check_whole(&[&first, &second, &back, &there]);
}

// Row 12.
#[test]
fn run_is_lost_in_postcopy() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    pair.link.cut_at(Way::ToDest, FrameType::Run);
    let mut send = pair.scene.send(&pair.a, &pair.link.address, SLOWLY);
    pair.link.await_cut();
    send.await_note("both sides hold still");
    assert!(pair.a.is_committed());
    assert!(pair.b.is_in_doubt(), "{:?}", pair.b.status());
    pair.link.heal();
    send.end().expect(0, &[]);
    pair.check_moved();
}

// Row 15.
#[test]
fn running_is_lost_in_postcopy() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    pair.link.cut_at(Way::ToSource, FrameType::Running);
    let mut send = pair.scene.send(&pair.a, &pair.link.address, SLOWLY);
    pair.link.await_cut();
    pair.b.await_running();
    assert!(pair.a.is_committed());
    send.await_note("the connection is lost");
    pair.link.heal();
    send.end().expect(0, &[]);
    pair.check_moved();
}

// Rows 11 and 14's neighbours: neither mover outlives the fence.
#[test]
fn both_movers_are_killed_between_the_fence_and_run() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let run = pair.link.hold(Way::ToDest, FrameType::Run);
    let mut send = pair.scene.send(&pair.a, &pair.link.address, SLOWLY);
    let run = run.caught();
    send.crash();
    pair.b.program.crash();
    pair.link.cut();
    drop(run);
    let status = check_answers(&pair.b);
    assert!(matches!(status.ownership, Ownership::InDoubt { .. }), "{status:?}");
    assert!(pair.a.is_committed());
    pair.link.heal();
    pair.resume_receiver();
    pair.scene.resume(&pair.a, &[]).end().expect(0, &[]);
    pair.check_moved();
}

#[test]
fn verify_and_postcopy_exclude_each_other() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.small("a");
    for mode in [&["--mode", "postcopy"], &["--mode", "hybrid"], &["--on-timeout", "postcopy"]] {
        let args = [&mode[..], &["--verify"]].concat();
        let end = scene.send(&a, "tcp:127.0.0.1:9", &args).end();
        assert_eq!(end.code, 2, "{end:?}");
        assert!(end.stderr.contains("--verify"), "{end:?}");
    }
    check_beats(&[&a]);
}

#[test]
fn a_guest_that_lacks_pages_is_not_sent_on() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let mut send = pair.in_postcopy();
    // No page comes while this is tried, however long it takes.
    pair.link.cut();
    let mut c = pair.scene.receiver("c", &[]);
    for mode in ["precopy", "postcopy"] {
        let end = pair.scene.send(&pair.b, &c.address, &["--mode", mode]).end();
        end.expect(1, &["pages are still coming", "the source has the guest"]);
        assert!(lacks_pages(&pair.b.status()), "{end:?}");
    }
    pair.link.heal();
    send.end().expect(0, &[]);
    pair.check_moved();
    // Once it has them it goes anywhere.
    pair.scene.send(&pair.b, &c.address, &[]).end().expect(0, &[]);
    c.program.end().expect(0, &[]);
    check_whole(&[&pair.a, &pair.b, &c]);
}
