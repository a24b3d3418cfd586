//! The receiver's other ways: attaching to a vmrun that is there, waiting on, ending; guests that
//! do not run when they are moved.

use nix::sys::signal::Signal;
use vmferry::control::RunState;

use crate::guest::{check_alive, check_beats, check_story};
use crate::proxy::Proxy;
use crate::scene::{SLOW, Scene, kvm};

#[test]
fn a_receiver_attaches_to_an_incoming_vmrun() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.small("a");
    let empty = scene.vmrun("b", &["--incoming"]);
    // Ended before anything came, it leaves the vmrun that is not its own.
    let mut b = scene.receiver("b", &["--attach"]);
    b.program.signal(Signal::SIGTERM);
    b.program.end().expect(143, &[]);
    assert!(empty.is_empty());
    let mut b = scene.receiver("b", &["--attach"]);
    scene.send(&a, &b.address, &[]).end().expect(0, &[]);
    assert_eq!(b.program.end().code, 0);
    check_alive(&[&a, &empty]);
    // It is no place for another.
    let mut command = scene.command("vmrecv");
    command.args(["tcp:127.0.0.1:0", "--attach", "--control"]).arg(&empty.control);
    scene.start("vmrecv", command).end().expect(1, &["owns its guest"]);
    check_beats(&[&a, &empty]);
}

#[test]
fn a_waiting_receiver_that_is_ended_leaves_nothing() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    for (signal, code) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130)] {
        let mut b = scene.receiver("b", &[]);
        b.program.signal(signal);
        b.program.end().expect(code, &[]);
        b.await_gone();
        assert!(!b.control.exists());
    }
}

#[test]
fn a_loading_receiver_that_is_ended_leaves_nothing_and_the_source_is_told() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.big("a");
    let mut b = scene.receiver("b", &[]);
    let mut send = scene.send(&a, &b.address, SLOW);
    send.await_line("pages on their way", |l| {
        (l["progress"]["sent_bytes"].as_u64()? > 1 << 20).then_some(())
    });
    b.program.signal(Signal::SIGTERM);
    send.end().expect(5, &["stopped by signal 15", "on the destination", "the source has the guest"]);
    b.program.end().expect(143, &[]);
    b.await_gone();
    a.await_running();
    check_beats(&[&a]);
}

#[test]
fn a_guest_paused_by_its_operator_arrives_paused() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.small("a");
    a.vmctl(&["pause"]).expect(0, &[]);
    let mut b = scene.receiver("b", &[]);
    // An attempt that fails leaves it paused.
    let link = Proxy::to(&b.address);
    link.cut_at(crate::proxy::Way::ToSource, vmferry::wire::FrameType::Ready);
    scene.send(&a, &link.address, &[]).end().expect(5, &[]);
    assert_eq!(a.status().run_state, RunState::Paused);
    let before = check_story(&[&a]);
    scene.send(&a, &b.address, &[]).end().expect(0, &[]);
    assert_eq!(b.program.end().code, 0);
    assert_eq!(b.status().run_state, RunState::Paused);
    assert_eq!(check_story(&[&a, &b]), before);
    b.vmctl(&["resume"]).expect(0, &[]);
    check_alive(&[&a, &b]);
}

#[test]
fn the_guest_ends_while_it_is_moved() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let mut a = scene.guest("a", "64M", 1, "fill=32M ws=1M rate=5 stop_after=600");
    let mut b = scene.receiver("b", &[]);
    let end = scene.send(&a, &b.address, &["--bwlimit", "2M"]).end();
    assert!([1, 3].contains(&end.code) && end.stderr.contains("the guest has"), "{end:?}");
    assert_eq!(a.program.end().code, 0);
    // Another one may come.
    let next = scene.small("next");
    scene.send(&next, &b.address, &[]).end().expect(0, &[]);
    assert_eq!(b.program.end().code, 0);
    check_alive(&[&next, &b]);
}

#[test]
fn settings_of_a_migration_under_way() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.guest("a", "32M", 1, "fill=8M ws=8M rate=0");
    let b = scene.receiver("b", &[]);
    let socket = scene.path("send.sock");
    let args = [
        "--bwlimit",
        "8M",
        "--downtime",
        "1ms",
        "--max-passes",
        "1000",
        "--control",
        socket.to_str().unwrap(),
    ];
    let mut send = scene.send(&a, &b.address, &args);
    send.await_line("pages on their way", |l| {
        (l["progress"]["sent_bytes"].as_u64()? > 1 << 20).then_some(())
    });
    let ctl = |args: &[&str]| crate::scene::vmctl(&socket, args);
    let progress = ctl(&["--json", "progress"]);
    assert_eq!(progress.expect(0, &[]).lines[0]["settings"]["downtime_ms"], 1);
    ctl(&["set", "--downtime", "2s"]).expect(0, &[]);
    assert_eq!(ctl(&["--json", "status"]).lines[0]["settings"]["downtime_ms"], 2000);
    ctl(&["pause"]).expect(2, &["vmrun"]);
    ctl(&["switch-now"]).expect(0, &[]);
    send.end().expect(0, &[]);
    check_alive(&[&a, &b]);
}
