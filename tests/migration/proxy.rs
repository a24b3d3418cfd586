//! The link between two hosts, in the test's hand: a forwarder that knows the frames of the stream
//! and holds, changes, repeats or loses what it is told to.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use serde_json::Value;
use vmferry::wire::{FrameType, HEADER_BYTES, Header, Message, PAGES_HEAD_BYTES};

use super::program::PATIENCE;

/// Which way a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Way {
    ToDest,
    ToSource,
}

/// Which frames are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    Frame(FrameType),
    /// PING or PONG on the main channel. Which of them a side says depends on who falls silent first: a side
    /// that answers all the time has no cause to ask.
    SignOfLife,
}

impl From<FrameType> for Kind {
    fn from(kind: FrameType) -> Self {
        Self::Frame(kind)
    }
}

/// A frame as it comes by.
#[derive(Clone, Copy)]
struct Passing {
    way: Way,
    header: Header,
    /// Its connection's first frame was a HELLO, or an answer to one.
    main: bool,
    /// Its receiver has not hung up: no rule is spent on what nobody reads.
    heard: bool,
}

impl Passing {
    fn is(&self, way: Way, kind: Kind) -> bool {
        let sign = || self.main && matches!(self.header.kind, FrameType::Ping | FrameType::Pong);
        self.way == way && if let Kind::Frame(kind) = kind { self.header.kind == kind } else { sign() }
    }
}

/// Makes another payload of one.
type Change = dyn FnOnce(&[u8]) -> Vec<u8> + Send;

/// What happens to a frame, once.
enum Act {
    /// It waits until the test lets it go on.
    Hold,
    /// It is lost, and the link with it.
    Cut,
    /// Its payload is changed.
    Rewrite(Box<Change>),
    /// Another message takes its place.
    Replace(Message),
    /// It comes twice.
    Repeat,
}

struct Rule {
    way: Way,
    kind: Kind,
    act: Act,
    /// The number that the test knows it by.
    id: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Catch {
    Caught,
    LetGo,
    Lost,
}

#[derive(Default)]
struct State {
    rules: Vec<Rule>,
    catches: HashMap<u64, Catch>,
    next_id: u64,
    /// Grows with each cut; connections of an older one are dead.
    life: u64,
    down: bool,
    frozen: bool,
    connections: Vec<TcpStream>,
    passed: HashMap<(Way, Kind), u64>,
    over: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// The link. Gone with everything on it when dropped.
pub struct Proxy {
    /// DEST for vmsend.
    pub address: String,
    shared: Arc<Shared>,
    port: u16,
}

/// A frame that waits in the link.
pub struct Held<'a> {
    proxy: &'a Proxy,
    id: u64,
}

impl Proxy {
    /// A link to `dest` (`tcp:HOST:PORT`).
    pub fn to(dest: &str) -> Self {
        let dest = dest.strip_prefix("tcp:").unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        std::thread::spawn(move || theirs.serve(&listener, &dest));
        Self { address: format!("tcp:127.0.0.1:{port}"), shared, port }
    }

    /// The next frame of that kind is held.
    pub fn hold(&self, way: Way, kind: FrameType) -> Held<'_> {
        Held { proxy: self, id: self.rule(way, kind, Act::Hold) }
    }

    /// The next frame of that kind is lost, and the link is down from then on.
    pub fn cut_at(&self, way: Way, kind: FrameType) {
        self.rule(way, kind, Act::Cut);
    }

    /// The JSON of the next frame of that kind is changed.
    pub fn rewrite(&self, way: Way, kind: FrameType, change: impl FnOnce(&mut Value) + Send + 'static) {
        self.rewrite_bytes(way, kind, |payload| {
            let mut value = serde_json::from_slice(payload).unwrap();
            change(&mut value);
            serde_json::to_vec(&value).unwrap()
        });
    }

    /// The payload of the next frame of that kind is changed.
    pub fn rewrite_bytes(
        &self,
        way: Way,
        kind: FrameType,
        change: impl FnOnce(&[u8]) -> Vec<u8> + Send + 'static,
    ) {
        self.rule(way, kind, Act::Rewrite(Box::new(change)));
    }

