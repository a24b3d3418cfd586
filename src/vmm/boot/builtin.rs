//! The guest that comes with the program.

/// The trial guest, `--kernel builtin:heartbeat`: a static x86_64 ELF with a PVH entry note.
///
/// It fills memory, dirties a working set at a set rate, checks every page it visits and prints a
/// heartbeat on the first serial port. `guest/README.md` has its parameters, which it takes from
/// the command line, and its output. `build.rs` compiles it from `guest/`.
pub const HEARTBEAT_ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/heartbeat.elf"));
