//! Mistakes on the command line and on the spot: one line that says what and where, the right exit
//! code, and nothing touched.

use std::fs;
use std::os::unix::net::UnixListener;

use crate::guest::check_beats;
use crate::program::End;
use crate::scene::{Scene, kvm};

/// Runs a program that ends by itself.
fn run(scene: &Scene, program: &str, args: &[&str]) -> End {
    let mut command = scene.command(program);
    command.args(args);
    scene.start(program, command).end()
}

/// One line, which has the program's name and all of `words`.
#[track_caller]
fn check(end: &End, program: &str, code: i32, words: &[&str]) {
    end.expect(code, words);
    assert_eq!(end.stderr.lines().count(), 1, "{end:?}");
    assert!(end.stderr.starts_with(&format!("{program}: ")), "{end:?}");
}

#[test]
fn kernels_that_are_none_and_memory_that_does_not_fit() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let elf = fs::read(env!("OTHER_ELF")).unwrap();
    fs::write(scene.path("short.elf"), &elf[..100]).unwrap();
    fs::write(scene.path("cut.elf"), &elf[..elf.len() / 2]).unwrap();
    fs::write(scene.path("no-note.elf"), fs::read(crate::scene::binary("vmctl")).unwrap()).unwrap();
    fs::write(scene.path("text"), "this is no kernel").unwrap();
    fs::write(scene.path("empty"), "").unwrap();
    let before = names(&scene);
    for kernel in ["short.elf", "cut.elf", "no-note.elf", "text", "empty", "missing", "/", "builtin:missing"]
    {
        let end = run(&scene, "vmrun", &["--kernel", kernel, "--serial", "none", "--control", "x.sock"]);
        check(&end, "vmrun", 1, &[kernel.strip_prefix("builtin:").unwrap_or(kernel)]);
    }
    for (memory, cpus, word) in [("9000G", "1", "emory"), ("1M", "1", "emory"), ("64M", "100000", "vCPU")] {
        let args = ["--kernel", "builtin:heartbeat", "--memory", memory, "--cpus", cpus, "--serial", "none"];
        check(&run(&scene, "vmrun", &args), "vmrun", 1, &[word]);
    }
    let initrd = ["--kernel", env!("OTHER_ELF"), "--initrd", "missing", "--serial", "none"];
    check(&run(&scene, "vmrun", &initrd), "vmrun", 1, &["missing"]);
    let serial = ["--kernel", "builtin:heartbeat", "--serial", "file:/no/such/dir/log"];
    check(&run(&scene, "vmrun", &serial), "vmrun", 1, &["/no/such/dir/log"]);
    let left: Vec<String> = names(&scene).into_iter().filter(|n| !before.contains(n)).collect();
    assert!(left.iter().all(|n| n.ends_with(".out") || n.ends_with(".err")), "left behind: {left:?}");
}

fn names(scene: &Scene) -> Vec<String> {
    fs::read_dir(scene.path("")).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn control_sockets_that_are_taken_or_something_else() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.small("a");
    fs::write(scene.path("file"), "precious").unwrap();
    let _listener = UnixListener::bind(scene.path("foreign.sock")).unwrap();
    for path in ["a.sock", "file", "foreign.sock", "no/dir/x.sock"] {
        let end =
            run(&scene, "vmrun", &["--kernel", "builtin:heartbeat", "--serial", "none", "--control", path]);
        check(&end, "vmrun", 1, &[path]);
        // vmrecv's vmrun says it on the same standard error.
        let end = run(&scene, "vmrecv", &["tcp:127.0.0.1:0", "--control", path]);
        end.expect(1, &["vmrecv: ", path]);
        if path != "a.sock" {
            let end = run(&scene, "vmctl", &[path, "--timeout", "200ms", "status"]);
            check(&end, "vmctl", 1, &[path]);
            let end = run(&scene, "vmsend", &["--vm", path, "tcp:127.0.0.1:1"]);
            check(&end, "vmsend", 1, &[path]);
        }
    }
    assert_eq!(fs::read_to_string(scene.path("file")).unwrap(), "precious");
    assert!(scene.path("foreign.sock").exists() && a.control.exists());
    check_beats(&[&a]);
}

#[test]
fn addresses_that_are_none() {
    let scene = Scene::new();
    for dest in ["nowhere", "tcp:", "tcp:host", "tcp:host:99999", "unix:", "gopher:host:70"] {
        for (program, args) in
            [("vmsend", ["--vm", "x.sock", dest]), ("vmrecv", ["--control", "x.sock", dest])]
        {
            run(&scene, program, &args).expect(2, &[dest]);
        }
    }
    // What goes beyond loopback has to be said out loud.
    for (program, args) in [
        ("vmsend", ["--vm", "x.sock", "tcp:192.0.2.1:7070"]),
        ("vmrecv", ["--control", "x.sock", "tcp:0.0.0.0:0"]),
    ] {
        check(&run(&scene, program, &args), program, 2, &["--insecure"]);
    }
    assert!(names(&scene).iter().all(|n| n.ends_with(".out") || n.ends_with(".err")));
}

#[test]
fn an_address_that_is_taken() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", taken.local_addr().unwrap());
    check(&run(&scene, "vmrecv", &[&address, "--control", "x.sock"]), "vmrecv", 1, &[&address]);
    fs::write(scene.path("file"), "precious").unwrap();
    let listen = format!("unix:{}", scene.path("file").display());
    check(&run(&scene, "vmrecv", &[&listen, "--control", "x.sock"]), "vmrecv", 1, &["file"]);
    assert_eq!(fs::read_to_string(scene.path("file")).unwrap(), "precious");
    // The vmrun that was started for it is gone again.
    crate::program::until("no vmrun is left", || (!scene.path("x.sock").exists()).then_some(()));
}

#[test]
fn nothing_to_resume() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.small("a");
    scene.resume(&a, &[]).end().expect(1, &["nothing to resume"]);
    let b = scene.receiver("b", &[]);
    let end = scene.send(&b, "tcp:127.0.0.1:1", &[]).end();
    end.expect(1, &["holds no guest"]);
    check_beats(&[&a]);
}
