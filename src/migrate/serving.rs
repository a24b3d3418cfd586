//! After a postcopy switchover: the source serves pages until the destination has them all, over as
//! many connections as it takes.

use std::sync::Arc;
use std::time::Instant;

use crate::switchover::SourceInput;
use crate::wire::Message;

use super::handover::{Handover, TICK};
use super::link::Event;
use super::outcome::{Ending, MigrateError, Side, here};
use super::postcopy::heard::Beginning;
use super::postcopy::owed::Owed;
use super::postcopy::server::PageServer;
use super::told::LinkDown;

impl Handover<'_, '_> {
    /// Whether the guest runs at the destination without all its pages.
    pub(super) fn owes(&self) -> bool {
        self.heard.is_fetching() || (self.migration.server.is_some() && !self.migration.hello.resume)
    }

    /// Sends what is owed until the destination has said that nothing is missing.
    pub(super) fn serve(&mut self) -> Result<(), MigrateError> {
        self.migration.phase = "postcopy";
        self.migration.moved = true;
        if !self.heard.is_fetching() {
            self.push()?;
        }
        let (mut shown, mut has_vmrun) = (Instant::now(), true);
        loop {
            if let Some(done) = self.done.take() {
                self.migration.latency = done.latency;
                return self.believe();
            }
            let whole = self.heard.whole();
            if let Some(beginning) =
                whole.map_err(|why| MigrateError::new(Ending::Resumable, Side::Destination, why))?
            {
                self.begin_again(beginning)?;
            }
            let mut lost = None;
            match self.migration.inbox.recv_timeout(TICK) {
                Ok(Event::Main(epoch, message, _)) if epoch == self.migration.attempt.epoch => {
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
                return self.believe();
            }
            if self.migration.settings.refuse_cancel().is_some() {
                let text = "too late to cancel: the guest runs at the destination and needs its pages";
                self.migration.observer.note(text);
            }
            if shown.elapsed() >= TICK * 2 {
                shown = Instant::now();
                if std::mem::replace(&mut has_vmrun, self.migration.vm.client.is_alive()) && !has_vmrun {
                    let text = "the source's vmrun is gone; the guest's memory is still open here, and nowhere else: \
                                if this vmsend ends too, what has not been sent is lost";
                    self.migration.observer.note(text);
                }
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
            Message::Done(done) => self.done = Some(done),
            Message::Received(part) => self.heard.received(&part),
            Message::PageRequest(pages) => {
                // Said before the connection could serve; by now it may.
                let pages = self.heard.requested(pages);
                if let Some(link) = &self.migration.link {
                    let _ = link.answer(&pages);
                }
            }
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
        self.migration.link_down = Some(LinkDown::now(why));
        if let Some(link) = self.migration.link.take() {
            link.cut();
        }
        self.reconnect(None)?;
        self.migration.phase = "postcopy";
        match self.follow_up.pop() {
            Some(SourceInput::Running) => Ok(self.heard.is_fetching()),
            // It has said RUNNING before: nothing else is true of the guest's own receiver.
            _ => Err(MigrateError::new(
                Ending::Unknown,
                Side::Destination,
                "the destination ran the guest, and says now that it does not",
            )),
        }
    }

    /// The destination says that nothing is missing: it must not be so, while there are pages that were
    /// never sent. Whoever says that does not get the guest's last whole copy released.
    fn believe(&self) -> Result<(), MigrateError> {
        match self.migration.server.as_ref().map_or(0, |server| server.unsent()) {
            0 => Ok(()),
            pages => Err(self.lied("every page", pages)),
        }
    }

    fn lied(&self, what: &str, pages: u64) -> MigrateError {
        let vm = self.migration.options.vm.display();
        let cause = format!(
            "the destination says that it has {what}, and {pages} of these were never sent: the source keeps the guest's \
             memory, and `vmsend --resume --vm {vm}` asks again"
        );
        MigrateError::new(Ending::Resumable, Side::Destination, cause)
    }

    /// Opens the channels anew and sends what is missing.
    fn begin_again(&mut self, beginning: Beginning) -> Result<(), MigrateError> {
        let before = self.migration.server.as_ref().map(|s| s.owed_now());
        match before.as_ref().map_or(0, |before| before.unsent_of(&beginning.received)) {
            0 => {}
            pages => return Err(self.lied("pages", pages)),
        }
        let m = &mut *self.migration;
        let Some(bulk) = m.bulk.clone() else { return Err(here("the guest's RAM is not at hand")) };
        let owed = Owed::anew(&beginning.received, before);
        m.observer.note(&format!("going on: {} pages are missing", owed.left()));
        m.postcopy_pages.get_or_insert(owed.left());
        let server = Arc::new(PageServer::new(owed));
        m.server = Some(server.clone());
        let Some(link) = &mut m.link else { return Ok(()) };
        // A connection that breaks here is noticed by its reader, and comes back like any other.
        if let Err(error) = link.open_channels(m.options, &m.hello) {
            let _ = m.events.send(Event::Lost(m.attempt.epoch, error.cause));
            return Ok(());
        }
        link.serve(&server, &bulk);
        let _ = link.answer(&beginning.requests);
        self.push()
    }
}
