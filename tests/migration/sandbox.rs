//! What the programs have given up, and what happens to one that tries what it may not.

use std::fs;

use vmferry::control::RunState;

use crate::guest::{check_alive, check_beats};
use crate::program::{Program, until};
use crate::scene::{SLOW, Scene, fault_points, kvm};

/// A field of `/proc/PID/task/TID/status`, for each thread by its name.
fn threads(pid: u32, field: &str) -> Vec<(String, String)> {
    let read = |path: std::path::PathBuf| fs::read_to_string(path).unwrap_or_default();
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let value = |status: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(field)?.strip_prefix(':'));
        line.unwrap_or_default().trim().to_owned()
    };
    tasks
        .flatten()
        .map(|task| {
            (read(task.path().join("comm")).trim().to_owned(), value(&read(task.path().join("status"))))
        })
        .filter(|(_, value)| !value.is_empty())
        .collect()
}

fn pid(program: &Program) -> u32 {
    program.pid().as_raw() as u32
}

fn assert_all(pid: u32, field: &str, wanted: &str) {
    let found = threads(pid, field);
    assert!(!found.is_empty() && found.iter().all(|(_, v)| v == wanted), "{field}: {found:?}");
}

#[test]
fn all_threads_have_given_up_what_they_do_without() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.big("a");
    let b = scene.receiver("b", &[]);
    let mut send = scene.send(&a, &b.address, SLOW);
    send.await_line("pages on their way", |l| {
        (l["progress"]["sent_bytes"].as_u64()? > 1 << 20).then_some(())
    });
    let vmrun = a.status().pid;
    for pid in [pid(&send), pid(&b.program), vmrun] {
        assert_all(pid, "Seccomp", "2");
        assert_all(pid, "NoNewPrivs", "1");
    }
    for pid in [pid(&send), pid(&b.program)] {
        assert_all(pid, "CapEff", "0000000000000000");
        assert_all(pid, "CapPrm", "0000000000000000");
    }
    // The thread beside the service's is given it as a chore.
    until("no thread of a vmrun with a running guest has a capability", || {
        threads(vmrun, "CapEff").iter().all(|(_, v)| v == "0000000000000000").then_some(())
    });
    // vCPUs have a filter of their own on top.
    let filters = threads(vmrun, "Seccomp_filters");
    let of = |name: &str| filters.iter().find(|(n, _)| n == name).map(|(_, v)| v.parse::<u32>().unwrap());
    assert!(of("vcpu0") > of("beside"), "{filters:?}");
}

#[test]
fn a_mover_that_tries_what_it_may_not_ends_and_the_guest_does_not() {
    if !kvm() || !fault_points() {
        return;
    }
    let scene = Scene::new();
    let a = scene.small("a");
    let mut b = scene.receiver("b", &[]);
    let mut command = scene.command("vmsend");
    command.env("VMFERRY_FORBIDDEN", "send").arg("--vm").arg(&a.control).arg(&b.address);
    let words = ["vmsend: the sandbox has refused the system call ptrace", "exit code 9", "--no-sandbox"];
    scene.start("vmsend-forbidden", command).end().expect(9, &words);
    let mut command = scene.command("vmrecv");
    command.env("VMFERRY_FORBIDDEN", "receive");
    let mut c = scene.receiver_from("c", command, "tcp:127.0.0.1:0", &[]);
    scene.send(&a, &c.address, &[]).end().expect(5, &[]);
    c.program.end().expect(9, &["vmrecv: the sandbox has refused the system call ptrace"]);
    a.await_running();
    check_beats(&[&a]);
    scene.send(&a, &b.address, &[]).end().expect(0, &[]);
    assert_eq!(b.program.end().code, 0);
    check_alive(&[&a, &b]);
}

#[test]
fn a_vmrun_that_tries_what_it_may_not_goes_on_with_its_guest() {
    if !kvm() || !fault_points() {
        return;
    }
    let scene = Scene::new();
    for place in ["service", "vcpu"] {
        let host = scene.host(place);
        let mut command = scene.command("vmrun");
        command.env("VMFERRY_FORBIDDEN", place).arg("--control").arg(&host.control);
        command.args(["--kernel", "builtin:heartbeat", "--memory", "32M", "--serial", "none"]);
        let program = scene.start(place, command);
        until("the refusal is told", || {
            program.stderr().contains("refused the system call ptrace").then_some(())
        });
        until("it answers", || host.control.exists().then_some(()));
        assert_eq!(host.await_running().run_state, RunState::Running);
        host.vmctl(&["quit"]).expect(0, &[]);
    }
}

#[test]
fn without_the_sandbox_nothing_is_given_up() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let b = scene.receiver("b", &["--no-sandbox"]);
    for pid in [pid(&b.program), b.status().pid] {
        assert_all(pid, "Seccomp", "0");
    }
}
