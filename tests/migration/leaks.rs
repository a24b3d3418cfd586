//! Hosts that live on hold no more after many attempts, and a guest that has moved often no more than
//! one that has just come.

use std::fs;

use nix::sys::signal::Signal;
use vmferry::control::RunState;
use vmferry::wire::FrameType;

use crate::guest::check_alive;
use crate::program::until;
use crate::proxy::{Proxy, Way};
use crate::scene::{Host, SLOW, Scene, kvm};

/// Descriptors, memfds among them, and threads of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Holds {
    descriptors: usize,
    memfds: usize,
    threads: usize,
}

fn holds(pid: u32) -> Holds {
    let list = |what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().flatten();
    let targets: Vec<_> = list("fd").filter_map(|fd| fs::read_link(fd.path()).ok()).collect();
    let memfds = targets.iter().filter(|t| t.to_string_lossy().contains("memfd:")).count();
    Holds { descriptors: targets.len(), memfds, threads: list("task").count() }
}

/// Threads that say farewell, and descriptors of theirs, take a moment to go.
#[track_caller]
fn await_same(what: &str, pid: u32, before: Holds) {
    until(&format!("{what} holds {before:?} again (and not {:?})", holds(pid)), || {
        (holds(pid) == before).then_some(())
    });
}

#[test]
fn attempts_that_fail_leave_nothing_with_the_hosts() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.small("a");
    let empty = scene.vmrun("b", &["--incoming"]);
    let b = scene.receiver("b", &["--attach"]);
    let (source, dest, mover) = (a.status().pid, empty.status().pid, b.program.pid().as_raw() as u32);
    let link = Proxy::to(&b.address);
    let fail = |number: usize| {
        let moments = [
            (Way::ToSource, FrameType::Accepted),
            (Way::ToDest, FrameType::Barrier),
            (Way::ToDest, FrameType::End),
            (Way::ToSource, FrameType::Ready),
        ];
        if let Some((way, kind)) = moments.get(number % 5) {
            link.cut_at(*way, *kind);
            scene.send(&a, &link.address, &[]).end().expect(5, &["the source has the guest"]);
            link.heal();
        } else {
            let mut send = scene.send(&a, &link.address, SLOW);
            send.await_line("pages on their way", |l| {
                (l["progress"]["sent_bytes"].as_u64()? > 1 << 18).then_some(())
            });
            send.signal(Signal::SIGTERM);
            send.end().expect(143, &[]);
        }
    };
    // What READY has left held is replaced by the next attempt, here one that fails early.
    let settle = || {
        fail(0);
        b.await_status("it is empty", |s| s.run_state == RunState::Empty);
    };
    (0..5).for_each(fail);
    settle();
    let stable = |pid: u32| {
        until("it holds what it did", || {
            let first = holds(pid);
            std::thread::sleep(vmferry::migrate::wires::FAREWELL * 2);
            (holds(pid) == first).then_some(first)
        })
    };
    let before = [source, dest, mover].map(stable);
    (0..15).for_each(fail);
    settle();
    for (what, pid, before) in
        [("vmrun at A", source, before[0]), ("vmrun at B", dest, before[1]), ("vmrecv", mover, before[2])]
    {
        await_same(what, pid, before);
    }
    drop(empty);
}

#[test]
fn a_guest_that_goes_back_and_forth_takes_no_more_each_time() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let first = scene.small("h0");
    let mut stations: Vec<Host> = vec![first.host.clone()];
    let mut after_two = None;
    for round in 1..=10 {
        let mut to = scene.receiver(&format!("h{round}"), &[]);
        let mode = ["precopy", "postcopy"][round % 2];
        scene.send(&stations[round - 1], &to.address, &["--mode", mode]).end().expect(0, &[]);
        to.program.end().expect(0, &[]);
        stations.push(to.host.clone());
        let pid = to.await_running().pid;
        if round == 2 {
            after_two = Some(until("it holds what it will", || {
                let before = holds(pid);
                std::thread::sleep(std::time::Duration::from_millis(200));
                (before == holds(pid)).then_some(before)
            }));
        }
        if round == 10 {
            await_same("the tenth vmrun", pid, after_two.unwrap());
        }
    }
    check_alive(&stations.iter().collect::<Vec<_>>());
}
