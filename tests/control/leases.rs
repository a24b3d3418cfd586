//! Pauses that end with their connection, pauses that do not, and the fence.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use nix::sys::signal::Signal;
use vmferry::control::{Client, FailureCode, RunState};
use vmferry::switchover::{Attempt, OperatorWord, Ownership};

use crate::host::{Vmrun, attempt, kvm, session, vmctl};

const NO_WORD: OperatorWord = OperatorWord { force: false, peer_fenced: false };

/// A sender just before the fence: attached, paused, exported.
fn ready_to_fence(vmrun: &Vmrun) -> (Client, Attempt) {
    let mut mover = vmrun.client();
    let attached = mover.attach(Some(session(1)), "tcp:there:7070").unwrap();
    assert_eq!(attached.attempt, attempt(1, 1));
    assert_eq!(mover.pause(true).unwrap().run_state, RunState::Paused);
    mover.export().unwrap();
    (mover, attached.attempt)
}

fn fenced(vmrun: &Vmrun) -> (Client, Attempt) {
    let (mut mover, attempt) = ready_to_fence(vmrun);
    mover.fence(attempt, "tcp:there:7070").unwrap();
    (mover, attempt)
}

#[test]
fn a_lost_lease_lets_the_guest_go_on() {
    if !kvm() {
        return;
    }
    let vmrun = Vmrun::heartbeat();
    vmrun.beats();
    let (mover, _) = ready_to_fence(&vmrun);
    let paused = vmrun.status();
    assert!(paused.mover_attached && paused.run_state == RunState::Paused, "{paused:?}");
    drop(mover);
    assert!(!vmrun.wait_for(RunState::Running).mover_attached);
    vmrun.beats();
}

#[test]
fn an_operators_pause_stays_whatever_movers_do() {
    if !kvm() {
        return;
    }
    let vmrun = Vmrun::heartbeat();
    assert_eq!(vmctl(&vmrun, &["pause"]).0, 0);
    let (mut mover, _) = ready_to_fence(&vmrun);
    assert_eq!(mover.resume(NO_WORD).unwrap().run_state, RunState::Paused);
    mover.pause(true).unwrap();
    drop(mover);
    vmrun.until("the mover is gone", || !vmrun.status().mover_attached);
    assert_eq!(vmrun.status().run_state, RunState::Paused);
    // And the other way round: paused by a mover first, by the operator meanwhile.
    assert_eq!(vmctl(&vmrun, &["resume"]).0, 0);
    let (mover, _) = ready_to_fence(&vmrun);
    assert_eq!(vmctl(&vmrun, &["pause"]).0, 0);
    drop(mover);
    vmrun.until("the mover is gone", || !vmrun.status().mover_attached);
    assert_eq!(vmrun.status().run_state, RunState::Paused);
    assert_eq!(vmctl(&vmrun, &["resume"]).0, 0);
    vmrun.beats();
}

#[test]
fn a_guest_started_paused_waits_for_resume() {
    if !kvm() {
        return;
    }
    let vmrun = Vmrun::start(&[
        "--kernel",
        "builtin:heartbeat",
        "--memory",
        "16M",
        "--serial",
        "file:log",
        "--paused",
    ]);
    assert_eq!(vmrun.status().run_state, RunState::Paused);
    assert!(vmctl(&vmrun, &["resume"]).1.contains("runs here"));
    vmrun.beats();
}

#[test]
fn what_ran_since_the_export_cannot_be_fenced() {
    if !kvm() {
        return;
    }
    let vmrun = Vmrun::heartbeat();
    let (mut mover, attempt) = ready_to_fence(&vmrun);
    // The operator may not get in between, unless by force: then the fence is refused.
    let (code, _, text) = vmctl(&vmrun, &["resume"]);
    assert_eq!(code, 3, "{text}");
    assert_eq!(vmctl(&vmrun, &["resume", "--force"]).0, 0);
    vmrun.beats();
    mover.pause(true).unwrap();
    let error = mover.fence(attempt, "there").unwrap_err();
    assert_eq!(error.code(), Some(FailureCode::Refused), "{error}");
    mover.export().unwrap();
    mover.fence(attempt, "there").unwrap();
}

#[test]
fn what_runs_is_not_exported_and_can_be_afterwards() {
    if !kvm() {
        return;
    }
    let vmrun = Vmrun::heartbeat();
    let mut mover = vmrun.client();
    mover.attach(Some(session(1)), "tcp:there:7070").unwrap();
    let error = mover.export().unwrap_err();
    assert_eq!(error.code(), Some(FailureCode::Refused), "{error}");
    vmrun.beats();
    assert_eq!(mover.fence(attempt(1, 1), "there").unwrap_err().code(), Some(FailureCode::Refused));
    assert_eq!(mover.pause(true).unwrap().run_state, RunState::Paused);
    assert_eq!(mover.fence(attempt(1, 1), "there").unwrap_err().code(), Some(FailureCode::Refused));
    mover.export().unwrap();
    mover.fence(attempt(1, 1), "there").unwrap();
}

