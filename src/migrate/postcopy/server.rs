//! The source's page server: requests first, the rest in the background.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::transport::{RateLimiter, Sender};
use crate::wire::RunTable;

use crate::migrate::bulk::{Counters, Views, WorkError, send_chunk};
use crate::migrate::queue::Chunk;

use super::owed::Owed;

/// Sends what is owed to the destination. Each page is taken out of what is owed before it is sent.
#[derive(Debug)]
pub struct PageServer {
    owed: Mutex<Owed>,
    /// Requests that are being answered: the background yields to them.
    urgent: Mutex<usize>,
    /// No request is being answered any more.
    calm: Condvar,
}

impl PageServer {
    /// Owes `owed`.
    pub fn new(owed: Owed) -> Self {
        Self { owed: Mutex::new(owed), urgent: Mutex::new(0), calm: Condvar::new() }
    }

    /// Pages that have not been sent.
    pub fn left(&self) -> u64 {
        self.owed().left()
    }

    /// What has not been sent, as it is now.
    pub fn owed_now(&self) -> Owed {
        self.owed().clone()
    }

    /// Answers a request on the urgent channel: each page, and a few behind it.
    pub fn answer(
        &self,
        pages: &[u64],
        urgent: &Sender,
        views: &Views,
        counters: &Counters,
    ) -> Result<(), WorkError> {
        *self.urgent() += 1;
        let mut table = RunTable::new();
        let result = pages.iter().try_for_each(|page| {
            let chunk = Chunk { pages: self.owed().answer(*page), zero: vec![] };
            send_chunk(&chunk, &mut table, urgent, views, counters, None)
        });
        let mut urgent = self.urgent();
        *urgent -= 1;
        if *urgent == 0 {
            self.calm.notify_all();
        }
        result
    }

    /// Sends what is owed on `sender`, until nothing is left.
    pub fn push(
        &self,
        sender: &Sender,
        views: &Views,
        counters: &Counters,
        limit: &RateLimiter,
    ) -> Result<(), WorkError> {
        let mut table = RunTable::new();
        loop {
            // Each frame is paid for before the next is taken, not while it is held: whoever asks
            // for a page that is taken already waits until it is out.
            limit.take(table.encoded_bytes() as u64 + table.data_bytes(), sender.cancel_token())?;
            drop(self.calm.wait_while(self.urgent(), |urgent| *urgent > 0));
            let chunk = Chunk { pages: self.owed().push(), zero: vec![] };
            if chunk.pages.is_empty() {
                return Ok(());
            }
            send_chunk(&chunk, &mut table, sender, views, counters, None)?;
        }
    }

    fn owed(&self) -> MutexGuard<'_, Owed> {
        self.owed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn urgent(&self) -> MutexGuard<'_, usize> {
        self.urgent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
