//! Failures before the guest is paused: it never notices, and a second try succeeds.

use nix::sys::signal::Signal;
use vmferry::control::RunState;
use vmferry::wire::FrameType;

use crate::guest::{check_alive, check_beats};
use crate::program::Program;
use crate::proxy::{Proxy, Way};
use crate::scene::{Host, Receiver, SLOW, Scene, Vmrun, kvm, never_paused, vmctl};

/// A guest, a receiver, and a migration between them whose first pass is under way for seconds.
struct Moving {
    a: Vmrun,
    b: Receiver,
    link: Proxy,
    send: Program,
    scene: Scene,
}

impl Moving {
    fn start(receiver: &[&str], sender: &[&str]) -> Self {
        let scene = Scene::new();
        let a = scene.big("a");
        let b = scene.receiver("b", receiver);
        let link = Proxy::to(&b.address);
        let mut send = scene.send(&a, &link.address, &[SLOW, sender].concat());
        await_precopy(&mut send);
        assert!(a.status().dirty_log);
        Self { a, b, link, send, scene }
    }
}

/// Waits until pages are on their way.
fn await_precopy(send: &mut Program) {
    send.await_line("pages on their way", |line| {
        let progress = &line["progress"];
        (progress["phase"] == "precopy" && progress["sent_bytes"].as_u64()? > 1 << 20).then_some(())
    });
}

/// The guest runs as if nothing had been, and nobody logs its pages.
#[track_caller]
fn check_untouched(host: &Host) {
    host.await_status("no trace of the migration", |s| !s.mover_attached && !s.dirty_log);
    host.await_running();
    check_beats(&[host]);
}

/// Another try, which succeeds.
#[track_caller]
fn check_next_try(scene: &Scene, from: &Host, to: &mut Receiver) {
    scene.send(from, &to.address, &["--verify"]).end().expect(0, &[]);
    assert_eq!(to.program.end().code, 0);
    check_alive(&[from, to]);
}

// Row 1.
#[test]
fn nobody_listens() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.small("a");
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let gone = scene.path("gone.sock");
    for (dest, why) in [
        (format!("tcp:127.0.0.1:{port}"), "refused"),
        (format!("unix:{}", gone.display()), "gone.sock"),
        ("exec:exit 7".to_owned(), "7"),
        ("tcp:no.such.host.invalid:1".to_owned(), "no.such.host.invalid"),
    ] {
        never_paused(&a, || {
            let insecure: &[&str] = if dest.contains("invalid") { &["--insecure"] } else { &[] };
            let end = scene.send(&a, &dest, insecure).end();
            assert!([1, 5].contains(&end.code), "{end:?}");
            assert!(end.stderr.contains(why) && end.stderr.contains("the source has the guest"), "{end:?}");
            assert_eq!(end.stderr.lines().count(), 1, "{end:?}");
            if dest.starts_with("tcp:") {
                end.expect(1, &[&dest]);
            }
        });
    }
    check_untouched(&a);
}

// Row 2.
#[test]
fn what_the_destination_cannot_be_is_refused_by_name() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.small("a");
    let mut b = scene.receiver("b", &[]);
    let link = Proxy::to(&b.address);
    let refused = |words: &[&str]| {
        never_paused(&a, || {
            let end = scene.send(&a, &link.address, &[]).end();
            end.expect(3, words).expect(3, &["on the destination", "the source has the guest, untouched"]);
            assert!(b.is_empty());
        });
    };
    link.rewrite(Way::ToDest, FrameType::Hello, |hello| {
        (hello["version_min"], hello["version_max"]) = (7.into(), 9.into());
    });
    refused(&["version", "7 to 9", "the destination 1"]);
    link.rewrite(Way::ToDest, FrameType::Hello, |hello| {
        hello["features"] = vec!["must:levitation", "speech", "must:telepathy"].into();
    });
    refused(&["feature levitation", "feature telepathy"]);
    link.rewrite(Way::ToDest, FrameType::Machine, |machine| {
        machine["capabilities"].as_array_mut().unwrap().push("KVM_CAP_MIND_READING".into());
        machine["msrs"].as_array_mut().unwrap().push(0x1234_5678.into());
        machine["vcpus"] = 5000.into();
    });
    refused(&["KVM_CAP_MIND_READING", "0x12345678", "5000"]);
    link.rewrite(Way::ToDest, FrameType::Machine, |machine| {
        // Every CPUID bit of leaf 7 that there could be.
        for entry in machine["cpuid"].as_array_mut().unwrap() {
            if entry["function"] == 7 && entry["index"] == 0 {
                entry["ebx"] = u32::MAX.into();
                entry["ecx"] = u32::MAX.into();
            }
        }
    });
    refused(&["CPUID"]);
    assert_eq!(link.passed(Way::ToDest, FrameType::Pages), 0);
    check_untouched(&a);
    check_next_try(&scene, &a, &mut b);
}

