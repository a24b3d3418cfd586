//! See `vmferry::cli::vmrecv`.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    vmferry::cli::vmrecv::run(&vmferry::cli::vmrecv::Args::parse())
}