#[test]
fn after_the_fence_nothing_but_force_resumes() {
    if !kvm() {
        return;
    }
    let mut vmrun = Vmrun::heartbeat();
    let (mut mover, first) = fenced(&vmrun);
    assert!(fs::read_to_string(vmrun.record()).unwrap().contains("tcp:there:7070"));
    mover.fence(first, "tcp:there:7070").unwrap(); // a repeat changes nothing
    for client in [&mut mover, &mut vmrun.client()] {
        let error = client.resume(NO_WORD).unwrap_err().to_string();
        assert!(error.contains("tcp:there:7070") && error.contains("--peer-fenced"), "{error}");
    }
    assert_eq!(vmctl(&vmrun, &["resume", "--force"]).0, 3);
    assert_eq!(vmctl(&vmrun, &["quit"]).0, 3);
    drop(mover);
    vmrun.until("the mover is gone", || !vmrun.status().mover_attached);
    assert_eq!(vmctl(&vmrun, &["quit"]).0, 3, "nobody is attached, and it is held all the same");
    // It is held, and a mover that comes back finds it so, with the next epoch.
    let status = vmrun.status();
    assert_eq!(status.run_state, RunState::Paused);
    assert!(status.summary.contains("tcp:there:7070"), "{}", status.summary);
    let mut again = vmrun.client();
    assert_eq!(again.attach(Some(session(9)), "x").unwrap_err().code(), Some(FailureCode::Refused));
    let attached = again.attach(None, "x").unwrap();
    assert_eq!(attached.attempt, attempt(1, 2));
    assert!(matches!(attached.ownership, Ownership::Committed { .. }));
    assert_eq!(again.peer_revoked(first).unwrap_err().code(), Some(FailureCode::Refused), "stale");
    // The operator's word brings it back, and the mover counts no more.
    assert_eq!(vmctl(&vmrun, &["resume", "--force", "--peer-fenced"]).0, 0);
    vmrun.beats();
    assert!(again.release(attached.attempt, false).is_err());
    assert!(!vmrun.record().exists());
    assert_eq!(vmctl(&vmrun, &["quit"]).0, 0);
    assert_eq!(vmrun.end().0, 0);
}

#[test]
fn a_revoked_guest_goes_on_when_its_mover_says_so_or_goes() {
    if !kvm() {
        return;
    }
    for resume in [true, false] {
        let vmrun = Vmrun::heartbeat();
        let (mover, _) = fenced(&vmrun);
        drop(mover);
        vmrun.until("the mover is gone", || !vmrun.status().mover_attached);
        let mut again = vmrun.client();
        let attached = again.attach(None, "").unwrap();
        again.peer_revoked(attached.attempt).unwrap();
        assert_eq!(again.status().unwrap().run_state, RunState::Paused);
        if resume {
            assert_eq!(again.resume(NO_WORD).unwrap().run_state, RunState::Running);
        }
        drop(again);
        vmrun.wait_for(RunState::Running);
        vmrun.beats();
    }
}

#[test]
fn a_record_that_cannot_be_written_refuses_the_fence() {
    if !kvm() {
        return;
    }
    let vmrun = Vmrun::heartbeat();
    let (mut mover, attempt) = ready_to_fence(&vmrun);
    fs::create_dir(vmrun.record()).unwrap();
    let error = mover.fence(attempt, "there").unwrap_err();
    assert_eq!(error.code(), Some(FailureCode::Failed), "{error}");
    assert!(error.to_string().contains("session.json"), "{error}");
    assert_eq!(mover.resume(NO_WORD).unwrap().run_state, RunState::Running);
    assert!(matches!(vmrun.status().ownership, Ownership::Sole { .. }));
    vmrun.beats();
}

#[test]
fn a_release_ends_vmrun_as_migrated_or_keeps_the_remains() {
    if !kvm() {
        return;
    }
    let mut vmrun = Vmrun::heartbeat();
    let (mut mover, attempt) = fenced(&vmrun);
    mover.release(attempt, false).unwrap();
    let (code, text) = vmrun.end();
    assert_eq!(code, 0);
    assert!(text.contains("migrated to tcp:there:7070"), "{text}");
    assert!(!vmrun.record().exists() && !vmrun.socket().exists());

    let vmrun = Vmrun::heartbeat();
    let (mut mover, attempt) = fenced(&vmrun);
    mover.release(attempt, true).unwrap();
    assert_eq!(vmctl(&vmrun, &["resume"]).0, 3);
    assert_eq!(vmrun.status().run_state, RunState::Paused);
    assert_eq!(vmrun.client().ram().unwrap().1.len(), 1);
    drop(mover);
    vmrun.until("the mover is gone", || !vmrun.status().mover_attached);
    assert_eq!(vmctl(&vmrun, &["quit"]).0, 0);
}