// Row 27: the receiver's vmrun may not have as much memory as the guest needs.
#[test]
fn a_destination_without_memory_is_told_before_anything_is_sent() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.guest("a", "2G", 1, "fill=8M ws=1M rate=5");
    let mut limited = std::process::Command::new("sh");
    let script = format!("ulimit -v 1500000; exec {} \"$@\"", crate::scene::binary("vmrecv"));
    limited.args(["-c", &script, "sh"]).current_dir(scene.path(""));
    let mut b = scene.receiver_from("b", limited, "tcp:127.0.0.1:0", &[]);
    let link = Proxy::to(&b.address);
    never_paused(&a, || {
        let end = scene.send(&a, &link.address, &[]).end();
        assert!([1, 3].contains(&end.code), "{end:?}");
        end.expect(end.code, &["emory", "on the destination", "the source has the guest"]);
    });
    assert_eq!(link.passed(Way::ToDest, FrameType::Pages), 0);
    assert!(b.program.is_running() && b.is_empty());
    check_untouched(&a);
}

// Row 3.
#[test]
fn the_receiver_dies() {
    if !kvm() {
        return;
    }
    let Moving { a, mut b, link, mut send, scene } = Moving::start(&[], &[]);
    never_paused(&a, || {
        b.program.crash();
        let end = send.end();
        assert!([1, 5].contains(&end.code), "{end:?}");
        assert!(end.stderr.contains("the source has the guest"), "{end:?}");
    });
    // Its vmrun lives on, empty; another receiver may take it over.
    b.await_status("the receiver is empty", |s| s.run_state == RunState::Empty);
    check_untouched(&a);
    drop(link);
    b = scene.receiver("b", &["--attach"]);
    check_next_try(&scene, &a, &mut b);
}

#[test]
fn the_receiving_vmrun_dies() {
    if !kvm() {
        return;
    }
    let Moving { a, mut b, link, mut send, scene } = Moving::start(&[], &[]);
    never_paused(&a, || {
        b.host.crash();
        let end = send.end();
        assert!([1, 5].contains(&end.code), "{end:?}");
        end.expect(end.code, &["on the destination", "the source has the guest"]);
    });
    drop(link);
    // vmrecv starts a new one and waits on.
    check_untouched(&a);
    check_next_try(&scene, &a, &mut b);
}

#[test]
fn the_link_breaks() {
    if !kvm() {
        return;
    }
    let Moving { a, mut b, link, mut send, scene } = Moving::start(&[], &[]);
    never_paused(&a, || {
        link.cut();
        send.end().expect(5, &["the source has the guest"]);
    });
    b.await_status("the receiver is empty", |s| s.memory_bytes == 0);
    check_untouched(&a);
    check_next_try(&scene, &a, &mut b);
}

#[test]
fn the_link_goes_silent() {
    if !kvm() {
        return;
    }
    let Moving { a, mut b, link, mut send, scene } = Moving::start(&["--peer-timeout", "2s"], &[]);
    never_paused(&a, || {
        link.freeze();
        send.end().expect(5, &["the source has the guest"]);
    });
    b.await_status("the receiver is empty", |s| s.memory_bytes == 0);
    check_untouched(&a);
    check_next_try(&scene, &a, &mut b);
}

