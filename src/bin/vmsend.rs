//! See `vmferry::cli::vmsend`.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    vmferry::cli::vmsend::run(&vmferry::cli::vmsend::Args::parse())
}
