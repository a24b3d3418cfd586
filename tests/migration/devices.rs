//! Guests with devices of the host's: what is missing at the destination is told before anything is sent.

use std::process::Command;

use crate::guest::{check_alive, check_beats};
use crate::scene::{Scene, Vmrun, binary, fault_points, kvm, never_paused, skip};

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

// Row 6.
#[test]
fn a_card_that_fails_its_import_stays_with_its_guest() {
    if !kvm() || !fault_points() || !namespaces() {
        return;
    }
    let scene = Scene::new();
    let mut vmrun = alone("vmrun");
    vmrun.current_dir(scene.path(""));
    let a = scene.guest_from("a", vmrun, &["--net", "tap=new:vmcard0"]);
    let listen = |name: &str| format!("unix:{}", scene.path(name).display());
    let mut command = alone("vmrecv");
    command.env("VMFERRY_FAULT_POINT", "import:net0");
    let b = scene.receiver_from("b", command, &listen("b.in"), &["--remap", "net0=new:vmcard8"]);
    let end = scene.send(&a.host, &b.address, &[]).end();
    end.expect(5, &["net0", "refused on purpose", "the source has the guest"]);
    a.await_running();
    check_beats(&[&a]);
    let mut c = scene.receiver_from("c", alone("vmrecv"), &listen("c.in"), &["--remap", "net0=new:vmcard8"]);
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

/// A small guest with a disk of that image (the trial guest has no driver for it).
fn guest_with_disk(scene: &Scene, image: &str) -> Vmrun {
    let image = scene.path(image);
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let disk = image.display().to_string();
    let kernel = ["--kernel", "builtin:heartbeat", "--memory", "32M", "--disk", &disk];
    let cmdline = ["--cmdline", "vcpus=1 fill=8M ws=1M rate=5 beat=5 status=50"];
    let guest = scene.vmrun("a", &[&kernel[..], &cmdline].concat());
    check_beats(&[&guest]);
    guest
}

#[test]
fn a_disk_that_is_missing_at_the_destination_is_refused_by_name() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = guest_with_disk(&scene, "disk.img");
    // No image is named; it is not there; it has another size.
    let small = scene.path("small.img");
    std::fs::write(&small, vec![0; 512]).unwrap();
    let gone = format!("disk0={}", scene.path("gone.img").display());
    let other = format!("disk0={}", small.display());
    let cases: [(&[&str], &[&str]); 3] = [
        (&[], &["disk0", "--remap"]),
        (&["--remap", &gone], &["disk0", "gone.img", "No such file"]),
        (&["--remap", &other], &["disk0", "1048576", "512"]),
    ];
    for (n, (args, said)) in cases.into_iter().enumerate() {
        let b = scene.receiver(&format!("b{n}"), args);
        scene.send(&a, &b.address, &[]).end().expect(3, said);
        a.await_running();
    }
    check_alive(&[&a]);
}

#[test]
fn a_disk_goes_with_its_guest_and_back() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = guest_with_disk(&scene, "disk.img");
    let remap = format!("disk0={}", scene.path("disk.img").display());
    let mut b = scene.receiver("b", &["--remap", &remap]);
    scene.send(&a, &b.address, &[]).end().expect(0, &[]);
    assert_eq!(b.program.end().code, 0);
    check_alive(&[&a, &b]);
    // The one that has it is known to whoever wants it.
    let disk = scene.path("disk.img").display().to_string();
    let mut second = scene.command("vmrun");
    second.args(["--kernel", "builtin:heartbeat", "--serial", "none", "--disk", &disk]);
    scene.start("second", second).end().expect(1, &["disk0", "has it open"]);
    let mut c = scene.receiver("c", &["--remap", &remap]);
    scene.send(&b, &c.address, &[]).end().expect(0, &[]);
    assert_eq!(c.program.end().code, 0);
    check_alive(&[&a, &b, &c]);
}