    /// Another message takes the place of the next frame of that kind.
    pub fn replace(&self, way: Way, kind: impl Into<Kind>, message: Message) {
        self.rule(way, kind, Act::Replace(message));
    }

    /// The next frame of that kind comes twice.
    pub fn repeat(&self, way: Way, kind: FrameType) {
        self.rule(way, kind, Act::Repeat);
    }

    /// The link is down from now on: connections end, new ones are closed at once.
    pub fn cut(&self) {
        self.shared.cut(&mut self.shared.lock());
    }

    /// Waits until a frame has been met that cuts the link.
    pub fn await_cut(&self) {
        self.shared.await_state("the link is cut", |state| state.down);
    }

    /// The link is up again.
    pub fn heal(&self) {
        let mut state = self.shared.lock();
        (state.down, state.frozen) = (false, false);
        self.shared.changed.notify_all();
    }

    /// Nothing passes any more, and nobody is told: a dead link.
    pub fn freeze(&self) {
        self.shared.lock().frozen = true;
    }

    /// How many frames of that kind have passed.
    pub fn passed(&self, way: Way, kind: impl Into<Kind>) -> u64 {
        self.shared.lock().passed.get(&(way, kind.into())).copied().unwrap_or(0)
    }

    /// Waits until a frame of that kind has passed.
    pub fn await_passed(&self, way: Way, kind: FrameType) {
        self.shared
            .await_state("the frame has passed", |state| state.passed.contains_key(&(way, kind.into())));
    }

