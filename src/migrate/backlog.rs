//! How much of what has come on a channel may wait for the conductor. While it is busy (a digest of all
//! RAM takes seconds) a peer could otherwise fill this process with messages.

use std::sync::mpsc::{Receiver, Sender, channel};

/// The most messages that wait. An honest peer waits for an answer after a few; one of a hostile peer may
/// have 64 MiB.
const MOST_WAITING: usize = 4;

/// The reader's end.
#[derive(Debug)]
pub struct Backlog {
    give: Sender<()>,
    back: Receiver<()>,
    waiting: usize,
}

/// A message's place, free again when the message is dropped with it.
#[derive(Debug)]
pub struct Place(Sender<()>);

impl Backlog {
    /// With nothing in it.
    pub fn new() -> Self {
        let (give, back) = channel();
        Self { give, back, waiting: 0 }
    }

    /// A place for a message that has come; waits until there is one.
    pub fn place(&mut self) -> Place {
        self.waiting -= self.back.try_iter().count();
        // An error cannot be: `give` is here.
        while self.waiting >= MOST_WAITING && self.back.recv().is_ok() {
            self.waiting -= 1;
        }
        self.waiting += 1;
        Place(self.give.clone())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = self.0.send(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_waits_for_its_conductor() {
        let (sender, conductor) = channel();
        let (told, progress) = channel();
        let reader = std::thread::spawn(move || {
            let mut backlog = Backlog::new();
            for n in 0..MOST_WAITING * 3 {
                let place = backlog.place();
                let _ = told.send(n);
                if sender.send(place).is_err() {
                    return;
                }
            }
        });
        let mut had = 0;
        for _ in 0..MOST_WAITING * 3 {
            drop(conductor.recv().unwrap());
            had += 1;
            // Those that wait, and the one that this has just made room for.
            let most = progress.try_iter().last().unwrap_or(0);
            assert!(most < had + MOST_WAITING, "{most}");
        }
        reader.join().unwrap();
    }
}
