//! Moves a running microVM to another host.

fn main() -> std::process::ExitCode {
    vmferry::cli::vmsend::main()
}
