//! Loading: the machine, the ends of passes, the end of it all, the import.

use std::sync::Arc;
use std::time::Instant;

use crate::control::{ClientError, FailureCode, Imported};
use crate::memory::PAGE_BYTES;
use crate::migrate::host;
use crate::migrate::outcome::{Ending, MigrateError, Side};
use crate::migrate::placer::Placer;
use crate::state::MachineDescription;
use crate::switchover::{DestInput, DestStep};
use crate::wire::{self, Message, Refused, RefusedCode};

use super::{Arrival, Event, PassBegan};

impl Arrival<'_> {
    /// Has `vmrun` make itself the machine that the source describes, or names what is in the way.
    pub(super) fn make_machine(&mut self, body: &wire::JsonBody) -> Result<(), MigrateError> {
        let machine: MachineDescription = match body.parse() {
            Ok(machine) => machine,
            Err(error) => return self.fail(error),
        };
        let Some(session) = &mut self.session else { return Ok(()) };
        if session.machine().is_some() {
            return self.fail("MACHINE came twice");
        }
        // Connected now, while the guest runs elsewhere.
        let importer = self.host.second();
        let prepared = self.host.prepare(session.attempt, &machine, session.hello.wants_postcopy());
        match prepared.and_then(|ram| Ok((ram, importer?))) {
            Ok((ram, importer)) => {
                session.importer = Some(importer);
                let _ = session.placer.set(Some(Placer::new(Arc::new(ram))));
                self.say(&Message::Accepted)
            }
            Err(error) => {
                let failure = error.failure();
                let unsuitable = failure.is_some_and(|f| f.code == FailureCode::Unsuitable);
                let refused = Refused {
                    code: if unsuitable { RefusedCode::Unsuitable } else { RefusedCode::Failed },
                    message: error.to_string(),
                    problems: failure.map(|f| f.problems.clone()).unwrap_or_default(),
                };
                let ending = if unsuitable { Ending::Unsuitable } else { Ending::Failed };
                let mut ours = MigrateError::new(ending, Side::Destination, &refused.message);
                ours.problems.clone_from(&refused.problems);
                let _ = self.say(&Message::Refused(refused));
                self.drop_session();
                Err(ours)
            }
        }
    }

    /// One channel has ended a pass; when all have, the source may go on (D3).
    pub(super) fn on_barrier(&mut self, pass: u32) -> Result<(), MigrateError> {
        let Some(session) = &mut self.session else { return Ok(()) };
        // One pass at a time: the source waits for PASS_DONE.
        let channels = match session.ending_pass {
            None => 1,
            Some((open, channels)) if open == pass => channels + 1,
            Some((open, _)) => {
                return self.fail(format!("BARRIER of pass {pass} came before pass {open} was over"));
            }
        };
        if channels < session.hello.channels.max(1) {
            session.ending_pass = Some((pass, channels));
            return Ok(());
        }
        session.ending_pass = None;
        let (data_pages, zero_pages) = session.machine().map(Placer::counts).unwrap_or_default();
        let before = std::mem::replace(
            &mut session.pass_began,
            PassBegan { data_pages, zero_pages, at: Instant::now() },
        );
        let data = data_pages - before.data_pages;
        let done = wire::PassDone {
            pass,
            pages_placed: data + zero_pages - before.zero_pages,
            bytes: data * PAGE_BYTES,
            elapsed_us: before.at.elapsed().as_micros() as u64,
        };
        self.say(&Message::PassDone(done))
    }

    /// Everything is here: counts and digest are compared, then the import starts.
    pub(super) fn on_end(&mut self, end: &wire::End) -> Result<(), MigrateError> {
        let Some(session) = &mut self.session else { return Ok(()) };
        session.stays_paused = end.stays_paused;
        let (Some(placer), Some(state)) =
            (session.placer.get().and_then(Option::as_ref), session.state.take())
        else {
            return self.fail("END before the machine and its state");
        };
        let counts = placer.counts();
        // In postcopy a page that was never told is missing, or a hole of the source's.
        let never_told = if end.postcopy { 0 } else { placer.missing() };
        if counts != (end.pages, end.zero_pages) || never_told > 0 {
            let why = format!(
                "pages are missing: the source sent {} and {} zero pages, {} and {} were placed; {} were never told",
                end.pages, end.zero_pages, counts.0, counts.1, never_told
            );
            return self.fail(why);
        }
        if let Some(theirs) = &end.digest {
            match placer.ram().digest() {
                Ok(ours) if ours == *theirs => session.digest = Some(ours),
                Ok(ours) => {
                    return self
                        .fail(format!("the digests of RAM differ: source {theirs}, destination {ours}"));
                }
                Err(error) => return self.fail(error),
            }
        }
        if let Err(error) = if end.postcopy { self.page(&end.ahead) } else { self.disarmed() } {
            return self.fail(error);
        }
        let Some(session) = &mut self.session else { return Ok(()) };
        let Some(client) = session.importer.take() else { return self.fail("END before the machine") };
        let (events, attempt) = (self.events.clone(), session.attempt);
        std::thread::spawn(move || {
            let _ = events.send(Event::Imported(attempt, host::import(client, attempt, &state)));
        });
        Ok(())
    }

    pub(super) fn on_imported(&mut self, result: Result<Imported, ClientError>) -> Result<(), MigrateError> {
        if self.step != DestStep::Loading {
            return Ok(());
        }
        match result {
            Ok(imported) => {
                if let Some(session) = &mut self.session {
                    let digest = session.digest.clone();
                    session.ready =
                        wire::Ready { import_us: imported.import_us, sync_us: imported.sync_us, digest };
                }
                self.input(DestInput::Loaded)
            }
            Err(error) => self.fail(error),
        }
    }
}
