//! A whole sender, between a stand-in for `vmrun` whose guest runs and a destination that answers what
//! the input says.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use vmferry::migrate::convergence::{Mode, OnTimeout, Policy};
use vmferry::migrate::options::SendOptions;
use vmferry::migrate::outcome::Ending;
use vmferry::migrate::report::Silent;
use vmferry::migrate::settings::Settings;
use vmferry::migrate::source;
use vmferry::switchover::{Attempt, Ownership};
use vmferry::transport::Address;
use vmferry::wire::{self, FrameType, HEADER_BYTES, Header, Message, PageBitmap};

use super::frames::{self, Sent};
use super::input::{Reader, Writer};
use super::vmrun::{IMAGE_FAILS, Seen, Vmrun, socket_path};
use super::wire::crc32c;

/// How long a destination waits for words that may not come.
const WORDS: Duration = Duration::from_millis(20);
/// Connections of one session.
const MOST_ROUNDS: usize = 3;

/// What a destination does, besides frames.
const AWAIT: u8 = 0xff;
const HANG_UP: u8 = 0xfe;

enum Step {
    /// A frame, but for the attempt, which the source chooses.
    Say(Vec<u8>),
    Await(FrameType),
}

pub fn run(data: &[u8]) {
    play(data, WORDS);
}

/// What has become of the guest, and how the sender says that it ended.
fn play(data: &[u8], patience: Duration) -> (Seen, Option<Ending>) {
    let mut input = Reader(data);
    let (faults, flags) = (input.u16(), input.u8());
    let mut rounds = Vec::new();
    while !input.is_empty() && rounds.len() < MOST_ROUNDS {
        rounds.push(script(&mut input));
    }
    let vmrun = Vmrun::with_guest(faults);
    let dest = socket_path();
    let listener = UnixListener::bind(&dest).expect("a socket can be made");
    let policy = Policy {
        downtime: Duration::from_secs(1),
        timeout: None,
        max_passes: Some(3),
        on_timeout: OnTimeout::Force,
        switch_now: false,
        mode: [Mode::Precopy, Mode::Hybrid, Mode::Postcopy][usize::from(flags % 3)],
    };
    let options = SendOptions {
        vm: vmrun.path.clone(),
        dest: Address::Unix(dest.clone()),
        redirect: None,
        channels: 1,
        verify: flags & 4 != 0,
        keep_source: false,
        peer_timeout: Duration::from_secs(5),
        connect_timeout: Duration::from_secs(5),
        recover_timeout: Some(Duration::ZERO),
        warm_up: if flags & 8 == 0 { Duration::ZERO } else { Duration::from_secs(10) },
        policy,
        bandwidth_limit: 0,
    };
    let over = AtomicBool::new(false);
    let result = std::thread::scope(|scope| {
        scope.spawn(|| receive(&listener, rounds, patience, &over));
        let result = source::send(&options, Settings::new(policy, 0), &mut Silent);
        over.store(true, Ordering::Release);
        // Whoever waits for a caller has one.
        let _ = UnixStream::connect(&dest);
        result
    });
    let _ = std::fs::remove_file(&dest);
    let seen = vmrun.seen();
    let ending = result.err().map(|error| {
        let _ = error.to_string();
        error.ending
    });
    check(&seen, ending);
    (seen, ending)
}

/// What the sender says of the guest is so.
fn check(seen: &Seen, ending: Option<Ending>) {
    let owner = &seen.ownership;
    match ending {
        None => {
            assert!(matches!(owner, Ownership::Released { .. } | Ownership::Committed { .. }), "{seen:?}")
        }
        Some(Ending::Failed | Ending::PeerFailed | Ending::Unsuitable | Ending::NotConverged) => {
            assert!(matches!(owner, Ownership::Sole { .. }), "{ending:?}: {seen:?}");
        }
        _ => {}
    }
    // S2.
    let committed = matches!(owner, Ownership::Committed { .. } | Ownership::Released { .. });
    assert!(!committed || seen.paused, "the guest runs here, and may run elsewhere: {seen:?}");
}

fn script(input: &mut Reader<'_>) -> Vec<Step> {
    let mut sent = Sent { attempt: super::wire::ATTEMPT, sequence: 0 };
    let mut steps = Vec::new();
    while !input.is_empty() && steps.len() < 64 {
        match input.u8() {
            HANG_UP => break,
            AWAIT => {
                steps.push(Step::Await(FrameType::ALL[usize::from(input.u8()) % FrameType::ALL.len()]));
            }
            _ => steps.push(Step::Say(sent.frame(input).1)),
        }
    }
    steps
}

/// The BARRIERs that have come on bulk channels, and that nobody has waited for.
#[derive(Default)]
struct Barriers {
    open: Mutex<usize>,
    came: Condvar,
}

