//! The end on the source's side: both sides compare what was sent with what has come, and the source
//! lets its copy go.

use std::time::{Duration, Instant};

use crate::wire::{self, Message};

use super::handover::{Handover, TICK};
use super::link::Event;
use super::outcome::{MigrateError, Summary};
use super::wires::FAREWELL;

/// How long `vmrun` may take to let its copy go: before that the dirty log is turned off, and on a host whose
/// CPUs are all busy with guests KVM takes over ten seconds for it at times. Nobody waits for this but us.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(60);

impl Handover<'_, '_> {
    /// The destination runs: both sides compare their counts, and the source lets go.
    pub(super) fn take_leave(&mut self) -> Result<Summary, MigrateError> {
        let m = &mut *self.migration;
        m.phase = "done";
        let (pages, zero_pages) = m.bulk.as_ref().map(|b| b.counters.get()).unwrap_or_default();
        m.say(&Message::Done(wire::Done { pages, zero_pages, digest: m.digest.clone(), latency: None }));
        let theirs = self.await_done();
        let m = &mut *self.migration;
        if let Some(theirs) = theirs
            && m.bulk.is_some()
            && !m.hello.resume
            && (theirs.pages, theirs.zero_pages) != (pages, zero_pages)
        {
            m.observer.note(&format!(
                "the counts differ: {pages} + {zero_pages} pages were sent, {} + {} placed",
                theirs.pages, theirs.zero_pages
            ));
        }
        let summary = m.summary();
        if let Some(bulk) = &m.bulk {
            bulk.queue.stop();
        }
        m.vm.client.set_timeout(RELEASE_TIMEOUT);
        let released = m.vm.client.release(m.attempt, m.options.keep_source);
        match released {
            Err(error) if !error.is_disconnect() => {
                m.observer.note(&format!("the source vmrun was not released: {error}"));
                self.close_link();
            }
            // A vmrun that is gone holds nothing either.
            Ok(_) | Err(_) => self.part(),
        }
        Ok(summary)
    }

    /// The last word: nobody will come back for this guest. Hung up once it has been read.
    fn part(&mut self) {
        let Some(link) = self.migration.link.take() else { return };
        let _ = link.send(&Message::Released);
        link.close();
        let (epoch, until) = (self.migration.attempt.epoch, Instant::now() + FAREWELL);
        loop {
            match self.migration.inbox.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Event::Lost(e, _)) if e == epoch => return,
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }

    /// The receiver's DONE, if it comes: the guest runs there whether or not it does.
    fn await_done(&mut self) -> Option<wire::Done> {
        let until = Instant::now() + self.migration.options.peer_timeout;
        while Instant::now() < until {
            match self.migration.inbox.recv_timeout(TICK) {
                Ok(Event::Main(_, Message::Done(done), _)) => return Some(done),
                Ok(Event::Lost(..)) => {
                    self.close_link();
                    return None;
                }
                _ => {}
            }
        }
        None
    }
}
