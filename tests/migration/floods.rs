//! Peers that say too much: what a program takes stays bounded meanwhile, the guest is safe, and an
//! honest peer is served.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use vmferry::control::RunState;
use vmferry::switchover::Attempt;
use vmferry::wire::limits::{MAX_REQUESTED_PAGES, max_payload};
use vmferry::wire::{
    FrameType, HEADER_BYTES, Header, HelloAck, JsonBody, Message, POSTCOPY, PassDone, Ready, RefusedCode,
    Running, VERSION,
};

use crate::guest::{check_alive, check_beats};
use crate::peer::{Peer, hello, machine};
use crate::postcopy::check_answers;
use crate::program::{PATIENCE, Program, until};
use crate::scene::{SLOW, Scene, kvm};

/// What any program may take at most, whatever is said to it: threads, descriptors, and MiB beyond what it had. There are
/// 128 places for callers, and those who had to go may not have ended yet.
const MOST_THREADS: usize = 400;
const MOST_DESCRIPTORS: usize = 900;
const MOST_MIB: usize = 200;

/// What a process takes, looked at all the time.
struct Weight {
    over: Arc<AtomicBool>,
    watcher: Option<JoinHandle<(usize, usize)>>,
    pid: i32,
    began_mib: usize,
}

fn peak_mib(pid: i32) -> usize {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse().ok());
    peak.unwrap_or(0usize) / 1024
}

impl Weight {
    fn of(program: &Program) -> Self {
        let pid = program.pid().as_raw();
        let over = Arc::new(AtomicBool::new(false));
        let seen = over.clone();
        let count = move |what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).map_or(0, |d| d.count());
        let watcher = std::thread::spawn(move || {
            let mut most = (0, 0);
            while !seen.load(Ordering::Acquire) {
                most = (most.0.max(count("task")), most.1.max(count("fd")));
                std::thread::sleep(Duration::from_millis(2));
            }
            most
        });
        Self { over, watcher: Some(watcher), pid, began_mib: peak_mib(pid) }
    }

    /// It has taken no more than it may. Asked while it still runs.
    #[track_caller]
    fn check(mut self) {
        let mib = peak_mib(self.pid) - self.began_mib;
        self.over.store(true, Ordering::Release);
        let (threads, descriptors) = self.watcher.take().unwrap().join().unwrap();
        eprintln!("at most {threads} threads, {descriptors} descriptors, {mib} MiB more");
        assert!(threads < MOST_THREADS && descriptors < MOST_DESCRIPTORS && mib < MOST_MIB);
    }
}

/// This process holds thousands of connections itself.
fn allow_descriptors() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(8192), hard).unwrap();
}

// Row 25.
#[test]
fn whole_hellos_by_the_hundred_are_turned_away_and_the_migration_goes_on() {
    if !kvm() {
        return;
    }
    allow_descriptors();
    let scene = Scene::new();
    let a = scene.big("a");
    let mut b = scene.receiver("b", &[]);
    let mut send = scene.send(&a, &b.address, SLOW);
    send.await_line("pages on their way", |l| {
        (l["progress"]["sent_bytes"].as_u64()? > 1 << 20).then_some(())
    });
    let weight = Weight::of(&b.program);
    let machine = machine(&a);
    let callers: Vec<Peer> = (0..600)
        .map(|number| {
            let mut peer = Peer::connect(&b.address, 100 + (number % 100) as u8);
            peer.say(&Message::Hello(hello(&machine)));
            peer
        })
        .collect();
    // None hangs up, so that each is waited for; the last of them has its answer all the same.
    let mut last = Peer::connect(&b.address, 99);
    last.say(&Message::Hello(hello(&machine)));
    assert!(matches!(last.hear(), Some(Message::Refused(r)) if r.code == RefusedCode::Busy));
    weight.check();
    drop(callers);
    send.end().expect(0, &[]);
    b.program.end().expect(0, &[]);
    check_alive(&[&a, &b]);
}

#[test]
fn a_thousand_connections_that_say_nothing() {
    if !kvm() {
        return;
    }
    allow_descriptors();
    let scene = Scene::new();
    let a = scene.small("a");
    let mut b = scene.receiver("b", &[]);
    let weight = Weight::of(&b.program);
    let address = b.address.strip_prefix("tcp:").unwrap();
    let callers: Vec<TcpStream> = (0..1000).map(|_| TcpStream::connect(address).unwrap()).collect();
    let mut send = scene.send(&a, &b.address, &["--bwlimit", "8M"]);
    send.await_line("pages on their way", |l| {
        (l["progress"]["sent_bytes"].as_u64()? > 1 << 16).then_some(())
    });
    weight.check();
    send.end().expect(0, &[]);
    b.program.end().expect(0, &[]);
    drop(callers);
    check_alive(&[&a, &b]);
}

