//! What takes long in a `vmrun` (a slow disk, KVM on a busy host) holds up nobody who only asks, and
//! what else is ordered meanwhile is done afterwards, in its order.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::{self, JoinHandle};

use nix::sys::stat::Mode;
use vmferry::control::{Client, FailureCode, RunState};
use vmferry::switchover::Ownership;

use crate::host::{PATIENCE, Vmrun, attempt, kvm, session};

/// A chore of a `vmrun` that is held up, until this is let go.
struct Stalled {
    fifo: PathBuf,
    held: File,
}

impl Stalled {
    /// Starts `begin` (which has the chore done) on a thread, and waits until the chore is held up.
    fn while_doing<T: Send + 'static>(
        vmrun: &Vmrun,
        begin: impl FnOnce() -> T + Send + 'static,
    ) -> (Self, JoinHandle<T>) {
        let fifo = vmrun.path("stall");
        nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        let doing = thread::spawn(begin);
        let mut held = None;
        vmrun.until("the chore to be held up", || {
            // Without a reader, this open fails.
            let opened = OpenOptions::new().write(true).custom_flags(nix::libc::O_NONBLOCK).open(&fifo);
            held = opened.ok();
            held.is_some()
        });
        (Self { fifo, held: held.unwrap() }, doing)
    }

    fn let_go(self) {
        fs::remove_file(&self.fifo).unwrap();
        drop(self.held);
    }
}

