//! A guest that uses its devices while it moves: a disk that it checks all the time, and sockets between
//! it and programs of the host. tests/guests/drivers.c is the guest.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::guest::{check_beats, check_story, output};
use crate::program::{PATIENCE, until};
use crate::scene::{Host, Receiver, Scene, Vmrun, fault_points, kvm, never_paused};

/// In each mode, at a rate that leaves the guest waiting for pages in postcopy.
const MODES: [&[&str]; 3] = [
    &["--mode", "precopy"],
    &["--mode", "hybrid", "--bwlimit", "8M", "--downtime", "20ms"],
    &["--mode", "postcopy", "--bwlimit", "2M"],
];

fn guest(scene: &Scene, name: &str, args: &[&str]) -> Vmrun {
    let kernel = ["--kernel", env!("DRIVERS_ELF"), "--memory", "16M"];
    let guest = scene.vmrun(name, &[&kernel[..], args].concat());
    check_beats(&[&guest]);
    guest
}

fn image(scene: &Scene) -> String {
    let image = scene.path("disk.img");
    fs::write(&image, vec![0; 1 << 20]).unwrap();
    image.display().to_string()
}

/// Waits for so many more of the guest's rounds, and checks all that it has said.
fn rounds(hosts: &[&Host], count: u64) {
    let before = check_story(hosts);
    until("more rounds", || (check_story(hosts) >= before + count).then_some(()));
}

/// A second machine that wants the image, and is told who has it.
fn refused(scene: &Scene, image: &str, holder: &Host) {
    let mut second = scene.command("vmrun");
    second.args(["--kernel", env!("DRIVERS_ELF"), "--serial", "none", "--disk", image]);
    let holder = format!("has it open (process {})", holder.status().pid);
    scene.start("second", second).end().expect(1, &["disk0", image, &holder]);
}

// Rows 24 and S5: the lock is the owner's, and goes with the guest; what the guest wrote is there.
#[test]
fn a_disk_in_use_moves_in_each_mode_and_nobody_else_gets_it() {
    if !kvm() {
        return;
    }
    for mode in MODES {
        let scene = Scene::new();
        let image = image(&scene);
        let a = guest(&scene, "a", &["--disk", &image]);
        // All of the disk was written, and most of the buffers.
        rounds(&[&a], 700);
        refused(&scene, &image, &a);
        let remap = format!("disk0={image}");
        let mut b = scene.receiver("b", &["--remap", &remap]);
        scene.send(&a, &b.address, mode).end().expect(0, &[]);
        assert_eq!(b.program.end().code, 0, "{mode:?}");
        a.await_gone();
        rounds(&[&a, &b], 300);
        refused(&scene, &image, &b);
        let mut c = scene.receiver("c", &["--remap", &remap]);
        scene.send(&b, &c.address, mode).end().expect(0, &[]);
        assert_eq!(c.program.end().code, 0, "{mode:?}");
        b.await_gone();
        rounds(&[&a, &b, &c], 300);
        c.vmctl(&["quit"]).expect(0, &[]);
        c.await_gone();
        // Its next machine finds it free.
        guest(&scene, "d", &["--disk", &image]);
    }
}

/// A program that listens where the guest of the socket `path` reaches port 80 of the host.
fn service(path: &Path) -> UnixListener {
    UnixListener::bind(format!("{}_80", path.display())).unwrap()
}

/// The guest's next connection to the service, and what it says first.
fn greeted(service: &UnixListener) -> (UnixStream, String) {
    service.set_nonblocking(true).unwrap();
    let socket = until("the guest connects", || service.accept().ok()).0;
    socket.set_nonblocking(false).unwrap();
    let text = read(&socket, "hello 0\n".len());
    (socket, text)
}

fn read(mut socket: &UnixStream, bytes: usize) -> String {
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut text = vec![0; bytes];
    socket.read_exact(&mut text).unwrap();
    String::from_utf8(text).unwrap()
}

/// Connects to the guest's echo.
fn called(path: &Path) -> UnixStream {
    let mut socket = UnixStream::connect(path).unwrap();
    socket.write_all(b"CONNECT 5000\n").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut line = String::new();
    while !line.ends_with('\n') {
        line += &read(&socket, 1);
    }
    assert!(line.strip_prefix("OK ").is_some_and(|port| port.trim_end().parse::<u32>().is_ok()), "{line:?}");
    socket
}

#[track_caller]
fn echoes(mut socket: &UnixStream, text: &str) {
    socket.write_all(text.as_bytes()).unwrap();
    assert_eq!(read(socket, text.len()), text);
}

fn ends(mut socket: &UnixStream) {
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    match socket.read(&mut [0]) {
        Ok(0) => {}
        Err(e) if e.kind() == io::ErrorKind::ConnectionReset => {}
        other => panic!("{other:?}"),
    }
}

fn says(hosts: &[&Host], text: &str) {
    until(text, || output(hosts).contains(text).then_some(()));
}

fn vsock(path: &Path) -> String {
    format!("cid=42,path={}", path.display())
}

fn remap(path: &Path) -> String {
    format!("vsock0={}", path.display())
}

/// What is in the scene's directory under the name of the socket, but for services.
fn sockets(scene: &Scene, name: &str) -> Vec<PathBuf> {
    let all = fs::read_dir(scene.path("")).unwrap().map(|f| f.unwrap().path());
    all.filter(|p| p.file_name().unwrap().to_str().unwrap().starts_with(&format!("{name}."))).collect()
}

