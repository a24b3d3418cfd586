//! A `vmrun --incoming` from prepare to run, with a real guest carried over by the test itself.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use vmferry::control::{Client, FailureCode, RunState};
use vmferry::switchover::{OperatorWord, Ownership};

use crate::host::{Vmrun, attempt, kvm, session, vmctl};

/// A source that has exported, with its memory and state.
pub struct Source {
    pub vmrun: Vmrun,
    pub mover: Client,
    pub ram: Vec<OwnedFd>,
    pub state: OwnedFd,
    pub bytes: u64,
}

pub fn source() -> Source {
    let vmrun = Vmrun::heartbeat();
    vmrun.beats();
    let mut mover = vmrun.client();
    mover.attach(Some(session(1)), "there").unwrap();
    mover.pause(true).unwrap();
    let (blob, state) = mover.export().unwrap();
    let (_, ram) = mover.ram().unwrap();
    Source { vmrun, mover, ram, state, bytes: blob.bytes }
}

/// Prepares `dest` for session `n` and fills its memory.
pub fn load(source: &mut Source, dest: &Vmrun, n: u8) -> Client {
    let mut client = dest.client();
    let machine = source.mover.machine().unwrap();
    let (prepared, ram) = client.prepare(attempt(n, 1), &machine, vec![], false).unwrap();
    assert_eq!(prepared.ram.map, machine.ram);
    for ((from, to), region) in source.ram.iter().zip(&ram).zip(machine.ram.regions()) {
        let mut bytes = vec![0; region.bytes as usize];
        File::from(from.try_clone().unwrap()).read_exact_at(&mut bytes, 0).unwrap();
        File::from(to.try_clone().unwrap()).write_all_at(&bytes, 0).unwrap();
    }
    client
}

#[test]
fn a_guest_comes_in_and_runs_only_when_it_is_told() {
    if !kvm() {
        return;
    }
    let mut source = source();
    let dest = Vmrun::incoming();
    let mut client = load(&mut source, &dest, 1);
    let a = attempt(1, 1);
    assert_eq!(client.status().unwrap().run_state, RunState::Loading);
    for (what, error) in [
        ("promise", client.promise(a, false).unwrap_err()),
        ("run", client.run(a).unwrap_err()),
        ("resume", client.resume(OperatorWord { force: true, peer_fenced: true }).unwrap_err()),
        ("pause", client.pause(false).unwrap_err()),
    ] {
        assert_eq!(error.code(), Some(FailureCode::Refused), "{what}: {error}");
    }
    client.import(a, &source.state, source.bytes).unwrap();
    assert_eq!(client.import(a, &source.state, source.bytes).unwrap_err().code(), Some(FailureCode::Refused));
    client.promise(a, false).unwrap();
    assert!(dest.record().exists());
    assert_eq!(vmctl(&dest, &["resume"]).0, 3);
    assert_eq!(vmctl(&dest, &["quit"]).0, 3);
    drop(client);
    dest.until("the receiver is gone", || !dest.status().mover_attached);
    assert!(matches!(dest.status().ownership, Ownership::InDoubt { .. }), "held without its receiver");
    assert_eq!(vmctl(&dest, &["quit"]).0, 3);
    let mut again = dest.client();
    again.renew(attempt(1, 2)).unwrap();
    assert_eq!(again.run(a).unwrap_err().code(), Some(FailureCode::Refused), "a stale RUN");
    source.mover.fence(attempt(1, 1), "there").unwrap();
    assert_eq!(again.run(attempt(1, 2)).unwrap().run_state, RunState::Running);
    assert_eq!(again.run(attempt(1, 2)).unwrap().run_state, RunState::Running, "a repeat");
    dest.beats();
    assert!(again.revoke(attempt(1, 2)).is_err());
    source.mover.release(attempt(1, 1), false).unwrap();
    assert_eq!(source.vmrun.end().0, 0);
    drop(again);
    // It can be sent on at once.
    let mut next = dest.client();
    dest.until("the receiver is gone", || next.attach(Some(session(2)), "on").is_ok());
    next.pause(true).unwrap();
    next.export().unwrap();
    drop(next);
    dest.wait_for(RunState::Running);
    dest.beats();
}

