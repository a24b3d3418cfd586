//! The sending half of the bulk channels: workers that read pages, test them for zero, send them.

use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;

use crate::memory::{PAGE_BYTES, PageIndex, PageRun};
use crate::sys::view::RamView;
use crate::transport::{ChannelError, RateLimiter, Sender, StreamError};
use crate::wire::{Message, Run, RunKind, RunTable};

use super::queue::{Chunk, Job, PassQueue};
use super::ram::Ram;

/// What has gone out so far, over all channels.
#[derive(Debug, Default)]
pub struct Counters {
    /// Pages sent with their content.
    pub data_pages: AtomicU64,
    /// Pages told to be zero.
    pub zero_pages: AtomicU64,
}

impl Counters {
    /// Data pages and zero pages.
    pub fn get(&self) -> (u64, u64) {
        (self.data_pages.load(Ordering::Relaxed), self.zero_pages.load(Ordering::Relaxed))
    }
}

/// The source's RAM, mapped for reading.
#[derive(Debug)]
pub struct Views {
    ram: Ram,
    views: Vec<RamView>,
}

impl Views {
    /// Maps every region of `ram`.
    pub fn new(ram: Ram) -> io::Result<Self> {
        let regions = ram.map().regions().iter();
        let views = regions
            .zip(ram.files())
            .map(|(r, file)| RamView::new(file, r.bytes))
            .collect::<io::Result<_>>()?;
        Ok(Self { ram, views })
    }

    /// The RAM itself.
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// Splits `run` into zero pages and pages with content, as they are at this moment, and adds
    /// them to the frame: runs to `table`, content to `data`.
    fn classify<'a>(
        &'a self,
        run: PageRun,
        table: &mut RunTable,
        data: &mut Vec<IoSlice<'a>>,
    ) -> io::Result<()> {
        let past_the_end =
            || io::Error::new(io::ErrorKind::InvalidInput, "a run of pages beyond the RAM map");
        let mut rest = run;
        while rest.pages > 0 {
            let span = self.ram.span(rest).ok_or_else(past_the_end)?;
            let view = &self.views[span.region];
            view.populate(span.offset, span.bytes);
            let pages = span.bytes / PAGE_BYTES;
            let is_zero = |page: u64| view.is_zero(span.offset + page * PAGE_BYTES, PAGE_BYTES);
            let mut at = 0;
            while at < pages {
                let zero = is_zero(at);
                let mut end = at + 1;
                while end < pages && is_zero(end) == zero {
                    end += 1;
                }
                let kind = if zero { RunKind::Zero } else { RunKind::Data };
                let first = PageIndex(rest.first.0 + at);
                table.push(Run { first, pages: (end - at) as u32, kind }).map_err(io::Error::other)?;
                if !zero {
                    data.push(view.io_slice(span.offset + at * PAGE_BYTES, (end - at) * PAGE_BYTES));
                }
                at = end;
            }
            rest = PageRun { first: PageIndex(rest.first.0 + pages), pages: rest.pages - pages };
        }
        Ok(())
    }
}

/// Why a worker stopped.
#[derive(Debug, Error)]
pub enum WorkError {
    /// The channel failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// Pages could not be read, or do not fit a frame.
    #[error("reading the guest's RAM: {0}")]
    Read(#[from] io::Error),
}

impl From<StreamError> for WorkError {
    fn from(error: StreamError) -> Self {
        Self::Channel(error.into())
    }
}

/// One worker: sends on `sender` what the queue gives, until the queue stops.
pub fn work(
    sender: &Sender,
    queue: &PassQueue,
    views: &Views,
    counters: &Counters,
    limit: &RateLimiter,
) -> Result<(), WorkError> {
    let mut pass = 0;
    let mut table = RunTable::new();
    loop {
        match queue.next(&mut pass) {
            Job::Stop => return Ok(()),
            Job::Barrier(pass) => sender.send(&Message::Barrier { pass })?,
            Job::Send(chunk) => send_chunk(&chunk, &mut table, sender, views, counters, Some(limit))?,
        }
    }
}

/// Reads the pages of `chunk`, tests them for zero and sends them in one frame. `table` is scratch
/// space.
pub fn send_chunk(
    chunk: &Chunk,
    table: &mut RunTable,
    sender: &Sender,
    views: &Views,
    counters: &Counters,
    limit: Option<&RateLimiter>,
) -> Result<(), WorkError> {
    table.clear();
    let mut data = Vec::new();
    for run in &chunk.pages {
        views.classify(*run, table, &mut data)?;
    }
    for run in &chunk.zero {
        let mut rest = *run;
        while rest.pages > 0 {
            let pages = rest.pages.min(u64::from(u32::MAX)) as u32;
            let zero = Run { first: rest.first, pages, kind: RunKind::Zero };
            table.push(zero).map_err(io::Error::other)?;
            rest = PageRun {
                first: PageIndex(rest.first.0 + u64::from(pages)),
                pages: rest.pages - u64::from(pages),
            };
        }
    }
    if table.is_empty() {
        return Ok(());
    }
    // Counted before they are out: the receiver may have placed them, and said so, before we are back.
    let (sent, zero) = table.pages();
    counters.data_pages.fetch_add(sent, Ordering::Relaxed);
    counters.zero_pages.fetch_add(zero, Ordering::Relaxed);
    if let Some(limit) = limit {
        limit.take(table.encoded_bytes() as u64 + table.data_bytes(), sender.cancel_token())?;
    }
    sender.send_pages(table, &data)?;
    Ok(())
}
