//! All targets under libFuzzer; the variable `FUZZ_TARGET` says which. With `FUZZ_SEEDS` instead, the
//! first inputs of every target are written to that folder, and the targets named. scripts/fuzz runs it.
//!
//! Besides what libFuzzer sees (crashes, time-outs, the size of the process), an input fails that
//! takes more memory on the heap than its target allows.

#![no_main]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::path::Path;
use std::process::exit;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use libfuzzer_sys::fuzz_target;
use nix::sys::signal::{SigHandler, Signal, signal};
use vmferry_fuzz::{TARGETS, Target, target};

static TARGET: OnceLock<Target> = OnceLock::new();
/// Bytes on the heap.
static LIVE: AtomicUsize = AtomicUsize::new(0);
/// How many they may be.
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

struct Counting;

#[global_allocator]
static HEAP: Counting = Counting;

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        if live > LIMIT.load(Ordering::Relaxed) {
            // What tells of it needs memory too; libFuzzer's hook ends the process after that.
            LIMIT.store(usize::MAX, Ordering::Relaxed);
            panic!("{} bytes more make {live} on the heap: more than this target may have", layout.size());
        }
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

fn write_seeds(folder: &Path) -> std::io::Result<()> {
    for target in TARGETS {
        println!("{}", target.name);
        let into = folder.join(target.name);
        fs::create_dir_all(&into)?;
        for (name, bytes) in (target.seeds)() {
            fs::write(into.join(name), bytes)?;
        }
    }
    Ok(())
}

fuzz_target!(
    init: {
        // As in every Rust program; here `main` is libFuzzer's.
        // SAFETY: nothing is called by ignoring a signal.
        unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) }.expect("a signal can be ignored");
        if let Some(folder) = std::env::var_os("FUZZ_SEEDS") {
            write_seeds(Path::new(&folder)).expect("the seeds can be written");
            exit(0);
        }
        let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
        let Some(target) = target(&name) else {
            eprintln!("FUZZ_TARGET={name} is no target");
            exit(2);
        };
        let _ = TARGET.set(*target);
    },
    |data: &[u8]| {
        let Some(target) = TARGET.get() else { return };
        LIMIT.store(LIVE.load(Ordering::Relaxed) + (target.limit_mib << 20), Ordering::Relaxed);
        (target.run)(data);
        LIMIT.store(usize::MAX, Ordering::Relaxed);
    }
);
