//! What may happen next in a world of the model.

use super::*;

/// Takes what may happen next: whether it is a fault, and what it does.
type Branch<'a> = dyn FnMut(bool, &dyn Fn(&mut World)) + 'a;

impl World {
    /// Every world that may follow, and whether it takes a fault to get there.
    pub(super) fn successors(&self, mutant: Mutant, max_faults: u8) -> Vec<(World, bool)> {
        let mut next = Vec::new();
        let mut branch = |fault: bool, change: &dyn Fn(&mut World)| {
            if fault && self.faults == max_faults {
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
}