// Row 4.
#[test]
fn the_sender_dies() {
    if !kvm() {
        return;
    }
    let Moving { a, mut b, link, mut send, scene } = Moving::start(&[], &[]);
    never_paused(&a, || {
        send.crash();
        check_untouched(&a);
    });
    drop(link);
    // Again, and it dies again; the third one succeeds.
    let mut send = scene.send(&a, &b.address, SLOW);
    await_precopy(&mut send);
    send.crash();
    check_untouched(&a);
    check_next_try(&scene, &a, &mut b);
}

// Row 26, before the fence.
#[test]
fn signals_and_cancel_stop_it_and_the_guest_stays() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.big("a");
    let mut b = scene.receiver("b", &[]);
    let socket = scene.path("send.sock");
    let control = ["--control", socket.to_str().unwrap()];
    for (signal, code) in [(Some(Signal::SIGINT), 130), (Some(Signal::SIGTERM), 143), (None, 1)] {
        let mut send = scene.send(&a, &b.address, &[SLOW, &control].concat());
        await_precopy(&mut send);
        never_paused(&a, || {
            match signal {
                Some(signal) => send.signal(signal),
                None => drop(vmctl(&socket, &["cancel"]).expect(0, &[])),
            }
            send.end().expect(code, &["the source has the guest"]);
        });
        assert!(!socket.exists());
        check_untouched(&a);
        b.await_status("the receiver is empty", |s| s.memory_bytes == 0);
    }
    assert!(b.program.is_running());
    check_next_try(&scene, &a, &mut b);
}

#[test]
fn one_attempt_follows_another_at_once() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.small("a");
    let mut b = scene.receiver("b", &[]);
    let link = Proxy::to(&b.address);
    for _ in 0..5 {
        link.cut_at(Way::ToDest, FrameType::Barrier);
        scene.send(&a, &link.address, &[]).end().expect(5, &["the source has the guest"]);
        link.heal();
    }
    check_next_try(&scene, &a, &mut b);
}

#[test]
fn a_closed_standard_output_changes_nothing() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.big("a");
    let b = scene.receiver("b", &[]);
    let mut command = scene.command("vmsend");
    command.arg("--vm").arg(&a.control).arg("--json").arg(&b.address).args(["--bwlimit", "20M"]);
    command.stdin(std::process::Stdio::null());
    let (out, err) = (std::io::pipe().unwrap(), std::io::pipe().unwrap());
    command.stdout(out.1).stderr(err.1);
    let mut child = command.spawn().unwrap();
    drop(command);
    // The first line has come; nobody reads the next ones.
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(out.0), &mut line).unwrap();
    assert!(line.contains("connected to"), "{line}");
    drop(err.0);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    check_alive(&[&a, &b]);
}

#[test]
fn it_gives_up_when_it_cannot_converge() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.guest("a", "32M", 1, "fill=8M ws=8M rate=0");
    let mut b = scene.receiver("b", &[]);
    let limits = ["--bwlimit", "8M", "--downtime", "10ms", "--max-passes", "3"];
    never_paused(&a, || {
        scene.send(&a, &b.address, &limits).end().expect(4, &["the source has the guest"]);
    });
    check_untouched(&a);
    check_next_try_forced(&scene, &a, &mut b);
}

fn check_next_try_forced(scene: &Scene, from: &Host, to: &mut Receiver) {
    scene.send(from, &to.address, &["--verify", "--on-timeout", "force"]).end().expect(0, &[]);
    assert_eq!(to.program.end().code, 0);
    check_alive(&[from, to]);
}

#[test]
fn a_very_slow_migration_still_hears_its_operator() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.big("a");
    let b = scene.receiver("b", &[]);
    let mut send = scene.send(&a, &b.address, &["--bwlimit", "100K"]);
    // Twice, so that progress is shown within what was one window for the sender.
    let shown = |n: usize| {
        move |send: &Program| send.lines().iter().filter(|l| l["event"] == "progress").count() >= n
    };
    crate::program::until("progress", || shown(5)(&send).then_some(()));
    send.signal(Signal::SIGINT);
    send.end().expect(130, &[]);
    check_untouched(&a);
}
