//! Migrations that succeed: shapes of guests, ways to connect, options, and what is told of them.

use crate::guest::{await_ticks, check_alive, check_beats, ticks};
use crate::scene::{Host, Scene, binary, kvm, vmctl};

/// Moves the guest of `a` to a new receiver `b` and checks all of it.
fn move_once(memory: &str, cpus: u32, cmdline: &str, args: &[&str]) {
    let scene = Scene::new();
    let mut a = scene.guest("a", memory, cpus, cmdline);
    check_beats(&[&a]);
    let mut b = scene.receiver("b", &[]);
    let end = scene.send(&a, &b.address, args).end();
    end.expect(0, &[]);
    assert_eq!(b.program.end().code, 0);
    a.program.end().expect(0, &["migrated to tcp:127.0.0.1:"]);
    check_alive(&[&a, &b]);
    let status = b.await_running();
    assert_eq!(status.vcpus, cpus);
    assert_eq!(end.result()["memory_bytes"], status.memory_bytes);
}

macro_rules! moves {
    ($($name:ident: $memory:literal, $cpus:literal, $cmdline:literal, $args:expr;)*) => {$(
        #[test]
        fn $name() {
            if kvm() {
                move_once($memory, $cpus, $cmdline, $args);
            }
        }
    )*};
}

moves! {
    one_vcpu_64_mib_random: "64M", 1, "fill=32M ws=8M rate=20", &["--channels", "1"];
    two_vcpus_256_mib_compressible: "256M", 2, "fill=64M ws=8M rate=20 pattern=compressible", &["--channels", "2"];
    four_vcpus_64_mib_zero: "64M", 4, "fill=16M ws=4M rate=20 pattern=zero", &["--channels", "4"];
    two_vcpus_random_order_with_the_clock_page: "64M", 2, "fill=16M ws=8M rate=20 order=random place=spread kvmclock=1", &[];
    two_gib: "2G", 1, "fill=24M ws=4M rate=20 place=spread", &["--verify"];
    a_guest_that_dirties_as_fast_as_it_can: "32M", 1, "fill=8M ws=4M rate=0", &["--on-timeout", "force", "--downtime", "1ms"];
}

#[test]
fn through_a_unix_socket() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.small("a");
    let listen = format!("unix:{}", scene.path("link.sock").display());
    let mut b = scene.receiver_at("b", &listen, &[]);
    scene.send(&a, &b.address, &["--channels", "2"]).end().expect(0, &[]);
    assert_eq!(b.program.end().code, 0);
    check_alive(&[&a, &b]);
    assert!(!scene.path("link.sock").exists(), "vmrecv leaves its socket behind");
}

#[test]
fn through_a_command() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.small("a");
    let b: Host = scene.host("b");
    let dest = format!(
        "exec:{} --control {} --serial file:{} -",
        binary("vmrecv"),
        b.control.display(),
        b.log.display()
    );
    let end = scene.send(&a, &dest, &["--verify"]).end();
    assert_eq!(end.expect(0, &[]).result()["channels"], 0);
    check_alive(&[&a, &b]);
}

#[test]
fn ten_times_back_and_forth() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let first = scene.guest("a", "32M", 2, "fill=8M ws=2M rate=10");
    // Where the guest has been, in order: each time at one of the same two sockets.
    let mut stations = vec![first.host.clone()];
    for n in 1..=10 {
        let mut to = scene.receiver(["a", "b"][n % 2], &[]);
        let from = &mut stations[n - 1];
        scene.send(from, &to.address, &[]).end().expect(0, &[]);
        assert_eq!(to.program.end().code, 0);
        from.await_gone();
        // Out of the way of the guest's next stay there.
        let kept = scene.path(&format!("log.{n}"));
        std::fs::rename(&from.log, &kept).unwrap();
        from.log = kept;
        stations.push(to.host.clone());
        check_beats(&stations.iter().collect::<Vec<_>>());
    }
    check_alive(&stations.iter().collect::<Vec<_>>());
}

