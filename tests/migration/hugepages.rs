//! Huge pages: guests move between hosts with and without them; too few are a refusal.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};

use nix::fcntl::{Flock, FlockArg};

use vmferry::wire::FrameType;

use crate::guest::{check_alive, check_beats};
use crate::postcopy::{Pair, check_answers, check_result, check_whole, lacks_pages};
use crate::proxy::Way;
use crate::recovery::{registered, userfaultfds};
use crate::scene::{Host, Receiver, Scene, kvm, skip};

const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// More huge pages while this lives; one test at a time has them. A process of its own gives them back
/// when this is gone, also where the test was killed.
pub struct Pool {
    guard: Child,
    /// Its end is what the guard waits for.
    alive: Option<ChildStdin>,
    _lock: Flock<File>,
}

/// Waits for the end of its input, then gives the huge pages back. Its standard output is the lock, so
/// that nobody else takes the pool before that.
const GIVE_BACK: &str = "trap '' INT TERM HUP; read -r _; echo \"$1\" > \"$0\"";

impl Pool {
    pub fn with(pages: u64) -> Option<Self> {
        let file = File::create(std::env::temp_dir().join("vmferry-hugepages.lock")).ok()?;
        let lock = Flock::lock(file, FlockArg::LockExclusive).ok()?;
        let before = fs::read_to_string(POOL).unwrap_or_default().trim().to_owned();
        let wanted = before.parse::<u64>().unwrap_or(0) + pages;
        let mut guard = Command::new("sh");
        guard.args(["-c", GIVE_BACK, POOL, &before]).stdin(Stdio::piped()).stderr(Stdio::null());
        // In a group of its own: what ends the test's group must not end it.
        let mut guard = guard.stdout(lock.try_clone().ok()?).process_group(0).spawn().ok()?;
        let pool = Self { alive: guard.stdin.take(), guard, _lock: lock };
        let written = fs::write(POOL, wanted.to_string()).is_ok();
        let have = fs::read_to_string(POOL).unwrap_or_default().trim().parse::<u64>().unwrap_or(0);
        (written && have >= wanted || skip(&format!("{POOL} cannot be raised to {wanted}"))).then_some(pool)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.alive = None;
        let _ = self.guard.wait();
    }
}

// Whatever becomes of the test: what the guard waits for is closed with it.
#[test]
fn huge_pages_are_given_back() {
    let Some(mut pool) = Pool::with(1) else { return };
    let raised: u64 = fs::read_to_string(POOL).unwrap().trim().parse().unwrap();
    pool.alive = None;
    assert!(pool.guard.wait().unwrap().success());
    assert_eq!(fs::read_to_string(POOL).unwrap().trim().parse(), Ok(raised - 1));
}

/// A guest of `from` pages moves to a receiver told `to`, whose memory then is of `pages`.
fn moves(from: &str, to: &[&str], pages: &str) {
    let Some(_pool) = kvm().then(|| Pool::with(64)).flatten() else { return };
    let scene = Scene::new();
    let a = scene.guest_of(from, "a", "64M", 1, "fill=24M ws=4M rate=10 pattern=zero");
    check_alive(&[&a]);
    let mut b = scene.receiver("b", to);
    scene.send(&a, &b.address, &["--verify"]).end().expect(0, &[]);
    b.program.end().expect(0, &[]);
    check_alive(&[&a, &b]);
    assert_eq!(b.status().ram_pages.map(|p| p.to_string()).as_deref(), Some(pages));
}

#[test]
fn huge_pages_stay_huge_pages() {
    moves("2M", &[], "2M");
}

#[test]
fn from_huge_pages_to_small_ones() {
    moves("2M", &["--hugepages", "4K"], "4K");
}

#[test]
fn from_small_pages_to_huge_ones() {
    moves("4K", &["--hugepages", "2M"], "2M");
}

#[test]
fn transparent_ones_are_asked_for_again() {
    moves("thp", &[], "thp");
}

#[test]
fn too_few_huge_pages_are_a_refusal() {
    let Some(_pool) = kvm().then(|| Pool::with(0)).flatten() else { return };
    let scene = Scene::new();
    let a = scene.small("a");
    let b = scene.receiver("b", &["--hugepages", "2M"]);
    scene.send(&a, &b.address, &[]).end().expect(3, &["16 free huge pages", "nr_hugepages"]);
    check_beats(&[&a]);
    assert!(b.is_empty());
}

