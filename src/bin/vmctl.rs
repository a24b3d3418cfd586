//! Asks and tells a hosted microVM, or a migration under way.

fn main() -> std::process::ExitCode {
    vmferry::cli::vmctl::main()
}