#[test]
fn one_mover_at_a_time_and_none_without_attach() {
    if !kvm() {
        return;
    }
    let vmrun = Vmrun::heartbeat();
    let mut first = vmrun.client();
    let mut second = vmrun.client();
    assert_eq!(first.dirty_start().unwrap_err().code(), Some(FailureCode::Refused));
    first.attach(Some(session(1)), "a").unwrap();
    assert_eq!(second.attach(Some(session(2)), "b").unwrap_err().code(), Some(FailureCode::Busy));
    assert_eq!(second.attach(None, "b").unwrap_err().code(), Some(FailureCode::Busy));
    assert_eq!(second.export().unwrap_err().code(), Some(FailureCode::Refused));
    assert_eq!(vmctl(&vmrun, &["quit"]).0, 3);
    drop(first);
    vmrun.until("the first is gone", || !vmrun.status().mover_attached);
    let attached = second.attach(Some(session(2)), "b").unwrap();
    assert_eq!(attached.superseded, Some(attempt(1, 1)));
}

#[test]
fn the_dirty_log_is_shared_and_what_is_put_back_comes_again() {
    if !kvm() {
        return;
    }
    let vmrun = Vmrun::heartbeat();
    vmrun.beats();
    let mut mover = vmrun.client();
    mover.attach(Some(session(1)), "a").unwrap();
    assert_eq!(mover.dirty_take().unwrap_err().code(), Some(FailureCode::Refused));
    let (pages, bitmap) = mover.dirty_start().unwrap();
    assert_eq!(pages.pages, (16 << 20) / 4096);
    let all = vmferry::memory::PageRun { first: vmferry::memory::PageIndex(0), pages: pages.pages };
    mover.dirty_clear(all).unwrap();
    vmrun.beats();
    mover.pause(true).unwrap();
    let taken = mover.dirty_take().unwrap().pages;
    assert!(taken > 0);
    let bitmap = fs::File::from(bitmap);
    assert!(bitmap.set_len(0).is_err(), "sealed");
    let mut bytes = vec![0; (pages.pages / 8) as usize];
    bitmap.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes.iter().map(|b| u64::from(b.count_ones())).sum::<u64>(), taken);
    mover.dirty_put_back().unwrap();
    assert!(mover.dirty_take().unwrap().pages >= taken);
    let beyond = vmferry::memory::PageRun { first: all.first, pages: all.pages + 1 };
    assert_eq!(mover.dirty_clear(beyond).unwrap_err().code(), Some(FailureCode::Usage));
    drop(mover);
    assert!(!vmrun.wait_for(RunState::Running).dirty_log);
    vmrun.until("the dirty log is off", || !vmrun.status().dirty_log);
}

#[test]
fn a_signal_ends_vmrun_but_a_held_guest_only_at_the_second() {
    if !kvm() {
        return;
    }
    for (signal, code) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143)] {
        let mut vmrun = Vmrun::heartbeat();
        vmrun.signal(signal);
        assert_eq!(vmrun.end().0, code);
        assert!(!vmrun.socket().exists());
    }
    let mut vmrun = Vmrun::heartbeat();
    let (mover, _) = fenced(&vmrun);
    vmrun.signal(Signal::SIGTERM);
    // A call that is answered after the signal was seen: two, since one may be answered before.
    assert!((0..2).all(|_| vmrun.client().status().is_ok()));
    vmrun.signal(Signal::SIGTERM);
    let (code, text) = vmrun.end();
    assert_eq!(code, 143);
    assert!(text.contains("a second signal within"), "{text}");
    drop(mover);
    // The record stays, and the next vmrun says so and keeps it.
    assert!(vmrun.record().exists());
    let dir = std::mem::replace(&mut vmrun.dir, tempfile::tempdir().unwrap());
    let mut next = Vmrun::start_in(dir, &["--incoming"]);
    assert!(!next.record().exists());
    assert!(next.path("vm.sock.session.json.old").exists());
    next.signal(Signal::SIGTERM);
    let (_, text) = next.end();
    assert!(text.contains("tcp:there:7070") && text.contains(".old"), "{text}");
}

#[test]
fn descriptors_that_nobody_wants_are_closed() {
    if !kvm() {
        return;
    }
    let vmrun = Vmrun::heartbeat();
    let open = || fs::read_dir(format!("/proc/{}/fd", vmrun.pid())).unwrap().count();
    let mut client = vmrun.client();
    client.status().unwrap();
    let before = open();
    let null = fs::File::open("/dev/null").unwrap();
    for _ in 0..20 {
        // They are said, and the request has no use for them.
        let fds = [null.as_fd(); 4];
        let _: (vmferry::control::Status, _) = client.call(&vmferry::control::Request::Status, &fds).unwrap();
    }
    vmrun.until("they are closed", || open() <= before + 1);
    // And these no line says: they go when the next bytes come.
    let stream = std::os::unix::net::UnixStream::connect(vmrun.socket()).unwrap();
    for _ in 0..20 {
        vmferry::sys::fdpass::send(stream.as_fd(), b"{\"id\":1,\"cmd\":\"status\"}\n", &[null.as_fd(); 30])
            .unwrap();
        client.status().unwrap();
    }
    drop(stream);
    vmrun.until("they are closed", || open() <= before + 1);
}
