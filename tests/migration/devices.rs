//! Guests with devices of the host's: what is missing at the destination is told before anything is sent.

use std::process::Command;

use crate::guest::{check_alive, check_beats};
use crate::scene::{Scene, binary, kvm, never_paused, skip};

/// The trial guest has no driver for it: the card moves all the same.
#[test]
fn a_tap_that_is_missing_at_the_destination_is_named_and_another_can_be_given() {
    if !kvm() || !namespaces() {
        return;
    }
    let scene = Scene::new();
    let card = "tap=new:vmcard0,mac=52:54:00:12:34:56";
    let mut vmrun = alone("vmrun");
    vmrun.current_dir(scene.path(""));
    let a = scene.guest_from("a", vmrun, &["--net", card]);

    let listen = |name: &str| format!("unix:{}", scene.path(name).display());
    let receive = |name: &str, remap: &str| {
        scene.receiver_from(name, alone("vmrecv"), &listen(&format!("{name}.in")), &["--remap", remap])
    };
    let b = receive("b", "net0=vmcard7");
    never_paused(&a, || {
        let end = scene.send(&a.host, &b.address, &[]).end();
        end.expect(3, &["device net0", "vmcard7", "there is no interface of that name"]);
    });
    check_beats(&[&a]);

    let mut c = receive("c", "net0=new:vmcard8");
    scene.send(&a.host, &c.address, &[]).end().expect(0, &[]);
    assert_eq!(c.program.end().code, 0);
    check_alive(&[&a, &c]);
}

/// `program` in a network namespace of its own, which ends with it.
fn alone(program: &str) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--net", "--"]).arg(binary(program));
    command
}

fn namespaces() -> bool {
    let made = Command::new("unshare").args(["--net", "--", "true"]).output();
    made.is_ok_and(|out| out.status.success()) || skip("this needs root, to make network namespaces")
}
