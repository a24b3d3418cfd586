//! The fence while its record is held up, and when its answer does not come (S3): RUN is said when it
//! stands and not before, and the guest goes on here only when it does not.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use nix::sys::stat::Mode;
use vmferry::control::RunState;
use vmferry::switchover::Ownership;
use vmferry::wire::FrameType;

use crate::guest::{check_alive, check_story};
use crate::program::{Program, until};
use crate::proxy::{Proxy, Way};
use crate::scene::{Scene, fault_points, kvm};
use crate::switchover::Pair;

/// A migration whose fence is asked for, and whose record is held up until this is let go.
struct Fencing {
    pair: Pair,
    send: Program,
    fifo: PathBuf,
    held: File,
}

impl Fencing {
    fn start(args: &[&str]) -> Self {
        let scene = Scene::new();
        let fifo = scene.path("stall");
        let mut command = scene.command("vmrun");
        command.env("VMFERRY_STALL", format!("record:{}", fifo.display()));
        let a = scene.guest_from("a", command, &[]);
        let b = scene.receiver("b", &[]);
        let link = Proxy::to(&b.address);
        let ready = link.hold(Way::ToSource, FrameType::Ready);
        let send = scene.send(&a, &link.address, args);
        let ready = ready.caught();
        // From here on: what was written before was written without a FIFO to wait for.
        nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        ready.pass();
        let held = until("the record is held up", || {
            // Without a reader, this open fails.
            OpenOptions::new().write(true).custom_flags(nix::libc::O_NONBLOCK).open(&fifo).ok()
        });
        Self { pair: Pair { a, b, link, scene }, send, fifo, held }
    }

    /// Nothing is fenced, nobody runs, and RUN was not said.
    #[track_caller]
    fn check_open(&self) {
        let Pair { a, b, link, .. } = &self.pair;
        assert!(matches!(a.status().ownership, Ownership::Sole { .. }), "{:?}", a.status());
        assert!(b.is_in_doubt(), "{:?}", b.status());
        assert_eq!(link.passed(Way::ToDest, FrameType::Run), 0);
    }

    fn let_go(self) -> (Pair, Program) {
        fs::remove_file(&self.fifo).unwrap();
        (self.pair, self.send)
    }
}

fn can_stall() -> bool {
    kvm() && fault_points()
}

#[test]
fn a_fence_that_fails_late_was_not_taken_for_one() {
    if !can_stall() {
        return;
    }
    let fencing = Fencing::start(&[]);
    // Behind the fence, which shows that it has been taken in.
    let vmctl = fencing.pair.a.vmctl(&["--timeout", "200ms", "resume"]);
    vmctl.expect(1, &["it waits for: the session record to be on disk"]);
    fencing.check_open();
    let obstacle = fencing.pair.scene.path("a.sock.session.json");
    fs::create_dir(&obstacle).unwrap();
    let (mut pair, mut send) = fencing.let_go();
    send.end().expect(1, &["the fence was refused", "session.json", "the source has the guest"]);
    assert_eq!(pair.link.passed(Way::ToDest, FrameType::Run), 0);
    pair.b.await_status("it was told", |s| s.run_state == RunState::Empty);
    fs::remove_dir(&obstacle).unwrap();
    pair.check_back_and_try_again();
}

#[test]
fn a_vmrun_that_dies_before_it_answers_the_fence_does_not_take_the_guest_along() {
    if !can_stall() {
        return;
    }
    let Fencing { mut pair, mut send, held, .. } = Fencing::start(&[]);
    pair.a.program.crash();
    send.await_note("the fence got no answer");
    send.end().expect(0, &[]);
    drop(held);
    assert_eq!(pair.b.program.end().code, 0);
    check_alive(&[&pair.a, &pair.b]);
}

#[test]
fn a_fence_that_is_long_in_coming_is_waited_for() {
    if !can_stall() {
        return;
    }
    let mut fencing = Fencing::start(&[]);
    fencing.send.await_note("the fence got no answer");
    fencing.check_open();
    let (mut pair, mut send) = fencing.let_go();
    send.end().expect(0, &[]);
    pair.check_moved();
}

#[test]
fn a_fence_that_stays_open_is_nobodys_guess() {
    if !can_stall() {
        return;
    }
    let mut fencing = Fencing::start(&["--recover-timeout", "1s"]);
    let words = ["it is open whether the guest is fenced", "vmctl", "status", "vmsend --resume"];
    fencing.send.end().expect(7, &words);
    fencing.check_open();
    let before = check_story(&[&fencing.pair.a]);
    let (mut pair, _) = fencing.let_go();
    // It was recorded after all.
    pair.a.await_status("the dead vmsend is gone", |s| !s.mover_attached);
    assert!(pair.a.is_committed() && pair.b.is_in_doubt());
    assert_eq!(check_story(&[&pair.a]), before);
    pair.scene.resume(&pair.a, &[]).end().expect(0, &[]);
    pair.check_moved();
}
