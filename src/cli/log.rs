//! What a program tells beside its results, on standard error.

use clap::ValueEnum;
use tracing::Level;

/// `--log LEVEL`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogLevel {
    /// What went wrong
    Error,
    /// Also what deserves attention
    Warn,
    /// Also what happens
    Info,
    /// Also why
    Debug,
    /// Everything
    Trace,
}

/// Sends everything from `level` up to standard error. Once per process.
pub fn start(level: LogLevel) {
    let level = match level {
        LogLevel::Error => Level::ERROR,
        LogLevel::Warn => Level::WARN,
        LogLevel::Info => Level::INFO,
        LogLevel::Debug => Level::DEBUG,
        LogLevel::Trace => Level::TRACE,
    };
    // A second start (in tests) changes nothing.
    let _ = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .without_time()
        .try_init();
}
