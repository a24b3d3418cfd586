//! Two hosts that are two network namespaces with a cable between them.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::guest::{check_alive, check_beats};
use crate::postcopy::check_result;
use crate::program::{Program, until};
use crate::scene::{Host, Receiver, SLOW, Scene, binary, kvm, never_paused, skip};

const ADDRESS_A: &str = "198.51.100.1";
const ADDRESS_B: &str = "198.51.100.2";

/// Two namespaces and the cable. Gone when dropped.
struct Net {
    a: String,
    b: String,
}

impl Net {
    /// `None` where namespaces cannot be made.
    fn new() -> Option<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let n = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = |side| format!("vmferry-{}-{n}{side}", std::process::id());
        let net = Self { a: name("a"), b: name("b") };
        if !nix::unistd::geteuid().is_root() || !ip(&["netns", "add", &net.a]) {
            skip("this needs root and iproute2, to make network namespaces");
            return None;
        }
        let commands: &[&[&str]] = &[
            &["netns", "add", &net.b],
            &["-n", &net.a, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", &net.b],
            &["-n", &net.a, "addr", "add", &format!("{ADDRESS_A}/24"), "dev", "cable"],
            &["-n", &net.b, "addr", "add", &format!("{ADDRESS_B}/24"), "dev", "cable"],
            &["-n", &net.a, "link", "set", "cable", "up"],
            &["-n", &net.b, "link", "set", "cable", "up"],
        ];
        for command in commands {
            assert!(ip(command), "ip {command:?}");
        }
        Some(net)
    }

    /// Unplugs the cable at the destination, or plugs it in. It is in once the source reaches the
    /// destination: what the kernel asked for its address meanwhile has to be given up first, and calls
    /// until then end with EHOSTUNREACH.
    fn cable(&self, state: &str) {
        assert!(ip(&["-n", &self.b, "link", "set", "cable", state]));
        if state == "up" {
            until("the source reaches the destination", || self.reaches().then_some(()));
        }
    }

    /// Whether a call from the source is answered at the destination, where nobody listens on port 1.
    fn reaches(&self) -> bool {
        let call = format!("exec 3<>/dev/tcp/{ADDRESS_B}/1");
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.a, "bash", "-c", &call]).env("LC_ALL", "C");
        let output = command.stdin(Stdio::null()).output().unwrap();
        String::from_utf8_lossy(&output.stderr).contains("Connection refused")
    }

    /// A command for `program` in one of the namespaces.
    fn command(namespace: &str, program: &str, dir: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespace, binary(program)]).current_dir(dir);
        command
    }

    /// Limits what the cable carries from the source on, in Mbit/s; false where the kernel cannot.
    fn limit(&self, mbit: u32) -> bool {
        let rate = format!("{mbit}mbit");
        let tbf = [
            "qdisc", "add", "dev", "cable", "root", "tbf", "rate", &rate, "burst", "32kb", "latency", "50ms",
        ];
        let mut command = Command::new("tc");
        command
            .args(["-n", &self.a])
            .args(tbf)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success()) || skip("this needs tc with tbf")
    }

    fn receiver(&self, scene: &Scene, args: &[&str]) -> Receiver {
        let command = Self::command(&self.b, "vmrecv", &scene.path(""));
        scene.receiver_from("b", command, &format!("tcp:{ADDRESS_B}:0"), &[&["--insecure"], args].concat())
    }

    fn send(&self, scene: &Scene, host: &Host, dest: &str, args: &[&str]) -> Program {
        let mut command = Self::command(&self.a, "vmsend", &scene.path(""));
        command.arg("--vm").arg(&host.control).args(["--json", dest]).args(args);
        scene.start("vmsend", command)
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for name in [&self.a, &self.b] {
            ip(&["netns", "del", name]);
        }
    }
}

fn ip(args: &[&str]) -> bool {
    let mut command = Command::new("ip");
    command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

#[test]
fn between_two_hosts_it_must_be_said_to_be_insecure() {
    if !kvm() {
        return;
    }
    let Some(net) = Net::new() else { return };
    let scene = Scene::new();
    let a = scene.small("a");
    let mut b = net.receiver(&scene, &[]);
    never_paused(&a, || net.send(&scene, &a, &b.address, &[]).end().expect(2, &["--insecure"]).code);
    net.send(&scene, &a, &b.address, &["--insecure", "--verify"]).end().expect(0, &[]);
    assert_eq!(b.program.end().code, 0);
    check_alive(&[&a, &b]);
}

// Rows 1 and 3, with a cable.
#[test]
fn the_cable_is_unplugged_and_plugged_in_again() {
    if !kvm() {
        return;
    }
    let Some(net) = Net::new() else { return };
    let scene = Scene::new();
    let a = scene.big("a");
    let mut b = net.receiver(&scene, &["--peer-timeout", "2s"]);
    let slow = [&["--insecure"], SLOW].concat();
    let mut send = net.send(&scene, &a, &b.address, &slow);
    send.await_line("pages on their way", |l| {
        (l["progress"]["sent_bytes"].as_u64()? > 1 << 20).then_some(())
    });
    never_paused(&a, || {
        net.cable("down");
        let end = send.end();
        assert!([1, 5].contains(&end.code), "{end:?}");
        end.expect(end.code, &["the source has the guest"]);
        // Without a cable there is no connecting, either; that takes no longer than it may.
        let timeout = ["--insecure", "--connect-timeout", "500ms"];
        net.send(&scene, &a, &b.address, &timeout).end().expect(1, &[&b.address, "the source has the guest"]);
    });
    a.await_status("no trace of it", |s| !s.dirty_log && !s.mover_attached);
    b.await_status("the receiver has noticed as well", |s| s.memory_bytes == 0);
    check_beats(&[&a]);
    net.cable("up");
    net.send(&scene, &a, &b.address, &["--insecure"]).end().expect(0, &[]);
    assert_eq!(b.program.end().code, 0);
    check_alive(&[&a, &b]);
}

// Row 23: the cable carries less than the guest dirties.
#[test]
fn a_cable_that_is_too_slow_for_precopy_and_not_for_postcopy() {
    if !kvm() {
        return;
    }
    let Some(net) = Net::new() else { return };
    if !net.limit(64) {
        return;
    }
    let busy = |scene: &Scene| scene.guest("a", "64M", 1, "fill=16M ws=8M rate=20");
    let limits = ["--insecure", "--downtime", "50ms", "--max-passes", "3"];
    let scene = Scene::new();
    let a = busy(&scene);
    let b = net.receiver(&scene, &[]);
    never_paused(&a, || {
        let figures =
            ["did not converge: 3 passes were made", "dirties", "the link took", "expected downtime"];
        let advice = ["wanted 50 ms", "--mode hybrid", "--on-timeout", "the source has the guest"];
        net.send(&scene, &a, &b.address, &limits).end().expect(4, &figures).expect(4, &advice);
    });
    b.await_status("the receiver is empty", |s| s.memory_bytes == 0);
    check_beats(&[&a]);
    drop(scene);
    let ways: [&[&str]; 2] = [&["--mode", "hybrid"], &["--on-timeout", "postcopy"]];
    for way in ways {
        let scene = Scene::new();
        let mut a = busy(&scene);
        let mut b = net.receiver(&scene, &[]);
        let end = net.send(&scene, &a, &b.address, &[&limits, way].concat()).end();
        check_result(&end);
        assert!(end.result()["passes"].as_u64().unwrap() > 0, "{way:?} has tried precopy");
        b.program.end().expect(0, &[]);
        a.program.end().expect(0, &["migrated to"]);
        check_alive(&[&a, &b]);
    }
}