#[test]
fn sockets_live_while_their_guest_may_stay_and_are_made_anew_where_it_goes() {
    if !kvm() {
        return;
    }
    for mode in MODES {
        let scene = Scene::new();
        let (here, there) = (scene.path("here.v"), scene.path("there.v"));
        let (at_a, at_b) = (service(&here), service(&there));
        let a = guest(&scene, "a", &["--vsock", &vsock(&here)]);
        let (greeting, text) = greeted(&at_a);
        assert_eq!(text, "hello 1\n");
        let echo = called(&here);
        echoes(&echo, "one");

        // A receiver that is gone before the guest could go: everything goes on.
        if fault_points() {
            let b = refusing(&scene, "import:irqchip", &["--remap", &remap(&there)]);
            scene.send(&a, &b.address, mode).end().expect(5, &["irqchip"]);
            a.await_running();
            echoes(&echo, "two");
        }
        let mut b = scene.receiver("b", &["--remap", &remap(&there)]);
        scene.send(&a, &b.address, mode).end().expect(0, &[]);
        assert_eq!(b.program.end().code, 0);
        ends(&echo);
        ends(&greeting);
        says(&[&a, &b], "vsock: reset, cid 42\n");
        let (_greeting, text) = greeted(&at_b);
        assert_eq!(text, "hello 2\n");
        until("the source's path is free", || (!here.exists()).then_some(()));
        echoes(&called(&there), "three");
        check_beats(&[&a, &b]);
        assert_eq!(sockets(&scene, "there.v").len() + sockets(&scene, "here.v").len(), 0);
        b.vmctl(&["quit"]).expect(0, &[]);
        b.await_gone();
        until("the path is free", || (!there.exists()).then_some(()));
    }
}

#[test]
fn a_socket_keeps_its_path_on_one_host_and_a_dead_ones_is_replaced() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let path = scene.path("guest.v");
    let a = guest(&scene, "a", &["--vsock", &vsock(&path)]);
    let echo = called(&path);
    let mut b = scene.receiver("b", &["--remap", &remap(&path)]);
    // The source's vmrun stays, with what is left of its guest; its programs are let go all the same.
    scene.send(&a, &b.address, &["--keep-source"]).end().expect(0, &[]);
    assert_eq!(b.program.end().code, 0);
    ends(&echo);
    says(&[&a, &b], "vsock: reset, cid 42\n");
    echoes(&called(&path), "over there");
    a.vmctl(&["quit", "--force"]).expect(0, &[]);
    a.await_gone();
    echoes(&called(&path), "still there");
    b.crash();
    assert!(path.exists());
    let c = guest(&scene, "c", &["--vsock", &vsock(&path)]);
    echoes(&called(&path), "another");
    check_beats(&[&c]);
}

// Row 24.
#[test]
fn a_path_that_a_stranger_has_is_refused_and_left_alone() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let (here, there) = (scene.path("here.v"), scene.path("there.v"));
    let a = guest(&scene, "a", &["--vsock", &vsock(&here)]);
    let stranger = UnixListener::bind(&there).unwrap();
    let file = scene.path("file.v");
    fs::write(&file, "precious").unwrap();
    let gone = scene.path("nowhere").join("v");
    let cases: [(Option<&Path>, &[&str]); 4] = [
        (None, &["vsock0", "--remap"]),
        (Some(&there), &["vsock0", "there.v", "listens there (process"]),
        (Some(&file), &["vsock0", "file.v", "no socket"]),
        (Some(&gone), &["vsock0", "nowhere"]),
    ];
    for (n, (path, said)) in cases.into_iter().enumerate() {
        let given = path.map(remap);
        let args: Vec<&str> = given.iter().flat_map(|remap| ["--remap", remap.as_str()]).collect();
        let b = scene.receiver(&format!("b{n}"), &args);
        never_paused(&a, || {
            scene.send(&a, &b.address, &[]).end().expect(3, said);
        });
    }
    drop(stranger);
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    assert_eq!(sockets(&scene, "there.v").len() + sockets(&scene, "file.v").len(), 0);
    echoes(&called(&here), "here");
    check_beats(&[&a]);
}

/// A receiver whose machine fails its import at `point`.
fn refusing(scene: &Scene, point: &str, args: &[&str]) -> Receiver {
    let mut command = scene.command("vmrecv");
    command.env("VMFERRY_FAULT_POINT", point);
    scene.receiver_from(&format!("no-{}", point.replace(':', "-")), command, "tcp:127.0.0.1:0", args)
}

// Row 6, with each device of a guest that uses them.
#[test]
fn a_device_that_fails_its_import_leaves_the_guest_and_its_devices_at_the_source() {
    if !kvm() || !fault_points() {
        return;
    }
    let scene = Scene::new();
    let image = image(&scene);
    let (here, there) = (scene.path("here.v"), scene.path("there.v"));
    let args = ["--disk", &image, "--rng", "--vsock", &vsock(&here)];
    let a = guest(&scene, "a", &args);
    let echo = called(&here);
    let remaps = ["--remap", &format!("disk0={image}"), "--remap", &remap(&there)];
    for device in ["disk0", "rng0", "vsock0"] {
        let b = refusing(&scene, &format!("import:{device}"), &remaps);
        let said = [device, "refused on purpose", "the source has the guest"];
        scene.send(&a, &b.address, &[]).end().expect(5, &said);
        a.await_running();
        echoes(&echo, device);
        rounds(&[&a], 300);
        refused(&scene, &image, &a);
        assert!(!there.exists());
    }
    let mut b = scene.receiver("b", &remaps);
    scene.send(&a, &b.address, &[]).end().expect(0, &[]);
    assert_eq!(b.program.end().code, 0);
    rounds(&[&a, &b], 300);
    echoes(&called(&there), "moved");
}
