//! Failures while the guest stands still: exactly one runner, whatever dies or is lost and when.

use nix::sys::signal::Signal;
use vmferry::control::RunState;
use vmferry::switchover::Ownership;
use vmferry::wire::FrameType;

use crate::guest::{check_alive, check_beats};
use crate::program::{Program, until};
use crate::proxy::{Proxy, Way};
use crate::scene::{Host, Receiver, Scene, Vmrun, fault_points, kvm};

/// A guest, and a receiver that is reached through a link in the test's hand.
pub struct Pair {
    pub a: Vmrun,
    pub b: Receiver,
    pub link: Proxy,
    pub scene: Scene,
}

const TIMEOUT: &[&str] = &["--peer-timeout", "3s"];

impl Pair {
    fn new() -> Self {
        Self::with(&[])
    }

    fn with(receiver: &[&str]) -> Self {
        let scene = Scene::new();
        let a = scene.small("a");
        let b = scene.receiver("b", receiver);
        let link = Proxy::to(&b.address);
        Self { a, b, link, scene }
    }

    fn send(&self) -> Program {
        self.scene.send(&self.a, &self.link.address, TIMEOUT)
    }

    /// It is over, and the guest lives at the destination.
    #[track_caller]
    pub fn check_moved(&mut self) {
        assert_eq!(self.b.program.end().code, 0);
        self.a.program.end().expect(0, &["migrated to"]);
        check_alive(&[&self.a, &self.b]);
    }

    /// The guest lives at the source; another try moves it.
    #[track_caller]
    pub fn check_back_and_try_again(&mut self) {
        self.a.await_running();
        check_beats(&[&self.a]);
        self.link.heal();
        self.send().end().expect(0, &[]);
        self.check_moved();
    }
}

/// The vmsend `send` is killed while `held` frame is on the link.
fn paused_at(way: Way, kind: FrameType, acknowledged: bool) {
    let mut pair = Pair::new();
    let held = pair.link.hold(way, kind);
    let mut send = pair.send();
    let held = held.caught();
    assert_eq!(pair.a.status().run_state, RunState::Paused);
    assert!(!pair.a.is_committed());
    send.crash();
    pair.a.await_running();
    check_beats(&[&pair.a]);
    drop(held);
    if acknowledged {
        pair.b.await_status("it is held", |s| matches!(s.ownership, Ownership::InDoubt { .. }));
        assert!(pair.b.is_in_doubt());
    }
    pair.check_back_and_try_again();
}

// Row 5.
#[test]
fn the_sender_dies_with_the_guest_paused() {
    if kvm() {
        paused_at(Way::ToDest, FrameType::End, false);
    }
}

#[test]
fn the_sender_dies_before_it_hears_ready() {
    if kvm() {
        paused_at(Way::ToSource, FrameType::Ready, true);
    }
}

/// An import that fails at `point` with `words` in the reason.
fn import_fails(point: &str, words: &[&str]) {
    let scene = Scene::new();
    let a = scene.guest("a", "32M", 2, "fill=8M ws=1M rate=5");
    let mut command = scene.command("vmrecv");
    command.env("VMFERRY_FAULT_POINT", point);
    let mut b = scene.receiver_from("b", command, "tcp:127.0.0.1:0", &[]);
    let link = Proxy::to(&b.address);
    // Twice: the receiver waits on.
    for _ in 0..2 {
        let end = scene.send(&a, &link.address, &[]).end();
        assert!([1, 5].contains(&end.code), "{end:?}");
        end.expect(end.code, words).expect(end.code, &["on the destination", "the source has the guest"]);
        a.await_running();
        check_beats(&[&a]);
    }
    assert_eq!(link.passed(Way::ToSource, FrameType::Ready), 0);
    b.await_status("it is empty again", |s| s.run_state == RunState::Empty);
    assert!(b.program.is_running());
    let c = scene.receiver("c", &[]);
    scene.send(&a, &c.address, &[]).end().expect(0, &[]);
    check_alive(&[&a, &c]);
}

