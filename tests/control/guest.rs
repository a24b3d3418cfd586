//! What a guest does by itself.

use vmferry::control::{FailureCode, RunState};

use crate::host::{Vmrun, kvm, session, vmrun_fails};

const SHORT: &[&str] = &[
    "--kernel",
    "builtin:heartbeat",
    "--memory",
    "16M",
    "--serial",
    "file:log",
    "--cmdline",
    "stop_after=50",
    "--paused",
];

#[test]
fn a_guest_that_ends_ends_vmrun() {
    if !kvm() {
        return;
    }
    let mut vmrun = Vmrun::start(SHORT);
    vmrun.client().resume(vmferry::switchover::OperatorWord { force: false, peer_fenced: false }).unwrap();
    let (code, text) = vmrun.end();
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("the guest has"), "{text}");
    assert!(!vmrun.socket().exists());
}

#[test]
fn a_mover_learns_that_the_guest_has_ended() {
    if !kvm() {
        return;
    }
    let mut vmrun = Vmrun::start(SHORT);
    let mut mover = vmrun.client();
    mover.attach(Some(session(1)), "a").unwrap();
    let mut operator = vmrun.client();
    operator.resume(vmferry::switchover::OperatorWord { force: false, peer_fenced: false }).unwrap();
    vmrun.wait_for(RunState::Ended);
    let error = mover.pause(true).unwrap_err();
    assert_eq!(error.code(), Some(FailureCode::Refused));
    assert!(error.to_string().contains("the guest has ended"), "{error}");
    drop(mover);
    assert_eq!(vmrun.end().0, 0);
}

#[test]
fn what_cannot_start_says_why_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("text"), "no kernel").unwrap();
    let cases: &[(&[&str], i32, &str)] = &[
        (&["--kernel", "missing"], 1, "missing"),
        (&["--kernel", "text"], 1, "text"),
        (&["--kernel", "builtin:nothing"], 1, "heartbeat"),
        (&["--kernel", "builtin:heartbeat", "--memory", "9000G"], 1, "memory"),
        (&["--kernel", "builtin:heartbeat", "--memory", "5X"], 2, "no size"),
        (&["--kernel", "builtin:heartbeat", "--cpus", "0"], 2, "--cpus"),
        (&["--kernel", "builtin:heartbeat", "--serial", "radio"], 2, "serial"),
        (&[], 2, "--kernel"),
    ];
    for (args, code, says) in cases {
        // Without KVM all of the first kind end at /dev/kvm.
        if *code == 1 && !kvm() {
            continue;
        }
        let (got, text) = vmrun_fails(dir.path(), args);
        assert_eq!(got, *code, "{args:?}: {text}");
        assert!(text.contains(says), "{args:?}: {text}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "{args:?} left something");
    }
}