#[test]
fn states_of_the_largest_size_one_after_the_other() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.small("a");
    let mut b = scene.receiver("b", &[]);
    let weight = Weight::of(&b.program);
    let mut peer = Peer::with_machine(&b.address, 50, &a);
    let state = vec![7; max_payload(FrameType::State) as usize];
    for _ in 0..8 {
        peer.frame(FrameType::State, &state);
    }
    // It has taken them all when it answers this.
    peer.say(&Message::Run);
    assert!(!peer.hear_all().iter().any(|m| matches!(m, Message::Running(_))));
    weight.check();
    b.await_status("it is empty", |s| s.run_state == RunState::Empty);
    scene.send(&a, &b.address, &[]).end().expect(0, &[]);
    b.program.end().expect(0, &[]);
    check_alive(&[&a, &b]);
}

// A whole session that was recorded and is played again.
#[test]
fn a_session_that_was_given_up_is_not_begun_again() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.small("a");
    let mut b = scene.receiver("b", &[]);
    drop(Peer::with_machine(&b.address, 60, &a));
    b.await_status("it is empty", |s| s.run_state == RunState::Empty);
    let mut peer = until("the receiver is free again", || {
        let mut peer = Peer::connect(&b.address, 60);
        peer.say(&Message::Hello(hello(&machine(&a))));
        matches!(peer.hear()?, Message::HelloAck(_)).then_some(peer)
    });
    peer.say(&Message::Machine(JsonBody::of(&machine(&a)).unwrap()));
    let heard = peer.hear_all();
    assert!(!heard.contains(&Message::Accepted), "{heard:?}");
    scene.send(&a, &b.address, &[]).end().expect(0, &[]);
    b.program.end().expect(0, &[]);
    check_alive(&[&a, &b]);
}

/// A destination that is none: it agrees to everything as far as RUNNING, and then does what it wants
/// with the main connection. It reads the pages that come and forgets them.
struct FalseDestination {
    address: String,
    /// Frames with pages that have come.
    pages: Arc<AtomicUsize>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
}

