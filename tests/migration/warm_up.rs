//! What goes ahead of a guest in postcopy. The guest is that of tests/guests/other.S: where a kernel would be it has 10
//! MiB, of which it writes to 8 all the time.

use nix::sys::signal::Signal;

use crate::guest::{await_ticks, ticks};
use crate::hugepages::Pool;
use crate::program::{End, Program};
use crate::proxy::Proxy;
use crate::scene::{Host, Receiver, Scene, Vmrun, binary, kvm, vmctl};

/// Pages of its kernel that are written to; the others are few, and none of them is.
const WRITTEN_PAGES: u64 = 2048;
/// It takes 8 seconds to send them.
const SLOW: &[&str] = &["--mode", "postcopy", "--bwlimit", "1M", "--warm-up", "10m"];

struct Moving {
    a: Vmrun,
    b: Receiver,
    link: Proxy,
    scene: Scene,
}

/// The guest, in small pages: in a huge one all others would be there as well.
fn guest(scene: &Scene) -> Vmrun {
    let a = scene.vmrun("a", &["--kernel", env!("OTHER_ELF"), "--memory", "64M", "--hugepages", "4K"]);
    // Each pass over its memory is 128 ticks; on the second it begins to check.
    await_ticks(&[&a], 200);
    a
}

/// It has moved, and all its memory is right.
#[track_caller]
fn check_whole(hosts: [&Host; 2]) {
    hosts[1].await_running();
    await_ticks(&hosts, ticks(&hosts) + 300);
}

impl Moving {
    fn new() -> Self {
        Self::to(&[])
    }

    /// With arguments for the receiver.
    fn to(args: &[&str]) -> Self {
        let scene = Scene::new();
        let a = guest(&scene);
        let b = scene.receiver("b", args);
        let link = Proxy::to(&b.address);
        Self { a, b, link, scene }
    }

    fn send(&self, args: &[&str]) -> Program {
        self.scene.send(&self.a, &self.link.address, args)
    }

    /// The guest has moved and is whole. Gives how many pages went ahead of it.
    #[track_caller]
    fn check_moved(&mut self, end: &End) -> u64 {
        let result = end.expect(0, &[]).result();
        let arrived = self.b.program.end();
        for count in ["data_pages", "zero_pages"] {
            assert_eq!(result[count], arrived.expect(0, &[]).result()[count], "{count}");
        }
        check_whole([&self.a, &self.b]);
        result["warm_up_pages"].as_u64().unwrap()
    }

    /// The guest has stayed, and nobody logs its pages.
    #[track_caller]
    fn check_stayed(&self) {
        self.a.await_status("no trace of the migration", |s| !s.mover_attached && !s.dirty_log);
        self.a.await_running();
        await_ticks(&[&self.a], ticks(&[&self.a]) + 300);
    }
}

/// Waits until pages go ahead.
fn await_warm_up(send: &mut Program) {
    send.await_line("pages go ahead", |line| {
        let progress = &line["progress"];
        (progress["phase"] == "warm-up" && progress["sent_bytes"].as_u64()? > 0).then_some(())
    });
}

#[test]
fn the_kernel_goes_ahead_and_what_was_written_meanwhile_goes_once_more() {
    if !kvm() {
        return;
    }
    // It takes two seconds, and the guest goes over all its memory meanwhile: that would be in vain.
    let mut slowly = Moving::new();
    let end = slowly.send(&["--mode", "postcopy", "--bwlimit", "4M", "--warm-up", "1m"]).end();
    let kernel = slowly.check_moved(&end);
    assert!((WRITTEN_PAGES..WRITTEN_PAGES + 64).contains(&kernel), "{kernel} pages");
    // It takes a few milliseconds, and there is little of that, where the machine has nothing else to do.
    let mut fast = Moving::new();
    let end = fast.send(&["--mode", "postcopy"]).end();
    let both = fast.check_moved(&end);
    assert!((kernel..=2 * kernel).contains(&both), "{both} pages, of which {kernel} are the kernel's");
}

#[test]
fn the_kernel_goes_ahead_on_the_only_connection_as_well() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let (a, b) = (guest(&scene), scene.host("b"));
    let (control, log) = (b.control.display(), b.log.display());
    let dest = format!("exec:{} --control {control} --serial file:{log} -", binary("vmrecv"));
    let end = scene.send(&a, &dest, &["--mode", "postcopy"]).end();
    let ahead = end.expect(0, &[]).result()["warm_up_pages"].as_u64().unwrap();
    assert!(ahead >= WRITTEN_PAGES, "{ahead} pages");
    check_whole([&a, &b]);
}

#[test]
fn the_kernel_goes_ahead_into_huge_pages() {
    let Some(_pool) = kvm().then(|| Pool::with(64)).flatten() else { return };
    for pages in ["2M", "thp"] {
        let mut moving = Moving::to(&["--hugepages", pages]);
        let end = moving.send(&["--mode", "postcopy"]).end();
        let ahead = moving.check_moved(&end);
        assert!(ahead >= WRITTEN_PAGES, "{ahead} pages");
        assert_eq!(moving.b.status().ram_pages.map(|p| p.to_string()).as_deref(), Some(pages));
    }
}

#[test]
fn nothing_goes_ahead_of_who_has_no_time_for_it() {
    if !kvm() {
        return;
    }
    let mut moving = Moving::new();
    let end = moving.send(&["--mode", "postcopy", "--warm-up", "0s"]).end();
    assert_eq!(moving.check_moved(&end), 0);
}

#[test]
fn it_is_cut_short_by_its_time_by_the_timeout_and_by_the_operator() {
    if !kvm() {
        return;
    }
    for limit in [&["--warm-up", "100ms"][..], &["--warm-up", "10m", "--timeout", "100ms"]] {
        let mut moving = Moving::new();
        let end = moving.send(&[&["--mode", "postcopy", "--bwlimit", "4M"], limit].concat()).end();
        let ahead = moving.check_moved(&end);
        assert!(ahead < WRITTEN_PAGES, "{ahead} pages");
    }
    let mut moving = Moving::new();
    let socket = moving.scene.path("send.sock");
    let mut send = moving.send(&[SLOW, &["--control", socket.to_str().unwrap()]].concat());
    await_warm_up(&mut send);
    vmctl(&socket, &["switch-now"]).expect(0, &[]);
    vmctl(&socket, &["set", "--bwlimit", "0"]).expect(0, &[]);
    let ahead = moving.check_moved(&send.end());
    assert!((1..WRITTEN_PAGES).contains(&ahead), "{ahead} pages");
}

// Rows 3 and 26.
#[test]
fn a_guest_behind_its_kernel_stays_if_that_fails() {
    if !kvm() {
        return;
    }
    let moving = Moving::new();
    let mut send = moving.send(SLOW);
    await_warm_up(&mut send);
    send.signal(Signal::SIGINT);
    send.end().expect(130, &["the source has the guest"]);
    moving.check_stayed();
    let mut send = moving.send(SLOW);
    await_warm_up(&mut send);
    moving.link.cut();
    send.end().expect(5, &["the source has the guest"]);
    moving.check_stayed();
}
