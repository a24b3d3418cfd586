//! Flags that several programs have, so that they read the same everywhere.

use std::time::Duration;

use clap::Args;

use super::log::LogLevel;
use super::units::duration;

/// Heading of the flags about the connection between the two hosts.
pub const CONNECTION: &str = "Connection";
/// Heading of the flags about what is printed.
pub const OUTPUT: &str = "Output";

/// What `TIME` is, for help and man pages.
pub const TIME: &str = "TIME is a number with its unit, as in 300ms, 2s, 5m or '1m 30s'.";
/// What `RATE` is.
pub const RATE: &str = "RATE is in bytes a second, as in 200M or 1.5G (K, M, G and T are powers of 1024), or in bits a \
                        second, as in 800Mbit or 10Gbit (powers of 1000); 0 is no limit.";
/// What `SIZE` is.
pub const SIZE: &str = "SIZE is in bytes, as in 512M or 2G (K, M, G and T are powers of 1024).";

/// What both movers are told about the other side.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = CONNECTION)]
pub struct PeerArgs {
    /// Allow TCP beyond loopback, without encryption or authentication
    ///
    /// Whoever can read the network then reads the guest's memory, and whoever can write to it
    /// changes it. Without this flag only loopback, unix:, exec: and - are taken.
    #[arg(long)]
    pub insecure: bool,

    /// Take the other side for dead after it was silent for so long
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = duration)]
    pub peer_timeout: Duration,
}

/// What both movers are told about printing.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = OUTPUT)]
pub struct OutputArgs {
    /// Print JSON on standard output, one object a line, the result last
    #[arg(long)]
    pub json: bool,

    /// Print nothing but errors on standard error
    ///
    /// Without it there are a few notes and a closing summary, and on a terminal a progress line.
    #[arg(short, long)]
    pub quiet: bool,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub log: LogArgs,
}

/// How much is told beside the results.
#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = OUTPUT)]
pub struct LogArgs {
    /// Log messages of this level and above on standard error
    #[arg(
        id = "log",
        long = "log",
        value_name = "LEVEL",
        value_enum,
        default_value_t = LogLevel::Warn,
        env = LOG_VARIABLE,
        hide_env_values = true
    )]
    pub level: LogLevel,
}

/// The environment variable that stands for `--log`.
pub const LOG_VARIABLE: &str = "VMFERRY_LOG";