#[test]
fn the_result_says_all_and_digests_agree() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.small("a");
    let mut b = scene.receiver("b", &[]);
    let end = scene.send(&a, &b.address, &["--verify"]).end();
    let sent = end.expect(0, &[]).result();
    let there = b.program.end();
    let arrived = there.expect(0, &[]).result();
    assert_eq!(sent["ending"], "moved");
    assert_eq!(sent["memory_bytes"], 32 << 20);
    let digest = sent["digest"].as_str().unwrap();
    assert!(digest.len() == 64 && arrived["digest"] == digest, "{sent} {arrived}");
    for field in ["session", "data_pages", "zero_pages"] {
        assert_eq!(sent[field], arrived[field], "{field}");
    }
    assert_eq!(arrived["name"], "guest");
    let pages = sent["data_pages"].as_u64().unwrap();
    assert!(pages >= (8 << 20) / 4096 && sent["wire_bytes"].as_u64().unwrap() > pages * 4096, "{sent}");
    assert!(sent["passes"].as_u64().unwrap() >= 2 && sent["total_ms"].as_f64().unwrap() > 0.0, "{sent}");
    // The parts of the downtime are all there and add up to no more than the whole.
    let downtime = sent["downtime"].as_object().unwrap();
    let part = |name: &str| downtime[name].as_f64().unwrap();
    let parts = ["pause", "export", "last_pass", "verify", "import", "sync", "ready", "fence", "run"];
    let sum: f64 = parts.iter().map(|p| part(&format!("{p}_ms"))).sum();
    assert!(part("total_ms") > 0.0 && sum <= part("total_ms") + 1.0, "{downtime:?}");
    // Progress came before.
    assert!(end.lines.iter().any(|l| l["event"] == "progress" && l["progress"]["phase"] == "precopy"));
    check_alive(&[&a, &b]);
}

#[test]
fn the_source_is_kept_as_remains_that_do_not_run() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let mut a = scene.small("a");
    let b = scene.receiver("b", &[]);
    scene.send(&a, &b.address, &["--keep-source"]).end().expect(0, &[]);
    check_alive(&[&a, &b]);
    let status = a.status();
    assert!(status.summary.contains("remains"), "{status:?}");
    a.vmctl(&["resume"]).expect(3, &[]);
    a.vmctl(&["resume", "--force"]).expect(3, &[]);
    a.vmctl(&["quit"]).expect(0, &[]);
    assert_eq!(a.program.end().code, 0);
    check_beats(&[&a, &b]);
}

#[test]
fn the_bandwidth_limit_holds_and_can_be_lifted() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.big("a");
    let b = scene.receiver("b", &[]);
    let socket = scene.path("send.sock");
    let mut send = scene.send(&a, &b.address, &["--bwlimit", "1M", "--control", socket.to_str().unwrap()]);
    // 32 MiB at 1 MiB/s: it is still in its first pass when some of it has been sent.
    let progress = send.await_line("some progress", |line| {
        (line["progress"]["sent_bytes"].as_u64()? > 2 << 20).then(|| line["progress"].clone())
    });
    let rate = progress["sent_bytes"].as_f64().unwrap() / progress["elapsed_ms"].as_f64().unwrap() * 1000.0;
    assert!(rate < 2.0 * f64::from(1 << 20), "{rate} bytes a second");
    assert_eq!(progress["settings"]["bandwidth_bytes_per_s"], 1 << 20);
    vmctl(&socket, &["set", "--bwlimit", "0"]).expect(0, &[]);
    send.end().expect(0, &[]);
    assert!(!socket.exists());
    check_alive(&[&a, &b]);
}

#[test]
fn another_guest_than_the_built_in_one() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.vmrun("a", &["--kernel", env!("OTHER_ELF"), "--memory", "64M"]);
    // Each pass over its memory is 128 ticks; on the second it begins to check.
    await_ticks(&[&a], 200);
    let mut b = scene.receiver("b", &[]);
    scene.send(&a, &b.address, &["--verify"]).end().expect(0, &[]);
    assert_eq!(b.program.end().code, 0);
    let moved_at = ticks(&[&a, &b]);
    await_ticks(&[&a, &b], moved_at + 300);
    b.await_running();
}
