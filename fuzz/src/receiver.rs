//! A whole receiver: its conductor with its pumps and its placer, between a source that says what the
//! input says and a `vmrun` that is none but keeps to the rules of ownership.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;

use vmferry::fuzzing::{self, Door};
use vmferry::migrate::host::HostOptions;
use vmferry::migrate::intake::{Caller, Opening, Place};
use vmferry::migrate::options::ReceiveOptions;
use vmferry::migrate::outcome::Ending;
use vmferry::switchover::{Attempt, Ownership};
use vmferry::transport::{Address, CancelToken, Channel, ChannelOptions, Stream};
use vmferry::wire::{self, FrameType, HEADER_BYTES, Header, JsonBody, Message, PageBitmap};

use super::frames::{self, Sent};
use super::input::{Reader, Writer};
use super::messages::{hello, machine};
use super::vmrun::{REVOKE_FAILS, Seen, Vmrun};
use super::wire::ATTEMPT;

/// How long a source waits for an answer that may not come.
const ANSWER: Duration = Duration::from_millis(20);
/// Connections of one session.
const MOST_ROUNDS: usize = 3;

/// What a source does, besides frames.
const AWAIT: u8 = 0xff;
const COME_BACK: u8 = 0xfe;
const JOIN: u8 = 0xfd;
/// Channels of one connection.
const MOST_CHANNELS: usize = 5;

pub fn run(data: &[u8]) {
    play(data, ANSWER);
}

/// Who has the guest in the end, and whether it has run. `patience` is how long a source waits for an
/// answer.
fn play(data: &[u8], patience: Duration) -> (Ownership, bool) {
    let mut input = Reader(data);
    let faults = input.u16();
    let vmrun = Vmrun::incoming(faults);
    let options = ReceiveOptions {
        listen: Address::Unix("/nowhere".into()),
        peer_timeout: Duration::from_secs(5),
        linger: Duration::from_secs(5),
        host: HostOptions {
            control: vmrun.path.clone(),
            attach: true,
            vmrun: PathBuf::new(),
            sandbox: false,
            serial: "none".into(),
            ram_pages: None,
            remap: Vec::new(),
        },
    };
    let mut sources = Vec::new();
    let mut rounds = Vec::new();
    let mut said_run = false;
    for epoch in 1..=MOST_ROUNDS as u32 {
        if input.is_empty() {
            break;
        }
        let (source, caller) = Source::connect(Attempt { epoch, ..ATTEMPT }, &mut input, patience);
        said_run |= source.says_run;
        sources.push(source);
        rounds.push(caller);
    }
    let mut sources = sources.into_iter();
    let mut under_way: Vec<JoinHandle<()>> = Vec::new();
    let result = fuzzing::receive(&options, rounds, |door| {
        under_way.extend(sources.next().map(|s| std::thread::spawn(move || s.speak(&door))));
    });
    drop(sources);
    under_way.into_iter().for_each(|source| source.join().expect("the source ends"));
    let Seen { ownership, has_run, .. } = vmrun.seen();
    assert!(!has_run || said_run, "the guest runs, and nobody has said RUN");
    if let Err(error) = result
        && matches!(error.ending, Ending::Failed | Ending::PeerFailed | Ending::Unsuitable)
    {
        let is_here = matches!(ownership, Ownership::InDoubt { .. } | Ownership::Sole { .. });
        assert!(!is_here || faults & REVOKE_FAILS != 0, "{error}, says the receiver, but vmrun {ownership}");
    }
    (ownership, has_run)
}

/// The other end of one connection: what it will say, on which channel.
struct Source {
    attempt: Attempt,
    patience: Duration,
    channels: Vec<UnixStream>,
    /// Frames of a channel, and answers on the first that are waited for.
    script: Vec<Step>,
    says_run: bool,
}

/// Nobody is at this door but the caller.
fn place() -> Place {
    Place::alone(CancelToken::new().expect("a token can be made"))
}

enum Step {
    Say(usize, Vec<u8>),
    Await(FrameType),
    /// One more channel.
    Join,
}

