//! Telling without waiting.

use std::time::Instant;

use super::{Client, ClientError};
use crate::control::{MoverReport, Request};

impl Client {
    /// `report`: tells where a mover stands, without waiting for the answer: a `vmrun` that is stopped
    /// must not hold up its mover. One report at a time is under way; false when the one before has not
    /// been answered, and this one was not sent.
    pub fn report(&mut self, report: &MoverReport) -> Result<bool, ClientError> {
        // What has come meanwhile; an answer among it is that of the report before.
        while self.reported.is_some()
            && let Some(line) = self.line(Some(Instant::now()), "report")?
        {
            if let Some(answer) = self.sort(&line)? {
                self.reader.take_fds(answer.fds);
            }
        }
        if self.reported.is_some() {
            return Ok(false);
        }
        let id = self.next_id;
        self.next_id += 1;
        self.send(id, &Request::Report { report: Box::new(report.clone()) }, &[])?;
        self.reported = Some(id);
        Ok(true)
    }
}
