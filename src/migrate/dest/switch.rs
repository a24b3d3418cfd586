//! The switchover, and whatever ends an attempt.

use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::migrate::outcome::{Ending, MigrateError, Side, ms};
use crate::migrate::pump::Brought;
use crate::migrate::wires::FAREWELL;
use crate::switchover::{DestAction, DestInput, DestStep};
use crate::wire::{self, Message};

use super::tell::Lost;
use super::{Arrival, Arrived, Event, Session, failed};

impl Arrival<'_> {
    /// The main channel is gone.
    pub(super) fn on_lost(&mut self, why: &str) -> Result<(), MigrateError> {
        if let Some(session) = &mut self.session {
            if let Some(main) = session.main.take() {
                main.cut();
            }
            if let Some(pager) = &session.pager {
                pager.disconnect();
            }
            session.lost = Some(Lost::now(why));
        }
        // Where that ends the attempt, the reason is the link's.
        let _ = self.input(DestInput::LinkLost);
        match self.step {
            DestStep::InDoubt | DestStep::Running => {
                self.observer
                    .note(&format!("the connection is lost ({why}); waiting for the source to come back"));
                Ok(())
            }
            _ => Err(MigrateError::new(Ending::PeerFailed, Side::Link, why)),
        }
    }

    /// The source says what it may not. Before READY that ends the attempt; after it the guest is not to
    /// be dropped for that (S4): the connection ends, and what has come is kept.
    pub(super) fn on_nonsense(&mut self, what: &str) -> Result<(), MigrateError> {
        match self.step {
            DestStep::Loading | DestStep::Refused => self.fail(what),
            DestStep::InDoubt | DestStep::Running => self.on_lost(what),
        }
    }

    /// A bulk channel is gone: of no account once everything has come.
    pub(super) fn on_bulk_lost(&mut self, why: &str) -> Result<(), MigrateError> {
        let fetching = self.is_fetching();
        match self.step {
            DestStep::Loading => self.on_lost(why),
            // Pages that were on their way are owed to nobody any more: only a new connection, with
            // a new RECEIVED, brings them.
            DestStep::InDoubt | DestStep::Running if fetching => self.on_lost(why),
            _ => Ok(()),
        }
    }

    pub(super) fn on_signal(&mut self, signal: i32) -> Result<(), MigrateError> {
        match self.step {
            DestStep::InDoubt => {
                self.observer.note("not now: the guest is acknowledged and waits for the source's word");
                Ok(())
            }
            DestStep::Running => {
                let left = self.session.as_ref().map_or(0, Session::fetching);
                if left > 0 {
                    self.observer.note(&format!(
                        "not now: the guest runs here and {left} of its pages have yet to come"
                    ));
                }
                Ok(())
            }
            _ => {
                let _ = self.fail(format!("stopped by signal {signal}"));
                Err(MigrateError::new(
                    Ending::Signalled(signal),
                    Side::Destination,
                    format!("stopped by signal {signal}"),
                ))
            }
        }
    }

    /// Every tick: does a signal want us to stop, is `vmrun` still there, has the source been away for too long?
    pub(crate) fn look_after(&mut self) -> Result<Option<Arrived>, MigrateError> {
        match self.signal.swap(0, Ordering::Relaxed) {
            0 => {}
            signal => self.on_signal(signal as i32)?,
        }
        if !self.host.client.is_alive() {
            return self.on_host_gone().map(|()| None);
        }
        let away = self.session.as_ref().and_then(|s| s.lost.as_ref()).map(|lost| lost.since.elapsed());
        if let Some(away) = away {
            let fetching = self.session.as_ref().map_or(0, Session::fetching);
            let comes_back = self.options.listen.takes_many();
            if self.step == DestStep::Running && fetching == 0 && (away > self.options.linger || !comes_back)
            {
                self.observer.note("the source did not come back to take leave; the guest runs here");
                return Ok(Some(self.finish()));
            }
            if !comes_back && self.step == DestStep::InDoubt {
                let what = "the connection is lost and cannot come again; vmrun holds the guest for the source's word";
                return Err(MigrateError::new(Ending::Unknown, Side::Link, what));
            }
            if !comes_back && self.step == DestStep::Running {
                let what = format!(
                    "the connection is lost and cannot come again; the guest runs here and lacks {fetching} pages: \
                     `vmrecv --resume --control {} LISTEN`, then `vmsend --resume --vm SOCK DEST` with that address go on",
                    self.options.host.control.display()
                );
                return Err(MigrateError::new(Ending::Resumable, Side::Link, what));
            }
        }
        Ok(None)
    }

    pub(super) fn on_host_gone(&mut self) -> Result<(), MigrateError> {
        let gone = "the receiving vmrun is gone";
        match self.step {
            DestStep::InDoubt if self.session.as_ref().is_some_and(|s| s.run_passed_on) => {
                Err(MigrateError::new(Ending::Lost, Side::Destination, format!("{gone}, after RUN")))
            }
            DestStep::Running => {
                // A source that still serves pages has nobody left to serve.
                let reason = format!("{gone}, and the guest with it");
                self.say(&Message::Abort(wire::Abort {
                    side: wire::Side::Destination,
                    reason: reason.clone(),
                }))?;
                Err(MigrateError::new(Ending::Lost, Side::Destination, reason))
            }
            DestStep::InDoubt => {
                // Not an error yet: the source has to hear REVOKED, now or when it comes back.
                let _ = self.input(DestInput::GuestGone);
                Err(failed(format!("{gone} before the guest ran: the source takes it back")))
            }
            // As any other failure to load it: the source hears the reason.
            _ => self.fail(gone),
        }
    }

    /// Something here failed, or the source does not keep to the protocol: before READY it is told, and
    /// goes on. After that the guest is promised or runs here, and no more than the connection is lost.
    pub(super) fn fail(&mut self, why: impl std::fmt::Display) -> Result<(), MigrateError> {
        let error = failed(why);
        match self.step {
            DestStep::Loading => {
                let (step, _) = self.step.on(DestInput::LoadFailed);
                self.step = step;
                let abort = wire::Abort { side: wire::Side::Destination, reason: error.cause.clone() };
                let _ = self.say(&Message::Abort(abort));
                self.drop_session();
                Err(error)
            }
            DestStep::InDoubt | DestStep::Running => self.on_lost(&error.cause),
            DestStep::Refused => Err(error),
        }
    }

    /// Lets the pure machine decide, and does what it says.
    pub(super) fn input(&mut self, input: DestInput) -> Result<(), MigrateError> {
        let (next, actions) = self.step.on(input);
        for action in actions {
            self.act(*action)?;
        }
        self.step = next;
        if next == DestStep::Running && input == DestInput::Run {
            // Every page may have come before it could run.
            self.on_all_present()?;
        }
        if next == DestStep::Refused && self.session.is_some() {
            self.drop_session();
            return Err(MigrateError::new(
                Ending::PeerFailed,
                Side::Source,
                "the source has taken the guest back",
            ));
        }
        Ok(())
    }

    pub(super) fn act(&mut self, action: DestAction) -> Result<(), MigrateError> {
        let Some(session) = &mut self.session else { return Ok(()) };
        let attempt = session.attempt;
        match action {
            DestAction::Promise => match self.host.client.promise(attempt, session.stays_paused) {
                Ok(_) => Ok(()),
                Err(error) => self.fail(error),
            },
            DestAction::SendReady => {
                let ready = Message::Ready(session.ready.clone());
                self.say(&ready)
            }
            DestAction::Run => {
                session.run_passed_on = true;
                let start = Instant::now();
                match self.host.client.run(attempt) {
                    Ok(_) => {
                        session.run_us = start.elapsed().as_micros() as u64;
                        Ok(())
                    }
                    Err(error) => Err(MigrateError::new(Ending::Unknown, Side::Destination, error)),
                }
            }
            DestAction::SendRunning => {
                let running = Message::Running(wire::Running { run_us: session.run_us });
                self.say(&running)
            }
            // Of an acknowledged guest REVOKED may be said only when vmrun has let it go: it may have
            // been let run on an operator's word.
            DestAction::GiveUp => match self.host.client.revoke(attempt) {
                Err(error) if self.step == DestStep::InDoubt => {
                    Err(MigrateError::new(Ending::Unknown, Side::Destination, error))
                }
                _ => Ok(()),
            },
            DestAction::SendRevoked => self.say(&Message::Revoked),
            DestAction::SendAbort => {
                let reason = "the destination could not load the guest".to_owned();
                self.say(&Message::Abort(wire::Abort { side: wire::Side::Destination, reason }))
            }
            DestAction::AwaitReconnect => Ok(()),
        }
    }

    /// Says something on the main channel; a channel that fails is noticed by its pump.
    pub(super) fn say(&mut self, message: &Message) -> Result<(), MigrateError> {
        if let Some(main) = self.session.as_ref().and_then(|s| s.main.as_ref()) {
            let _ = main.send(message);
        }
        Ok(())
    }

    /// Ends the session's connections and makes `vmrun` empty again.
    pub(super) fn drop_session(&mut self) {
        let Some(session) = self.session.take() else { return };
        // A pump that waits for the machine need not.
        let _ = session.placer.set(None);
        if let Some(pager) = &session.pager {
            pager.stop();
        }
        let _ = self.host.client.revoke(session.attempt);
        if let Some(main) = session.main {
            main.close();
        }
        for sender in session.bulk.values() {
            sender.close();
        }
    }

    /// The source is done, and says what it has sent: it hears what has come.
    pub(super) fn compare(&mut self) -> Result<(), MigrateError> {
        let Some(session) = &self.session else { return Ok(()) };
        let (pages, zero_pages) = session.counts();
        let digest = session.digest.clone();
        self.say(&Message::Done(wire::Done { pages, zero_pages, digest, latency: None }))
    }

    /// The source has let its copy go: the connection ends.
    pub(super) fn part(&mut self) -> Arrived {
        if let Some(main) = self.session.as_ref().and_then(|s| s.main.as_ref()) {
            main.end();
            self.await_farewell();
        }
        self.finish()
    }

    /// The guest is here for good.
    pub(super) fn finish(&mut self) -> Arrived {
        let session = self.session.take();
        let (data_pages, zero_pages) = session.as_ref().map(Session::counts).unwrap_or_default();
        let latency = session.as_ref().and_then(|s| s.pager.as_ref()).map(|p| p.latency());
        for sender in session.iter().flat_map(|s| s.bulk.values()) {
            sender.close();
        }
        Arrived {
            session: session.as_ref().map(|s| s.attempt.session.to_string()).unwrap_or_default(),
            name: session.as_ref().map(|s| s.hello.vm_name.clone()).unwrap_or_default(),
            control: self.options.host.control.clone(),
            total_ms: ms(self.started.elapsed()),
            data_pages,
            zero_pages,
            latency,
            digest: session.and_then(|s| s.digest),
        }
    }

    /// Waits a moment until the source has hung up: closing before it has read our last words could
    /// take them from it.
    pub(super) fn await_farewell(&self) {
        let until = Instant::now() + FAREWELL;
        while let Ok(event) = self.inbox.recv_timeout(until.saturating_duration_since(Instant::now())) {
            if matches!(event, Event::Main(_, Brought::Lost(_))) {
                return;
            }
        }
    }
}
