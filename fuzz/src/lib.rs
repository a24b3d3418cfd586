//! What is fuzzed: each target takes any bytes, gives them to one entrance of the library as whoever
//! is on its other side could, and panics where a promise is broken.
//!
//! libFuzzer calls the targets (`src/bin/fuzz.rs`, scripts/fuzz); the library's own tests call them
//! with every input that was kept. So this file is built twice: here as a library, and as a module of
//! the tests of vmferry (`src/fuzzing.rs`).

#![deny(unsafe_code)]

use std::fs::File;
use std::io::Write;

mod boot;
mod channel;
mod control;
mod frames;
mod import;
pub mod input;
mod messages;
mod postcopy;
mod receiver;
mod sender;
mod state;
mod text;
mod virtio;
mod vmrun;
mod vsock;
mod wire;

/// One entrance that is fuzzed.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name, and that of its folders.
    pub name: &'static str,
    /// The most memory that one input may take on the heap, in MiB, beyond what it has itself.
    pub limit_mib: usize,
    /// Takes an input.
    pub run: fn(&[u8]),
    /// The first inputs, with their names, made by the library itself.
    pub seeds: fn() -> Vec<(String, Vec<u8>)>,
}

/// Every target.
pub const TARGETS: &[Target] = &[
    Target { name: "wire", limit_mib: 16, run: wire::run, seeds: wire::seeds },
    Target { name: "channel", limit_mib: 16, run: channel::run, seeds: channel::seeds },
    Target { name: "receiver", limit_mib: 64, run: receiver::run, seeds: receiver::seeds },
    Target { name: "sender", limit_mib: 64, run: sender::run, seeds: sender::seeds },
    Target { name: "postcopy", limit_mib: 4, run: postcopy::run, seeds: postcopy::seeds },
    Target { name: "state", limit_mib: 16, run: state::run, seeds: state::seeds },
    Target { name: "import", limit_mib: 64, run: import::run, seeds: import::seeds },
    Target { name: "control", limit_mib: 32, run: control::run, seeds: control::seeds },
    Target { name: "boot", limit_mib: 8, run: boot::run, seeds: boot::seeds },
    Target { name: "virtio", limit_mib: 8, run: virtio::run, seeds: virtio::seeds },
    Target { name: "vsock", limit_mib: 64, run: vsock::run, seeds: vsock::seeds },
    Target { name: "text", limit_mib: 4, run: text::run, seeds: text::seeds },
];

/// The target of that name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|t| t.name == name)
}

/// A file with that in it, as long as it is open.
fn kept(bytes: &[u8]) -> File {
    let mut file =
        vmferry::sys::memfd::create_sealed(c"fuzz", bytes.len() as u64).expect("a memfd can be made");
    file.write_all(bytes).expect("it has room");
    file
}
