//! Huge pages: guests move between hosts with and without them; too few are a refusal.

use std::fs::{self, File};

use nix::fcntl::{Flock, FlockArg};

use crate::guest::{check_alive, check_beats};
use crate::scene::{Scene, kvm, skip};

const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// More huge pages while this lives; one test at a time has them.
struct Pool {
    before: String,
    _lock: Flock<File>,
}

impl Pool {
    fn with(pages: u64) -> Option<Self> {
        let file = File::create(std::env::temp_dir().join("vmferry-hugepages.lock")).ok()?;
        let lock = Flock::lock(file, FlockArg::LockExclusive).ok()?;
        let before = fs::read_to_string(POOL).unwrap_or_default();
        let pool = Self { before: before.trim().to_owned(), _lock: lock };
        let wanted = pool.before.parse::<u64>().unwrap_or(0) + pages;
        let written = fs::write(POOL, wanted.to_string()).is_ok();
        let have = fs::read_to_string(POOL).unwrap_or_default().trim().parse::<u64>().unwrap_or(0);
        (written && have >= wanted || skip(&format!("{POOL} cannot be raised to {wanted}"))).then_some(pool)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = fs::write(POOL, &self.before);
    }
}

/// A guest of `from` pages moves to a receiver told `to`, whose memory then is of `pages`.
fn moves(from: &str, to: &[&str], pages: &str) {
    let Some(_pool) = kvm().then(|| Pool::with(64)).flatten() else { return };
    let scene = Scene::new();
    let a = scene.vmrun(
        "a",
        &[
            "--kernel",
            "builtin:heartbeat",
            "--memory",
            "64M",
            "--hugepages",
            from,
            "--cmdline",
            "fill=24M ws=4M rate=10 beat=5 status=50 pattern=zero",
        ],
    );
    a.await_running();
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