// With --verify both sides compare: a destination that has other memory does not get the guest.
#[test]
fn a_digest_that_differs_keeps_the_guest() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    pair.link.rewrite(Way::ToSource, FrameType::Ready, |ready| ready["digest"] = "00".into());
    let args = [TIMEOUT, &["--verify"]].concat();
    let mut send = pair.scene.send(&pair.a, &pair.link.address, &args);
    send.end().expect(1, &["the digests of RAM differ", "the source has the guest"]);
    assert_eq!(pair.link.passed(Way::ToDest, FrameType::Run), 0);
    pair.check_back_and_try_again();
}

// Row 6.
#[test]
fn a_device_does_not_load() {
    if kvm() && fault_points() {
        import_fails("import:serial", &["serial"]);
        import_fails("import:clock", &["clock"]);
    }
}

// Row 7.
#[test]
fn a_vcpu_does_not_synchronise() {
    if kvm() && fault_points() {
        import_fails("vcpu:1:lapic", &["vCPU 1", "LAPIC"]);
        import_fails("vcpu:0:msrs", &["vCPU 0", "MSR"]);
    }
}

// Row 9.
#[test]
fn the_destination_dies_before_ready() {
    if !kvm() {
        return;
    }
    for all in [true, false] {
        let Pair { a, mut b, link, scene } = Pair::new();
        let ready = link.hold(Way::ToSource, FrameType::Ready);
        let mut send = scene.send(&a, &link.address, TIMEOUT);
        let ready = ready.caught();
        b.host.crash();
        if all {
            b.program.crash();
        }
        link.cut();
        let end = send.end();
        end.expect(5, &["the source has the guest"]);
        drop(ready);
        a.await_running();
        check_beats(&[&a]);
        let c = scene.receiver("c", &[]);
        scene.send(&a, &c.address, &[]).end().expect(0, &[]);
        check_alive(&[&a, &c]);
    }
}

// Row 10.
#[test]
fn ready_is_lost() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    pair.link.cut_at(Way::ToSource, FrameType::Ready);
    pair.send().end().expect(5, &["the source has the guest"]);
    pair.a.await_running();
    check_beats(&[&pair.a]);
    assert!(pair.b.is_in_doubt(), "{:?}", pair.b.status());
    // Nobody else gets in, and nobody frees it by a mere wish.
    let elsewhere = Scene::new();
    let other = elsewhere.small("other");
    elsewhere.send(&other, &pair.b.address, &[]).end().expect(3, &["acknowledged"]);
    pair.b.vmctl(&["resume"]).expect(3, &[]);
    pair.b.vmctl(&["quit"]).expect(3, &[]);
    pair.b.program.signal(Signal::SIGTERM);
    pair.b.program.await_note("not now");
    check_beats(&[&other]);
    // The next session of the same guest is the old one's end.
    pair.check_back_and_try_again();
}

// Rows 11 and 22.
#[test]
fn the_sender_dies_between_the_fence_and_run() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let run = pair.link.hold(Way::ToDest, FrameType::Run);
    let mut send = pair.send();
    let run = run.caught();
    send.crash();
    pair.link.cut();
    drop(run);
    check_both_hold(&pair.a, &pair.b);
    for refused in [&["resume"][..], &["resume", "--force"], &["quit"]] {
        pair.a.vmctl(refused).expect(3, &[]);
    }
    pair.a.vmctl(&["resume"]).expect(3, &["--force --peer-fenced", &pair.link.address]);
    pair.scene.send(&pair.a, &pair.b.address, &[]).end().expect(1, &["committed"]);
    check_both_hold(&pair.a, &pair.b);
    pair.link.heal();
    pair.scene.resume(&pair.a, TIMEOUT).end().expect(0, &[]);
    pair.check_moved();
}

#[track_caller]
fn check_both_hold(a: &Host, b: &Host) {
    a.await_status("it is committed", |s| !s.mover_attached);
    assert!(a.is_committed(), "{:?}", a.status());
    assert!(b.is_in_doubt(), "{:?}", b.status());
}