    fn rule(&self, way: Way, kind: impl Into<Kind>, act: Act) -> u64 {
        let mut state = self.shared.lock();
        state.next_id += 1;
        let id = state.next_id;
        state.rules.push(Rule { way, kind: kind.into(), act, id });
        id
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.over = true;
        self.shared.cut(&mut state);
        drop(state);
        // Wakes the listener.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

impl Held<'_> {
    /// Waits until the frame is there.
    pub fn caught(self) -> Self {
        let id = self.id;
        self.proxy.shared.await_state("the frame comes by", |s| s.catches.contains_key(&id));
        self
    }

    /// Lets the frame go on.
    pub fn pass(self) {}

    /// Loses the frame, and its connection with all that is on it; others stay.
    pub fn lose(self) {
        self.proxy.shared.lock().catches.insert(self.id, Catch::Lost);
        self.proxy.shared.changed.notify_all();
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut state = self.proxy.shared.lock();
        state.rules.retain(|rule| rule.id != self.id);
        if state.catches.get(&self.id) != Some(&Catch::Lost) {
            state.catches.insert(self.id, Catch::LetGo);
        }
        self.proxy.shared.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn await_state(&self, what: &str, test: impl Fn(&State) -> bool) {
        let (_state, waited) = self
            .changed
            .wait_timeout_while(self.lock(), PATIENCE, |state| !test(state))
            .unwrap_or_else(|e| e.into_inner());
        assert!(!waited.timed_out(), "never: {what}");
    }

    fn cut(&self, state: &mut State) {
        state.down = true;
        state.life += 1;
        for connection in state.connections.drain(..) {
            let _ = connection.shutdown(Shutdown::Both);
        }
        self.changed.notify_all();
    }

    fn serve(self: Arc<Self>, listener: &TcpListener, dest: &str) {
        for caller in listener.incoming() {
            let Ok(caller) = caller else { continue };
            let mut state = self.lock();
            if state.over {
                return;
            }
            if state.down {
                continue; // closed at once
            }
            let Ok(callee) = TcpStream::connect(dest) else { continue };
            let _ = (caller.set_nodelay(true), callee.set_nodelay(true));
            let life = state.life;
            let left = Arc::new(AtomicBool::new(false));
            for (from, to, way) in [(&caller, &callee, Way::ToDest), (&callee, &caller, Way::ToSource)] {
                let (Ok(from), Ok(to)) = (from.try_clone(), to.try_clone()) else { continue };
                let (shared, left) = (self.clone(), left.clone());
                std::thread::spawn(move || shared.forward(from, to, way, life, &left));
            }
            state.connections.extend([caller, callee]);
        }
    }

    /// Passes frames on until either end closes, or the link is cut. `left` is set when the destination has
    /// hung up: what is still under way to it is of no account.
    fn forward(&self, mut from: TcpStream, mut to: TcpStream, way: Way, life: u64, left: &AtomicBool) {
        let mut main = None;
        loop {
            let mut bytes = vec![0; HEADER_BYTES];
            let Some(header) = read_all(&mut from, &mut bytes).then(|| header(&bytes)).flatten() else {
                break;
            };
            bytes.resize(HEADER_BYTES + header.payload_bytes as usize, 0);
            if !read_all(&mut from, &mut bytes[HEADER_BYTES..]) {
                break;
            }
            let main = *main.get_or_insert(matches!(header.kind, FrameType::Hello | FrameType::HelloAck));
            let heard = way == Way::ToSource || !left.load(Ordering::SeqCst);
            let passing = Passing { way, header, main, heard };
            let Some(bytes) = self.decide(passing, bytes, life) else {
                let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
                return;
            };
            if to.write_all(&bytes).is_err() {
                break;
            }
            let mut state = self.lock();
            for kind in [header.kind.into(), Kind::SignOfLife].into_iter().filter(|k| passing.is(way, *k)) {
                *state.passed.entry((way, kind)).or_default() += 1;
            }
            drop(state);
            self.changed.notify_all();
        }
        if way == Way::ToSource {
            left.store(true, Ordering::SeqCst);
        }
        let _ = to.shutdown(Shutdown::Write);
    }

    /// What becomes of a frame; `None` when it is lost with its connection.
    fn decide(&self, passing: Passing, bytes: Vec<u8>, life: u64) -> Option<Vec<u8>> {
        let (header, mut state) = (passing.header, self.lock());
        let rule = state.rules.iter().position(|r| passing.heard && passing.is(r.way, r.kind));
        let rule = rule.map(|at| state.rules.remove(at));
        let bytes = match rule {
            None => bytes,
            Some(Rule { act: Act::Cut, .. }) => {
                self.cut(&mut state);
                return None;
            }
            Some(Rule { act: Act::Rewrite(change), .. }) => {
                rewritten(header, header.kind, &change(&bytes[HEADER_BYTES..]))
            }
            Some(Rule { act: Act::Replace(message), .. }) => {
                rewritten(header, message.kind(), &message.encode().unwrap())
            }
            Some(Rule { act: Act::Repeat, .. }) => [bytes.clone(), bytes].concat(),
            Some(Rule { act: Act::Hold, id, .. }) => {
                state.catches.insert(id, Catch::Caught);
                self.changed.notify_all();
                state = self
                    .changed
                    .wait_while(state, |s| s.life == life && s.catches.get(&id) == Some(&Catch::Caught))
                    .unwrap_or_else(|e| e.into_inner());
                if state.catches.get(&id) == Some(&Catch::Lost) {
                    return None;
                }
                bytes
            }
        };
        state =
            self.changed.wait_while(state, |s| s.frozen && s.life == life).unwrap_or_else(|e| e.into_inner());
        (state.life == life).then_some(bytes)
    }
}

fn read_all(from: &mut TcpStream, bytes: &mut [u8]) -> bool {
    from.read_exact(bytes).is_ok()
}

fn header(bytes: &[u8]) -> Option<Header> {
    Header::decode(bytes.try_into().ok()?).ok()
}

fn rewritten(header: Header, kind: FrameType, payload: &[u8]) -> Vec<u8> {
    // The data of PAGES has no checksum.
    let checked = match (kind, payload) {
        (FrameType::Pages, [a, b, c, d, ..]) => {
            let runs = u32::from_le_bytes([*a, *b, *c, *d]) as usize;
            &payload[..payload.len().min(PAGES_HEAD_BYTES + 16 * runs)]
        }
        _ => payload,
    };
    let body_crc = crc32c::crc32c(checked);
    let header = Header { kind, payload_bytes: payload.len() as u32, body_crc, ..header };
    [&header.encode()[..], payload].concat()
}