impl Source {
    /// Reads one connection from the input: HELLO, then what is said.
    fn connect(attempt: Attempt, input: &mut Reader<'_>, patience: Duration) -> (Self, Caller) {
        let (bulk, resumes) = (input.u8() % 4, attempt.epoch > 1);
        let flags = input.u8();
        let hello = wire::Hello {
            resume: resumes != (flags & 2 != 0),
            superseded: (flags & 4 != 0).then_some(ATTEMPT),
            ..hello(bulk.into(), flags & 1 != 0)
        };
        let attempt = if flags & 8 != 0 { Attempt { epoch: 1, ..attempt } } else { attempt };
        let (main, channel) = channel(attempt, 0, patience);
        let caller = Caller { attempt, opening: Opening::Hello(Box::new(hello)), channel, place: place() };
        let mut sent = vec![Sent { attempt, sequence: 1 }];
        let (mut script, mut says_run) = (Vec::new(), false);
        while !input.is_empty() && script.len() < 64 {
            match input.u8() {
                COME_BACK => break,
                AWAIT => {
                    script.push(Step::Await(FrameType::ALL[usize::from(input.u8()) % FrameType::ALL.len()]))
                }
                JOIN if sent.len() < MOST_CHANNELS => {
                    sent.push(Sent { attempt, sequence: 1 });
                    script.push(Step::Join);
                }
                which => {
                    let which = usize::from(which) % sent.len();
                    let (kind, bytes) = sent[which].frame(input);
                    says_run |= kind == FrameType::Run;
                    script.push(Step::Say(which, bytes));
                }
            }
        }
        (Self { attempt, patience, channels: vec![main], script, says_run }, caller)
    }

    fn speak(mut self, door: &Door) {
        for step in std::mem::take(&mut self.script) {
            match step {
                Step::Say(which, bytes) => {
                    // Where the receiver has hung up, nobody hears it.
                    let _ = self.channels[which].write_all(&bytes);
                }
                Step::Join => {
                    let (attempt, index) = (self.attempt, self.channels.len() as u32);
                    let (theirs, channel) = channel(attempt, index, self.patience);
                    door.call(Caller { attempt, opening: Opening::Join { index }, channel, place: place() });
                    self.channels.push(theirs);
                }
                Step::Await(kind) => {
                    if !self.hears(kind) {
                        break;
                    }
                }
            }
        }
        for channel in &self.channels {
            let _ = channel.shutdown(Shutdown::Both);
        }
    }

    /// Whether an answer of that kind comes; what comes before it is in order and of a kind that a
    /// receiver may send.
    fn hears(&mut self, kind: FrameType) -> bool {
        let main = &mut self.channels[0];
        loop {
            let mut header = [0; HEADER_BYTES];
            if main.read_exact(&mut header).is_err() {
                return false;
            }
            let header = Header::decode(&header).expect("the receiver keeps to the format");
            let mut body = vec![0; header.payload_bytes as usize];
            if main.read_exact(&mut body).is_err() {
                return false;
            }
            if header.kind != FrameType::Pages {
                Message::decode(header.kind, body).expect("the receiver keeps to the format");
            }
            if header.kind == kind {
                return true;
            }
            if matches!(header.kind, FrameType::Abort | FrameType::Refused) {
                return false;
            }
        }
    }
}

/// The two ends of a channel, whose first frame has been read.
fn channel(attempt: Attempt, index: u32, patience: Duration) -> (UnixStream, Channel) {
    let (mut theirs, ours) = UnixStream::pair().expect("a pair of sockets can be made");
    theirs.set_read_timeout(Some(patience)).expect("it is a socket");
    theirs.set_write_timeout(Some(Duration::from_secs(5))).expect("it is a socket");
    let token = CancelToken::new().expect("a token can be made");
    let stream = Stream::from_socket(ours.into(), "the fuzzer".into(), token).expect("a stream can be made");
    let first = match index {
        0 => Message::Hello(hello(0, false)),
        index => Message::Join { index },
    };
    let body = first.encode().expect("it fits");
    let (kind, payload_bytes, body_crc) = (first.kind(), body.len() as u32, super::wire::crc32c(&body));
    let header = Header { kind, payload_bytes, attempt, sequence: 0, body_crc };
    theirs.write_all(&[&header.encode()[..], &body].concat()).expect("there is room");
    let options = ChannelOptions { peer_timeout: Duration::from_secs(5) };
    let (channel, _) = Channel::accept(stream, options).expect("the first frame is right");
    (theirs, channel)
}

fn say(input: Writer, channel: u8, message: &Message) -> Writer {
    frames::put(input.u8(channel), message)
}

fn pages(input: Writer, channel: u8, runs: &[(u16, u8, bool)]) -> Writer {
    frames::put_pages(input.u8(channel), runs)
}

fn hear(input: Writer, kind: FrameType) -> Writer {
    let index = FrameType::ALL.iter().position(|k| *k == kind).expect("every type is listed");
    input.u8(AWAIT).u8(index as u8)
}

pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let description = Message::Machine(JsonBody::of(&machine(1 << 20)).expect("it can be written"));
    let end = |pages, zero_pages, postcopy| {
        let (passes, digest, stays_paused) = (1, None, false);
        let ahead = vec![];
        Message::End(wire::End { passes, pages, zero_pages, digest, stays_paused, postcopy, ahead })
    };
    let state = Message::State(b"VMSTATE1".to_vec());
    let accepted = |channels: u8, flags: u8| {
        hear(say(Writer::default().u16(0).u8(channels).u8(flags), 0, &description), FrameType::Accepted)
    };
    let barrier = Message::Barrier { pass: 1 };
    let loaded = |input: Writer| {
        let input = pages(input, 0, &[(3, 2, false), (0, 3, true), (5, 251, true)]);
        let input = hear(say(input, 0, &barrier), FrameType::PassDone);
        hear(say(say(input, 0, &state), 0, &end(2, 254, false)), FrameType::Ready)
    };
    let leave = |input: Writer| {
        let done = Message::Done(wire::Done { pages: 2, zero_pages: 254, digest: None, latency: None });
        say(hear(say(input, 0, &done), FrameType::Done), 0, &Message::Released)
    };
    let run = |input: Writer| hear(say(input, 0, &Message::Run), FrameType::Running);
    let whole = leave(run(loaded(accepted(0, 0))));
    let bulk = pages(
        pages(accepted(2, 0).u8(JOIN).u8(JOIN), 1, &[(3, 2, false)]),
        2,
        &[(0, 3, true), (5, 251, true)],
    );
    let bulk = hear(say(say(bulk, 1, &barrier), 2, &barrier), FrameType::PassDone);
    let bulk = hear(say(say(bulk, 0, &state), 0, &end(2, 254, false)), FrameType::Ready);
    let bulk = leave(run(bulk));
    let back = |input: Writer| input.u8(COME_BACK).u8(0).u8(0);
    let revoked = hear(say(back(loaded(accepted(0, 0))), 0, &Message::Revoke), FrameType::Revoked);
    let returned = leave(run(back(loaded(accepted(0, 0)))));
    let missing = Message::Missing(PageBitmap { first: 0, words: vec![0b11000, 0, 0, 0] });
    let postcopy = pages(accepted(0, 1), 0, &[(0, 3, true), (3, 1, false), (5, 251, true)]);
    let postcopy = hear(say(postcopy, 0, &barrier), FrameType::PassDone);
    let postcopy = say(say(say(postcopy, 0, &state), 0, &missing), 0, &end(1, 254, true));
    let postcopy = run(hear(postcopy, FrameType::Ready));
    let urgent = accepted(1, 1).u8(JOIN).u8(JOIN);
    let urgent = pages(urgent, 1, &[(0, 3, true), (3, 1, false), (5, 251, true)]);
    let urgent = hear(say(urgent, 1, &barrier), FrameType::PassDone);
    let urgent = say(say(say(urgent, 0, &state), 0, &missing), 0, &end(1, 254, true));
    let urgent = pages(run(hear(urgent, FrameType::Ready)), 2, &[(4, 1, false), (3, 1, true)]);
    let lost = back(postcopy.clone());
    let fetch = |input: Writer| hear(pages(input, 0, &[(4, 1, false), (3, 1, true)]), FrameType::Done);
    let strange = say(run(loaded(accepted(0, 0))), 0, &Message::Accepted);
    let out_of_turn =
        say(say(accepted(2, 0).u8(JOIN).u8(JOIN), 1, &barrier), 2, &Message::Barrier { pass: 2 });
    let aborted = wire::Abort { side: wire::Side::Source, reason: "enough".into() };
    vec![
        ("whole".into(), whole.0),
        ("bulk".into(), bulk.0),
        ("revoked".into(), revoked.0),
        ("returned".into(), returned.0),
        ("postcopy".into(), leave(fetch(postcopy)).0),
        ("postcopy-lost".into(), leave(fetch(hear(lost, FrameType::Received))).0),
        ("strange-when-running".into(), strange.0),
        ("strange-in-doubt".into(), say(loaded(accepted(0, 0)), 0, &Message::Accepted).0),
        ("barrier-out-of-turn".into(), out_of_turn.0),
        ("postcopy-urgent".into(), leave(hear(urgent, FrameType::Done)).0),
        ("aborted".into(), say(loaded(accepted(0, 0)), 0, &Message::Abort(aborted)).0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The target would show nothing if it turned back at the door.
    #[test]
    fn the_seeds_go_all_the_way() {
        for (name, seed) in seeds() {
            let (ownership, has_run) = play(&seed, Duration::from_secs(20));
            let sole = matches!(ownership, Ownership::Sole { arrived: Some(_), .. });
            match &*name {
                "revoked" | "aborted" | "barrier-out-of-turn" => {
                    assert!(
                        matches!(ownership, Ownership::Empty { refused: Some(_) }),
                        "{name}: {ownership}"
                    );
                }
                "strange-in-doubt" => assert!(matches!(ownership, Ownership::InDoubt { .. }), "{ownership}"),
                _ => assert!(sole && has_run, "{name}: {ownership}"),
            }
        }
    }
}