impl Barriers {
    fn came(&self) {
        *self.open.lock().expect("nobody panics") += 1;
        self.came.notify_all();
    }

    /// Waits for one; whether it came.
    fn wait(&self, patience: Duration) -> bool {
        let open = self.open.lock().expect("nobody panics");
        let (mut open, waited) =
            self.came.wait_timeout_while(open, patience, |open| *open == 0).expect("nobody panics");
        *open = open.saturating_sub(1);
        !waited.timed_out()
    }
}

/// Takes connections: those of HELLO get a script each, those of JOIN are welcome.
fn receive(listener: &UnixListener, rounds: Vec<Vec<Step>>, patience: Duration, over: &AtomicBool) {
    let barriers = &Barriers::default();
    std::thread::scope(|scope| {
        let mut rounds = rounds.into_iter();
        loop {
            let Ok((mut stream, _)) = listener.accept() else { return };
            if over.load(Ordering::Acquire) {
                return;
            }
            let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
            let _ = stream.set_write_timeout(Some(Duration::from_secs(5)));
            let Some((first, body)) = hear(&mut stream) else { continue };
            match Message::decode(first.kind, body).expect("the sender keeps to the format") {
                Message::Join { index } => {
                    let _ = stream.write_all(&frame(first.attempt, &Message::Joined { index }));
                    scope.spawn(move || {
                        let _ = stream.set_read_timeout(None);
                        while let Some((header, _)) = hear(&mut stream) {
                            if header.kind == FrameType::Barrier {
                                barriers.came();
                            }
                        }
                    });
                }
                _ => match rounds.next() {
                    Some(steps) => {
                        scope.spawn(move || speak(stream, first.attempt, steps, patience, barriers));
                    }
                    None => drop(stream),
                },
            }
        }
    });
}

fn speak(
    mut stream: UnixStream,
    attempt: Attempt,
    steps: Vec<Step>,
    patience: Duration,
    barriers: &Barriers,
) {
    let _ = stream.set_read_timeout(Some(patience));
    for step in steps {
        match step {
            Step::Say(bytes) => drop(stream.write_all(&addressed(bytes, attempt))),
            // There is one bulk channel, so they are not on this one.
            Step::Await(FrameType::Barrier) => {
                if !barriers.wait(patience) {
                    return;
                }
            }
            Step::Await(kind) => loop {
                match hear(&mut stream) {
                    Some((header, _)) if header.kind == kind => break,
                    Some(_) => {}
                    None => return,
                }
            },
        }
    }
    let _ = stream.shutdown(Shutdown::Both);
}

/// The frame in the name of the attempt, if it is one.
fn addressed(mut bytes: Vec<u8>, attempt: Attempt) -> Vec<u8> {
    let Some(head) = bytes.first_chunk::<HEADER_BYTES>() else { return bytes };
    if let Ok(header) = Header::decode(head) {
        let name = super::wire::ATTEMPT;
        // Where the input wants another, it stays another.
        let session = if header.attempt.session == name.session { attempt.session } else { name.session };
        let epoch = header.attempt.epoch.wrapping_sub(name.epoch).wrapping_add(attempt.epoch);
        let header = Header { attempt: Attempt { session, epoch }, ..header };
        bytes[..HEADER_BYTES].copy_from_slice(&header.encode());
    }
    bytes
}

fn hear(stream: &mut UnixStream) -> Option<(Header, Vec<u8>)> {
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header).ok()?;
    let header = Header::decode(&header).expect("the sender keeps to the format");
    let mut body = vec![0; header.payload_bytes as usize];
    stream.read_exact(&mut body).ok()?;
    Some((header, body))
}

fn frame(attempt: Attempt, message: &Message) -> Vec<u8> {
    let body = message.encode().expect("it fits");
    let (kind, payload_bytes, body_crc) = (message.kind(), body.len() as u32, crc32c(&body));
    [&Header { kind, payload_bytes, attempt, sequence: 0, body_crc }.encode()[..], &body].concat()
}

fn say(input: Writer, message: &Message) -> Writer {
    frames::put(input.u8(0), message)
}

fn wait(input: Writer, kind: FrameType) -> Writer {
    let index = FrameType::ALL.iter().position(|k| *k == kind).expect("every type is listed");
    input.u8(AWAIT).u8(index as u8)
}

pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let ack = |features: &[&str], resume_phase, fetching| {
        Message::HelloAck(wire::HelloAck {
            version: wire::VERSION,
            features: features.iter().map(ToString::to_string).collect(),
            resume_phase,
            release: "0.1.0".into(),
            host: "hostb".into(),
            peer_timeout_ms: 5000,
            fetching,
        })
    };
    let begin_at = |faults: u16, flags: u8| {
        let input = say(Writer::default().u16(faults).u8(flags), &ack(&[wire::POSTCOPY], None, false));
        say(wait(input, FrameType::Machine), &Message::Accepted)
    };
    let begin = |flags| begin_at(0, flags);
    let pass = |input: Writer, pass| {
        let (pages_placed, bytes, elapsed_us) = (256, 4 * 4096, 100);
        say(
            wait(input, FrameType::Barrier),
            &Message::PassDone(wire::PassDone { pass, pages_placed, bytes, elapsed_us }),
        )
    };
    let ready = |input: Writer| say(wait(input, FrameType::End), &Message::Ready(wire::Ready::default()));
    let runs =
        |input: Writer| say(wait(input, FrameType::Run), &Message::Running(wire::Running { run_us: 1 }));
    let done = |input: Writer, pages, zero_pages| {
        let done = Message::Done(wire::Done { pages, zero_pages, digest: None, latency: None });
        say(wait(input, FrameType::Done), &done)
    };
    let leave = |input: Writer| wait(input, FrameType::Released);
    let precopy = |flags| ready(pass(pass(begin(flags), 1), 2));
    let lost = |input: Writer| input.u8(HANG_UP);
    let back = |input: Writer, phase, fetching| say(input, &ack(&[], Some(phase), fetching));
    let whole = leave(done(runs(precopy(0)), 4, 252));
    let revoked = say(
        wait(back(lost(precopy(0)), wire::ResumePhase::Revoked, false), FrameType::Revoke),
        &Message::Revoked,
    );
    let in_doubt = runs(back(lost(precopy(0)), wire::ResumePhase::InDoubt, false));
    let asks = |input: Writer| say(input, &Message::PageRequest(vec![3, 100, 255, 256, u64::MAX]));
    let all = |input: Writer| {
        let (pages, zero_pages) = (4, 0);
        say(input, &Message::Done(wire::Done { pages, zero_pages, digest: None, latency: None }))
    };
    let postcopy = runs(ready(begin(2)));
    let fetch = leave(all(asks(postcopy.clone())));
    let warm = |faults| begin_at(faults, 8);
    let goes_over = |input: Writer| leave(all(asks(runs(ready(input)))));
    let received = Message::Received(PageBitmap { first: 0, words: vec![!8, u64::MAX, u64::MAX, u64::MAX] });
    let again = say(back(lost(asks(postcopy.clone())), wire::ResumePhase::Running, true), &received);
    let refused = wire::Refused {
        code: wire::RefusedCode::Busy,
        message: "another guest is here".into(),
        problems: Vec::new(),
    };
    let refused = say(Writer::default().u16(0).u8(0), &Message::Refused(refused));
    let abort = wire::Abort { side: wire::Side::Destination, reason: "no".into() };
    vec![
        ("whole".into(), whole.0),
        ("verify".into(), precopy(4).0),
        ("revoked".into(), revoked.0),
        ("in-doubt".into(), in_doubt.0),
        ("postcopy".into(), fetch.0),
        ("warm-up".into(), goes_over(pass(pass(warm(0), 1), 2)).0),
        ("warm-up-refused".into(), goes_over(warm(IMAGE_FAILS)).0),
        ("warm-up-lost".into(), lost(wait(warm(0), FrameType::Barrier)).0),
        ("postcopy-again".into(), leave(all(again)).0),
        ("forgotten".into(), back(lost(precopy(0)), wire::ResumePhase::Unknown, false).0),
        ("refused".into(), refused.0),
        ("aborted".into(), say(pass(begin(0), 1), &Message::Abort(abort)).0),
        ("strange".into(), say(pass(begin(1), 7), &Message::Run).0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_is_taken_moves() {
        for (name, seed) in seeds() {
            if matches!(&*name, "whole" | "in-doubt") {
                let (seen, ending) = play(&seed, Duration::from_secs(20));
                assert!(seen.paused && ending.is_none(), "{name}: {ending:?}, {seen:?}");
            }
        }
    }

    #[test]
    fn a_guest_goes_over_behind_its_kernel_or_without() {
        for (name, seed) in seeds() {
            if matches!(&*name, "warm-up" | "warm-up-refused") {
                let (seen, ending) = play(&seed, Duration::from_secs(20));
                let is_over = !matches!(seen.ownership, Ownership::Sole { .. });
                assert!(
                    is_over && matches!(ending, None | Some(Ending::Resumable)),
                    "{name}: {ending:?}, {seen:?}"
                );
            }
        }
    }

    #[test]
    fn a_guest_that_nobody_takes_stays() {
        for (name, seed) in seeds() {
            if !matches!(&*name, "refused" | "aborted" | "strange" | "warm-up-lost") {
                continue;
            }
            let (seen, ending) = play(&seed, Duration::from_secs(20));
            let stays = matches!(seen.ownership, Ownership::Sole { .. }) && !seen.paused;
            assert!(ending.is_some() && stays, "{name}: {seen:?}");
        }
    }
}