// Row 12.
#[test]
fn run_is_lost() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    pair.link.cut_at(Way::ToDest, FrameType::Run);
    let mut send = pair.send();
    pair.link.await_cut();
    send.await_note("both sides hold still");
    assert!(pair.a.is_committed() && pair.b.is_in_doubt());
    // Row 26, after the fence: it is too late to cancel.
    send.signal(Signal::SIGINT);
    send.await_note("too late to cancel");
    send.signal(Signal::SIGTERM);
    pair.link.heal();
    send.end().expect(0, &[]);
    pair.check_moved();
}

// Its vmsend must not go on as if nothing had been said, and let it run elsewhere as well.
#[test]
fn an_operators_word_ends_what_a_sender_still_tries() {
    if !kvm() {
        return;
    }
    let pair = Pair::new();
    pair.link.cut_at(Way::ToDest, FrameType::Run);
    let mut send = pair.send();
    pair.link.await_cut();
    send.await_note("both sides hold still");
    pair.a.vmctl(&["resume", "--force", "--peer-fenced"]).expect(0, &[]);
    send.end().expect(7, &["resuming a migration is refused", "owns its guest"]);
    assert_eq!(pair.link.passed(Way::ToDest, FrameType::Run), 0);
    assert!(pair.b.is_in_doubt(), "{:?}", pair.b.status());
    check_beats(&[&pair.a]);
}

// Row 13, one way: the source wants the guest back before RUN has come.
#[test]
fn a_committed_guest_that_never_ran_comes_back() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    pair.link.cut_at(Way::ToDest, FrameType::Run);
    let mut send = pair.send();
    pair.link.await_cut();
    send.crash();
    check_both_hold(&pair.a, &pair.b);
    pair.link.heal();
    let end = pair.scene.resume(&pair.a, &["--revoke"]).end();
    end.expect(1, &["gave the guest back", "the source has the guest"]);
    assert_eq!(pair.link.passed(Way::ToDest, FrameType::Run), 0);
    pair.check_back_and_try_again();
}

// Row 13, the other way: it runs already.
#[test]
fn a_guest_that_runs_is_not_given_back() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    pair.link.cut_at(Way::ToSource, FrameType::Running);
    let mut send = pair.send();
    pair.link.await_cut();
    send.crash();
    pair.b.await_running();
    pair.link.heal();
    pair.scene.resume(&pair.a, &["--revoke"]).end().expect(0, &[]);
    pair.check_moved();
}

// Row 14.
#[test]
fn the_destination_dies_between_ready_and_run() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let run = pair.link.hold(Way::ToDest, FrameType::Run);
    let mut send = pair.scene.send(&pair.a, &pair.link.address, &["--recover-timeout", "1s"]);
    let run = run.caught();
    pair.b.program.crash();
    pair.b.host.crash();
    pair.link.cut();
    drop(run);
    send.end().expect(7, &["nobody runs the guest", "--resume", "--force --peer-fenced"]);
    pair.a.await_status("it is held", |s| !s.mover_attached);
    assert!(pair.a.is_committed());
    pair.a.vmctl(&["resume", "--force", "--peer-fenced"]).expect(0, &[]);
    check_alive(&[&pair.a]);
    let c = pair.scene.receiver("c", &[]);
    pair.scene.send(&pair.a, &c.address, &[]).end().expect(0, &[]);
    check_alive(&[&pair.a, &c]);
}

// A receiver that has forgotten cannot tell: the source does not guess.
#[test]
fn a_destination_that_knows_nothing_of_the_session() {
    if !kvm() {
        return;
    }
    let pair = Pair::new();
    let run = pair.link.hold(Way::ToDest, FrameType::Run);
    let mut send = pair.send();
    let run = run.caught();
    send.crash();
    pair.link.cut();
    drop(run);
    check_both_hold(&pair.a, &pair.b);
    let Pair { a, b, link: _link, scene } = pair;
    let port = b.address.clone();
    let Receiver { mut program, host, .. } = b;
    program.crash();
    host.crash();
    // Another receiver takes the place of the one that was spoken to. The dead one's record of who
    // owns the guest is not in its way.
    let mut new = scene.receiver_at("c", &port, &[]);
    let link = _link;
    link.heal();
    scene.resume(&a, &[]).end().expect(7, &["knows nothing"]);
    assert!(a.is_committed() && new.is_empty());
    assert!(new.program.is_running());
    a.vmctl(&["resume", "--force", "--peer-fenced"]).expect(0, &[]);
    scene.send(&a, &new.address, &[]).end().expect(0, &[]);
    check_alive(&[&a, &new]);
}

