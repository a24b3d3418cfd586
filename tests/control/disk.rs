//! A disk that takes what is written and cannot keep it: the kernel says so only to who waits for it
//! (fsync(2)), and a change that must outlive a crash is none then (S3).

use std::collections::BTreeMap;
use std::fs;

use nix::libc::{EIO, SYS_fdatasync, SYS_fsync};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use vmferry::control::{FailureCode, RunState};
use vmferry::switchover::{OperatorWord, Ownership};

use crate::host::{Vmrun, attempt, kvm, session};
use crate::incoming::{load, source};

/// A `vmrun` for which every sync fails, as on a disk that has failed.
fn on_a_failing_disk(args: &[&str]) -> Vmrun {
    let fails = BTreeMap::from([(SYS_fsync, vec![]), (SYS_fdatasync, vec![])]);
    let action = SeccompAction::Errno(EIO as u32);
    let filter = SeccompFilter::new(fails, SeccompAction::Allow, action, TargetArch::x86_64).unwrap();
    let filter = BpfProgram::try_from(filter).unwrap();
    // A filter is a thread's, and that of what it starts.
    std::thread::scope(|scope| {
        let start = || {
            seccompiler::apply_filter(&filter).unwrap();
            Vmrun::start(args)
        };
        scope.spawn(start).join().unwrap()
    })
}

#[test]
fn a_fence_that_is_not_on_disk_is_none() {
    if !kvm() {
        return;
    }
    let guest = ["--kernel", "builtin:heartbeat", "--memory", "16M", "--serial", "file:log"];
    let vmrun = on_a_failing_disk(&guest);
    let mut mover = vmrun.client();
    mover.attach(Some(session(1)), "there").unwrap();
    mover.pause(true).unwrap();
    mover.export().unwrap();
    for _ in 0..2 {
        let error = mover.fence(attempt(1, 1), "there").unwrap_err();
        assert_eq!(error.code(), Some(FailureCode::Failed), "{error}");
        assert!(error.to_string().contains("nothing was changed"), "{error}");
        assert!(matches!(vmrun.status().ownership, Ownership::Sole { .. }));
        assert!(!vmrun.record().exists(), "a fence that does not hold is not told of either");
    }
    let word = OperatorWord { force: false, peer_fenced: false };
    assert_eq!(mover.resume(word).unwrap().run_state, RunState::Running);
    vmrun.beats();
}

#[test]
fn a_guest_whose_ownership_is_not_on_disk_does_not_run() {
    if !kvm() {
        return;
    }
    let mut source = source();
    let dest = on_a_failing_disk(&["--incoming", "--serial", "file:log"]);
    let mut client = load(&mut source, &dest, 1);
    let a = attempt(1, 1);
    client.import(a, &source.state, source.bytes).unwrap();
    // The promise is written, and nobody waits for it: see vmm::service::record.
    client.promise(a, false).unwrap();
    assert!(fs::read_to_string(dest.record()).unwrap().contains("in-doubt"));
    let error = client.run(a).unwrap_err();
    assert_eq!(error.code(), Some(FailureCode::Failed), "{error}");
    let status = dest.status();
    assert!(matches!(status.ownership, Ownership::InDoubt { .. }), "{status:?}");
    assert_eq!(status.run_state, RunState::Paused);
    assert!(fs::read_to_string(dest.record()).unwrap().contains("in-doubt"));
}