impl FalseDestination {
    fn start(then: fn(&mut Voice)) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp:{}", listener.local_addr().unwrap());
        let (pages, streams) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(Vec::new())));
        let (counted, kept, main) = (pages.clone(), streams.clone(), Arc::new(Mutex::new(None)));
        std::thread::spawn(move || {
            // The test ends the streams; this thread goes with the test's process.
            for stream in listener.incoming().flatten() {
                kept.lock().unwrap().push(stream.try_clone().unwrap());
                let (counted, main) = (counted.clone(), main.clone());
                std::thread::spawn(move || serve(stream, &main, &counted, then));
            }
        });
        Self { address, pages, streams }
    }

    /// Nobody is there any more.
    fn hang_up(&self) {
        for stream in self.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// The sending half of a connection to a source.
struct Voice {
    stream: TcpStream,
    attempt: Attempt,
    sequence: u64,
}

impl Voice {
    /// Whether it could be said.
    fn say(&mut self, message: &Message) -> bool {
        let payload = message.encode().unwrap();
        let header = Header {
            kind: message.kind(),
            payload_bytes: payload.len() as u32,
            attempt: self.attempt,
            sequence: self.sequence,
            body_crc: crc32c::crc32c(&payload),
        };
        self.sequence += 1;
        self.stream.write_all(&[&header.encode()[..], &payload].concat()).is_ok()
    }
}

/// One connection. `main` is the voice of the main one, once it is there.
fn serve(mut stream: TcpStream, main: &Mutex<Option<Voice>>, pages: &AtomicUsize, then: fn(&mut Voice)) {
    let mut own = None;
    let mut bytes = [0; HEADER_BYTES];
    while stream.read_exact(&mut bytes).is_ok() {
        let header = Header::decode(&bytes).unwrap();
        let mut payload = vec![0; header.payload_bytes as usize];
        if stream.read_exact(&mut payload).is_err() {
            return;
        }
        if header.kind == FrameType::Pages {
            pages.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        let message = Message::decode(header.kind, payload).unwrap();
        let voice =
            || Some(Voice { stream: stream.try_clone().unwrap(), attempt: header.attempt, sequence: 0 });
        match message {
            Message::Hello(_) => *main.lock().unwrap() = voice(),
            Message::Join { .. } => own = voice(),
            _ => {}
        }
        let mut main = main.lock().unwrap();
        let answer = match message {
            Message::Hello(_) => Message::HelloAck(HelloAck {
                version: VERSION,
                features: vec![POSTCOPY.to_owned()],
                resume_phase: None,
                release: "test".into(),
                host: "false".into(),
                peer_timeout_ms: 5000,
                fetching: false,
            }),
            Message::Machine(_) => Message::Accepted,
            Message::Join { index } => {
                own.as_mut().unwrap().say(&Message::Joined { index });
                continue;
            }
            // There is one channel for pages, so that this ends the pass.
            Message::Barrier { pass } => {
                Message::PassDone(PassDone { pass, pages_placed: 0, bytes: 0, elapsed_us: 0 })
            }
            Message::End(_) => Message::Ready(Ready::default()),
            Message::Run => {
                let voice = main.as_mut().unwrap();
                voice.say(&Message::Running(Running::default()));
                return then(voice);
            }
            _ => continue,
        };
        if !main.as_mut().unwrap().say(&answer) {
            return;
        }
    }
}

/// Pages in RAM and outside of it, again and again, until nobody listens any more.
fn asks_for_ever(voice: &mut Voice) {
    let mut number = 0u64;
    loop {
        let pages = (0..MAX_REQUESTED_PAGES as u64).map(|n| match n % 4 {
            0 => number.wrapping_add(n) % 20_000,
            1 => u64::MAX - n,
            2 => 1 << 40,
            _ => 7,
        });
        if !voice.say(&Message::PageRequest(pages.collect())) {
            return;
        }
        number += 1;
    }
}

/// Words that are out of place, in a row.
fn babbles(voice: &mut Voice) {
    let words = [Message::Ready(Ready::default()), Message::Accepted, Message::Running(Running::default())];
    while words.iter().all(|word| voice.say(word)) {}
}

/// In postcopy, with a destination that does `then`: vmsend stays bounded, the guest's copy is held,
/// and when the other side is gone vmsend says how things stand.
fn a_destination_that(then: fn(&mut Voice)) {
    let scene = Scene::new();
    let a = scene.guest("a", "64M", 1, "fill=24M ws=1M rate=2");
    let destination = FalseDestination::start(then);
    let args = ["--mode", "postcopy", "--channels", "1", "--bwlimit", "4M", "--recover-timeout", "1s"];
    let mut send = scene.send(&a, &destination.address, &args);
    until("pages come", || (destination.pages.load(Ordering::Relaxed) > 3).then_some(()));
    let weight = Weight::of(&send);
    let before = destination.pages.load(Ordering::Relaxed);
    until("more pages come", || (destination.pages.load(Ordering::Relaxed) > before + 50).then_some(()));
    check_answers(&a);
    assert!(a.is_committed());
    weight.check();
    destination.hang_up();
    until("it has no connection", || {
        destination.hang_up();
        (!send.is_running()).then_some(())
    });
    let end = send.end();
    assert!([6, 7].contains(&end.code), "{end:?}");
    assert!(a.is_committed());
    // What is held is whole: on the operator's word it goes on.
    a.vmctl(&["resume", "--force", "--peer-fenced"]).expect(0, &[]);
    check_beats(&[&a]);
    check_alive(&[&a]);
}

#[test]
fn a_destination_that_asks_for_pages_for_ever() {
    if kvm() {
        a_destination_that(asks_for_ever);
    }
}

#[test]
fn a_destination_that_babbles_while_the_guest_is_there() {
    if kvm() {
        a_destination_that(babbles);
    }
}

/// A destination that says much before it is its turn is given up, and the guest goes on.
#[test]
fn a_destination_that_asks_for_pages_before_the_guest_is_there() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let a = scene.big("a");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", listener.local_addr().unwrap());
    let flood = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut bytes = [0; HEADER_BYTES];
        stream.read_exact(&mut bytes).unwrap();
        let attempt = Header::decode(&bytes).unwrap().attempt;
        asks_for_ever(&mut Voice { stream, attempt, sequence: 0 });
    });
    let end = scene.send(&a, &address, &["--mode", "postcopy", "--peer-timeout", "2s"]).end();
    end.expect(5, &["the source has the guest"]);
    flood.join().unwrap();
    a.await_running();
    check_beats(&[&a]);
}
