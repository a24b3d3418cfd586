//! Guests with devices that are connected to something on the host.

use crate::guest::{check_alive, check_beats};
use crate::scene::{Scene, Vmrun, kvm};

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