/// A request on a connection of its own: gives the connection, on which `pending` has come.
fn pending(vmrun: &Vmrun, request: &str) -> (BufReader<UnixStream>, String) {
    let mut stream = UnixStream::connect(vmrun.socket()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    writeln!(stream, r#"{{"id":1,"cmd":"hello","version":1,"client":"test"}}"#).unwrap();
    writeln!(stream, "{request}").unwrap();
    let mut reader = BufReader::new(stream);
    let (mut hello, mut line) = (String::new(), String::new());
    reader.read_line(&mut hello).unwrap();
    reader.read_line(&mut line).unwrap();
    (reader, line)
}

/// Whether guests can run, and chores be held up.
fn can_stall() -> bool {
    let built = cfg!(feature = "fault-points");
    if !built {
        eprintln!("SKIPPED: this needs --features fault-points");
    }
    built && kvm()
}

fn stalling(args: &[&str], chore: &str) -> Vmrun {
    let dir = tempfile::tempdir().unwrap();
    let stall = format!("{chore}:{}", dir.path().join("stall").display());
    Vmrun::start_with(dir, args, &[("VMFERRY_STALL", &stall)])
}

fn heartbeat_stalling(chore: &str) -> Vmrun {
    stalling(&["--kernel", "builtin:heartbeat", "--memory", "16M", "--serial", "file:log"], chore)
}

#[test]
fn a_disk_that_is_slow_at_the_fence_holds_up_no_question_and_no_order_overtakes_it() {
    if !can_stall() {
        return;
    }
    let vmrun = heartbeat_stalling("record");
    let mut mover = vmrun.client();
    mover.attach(Some(session(1)), "there").unwrap();
    mover.pause(true).unwrap();
    mover.export().unwrap();
    // The mover is gone as soon as it has its answer.
    let (stalled, fence) = Stalled::while_doing(&vmrun, move || mover.fence(attempt(1, 1), "there"));
    assert!(matches!(vmrun.status().ownership, Ownership::Sole { .. }), "not before it is on disk");
    assert!(vmrun.client().machine().unwrap().vcpus == 1);
    let (mut answer, line) = pending(&vmrun, r#"{"id":2,"cmd":"resume"}"#);
    assert!(line.contains("pending") && line.contains("session record"), "{line}");
    assert_eq!(vmrun.status().run_state, RunState::Paused);
    assert!(!fence.is_finished(), "the fence is answered when it is on disk");
    stalled.let_go();
    fence.join().unwrap().unwrap();
    let mut refused = String::new();
    answer.read_line(&mut refused).unwrap();
    assert!(refused.contains("\"refused\""), "{refused}");
    vmrun.until("the mover is gone", || !vmrun.status().mover_attached);
    let status = vmrun.status();
    assert!(matches!(status.ownership, Ownership::Committed { .. }), "{status:?}");
    assert_eq!(status.run_state, RunState::Paused);
    assert!(fs::read_to_string(vmrun.record()).unwrap().contains("there"));
}

#[test]
fn a_sender_that_dies_while_the_fence_is_written_finds_it_written() {
    if !can_stall() {
        return;
    }
    let vmrun = heartbeat_stalling("record");
    let mut mover = vmrun.client();
    mover.attach(Some(session(1)), "there").unwrap();
    mover.pause(true).unwrap();
    mover.export().unwrap();
    mover.set_timeout(std::time::Duration::from_millis(1));
    // It asks, does not wait for the answer, and is gone.
    let (stalled, gone) = Stalled::while_doing(&vmrun, move || mover.fence(attempt(1, 1), "there").is_err());
    assert!(gone.join().unwrap());
    assert_eq!(vmrun.status().run_state, RunState::Paused, "its lease holds until the fence is settled");
    stalled.let_go();
    vmrun.until("the mover is gone", || !vmrun.status().mover_attached);
    let status = vmrun.status();
    assert!(matches!(status.ownership, Ownership::Committed { .. }), "{status:?}");
    assert_eq!(status.run_state, RunState::Paused);
}

#[test]
fn a_dirty_log_that_is_slow_to_start_and_to_stop_holds_up_no_question() {
    if !can_stall() {
        return;
    }
    for (chore, begin) in [
        ("dirty-start", Client::dirty_start as fn(&mut Client) -> _),
        ("dirty-stop", |client| {
            let started = client.dirty_start();
            client.dirty_stop().and(started)
        }),
    ] {
        let vmrun = heartbeat_stalling(chore);
        let mut mover = vmrun.client();
        mover.attach(Some(session(1)), "there").unwrap();
        let (stalled, doing) = Stalled::while_doing(&vmrun, move || {
            let done = begin(&mut mover);
            (mover, done)
        });
        vmrun.beats();
        assert_eq!(vmrun.status().run_state, RunState::Running);
        let (mut answer, line) = pending(&vmrun, r#"{"id":2,"cmd":"pause","lease":false}"#);
        assert!(line.contains("pending") && line.contains("dirty log"), "{line}");
        stalled.let_go();
        let (mut mover, done) = doing.join().unwrap();
        done.unwrap();
        let mut paused = String::new();
        answer.read_line(&mut paused).unwrap();
        assert!(paused.contains("paused") || paused.contains("pending"), "{paused}");
        assert_eq!(mover.status().unwrap().dirty_log, chore == "dirty-start");
    }
}

#[test]
fn a_machine_that_is_slow_to_make_holds_up_no_question_and_goes_with_its_receiver() {
    if !can_stall() {
        return;
    }
    let source = Vmrun::heartbeat();
    let machine = source.client().machine().unwrap();
    let vmrun = stalling(&["--incoming", "--serial", "file:log"], "prepare");
    for (n, dies) in [(1, true), (2, false)] {
        let mut receiver = vmrun.client();
        if dies {
            receiver.set_timeout(std::time::Duration::from_millis(1));
        }
        let machine = machine.clone();
        let (stalled, doing) = Stalled::while_doing(&vmrun, move || {
            let made = receiver.prepare(attempt(n, 1), &machine, vec![], false);
            (!dies).then_some((receiver, made))
        });
        assert_eq!(vmrun.status().run_state, RunState::Empty);
        if dies {
            assert!(doing.join().unwrap().is_none());
            stalled.let_go();
            vmrun.until("what was made is dropped", || {
                let status = vmrun.status();
                status.run_state == RunState::Empty && !status.mover_attached
            });
        } else {
            // A second receiver waits its turn, and is refused then.
            let (mut answer, line) = pending(
                &vmrun,
                r#"{"id":2,"cmd":"revoke","attempt":{"session":"01010101010101010101010101010101","epoch":1}}"#,
            );
            assert!(line.contains("pending") && line.contains("machine to be made"), "{line}");
            stalled.let_go();
            let (mut receiver, made) = doing.join().unwrap().unwrap();
            made.unwrap();
            let mut refused = String::new();
            answer.read_line(&mut refused).unwrap();
            assert!(refused.contains("busy"), "{refused}");
            assert_eq!(receiver.status().unwrap().run_state, RunState::Loading);
            assert_eq!(
                receiver.promise(attempt(n, 1), false).unwrap_err().code(),
                Some(FailureCode::Refused),
                "nothing was imported"
            );
        }
    }
}
