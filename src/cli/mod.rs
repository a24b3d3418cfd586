//! The command lines: flags and units, exit codes, what is printed. Each program's `main` is here,
//! so that the binaries only call it.

pub mod confine;
pub mod exit;
pub mod flags;
pub mod log;
pub mod manual;
pub mod output;
pub mod progress;
pub mod status;
pub mod summary;
pub mod units;
pub mod vmctl;
pub mod vmrecv;
pub mod vmrun;
pub mod vmsend;
