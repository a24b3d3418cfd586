//! The work of one pass, handed out to the bulk channels.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::memory::PageRun;

/// A piece of work: a few hundred pages that go out in one frame.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chunk {
    /// Pages to read, test for zero and send.
    pub pages: Vec<PageRun>,
    /// Pages known to be zero.
    pub zero: Vec<PageRun>,
}

/// What a channel does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Job {
    /// Send these pages.
    Send(Chunk),
    /// All of this pass has been handed out: say so on the channel.
    Barrier(u32),
    /// It is over.
    Stop,
}

/// What became of a chunk that was to be queued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// It is in the queue.
    Done,
    /// There was no room for it in time: here it is again.
    Full(Chunk),
    /// The queue was stopped.
    Stopped,
}

/// A bounded queue of chunks, ended pass by pass. Each worker sees each pass's end exactly once.
#[derive(Debug)]
pub struct PassQueue {
    state: Mutex<State>,
    changed: Condvar,
    limit: usize,
}

#[derive(Debug, Default)]
struct State {
    chunks: VecDeque<Chunk>,
    sealed: u32,
    stopped: bool,
}

impl PassQueue {
    /// A queue that holds at most `limit` chunks.
    pub fn new(limit: usize) -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), limit }
    }

    /// Adds a chunk, waiting while the queue is full; gives it back when it still is after `patience`.
    pub fn push(&self, chunk: Chunk, patience: Duration) -> Pushed {
        let full = |state: &mut State| state.chunks.len() >= self.limit && !state.stopped;
        let waited = self.changed.wait_timeout_while(self.lock(), patience, full);
        let (mut state, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        if state.stopped {
            return Pushed::Stopped;
        }
        if waited.timed_out() {
            return Pushed::Full(chunk);
        }
        state.chunks.push_back(chunk);
        self.changed.notify_all();
        Pushed::Done
    }

    /// Ends pass `pass` (counted from 1): once the chunks are out, every worker gets its barrier.
    pub fn seal(&self, pass: u32) {
        self.lock().sealed = pass;
        self.changed.notify_all();
    }

    /// Drops what is queued and sends every worker home.
    pub fn stop(&self) {
        let mut state = self.lock();
        state.stopped = true;
        state.chunks.clear();
        self.changed.notify_all();
    }

    /// The next job of a worker whose last barrier was that of pass `*pass`.
    pub fn next(&self, pass: &mut u32) -> Job {
        let mut state = self.lock();
        loop {
            if state.stopped {
                return Job::Stop;
            }
            if let Some(chunk) = state.chunks.pop_front() {
                self.changed.notify_all();
                return Job::Send(chunk);
            }
            if state.sealed > *pass {
                *pass = state.sealed;
                return Job::Barrier(*pass);
            }
            state = self.wait(state);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::PageIndex;

    const LONG: Duration = Duration::from_secs(60);

    fn chunk(first: u64) -> Chunk {
        Chunk { pages: vec![PageRun { first: PageIndex(first), pages: 1 }], zero: vec![] }
    }

    #[test]
    fn every_chunk_goes_out_once_and_every_worker_sees_every_barrier() {
        let queue = PassQueue::new(2);
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..3)
                .map(|_| {
                    scope.spawn(|| {
                        let (mut pass, mut seen) = (0, Vec::new());
                        loop {
                            match queue.next(&mut pass) {
                                Job::Stop => return seen,
                                job => seen.push(job),
                            }
                        }
                    })
                })
                .collect();
            for pass in 1..=2 {
                (0..10).for_each(|n| assert_eq!(queue.push(chunk(n), LONG), Pushed::Done));
                queue.seal(pass);
                while !queue.lock().chunks.is_empty() {
                    std::thread::yield_now();
                }
            }
            // A worker that has not seen the last barrier yet must see it before it is stopped.
            let drained = || queue.lock().sealed == 2;
            assert!(drained());
            let all: Vec<Job> = {
                let barriers = |jobs: &[Job]| jobs.iter().filter(|j| matches!(j, Job::Barrier(_))).count();
                let mut pass = 1;
                assert_eq!(queue.next(&mut pass), Job::Barrier(2));
                queue.stop();
                let jobs: Vec<Vec<Job>> = workers.into_iter().map(|w| w.join().unwrap()).collect();
                assert!(jobs.iter().all(|j| barriers(j) <= 2));
                jobs.into_iter().flatten().collect()
            };
            assert_eq!(all.iter().filter(|j| matches!(j, Job::Send(_))).count(), 20);
            assert_eq!(queue.push(chunk(0), LONG), Pushed::Stopped);
        });
    }

    #[test]
    fn a_full_queue_gives_the_chunk_back() {
        let queue = PassQueue::new(1);
        assert_eq!(queue.push(chunk(1), Duration::ZERO), Pushed::Done);
        assert_eq!(queue.push(chunk(2), Duration::from_millis(1)), Pushed::Full(chunk(2)));
        assert_eq!(queue.next(&mut 0), Job::Send(chunk(1)));
        assert_eq!(queue.push(chunk(2), Duration::ZERO), Pushed::Done);
    }
}
