//! Shared flags and units, progress line, JSON events, exit codes.

pub mod progress;
pub mod vmrecv;
pub mod vmsend;

use serde::Serialize;

use crate::migrate::outcome::{Ending, MigrateError, Side};
use crate::state::Problem;

/// A failure as the last JSON line has it.
#[derive(Serialize)]
pub struct FailureReport<'a> {
    ending: Ending,
    side: Side,
    cause: &'a str,
    problems: &'a [Problem],
}

/// What `error` is in JSON.
pub fn failure(error: &MigrateError) -> FailureReport<'_> {
    FailureReport { ending: error.ending, side: error.side, cause: &error.cause, problems: &error.problems }
}