/// A guest with memory of `from` moves to a receiver told `to`, where its pages follow it into memory of
/// `pages`.
fn follows(from: &str, to: &[&str], pages: &str, args: &[&str]) {
    let Some(_pool) = kvm().then(|| Pool::with(64)).flatten() else { return };
    let scene = Scene::new();
    let mut a = scene.guest_of(from, "a", "64M", 2, "fill=24M ws=8M rate=20 order=random place=spread");
    let mut b = scene.receiver("b", to);
    check_result(&scene.send(&a, &b.address, args).end());
    b.program.end().expect(0, &[]);
    a.program.end().expect(0, &["migrated to"]);
    check_whole(&[&a, &b]);
    let status = b.status();
    assert_eq!(status.ram_pages.map(|p| p.to_string()).as_deref(), Some(pages));
    // Nothing of the fault handling is left.
    assert_eq!((registered(status.pid), userfaultfds(status.pid)), (0, 0));
}

const POSTCOPY: &[&str] = &["--mode", "postcopy", "--bwlimit", "8M"];
const HYBRID: &[&str] = &["--mode", "hybrid", "--bwlimit", "10M", "--downtime", "20ms"];

#[test]
fn huge_pages_follow_the_guest() {
    follows("2M", &[], "2M", POSTCOPY);
}

#[test]
fn small_pages_follow_the_guest_out_of_huge_ones() {
    follows("2M", &["--hugepages", "4K"], "4K", POSTCOPY);
}

#[test]
fn small_pages_follow_the_guest_into_huge_ones() {
    follows("4K", &["--hugepages", "2M"], "2M", POSTCOPY);
}

#[test]
fn transparent_ones_follow_the_guest() {
    follows("thp", &[], "thp", POSTCOPY);
}

// What was sent before the switchover and not written to since stays, within one huge page.
#[test]
fn huge_pages_of_which_a_part_is_stale() {
    follows("2M", &[], "2M", HYBRID);
}

#[test]
fn transparent_ones_of_which_a_part_is_stale() {
    follows("thp", &[], "thp", HYBRID);
}

// What goes ahead goes page by page, and the import asks for the rest of the huge pages that it touches: one
// request for each, and for no others.
#[test]
fn the_import_waits_for_few_huge_pages() {
    let Some(_pool) = kvm().then(|| Pool::with(64)).flatten() else { return };
    let mut pair = Pair::of("2M", "kvmclock=1");
    let ready = pair.link.hold(Way::ToSource, FrameType::Ready);
    let mut send = pair.scene.send(&pair.a, &pair.link.address, &["--mode", "postcopy"]);
    let ready = ready.caught();
    let requests = pair.link.passed(Way::ToSource, FrameType::PageRequest);
    assert!(requests <= 4, "{requests} requests before READY");
    ready.pass();
    send.end().expect(0, &[]);
    pair.check_moved();
}

#[test]
fn the_link_is_cut_while_huge_pages_follow() {
    let Some(_pool) = kvm().then(|| Pool::with(64)).flatten() else { return };
    let mut pair = Pair::of("2M", "");
    let mut send = pair.in_postcopy();
    for cut in 1..=3 {
        let frame = pair.link.hold(Way::ToDest, FrameType::Pages).caught();
        assert!(lacks_pages(&check_answers(&pair.b)), "too late for cut {cut}");
        pair.link.cut();
        frame.lose();
        pair.link.heal();
    }
    send.end().expect(0, &[]);
    pair.check_moved();
}

#[test]
fn the_receiver_is_killed_while_huge_pages_follow() {
    let Some(_pool) = kvm().then(|| Pool::with(64)).flatten() else { return };
    let mut pair = Pair::of("2M", "");
    let mut send = pair.in_postcopy();
    for _ in 0..2 {
        // In the middle of some huge page.
        let missing = check_answers(&pair.b).missing_pages.unwrap();
        pair.b.await_status("pages come", |s| s.missing_pages.unwrap_or(0) < missing);
        pair.b.program.crash();
        assert!(lacks_pages(&check_answers(&pair.b)));
        send.await_note("the connection is lost");
        pair.resume_receiver();
        pair.b.program.await_note("has come back");
    }
    send.end().expect(0, &[]);
    pair.check_moved();
}

#[test]
fn huge_pages_follow_there_and_back() {
    let Some(_pool) = kvm().then(|| Pool::with(64)).flatten() else { return };
    let mut pair = Pair::of("2M", "");
    let end = pair.in_postcopy().end();
    // Holes stay out of it.
    let pages = end.expect(0, &[]).result()["postcopy_pages"].as_u64().unwrap();
    assert!(pages < (64 << 20) / 4096, "{pages} pages were owed");
    pair.check_moved();
    let Pair { a, b, scene, .. } = pair;
    // Out of the way of the guest's next stay there.
    let first = Host { log: scene.path("log.1"), ..a.host.clone() };
    fs::rename(&a.log, &first.log).unwrap();
    let mut back: Receiver = scene.receiver("a", &[]);
    check_result(&scene.send(&b, &back.address, POSTCOPY).end());
    back.program.end().expect(0, &[]);
    check_whole(&[&first, &b, &back]);
}
