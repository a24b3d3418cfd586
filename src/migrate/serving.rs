//! After a postcopy switchover: the source serves pages until the destination has them all, over as
//! many connections as it takes.

use std::sync::Arc;
use std::time::Instant;

use crate::memory::PageSet;
use crate::switchover::SourceInput;
use crate::wire::{Done, FrameType, Message, PageBitmap};

use super::handover::{Handover, TICK};
use super::link::Event;
use super::outcome::{Ending, MigrateError, Side, here};
use super::postcopy::server::PageServer;

/// What the destination has said of its pages on the connection that stands.
#[derive(Debug, Default)]
pub(super) struct Heard {
    /// It has said, coming back, that pages are missing.
    pub fetching: bool,
    /// The parts of the set of pages that it has.
    pub received: Vec<PageBitmap>,
    /// Pages that were asked for before anybody could answer.
    pub requests: Vec<u64>,
    /// It has everything.
    pub done: Option<Done>,
}

impl Handover<'_, '_> {
    /// Whether the guest runs at the destination without all its pages.
    pub(super) fn owes(&self) -> bool {
        self.heard.fetching || (self.migration.server.is_some() && !self.migration.hello.resume)
    }

    /// Sends what is owed until the destination has said that nothing is missing.
    pub(super) fn serve(&mut self) -> Result<(), MigrateError> {
        self.migration.phase = "postcopy";
        if !self.heard.fetching {
            self.push()?;
        }
        let mut shown = Instant::now();
        loop {
            if let Some(done) = self.heard.done.take() {
                self.migration.latency = done.latency;
                return Ok(());
            }
            if self.heard.fetching && self.begin_again()? {
                self.heard.fetching = false;
            }
            let mut lost = None;
            match self.migration.inbox.recv_timeout(TICK) {
                Ok(Event::Main(epoch, message)) if epoch == self.migration.attempt.epoch => {
                    self.hear(message)?
                }
                Ok(Event::Lost(epoch, why)) if epoch == self.migration.attempt.epoch => {
                    lost = Some(why);
                }
                _ => {}
            }
            if let Some(why) = lost
                && !self.come_back(&why)?
            {
                return Ok(());
            }
            if self.migration.settings.refuse_cancel().is_some() {
                let text = "too late to cancel: the guest runs at the destination and needs its pages";
                self.migration.observer.note(text);
            }
            if shown.elapsed() >= TICK * 2 {
                shown = Instant::now();
                let left = self.migration.server.as_ref().map_or(0, |s| s.left());
                self.migration.tick_now(0, left);
                if let Some(link) = &self.migration.link {
                    link.set_rate(self.migration.settings.bandwidth_limit());
                }
            }
        }
    }

    fn hear(&mut self, message: Message) -> Result<(), MigrateError> {
        match message {
            Message::Done(done) => self.heard.done = Some(done),
            Message::Received(part) => self.heard.received.push(part),
            // Said before the connection could serve; by now it may.
            Message::PageRequest(pages) if !self.heard.fetching => {
                if let Some(link) = &self.migration.link {
                    let _ = link.answer(&pages);
                }
            }
            Message::PageRequest(pages) => self.heard.requests.extend(pages),
            Message::Abort(abort) => {
                return Err(MigrateError::new(Ending::Lost, Side::Destination, abort.reason));
            }
            // RUNNING comes again with each connection.
            _ => {}
        }
        Ok(())
    }

    /// Starts the background push on the connection that stands.
    fn push(&mut self) -> Result<(), MigrateError> {
        let m = &*self.migration;
        match (&m.link, &m.server, &m.bulk) {
            (Some(link), Some(server), Some(bulk)) => link.start_push(server, bulk, &m.events),
            _ => Err(here("there is no connection to send pages on")),
        }
    }

    /// The connection is gone: a new one, for as long as it takes. `false` when the destination has
    /// everything meanwhile.
    fn come_back(&mut self, why: &str) -> Result<bool, MigrateError> {
        self.migration
            .observer
            .note(&format!("the connection is lost ({why}); the guest goes on as far as it has its pages"));
        if let Some(link) = self.migration.link.take() {
            link.cut();
        }
        self.reconnect(None)?;
        self.migration.phase = "postcopy";
        match self.follow_up.pop() {
            Some(SourceInput::Running) => Ok(self.heard.fetching),
            // It has said RUNNING before: nothing else is true of the guest's own receiver.
            _ => Err(MigrateError::new(
                Ending::Unknown,
                Side::Destination,
                "the destination ran the guest, and says now that it does not",
            )),
        }
    }

    /// Once RECEIVED is whole: opens the channels anew and sends what is missing. `false`: not yet.
    fn begin_again(&mut self) -> Result<bool, MigrateError> {
        let Some(bulk) = self.migration.bulk.clone() else {
            return Err(here("the guest's RAM is not at hand"));
        };
        let total = bulk.views.ram().map().total_pages();
        let heard: usize = self.heard.received.iter().map(|part| part.words.len()).sum();
        if (heard as u64) < total.div_ceil(64) {
            return Ok(false);
        }
        let mut words = vec![0; total.div_ceil(64) as usize];
        for part in std::mem::take(&mut self.heard.received) {
            part.put_into(FrameType::Received, &mut words)
                .map_err(|e| MigrateError::new(Ending::Resumable, Side::Destination, e))?;
        }
        let mut owed = PageSet::full(total);
        owed.subtract(&PageSet::from_words(words, total));
        self.migration.observer.note(&format!("going on: {} pages are missing", owed.count()));
        let server = Arc::new(PageServer::new(&owed));
        self.migration.server = Some(server.clone());
        let requests = std::mem::take(&mut self.heard.requests);
        let m = &mut *self.migration;
        let Some(link) = &mut m.link else { return Ok(false) };
        // A connection that breaks here is noticed by its reader, and comes back like any other.
        if let Err(error) = link.open_channels(m.options, &m.hello) {
            let _ = m.events.send(Event::Lost(m.attempt.epoch, error.cause));
            return Ok(true);
        }
        link.serve(&server, &bulk);
        let _ = link.answer(&requests);
        self.push()?;
        Ok(true)
    }

    /// The operator's time for reconnecting is over.
    pub(super) fn interrupted(&self, why: &str) -> MigrateError {
        MigrateError::new(
            Ending::Resumable,
            Side::Link,
            format!(
                "the guest runs at the destination, which cannot be reached ({why}) and lacks pages: \
                 `vmsend --resume --vm {}` goes on",
                self.migration.options.vm.display()
            ),
        )
    }
}
