//! Takes a microVM in from another host.

fn main() -> std::process::ExitCode {
    vmferry::cli::vmrecv::main()
}
