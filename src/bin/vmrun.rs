//! Boots and hosts one microVM.

fn main() -> std::process::ExitCode {
    vmferry::cli::vmrun::main()
}
