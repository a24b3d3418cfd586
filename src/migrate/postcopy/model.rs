//! The recovery explored: every order of faults, deliveries, losses of either kind of channel,
//! connections that overtake each other, and crashes of either mover, breadth first, over the very
//! decisions that production makes ([`Owed`], [`Wanted`], [`Heard`], [`Ownership`]).

mod explore;
mod next;

use super::heard::Heard;
use super::owed::{Answer, Owed};
use super::wanted::{Fault, Wanted};
use crate::memory::{PageIndex, PageRun, PageSet};
use crate::switchover::{Attempt, Ownership, SessionId};
use crate::wire::PageBitmap;

const SESSION: SessionId = SessionId([7; 16]);
/// Page 0 is a hole of the source's, 1 and 2 have data and are missing, the others of the word are there.
const TOTAL: u64 = 64;
const MISSING: u64 = 0b110;
/// How much may go wrong in one history.
const MAX_FAULTS: u8 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Mem {
    Absent,
    Data,
    Zero,
}

/// The one vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Vcpu {
    Runs,
    /// It waits, and nobody has read that yet.
    Faults(u64),
    /// A receiver has read it.
    Waits(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Msg {
    Ack(bool),
    Request(u64),
    Received(u64),
    Done,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Sender {
    link: Option<u32>,
    heard: Heard,
    owed: Option<Owed>,
    serving: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Receiver {
    wanted: Wanted<PageSet, ()>,
    link: Option<u32>,
    channel: Option<u32>,
    /// Between its two halves: the page is placed, then marked.
    placing: Option<u64>,
    zeroing: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    source: Ownership,
    dest: Ownership,
    sender: Option<Sender>,
    receiver: Option<Receiver>,
    /// With the destination's vmrun, while it has no receiver.
    marks: PageSet,
    mem: [Mem; 3],
    vcpu: Vcpu,
    hellos: Vec<u32>,
    to_source: Vec<(u32, Msg)>,
    pages: Vec<(u32, u64)>,
    /// The page channel has broken, and main has not.
    broken: bool,
    released: bool,
    /// A connection has ended a newer one.
    regressed: bool,
    /// The source takes the destination for a liar.
    accused: bool,
    newest: u32,
    faults: u8,
}

/// Rules broken on purpose: the exploration must notice each of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutant {
    None,
    /// A page is marked before it is placed.
    MarkedFirst,
    /// What is owed is not made anew from RECEIVED.
    OwedIsKept,
    /// A connection of an older epoch is taken.
    StaleTaken,
    /// DONE when nobody waits, although pages are missing.
    DoneEarly,
    /// A page channel that is lost is no lost link.
    ChannelLossIgnored,
}

fn page(first: u64) -> PageRun {
    PageRun { first: PageIndex(first), pages: 1 }
}

fn start() -> World {
    let attempt = Attempt { session: SESSION, epoch: 1 };
    let (mut source, mut dest) = (Ownership::booted(), Ownership::empty());
    source.attach(SESSION).unwrap();
    source.fence(attempt, "b").unwrap();
    dest.prepare(attempt).unwrap();
    dest.promise(attempt).unwrap();
    dest.run(attempt).unwrap();
    let missing = PageSet::from_words(vec![MISSING], TOTAL);
    let marks = PageSet::from_words(vec![!MISSING], TOTAL);
    let owed = Owed::new(missing.clone(), PageSet::new(TOTAL)).with_frames_of(1);
    let heard = Heard::new(false, TOTAL);
    let wanted = Wanted::new(marks.clone(), missing.count());
    World {
        source,
        dest,
        sender: Some(Sender { link: Some(1), heard, owed: Some(owed), serving: true }),
        receiver: Some(Receiver { wanted, link: Some(1), channel: Some(1), placing: None, zeroing: None }),
        marks,
        mem: [Mem::Absent; 3],
        vcpu: Vcpu::Runs,
        hellos: vec![],
        to_source: vec![],
        pages: vec![],
        broken: false,
        released: false,
        regressed: false,
        accused: false,
        newest: 1,
        faults: 0,
    }
}

impl World {
    /// The rule that this world breaks.
    fn broken_rule(&self) -> Option<&'static str> {
        let lacks = self.mem[1..].iter().any(|mem| *mem != Mem::Data);
        let rules = [
            (self.source.may_run(), "S2: the source may run again"),
            (!self.dest.may_run(), "S3: the destination runs and does not own the guest"),
            (self.released && lacks, "S5: the source has let go of pages that are missing"),
            (self.regressed, "S6: a stale connection was taken"),
            (self.accused, "an honest destination is not believed"),
            (self.mem[1..].contains(&Mem::Zero), "D1: the guest sees a page that is not its own"),
        ];
        rules.iter().find(|(broken, _)| *broken).map(|(_, rule)| *rule)
    }

    fn is_whole(&self) -> bool {
        self.released
            && self.vcpu == Vcpu::Runs
            && self.receiver.as_ref().is_some_and(|r| r.wanted.missing() == 0)
    }

    fn link(&self) -> Option<u32> {
        self.receiver.as_ref().and_then(|r| r.link)
    }

    fn say(&mut self, msg: Msg) {
        if let Some(epoch) = self.link() {
            self.to_source.push((epoch, msg));
        }
    }

    fn lose_at_dest(&mut self) {
        if let Some(r) = &mut self.receiver {
            (r.link, r.channel) = (None, None);
        }
        self.to_source.clear();
    }

    /// Pages go out on the connection that stands.
    fn send(&mut self, runs: Vec<PageRun>) {
        let Some(epoch) = self.sender.as_ref().and_then(|s| s.link) else { return };
        if !self.broken {
            self.pages.extend(
                runs.iter().flat_map(|r| r.first.0..r.first.0 + r.pages).map(|number| (epoch, number)),
            );
        }
    }

    fn answer(&mut self, requests: &[u64]) {
        for request in requests {
            let owed = self.sender.as_mut().and_then(|s| s.owed.as_mut());
            let Answer { soon, rest, .. } = owed.map(|owed| owed.answer(*request)).unwrap_or_default();
            self.send([soon, rest].concat());
        }
    }

    /// The source hears a message of its connection.
    fn hear(&mut self, msg: Msg, mutant: Mutant) {
        let link = self.link();
        let Some(s) = &mut self.sender else { return };
        match msg {
            Msg::Ack(fetching) => {
                s.heard = Heard::new(fetching, TOTAL);
                if !fetching {
                    self.release(mutant);
                }
            }
            Msg::Done => self.release(mutant),
            Msg::Request(number) => {
                let now = s.heard.requested(vec![number]);
                self.answer(&now);
            }
            Msg::Received(word) => s.heard.received(&PageBitmap { first: 0, words: vec![word] }),
        }
        let Some(s) = &mut self.sender else { return };
        let Some(beginning) = s.heard.whole().expect("the destination keeps to the protocol") else { return };
        if s.link != link {
            // The channels cannot be opened.
            s.link = None;
            return;
        }
        let before = s.owed.take();
        self.accused |= mutant != Mutant::DoneEarly
            && before.as_ref().is_some_and(|before| before.unsent_of(&beginning.received) > 0);
        s.owed = match before {
            Some(before) if mutant == Mutant::OwedIsKept => Some(before),
            before => Some(Owed::anew(&beginning.received, before).with_frames_of(1)),
        };
        s.serving = true;
        self.broken = false;
        if let Some(r) = &mut self.receiver {
            r.channel = link;
        }
        self.answer(&beginning.requests);
    }

    /// The destination says that it has everything: the source believes it, unless that cannot be.
    fn release(&mut self, mutant: Mutant) {
        let owed = self.sender.as_ref().and_then(|s| s.owed.as_ref());
        match owed.is_some_and(|owed| owed.unsent() > 0) {
            // Rightly: it ends, and the next one cannot know.
            true if mutant == Mutant::DoneEarly => self.sender = None,
            true => self.accused = true,
            false => self.released = true,
        }
    }

    /// HELLO with this epoch reaches the destination.
    fn greet(&mut self, epoch: u32, mutant: Mutant) {
        if self.receiver.is_none() {
            return;
        }
        let renewed = self.dest.renew(Attempt { session: SESSION, epoch });
        if renewed.is_err() && mutant != Mutant::StaleTaken {
            return;
        }
        self.regressed |= epoch < self.newest;
        self.newest = epoch;
        self.lose_at_dest();
        let Some(r) = &mut self.receiver else { return };
        r.link = Some(epoch);
        let missing = r.wanted.missing();
        let word = r.wanted.marks().words()[0];
        let waits: Vec<u64> = r.wanted.waits().map(|(number, ())| number).collect();
        self.say(Msg::Ack(missing > 0));
        if missing > 0 {
            waits.into_iter().for_each(|number| self.say(Msg::Request(number)));
            self.say(Msg::Received(word));
        }
    }

    fn put(&mut self, number: u64, mem: Mem) {
        if self.mem[number as usize] == Mem::Absent {
            self.mem[number as usize] = mem;
        }
        if self.vcpu == Vcpu::Faults(number) || self.vcpu == Vcpu::Waits(number) {
            self.vcpu = Vcpu::Runs;
        }
    }

    fn mark(&mut self, number: u64, mutant: Mutant) {
        let Some(r) = &mut self.receiver else { return };
        let arrival = r.wanted.arrived(number);
        let calm = r.wanted.waits().count() == 0;
        if arrival.is_last {
            // Nothing is watched any more: whoever waits looks again.
            self.vcpu = Vcpu::Runs;
        }
        if arrival.is_last || (mutant == Mutant::DoneEarly && calm) {
            self.say(Msg::Done);
        }
    }

    fn read_fault(&mut self, number: u64) {
        let Some(r) = &mut self.receiver else { return };
        self.vcpu = Vcpu::Waits(number);
        match r.wanted.fault(number, ()) {
            Fault::Ask => self.say(Msg::Request(number)),
            Fault::Asked => {}
            Fault::Present => r.zeroing = Some(number),
        }
    }

    fn take_page(&mut self, i: usize, mutant: Mutant) {
        let (epoch, number) = self.pages.remove(i);
        let Some(r) = &mut self.receiver else { return };
        if r.channel != Some(epoch) || r.wanted.lacking(page(number)).is_empty() {
            return;
        }
        r.placing = Some(number);
        match mutant {
            Mutant::MarkedFirst => self.mark(number, mutant),
            _ => self.put(number, Mem::Data),
        }
    }
}
