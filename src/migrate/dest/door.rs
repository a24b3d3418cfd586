//! Who comes in: the first connection, more channels, the source coming back, somebody else.

use std::time::Instant;

use crate::control::Status;
use crate::migrate::intake::{Caller, Opening, Place};
use crate::migrate::pump::{self, Haste};
use crate::migrate::wires::{MainLine, host_name, shorter, turn_away};
use crate::switchover::{Attempt, DestInput, DestStep, Ownership};
use crate::transport::Channel;
use crate::wire::{self, Message, Refused, RefusedCode, ResumePhase, Supported};

use super::{Arrival, Event, MigrateError, Session, failed};

impl Arrival<'_> {
    /// A new connection: the first, one more channel, the source coming back, or somebody else.
    pub(super) fn on_caller(&mut self, caller: Caller) -> Result<(), MigrateError> {
        let Caller { attempt, opening, channel, place } = caller;
        match opening {
            Opening::Join { index } => self.on_join(attempt, index, channel, place),
            Opening::Hello(hello) => {
                let Some(session) = &self.session else {
                    return self.begin(attempt, *hello, channel, place);
                };
                if session.attempt.session == attempt.session && hello.resume {
                    return self.come_back(attempt, &hello, channel, place);
                }
                let superseded = hello.superseded.is_some_and(|old| old.session == session.attempt.session)
                    && hello.vm_uuid == session.hello.vm_uuid;
                if superseded && self.step != DestStep::Running {
                    // The source vmrun starts a new session only while it has not committed the
                    // old one: that is its ABORT, said late.
                    self.observer.note("the source has given the attempt before up, and comes again");
                    let _ = self.input(DestInput::Abort);
                    self.session = None;
                    self.step = DestStep::Loading;
                    return self.begin(attempt, *hello, channel, place);
                }
                let message = match self.step {
                    DestStep::Running => "the guest of another migration runs here already",
                    DestStep::InDoubt => "an acknowledged guest is held here for its own source",
                    _ => "another migration is under way here",
                };
                refuse(channel, place, RefusedCode::Busy, message);
                Ok(())
            }
        }
    }

    /// HELLO of a new session.
    pub(super) fn begin(
        &mut self,
        attempt: Attempt,
        hello: wire::Hello,
        channel: Channel,
        place: Place,
    ) -> Result<(), MigrateError> {
        if hello.resume {
            let phase = self.unknown_phase(attempt);
            let ack = self.hello_ack(&wire::Agreed { version: wire::VERSION, features: vec![] }, Some(phase));
            turn_away(channel, &Message::HelloAck(ack), place);
            return Ok(());
        }
        let agreed = match wire::negotiate(&hello, &Supported::default()) {
            Ok(agreed) => agreed,
            Err(refused) => {
                self.observer.note(&format!("refused {}: {refused}", hello.host));
                turn_away(channel, &Message::Refused(refused), place);
                return Ok(());
            }
        };
        if !place.leave() {
            return Ok(());
        }
        self.started = Instant::now();
        self.observer.note(&format!("receiving {:?} from {}", hello.vm_name, hello.host));
        crate::sys::sandbox::try_forbidden("receive");
        let ack = self.hello_ack(&agreed, None);
        self.session = Some(Session::new(attempt, hello));
        self.step = DestStep::Loading;
        self.connect_main(attempt, channel, ack)
    }

    /// What to say to a source that comes back for a session that no mover here knows: `vmrun` may.
    pub(super) fn unknown_phase(&mut self, attempt: Attempt) -> ResumePhase {
        match self.host.client.status() {
            Ok(Status { ownership: Ownership::Empty { refused: Some(old) }, .. })
                if old.session == attempt.session =>
            {
                ResumePhase::Revoked
            }
            _ => ResumePhase::Unknown,
        }
    }

    /// HELLO of our own session on a new connection: older ones are stale from here on.
    pub(super) fn come_back(
        &mut self,
        attempt: Attempt,
        hello: &wire::Hello,
        channel: Channel,
        place: Place,
    ) -> Result<(), MigrateError> {
        let Some(session) = &mut self.session else { return Ok(()) };
        if attempt.epoch <= session.attempt.epoch {
            let message =
                format!("epoch {} is stale, {} has been seen", attempt.epoch, session.attempt.epoch);
            refuse(channel, place, RefusedCode::Stale, &message);
            return Ok(());
        }
        if !place.leave() {
            return Ok(());
        }
        if let Err(error) = self.host.client.renew(attempt) {
            refuse(channel, place, RefusedCode::Failed, &error.to_string());
            return Ok(());
        }
        session.attempt = attempt;
        if let Some(old) = session.main.take() {
            old.cut();
        }
        session.lost = None;
        session.hello = hello.clone();
        session.ending_pass = None;
        for (_, sender) in session.bulk.drain() {
            sender.cancel_token().cancel("the source has come back on a new connection");
        }
        let phase = match self.step {
            DestStep::Loading => ResumePhase::Loading,
            DestStep::InDoubt => ResumePhase::InDoubt,
            DestStep::Running => ResumePhase::Running,
            DestStep::Refused => ResumePhase::Revoked,
        };
        self.observer.note(&format!("{} has come back (epoch {})", hello.host, attempt.epoch));
        let ack = self.hello_ack(&wire::Agreed { version: wire::VERSION, features: vec![] }, Some(phase));
        self.connect_main(attempt, channel, ack)?;
        self.fetch_on();
        self.input(DestInput::Reconnected)
    }

    /// Answers HELLO and lets a pump read the channel from here on.
    pub(super) fn connect_main(
        &mut self,
        attempt: Attempt,
        channel: Channel,
        ack: wire::HelloAck,
    ) -> Result<(), MigrateError> {
        let Some(session) = &mut self.session else { return Ok(()) };
        let patience = shorter(self.options.peer_timeout, session.hello.peer_timeout_ms);
        let (line, receiver) = MainLine::start(channel, patience).map_err(failed)?;
        let placer = session.placer.clone();
        let events = self.events.clone();
        std::thread::spawn(move || {
            pump::run(receiver, Haste::Urgent, &placer, &events, |b| Event::Main(attempt, b))
        });
        let sent = line.send(&Message::HelloAck(ack));
        session.main = Some(line);
        if let Err(error) = sent { self.on_lost(&error.to_string()) } else { Ok(()) }
    }

    pub(super) fn on_join(
        &mut self,
        attempt: Attempt,
        index: u32,
        channel: Channel,
        place: Place,
    ) -> Result<(), MigrateError> {
        let expected = self.session.as_ref().is_some_and(|s| {
            s.attempt == attempt
                && (1..=s.hello.all_channels()).contains(&index)
                && !s.bulk.contains_key(&index)
                && (self.step == DestStep::Loading || s.fetching() > 0)
        });
        let Some(session) = self.session.as_mut().filter(|_| expected) else {
            refuse(channel, place, RefusedCode::Session, "no such channel is expected here");
            return Ok(());
        };
        if !place.leave() {
            return Ok(());
        }
        let (sender, receiver) = channel.split();
        // The one beyond those that were promised for bulk is the urgent one.
        let haste = if index > session.hello.channels { Haste::Urgent } else { Haste::Bulk };
        let placer = session.placer.clone();
        let events = self.events.clone();
        std::thread::spawn(move || pump::run(receiver, haste, &placer, &events, |b| Event::Bulk(attempt, b)));
        let sent = sender.send(&Message::Joined { index });
        session.bulk.insert(index, sender);
        if let Err(error) = sent { self.on_bulk_lost(&error.to_string()) } else { Ok(()) }
    }

    fn hello_ack(&self, agreed: &wire::Agreed, resume_phase: Option<ResumePhase>) -> wire::HelloAck {
        wire::HelloAck {
            version: agreed.version,
            features: agreed.features.clone(),
            resume_phase,
            release: env!("CARGO_PKG_VERSION").to_owned(),
            host: host_name(),
            peer_timeout_ms: self.options.peer_timeout.as_millis() as u64,
            fetching: self.session.as_ref().is_some_and(|s| s.fetching() > 0),
        }
    }
}

/// Says no on a channel that is not ours, and lets go of it.
fn refuse(channel: Channel, place: Place, code: RefusedCode, message: &str) {
    let refused = Refused { code, message: message.to_owned(), problems: vec![] };
    turn_away(channel, &Message::Refused(refused), place);
}