// Row 15.
#[test]
fn running_is_lost() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    pair.link.cut_at(Way::ToSource, FrameType::Running);
    let mut send = pair.send();
    pair.link.await_cut();
    pair.b.await_running();
    send.await_note("both sides hold still");
    assert!(pair.a.is_committed());
    check_beats(&[&pair.a, &pair.b]);
    pair.link.heal();
    send.end().expect(0, &[]);
    pair.check_moved();
}

#[test]
fn the_sender_dies_before_it_hears_running() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let running = pair.link.hold(Way::ToSource, FrameType::Running);
    let mut send = pair.send();
    let running = running.caught();
    send.crash();
    drop(running);
    pair.b.await_running();
    pair.a.vmctl(&["resume"]).expect(3, &[]);
    pair.scene.resume(&pair.a, &[]).end().expect(0, &[]);
    pair.check_moved();
}

// The last words of either side: the guest runs there in any case.
#[test]
fn done_is_lost() {
    if !kvm() {
        return;
    }
    for way in [Way::ToDest, Way::ToSource] {
        let mut pair = Pair::with(&["--linger", "1s"]);
        pair.link.cut_at(way, FrameType::Done);
        pair.send().end().expect(0, &[]);
        pair.check_moved();
    }
}

// Both have counted, and A still holds its copy: vmrecv waits for whoever comes back for it.
#[test]
fn the_sender_dies_before_it_releases_its_guest() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let done = pair.link.hold(Way::ToSource, FrameType::Done);
    let mut send = pair.send();
    let done = done.caught();
    send.crash();
    drop(done);
    pair.a.await_status("the dead vmsend is gone", |s| !s.mover_attached);
    assert!(pair.a.is_committed());
    pair.scene.resume(&pair.a, &[]).end().expect(0, &[]);
    pair.check_moved();
}

#[test]
fn released_is_lost() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::with(&["--linger", "1s"]);
    pair.link.cut_at(Way::ToDest, FrameType::Released);
    pair.send().end().expect(0, &[]);
    pair.check_moved();
}

#[test]
fn the_receiver_dies_after_run() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let running = pair.link.hold(Way::ToSource, FrameType::Running);
    let mut send = pair.scene.send(&pair.a, &pair.link.address, &["--recover-timeout", "1s"]);
    let running = running.caught();
    pair.b.program.crash();
    pair.link.cut();
    drop(running);
    // The guest does not need its vmrecv; the source cannot know, and holds still.
    check_beats(&[&pair.a, &pair.b]);
    send.end().expect(7, &[]);
    assert!(pair.a.is_committed());
    check_alive(&[&pair.a, &pair.b]);
    pair.a.vmctl(&["quit", "--force"]).expect(0, &[]);
    pair.b.await_running();
}

#[test]
fn the_source_vmrun_dies_after_the_fence() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let run = pair.link.hold(Way::ToDest, FrameType::Run);
    let mut send = pair.send();
    let run = run.caught();
    pair.a.program.crash();
    run.pass();
    // It was committed: the destination has all of it.
    send.end().expect(0, &[]);
    assert_eq!(pair.b.program.end().code, 0);
    check_alive(&[&pair.a, &pair.b]);
    until("the guest runs", || (pair.b.status().run_state == RunState::Running).then_some(()));
}

#[test]
fn the_source_vmrun_dies_before_ready() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let ready = pair.link.hold(Way::ToSource, FrameType::Ready);
    let mut send = pair.send();
    let ready = ready.caught();
    pair.a.program.crash();
    let end = send.end();
    assert_ne!(end.code, 0, "{end:?}");
    assert!(end.stderr.contains("vmrun is gone"), "{end:?}");
    drop(ready);
    // Nothing was committed: nobody may say RUN any more. The operator has the last word.
    assert_ne!(pair.b.status().run_state, RunState::Running);
    assert!(pair.b.program.is_running());
}
