//! The recovery explored: every order of faults, deliveries, losses of either kind of channel,
//! connections that overtake each other, and crashes of either mover, breadth first, over the very
//! decisions that production makes ([`Owed`], [`Wanted`], [`Heard`], [`Ownership`]).

use std::collections::{HashMap, HashSet, VecDeque};

use super::heard::Heard;
use super::owed::Owed;
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
        newest: 1,
        faults: 0,
    }
}

/// Takes what may happen next: whether it is a fault, and what it does.
type Branch<'a> = dyn FnMut(bool, &dyn Fn(&mut World)) + 'a;

impl World {
    fn is_wrong(&self) -> bool {
        let lacks = self.mem[1..].iter().any(|mem| *mem != Mem::Data);
        self.mem[1..].contains(&Mem::Zero) || (self.released && lacks) || self.regressed
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
            let runs = owed.map(|owed| owed.answer(*request)).unwrap_or_default();
            self.send(runs);
        }
    }

    /// The source hears a message of its connection.
    fn hear(&mut self, msg: Msg, mutant: Mutant) {
        let link = self.link();
        let Some(s) = &mut self.sender else { return };
        match msg {
            Msg::Ack(fetching) => {
                s.heard = Heard::new(fetching, TOTAL);
                self.released |= !fetching;
            }
            Msg::Done => self.released = true,
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

    /// Every world that may follow, and whether it takes a fault to get there.
    fn successors(&self, mutant: Mutant) -> Vec<(World, bool)> {
        let mut next = Vec::new();
        let mut branch = |fault: bool, change: &dyn Fn(&mut World)| {
            if fault && self.faults == MAX_FAULTS {
                return;
            }
            let mut world = self.clone();
            world.faults += u8::from(fault);
            change(&mut world);
            if world != *self {
                next.push((world, fault));
            }
        };
        if let Some(&(epoch, msg)) = self.to_source.first() {
            branch(false, &|w| {
                w.to_source.remove(0);
                if w.sender.as_ref().is_some_and(|s| s.link == Some(epoch)) {
                    w.hear(msg, mutant);
                }
            });
        }
        for (i, &epoch) in self.hellos.iter().enumerate() {
            branch(false, &|w| {
                w.hellos.remove(i);
                w.greet(epoch, mutant);
            });
            branch(true, &|w| {
                w.hellos.remove(i);
            });
            // It comes twice.
            branch(true, &|w| w.greet(epoch, mutant));
        }
        self.at_the_source(&mut branch);
        self.at_the_destination(&mut branch, mutant);
        next
    }

    fn at_the_source(&self, branch: &mut Branch) {
        let Some(s) = &self.sender else {
            // `vmsend --resume`
            let heard = Heard::new(false, TOTAL);
            branch(false, &|w| {
                w.sender = Some(Sender { link: None, heard: heard.clone(), owed: None, serving: false });
            });
            return;
        };
        branch(true, &|w| w.sender = None);
        match s.link {
            Some(epoch) => {
                branch(true, &|w| w.sender.as_mut().unwrap().link = None);
                if self.link() != Some(epoch) && !self.hellos.contains(&epoch) {
                    branch(false, &|w| w.sender.as_mut().unwrap().link = None);
                }
            }
            None if self.receiver.is_some() => branch(false, &|w| {
                let epoch = w.source.reattach().unwrap().epoch;
                let s = w.sender.as_mut().unwrap();
                (s.link, s.serving, s.heard) = (Some(epoch), false, Heard::new(false, TOTAL));
                w.hellos.push(epoch);
            }),
            None => {}
        }
        if s.serving && s.link.is_some() {
            branch(false, &|w| {
                let runs = w.sender.as_mut().and_then(|s| s.owed.as_mut()).map(Owed::push);
                w.send(runs.unwrap_or_default());
            });
        }
    }

    fn at_the_destination(&self, branch: &mut Branch, mutant: Mutant) {
        let Some(r) = &self.receiver else {
            // `vmrecv --resume`: all who wait look again.
            branch(false, &|w| {
                let missing = TOTAL - w.marks.count();
                let wanted = Wanted::new(w.marks.clone(), missing);
                w.receiver =
                    Some(Receiver { wanted, link: None, channel: None, placing: None, zeroing: None });
                if let Vcpu::Waits(number) = w.vcpu {
                    let there = w.mem[number as usize] != Mem::Absent;
                    w.vcpu = if there { Vcpu::Runs } else { Vcpu::Faults(number) };
                }
            });
            return;
        };
        if r.wanted.missing() > 0 {
            for number in (0..3).filter(|n| self.vcpu == Vcpu::Runs && self.mem[*n as usize] == Mem::Absent) {
                branch(false, &|w| w.vcpu = Vcpu::Faults(number));
            }
            branch(true, &|w| {
                w.lose_at_dest();
                w.marks = w.receiver.take().unwrap().wanted.marks().clone();
            });
        }
        if let Vcpu::Faults(number) = self.vcpu {
            branch(false, &|w| w.read_fault(number));
        }
        if let Some(number) = r.zeroing {
            branch(false, &|w| {
                w.receiver.as_mut().unwrap().zeroing = None;
                w.put(number, Mem::Zero);
            });
        }
        if r.link.is_some() {
            branch(true, &|w| w.lose_at_dest());
            if self.sender.as_ref().and_then(|s| s.link) != r.link {
                branch(false, &|w| w.lose_at_dest());
            }
        }
        if r.channel.is_some() && !self.broken {
            branch(true, &|w| {
                w.broken = true;
                w.pages.clear();
            });
        }
        if self.broken && r.channel.is_some() && r.wanted.missing() > 0 {
            branch(false, &|w| match mutant {
                Mutant::ChannelLossIgnored => w.receiver.as_mut().unwrap().channel = None,
                _ => w.lose_at_dest(),
            });
        }
        match r.placing {
            Some(number) => branch(false, &|w| {
                w.receiver.as_mut().unwrap().placing = None;
                match mutant {
                    Mutant::MarkedFirst => w.put(number, Mem::Data),
                    _ => w.mark(number, mutant),
                }
            }),
            // Pages overtake each other: they come on several channels.
            None => (0..self.pages.len()).for_each(|i| branch(false, &|w| w.take_page(i, mutant))),
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

/// Explores everything; gives the number of states, and of those from which the guest does not become
/// whole unless something more goes wrong.
fn explore(mutant: Mutant) -> Result<(usize, usize), Box<World>> {
    let mut index = HashMap::from([(start(), 0usize)]);
    let mut states = vec![start()];
    let mut before: Vec<Vec<usize>> = vec![vec![]];
    let mut queue = VecDeque::from([0]);
    while let Some(i) = queue.pop_front() {
        if states[i].is_wrong() {
            return Err(Box::new(states[i].clone()));
        }
        if states[i].is_whole() {
            continue;
        }
        for (next, fault) in states[i].clone().successors(mutant) {
            let j = *index.entry(next.clone()).or_insert_with(|| {
                states.push(next);
                before.push(vec![]);
                queue.push_back(states.len() - 1);
                states.len() - 1
            });
            if !fault {
                before[j].push(i);
            }
        }
    }
    let mut good: HashSet<usize> = (0..states.len()).filter(|i| states[*i].is_whole()).collect();
    let mut queue: Vec<usize> = good.iter().copied().collect();
    while let Some(i) = queue.pop() {
        queue.extend(before[i].iter().filter(|j| good.insert(**j)));
    }
    Ok((states.len(), states.len() - good.len()))
}

#[test]
fn the_guest_becomes_whole_whatever_is_lost_and_never_sees_a_wrong_page() {
    let (states, stuck) = explore(Mutant::None).unwrap_or_else(|world| panic!("wrong: {world:#?}"));
    println!("{states} states explored");
    assert!(states > 1000, "only {states} states: the exploration is not one");
    assert_eq!(stuck, 0, "states from which the guest does not become whole");
}

#[test]
fn every_broken_rule_of_the_recovery_is_noticed() {
    for mutant in [
        Mutant::MarkedFirst,
        Mutant::OwedIsKept,
        Mutant::StaleTaken,
        Mutant::DoneEarly,
        Mutant::ChannelLossIgnored,
    ] {
        let noticed = explore(mutant).map_or(true, |(_, stuck)| stuck > 0);
        assert!(noticed, "{mutant:?} went unnoticed");
    }
}
