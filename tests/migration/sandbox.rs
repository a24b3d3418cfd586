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
    // The second would cut the guest's memory short, which on a tmpfs no seal forbids.
    for (what, call) in [("send", "ptrace"), ("send:truncate", "ftruncate")] {
        let mut command = scene.command("vmsend");
        command.env("VMFERRY_FORBIDDEN", what).arg("--vm").arg(&a.control).arg(&b.address);
        let refused = format!("vmsend: the sandbox has refused the system call {call}");
        scene.start(call, command).end().expect(9, &[&refused, "exit code 9", "--no-sandbox"]);
    }
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

/// Whether this kernel has landlock with TCP ports (version 4).
fn landlock() -> bool {
    // landlock_create_ruleset(NULL, 0, LANDLOCK_CREATE_RULESET_VERSION)
    let output = std::process::Command::new("python3")
        .args(["-c", "import ctypes; print(ctypes.CDLL(None).syscall(444, 0, 0, 1))"])
        .output();
    let version = output.ok().and_then(|o| String::from_utf8_lossy(&o.stdout).trim().parse::<i32>().ok());
    version.is_some_and(|v| v >= 4) || crate::scene::skip("this kernel has no landlock with TCP ports")
}

#[test]
fn files_and_ports_that_are_not_named_are_out_of_reach() {
    if !kvm() || !fault_points() || !landlock() {
        return;
    }
    let scene = Scene::new();
    let mut on = scene.small("a");
    for (what, program) in [("file", "vmsend"), ("port", "vmsend"), ("file", "vmrecv"), ("port", "vmrecv")] {
        let place = format!("{}:{what}", if program == "vmsend" { "send" } else { "receive" });
        let of = |name: &str| {
            let mut command = scene.command(name);
            if name == program {
                command.env("VMFERRY_FORBIDDEN", &place);
            }
            command
        };
        let name = format!("{what}-{program}");
        let mut to = scene.receiver_from(&name, of("vmrecv"), "tcp:127.0.0.1:0", &[]);
        let mut send = of("vmsend");
        send.arg("--vm").arg(&on.host.control).arg(&to.address);
        let end = scene.start("vmsend-forbidden", send).end();
        end.expect(0, &[]);
        to.program.end().expect(0, &[]);
        let said = if program == "vmsend" { end.stderr } else { to.program.stderr() };
        assert!(said.contains(&format!("the {what} gave Err(")), "{said}");
        assert!(said.contains("PermissionDenied"), "{program} may reach the {what}: {said}");
        on.host = to.host.clone();
    }
}

// The resolver's files, and its port, are let through where a host is given by name.
#[test]
fn a_name_is_resolved_in_the_sandbox() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.small("a");
    let mut b = scene.receiver_at("b", "tcp:localhost:0", &[]);
    let port = b.address.rsplit(':').next().unwrap();
    scene.send(&a, &format!("tcp:localhost:{port}"), &[]).end().expect(0, &[]);
    b.program.end().expect(0, &[]);
    check_alive(&[&a, &b]);
}

#[test]
fn a_pseudo_terminal_is_the_guests_in_the_sandbox() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let host = scene.host("a");
    let mut command = scene.command("vmrun");
    command.arg("--control").arg(&host.control).args(["--kernel", "builtin:heartbeat", "--memory", "32M"]);
    command.args(["--serial", "pty", "--cmdline", "fill=8M ws=1M beat=50"]);
    let program = scene.start("vmrun-pty", command);
    let path = until("it names the terminal", || {
        program.stderr().split_whitespace().find(|w| w.starts_with("/dev/pts/")).map(str::to_owned)
    });
    let mut terminal = fs::File::open(path.trim_end_matches([',', '.', ';'])).unwrap();
    let mut heard = String::new();
    while !heard.contains("b 3") {
        let mut bytes = [0; 256];
        let count = std::io::Read::read(&mut terminal, &mut bytes).unwrap();
        assert!(count > 0, "{heard}");
        heard.push_str(&String::from_utf8_lossy(&bytes[..count]));
    }
    host.vmctl(&["quit"]).expect(0, &[]);
}

#[test]
fn a_panic_has_its_backtrace_in_the_sandbox() {
    if !kvm() || !fault_points() {
        return;
    }
    let scene = Scene::new();
    let a = scene.small("a");
    let b = scene.receiver("b", &[]);
    let mut command = scene.command("vmsend");
    command.env("VMFERRY_FORBIDDEN", "send:panic").env("RUST_BACKTRACE", "1");
    command.arg("--vm").arg(&a.control).arg(&b.address);
    let end = scene.start("vmsend-panic", command).end();
    assert!(end.code != 0, "{end:?}");
    assert!(end.stderr.contains("as it was asked to"), "{end:?}");
    // Names, and lines of files: they are read from the program's own file.
    assert!(end.stderr.contains("try_forbidden") && end.stderr.contains("src/migrate/source.rs:"), "{end:?}");
    a.await_running();
    check_beats(&[&a]);
}