#[test]
fn a_receiver_that_goes_takes_its_machine_along_and_the_next_may_come() {
    if !kvm() {
        return;
    }
    let mut source = source();
    let dest = Vmrun::incoming();
    let client = load(&mut source, &dest, 1);
    let mut second = dest.client();
    let machine = source.mover.machine().unwrap();
    assert_eq!(
        second.prepare(attempt(2, 1), &machine, vec![], false).unwrap_err().code(),
        Some(FailureCode::Busy)
    );
    drop(client);
    dest.wait_for(RunState::Empty);
    // The session that was given up never comes back; the next may.
    let late = second.prepare(attempt(1, 2), &machine, vec![], false).unwrap_err();
    assert_eq!(late.code(), Some(FailureCode::Refused), "{late}");
    drop(second);
    let mut client = load(&mut source, &dest, 2);
    client.import(attempt(2, 1), &source.state, source.bytes).unwrap();
    client.promise(attempt(2, 1), false).unwrap();
    client.revoke(attempt(2, 1)).unwrap();
    client.revoke(attempt(2, 1)).unwrap();
    assert_eq!(client.run(attempt(2, 1)).unwrap_err().code(), Some(FailureCode::Refused));
    assert_eq!(dest.status().run_state, RunState::Empty);
    // Removed beside the loop, so maybe a moment later.
    dest.until("the record is gone", || !dest.record().exists());
    let mut client = load(&mut source, &dest, 3);
    client.import(attempt(3, 1), &source.state, source.bytes).unwrap();
    drop(source);
    client.promise(attempt(3, 1), false).unwrap();
    drop(client);
    // Its source is gone: the operator's word brings it to life.
    dest.until("the receiver is gone", || !dest.status().mover_attached);
    assert_eq!(vmctl(&dest, &["resume", "--force", "--peer-fenced"]).0, 0);
    dest.beats();
}

#[test]
fn a_state_that_is_none_fails_the_import_and_nothing_else() {
    if !kvm() {
        return;
    }
    let mut source = source();
    let dest = Vmrun::incoming();
    let mut client = load(&mut source, &dest, 1);
    let a = attempt(1, 1);
    let (pipe, _writer) = std::io::pipe().unwrap();
    assert_eq!(client.import(a, &pipe, 10).unwrap_err().code(), Some(FailureCode::Usage));
    // A file could be anywhere, and keep vmrun waiting.
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&vec![0; source.bytes as usize]).unwrap();
    assert_eq!(client.import(a, &file, source.bytes).unwrap_err().code(), Some(FailureCode::Usage));
    assert_eq!(
        client.import(a, &source.state, source.bytes + 1).unwrap_err().code(),
        Some(FailureCode::Usage)
    );
    assert_eq!(client.import(a, &source.state, u64::MAX).unwrap_err().code(), Some(FailureCode::Usage));
    assert_eq!(
        client.import(attempt(2, 1), &source.state, 1).unwrap_err().code(),
        Some(FailureCode::Refused)
    );
    let error = client.import(a, &source.state, source.bytes - 1).unwrap_err();
    assert_eq!(error.code(), Some(FailureCode::Failed), "{error}");
    assert_eq!(client.promise(a, false).unwrap_err().code(), Some(FailureCode::Refused));
    client.revoke(a).unwrap();
    // A machine that this host cannot be is refused with every reason.
    let mut machine = source.mover.machine().unwrap();
    machine.vcpus = 100_000;
    machine.capabilities.push("KVM_CAP_MIND_READING".into());
    let error = client.prepare(attempt(4, 1), &machine, vec![], false).unwrap_err();
    assert_eq!(error.code(), Some(FailureCode::Unsuitable), "{error}");
    assert!(error.failure().unwrap().problems.len() >= 2, "{error}");
    assert_eq!(dest.status().run_state, RunState::Empty);
    // The source has not noticed any of it.
    drop(source.mover);
    source.vmrun.wait_for(RunState::Running);
    source.vmrun.beats();
    let _ = source.state.as_fd();
}
