//! The receiving half of a channel: a thread that places pages and passes on everything else.

use std::io;
use std::sync::mpsc::Sender as EventSender;
use std::sync::{Arc, OnceLock};

use nix::libc::ESRCH;
use thiserror::Error;

use crate::memory::PageRun;
use crate::sys::schedule;
use crate::transport::{ChannelError, Frame, Receiver};
use crate::wire::{Message, RunKind, RunTable};

use super::backlog::{Backlog, Place};
use super::placer::Placer;

/// Where pages go once the machine has been made; `None` when it was not.
pub type PlacerSlot = Arc<OnceLock<Option<Placer>>>;

/// What a channel brings.
#[derive(Debug)]
pub enum Brought {
    /// A message, with its place among those that wait.
    Message(Message, Place),
    /// The channel is over, and why.
    Lost(String),
    /// The `vmrun` whose memory pages were to go to is gone.
    HostGone,
}

/// Whether somebody may be waiting for the pages of a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Haste {
    /// Somebody may.
    Urgent,
    /// Nobody does, once the guest runs here: whoever waits has asked on another channel. These are taken in turn
    /// with the guest all the same: the sooner all are here, the less it has to wait for.
    Bulk,
}

#[derive(Debug, Error)]
enum PumpError {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("a page cannot be written to the guest's RAM: {0}")]
    Place(#[from] io::Error),
}

/// Receives on one channel until it ends; `wrap` makes an event of what comes, for `events`.
/// Pages are placed here, without a detour: what reaches the conductor is in order with them.
pub fn run<E>(
    mut receiver: Receiver,
    haste: Haste,
    slot: &PlacerSlot,
    events: &EventSender<E>,
    wrap: impl Fn(Brought) -> E,
) {
    let (mut buffer, mut backlog) = (Vec::new(), Backlog::new());
    if haste == Haste::Urgent {
        schedule::log_unchanged("who takes urgent pages", schedule::be_prompt());
    }
    let mut placer = slot.get().and_then(Option::as_ref);
    if let Some(placer) = placer {
        receiver.accept_pages(placer.ram().map().total_pages());
    }
    loop {
        let brought = match step(&mut receiver, placer, &mut buffer) {
            Ok(None) => continue,
            Ok(Some(message)) => Brought::Message(message, backlog.place()),
            // Of a process that is ending, its memory goes before its connections.
            Err(PumpError::Place(error)) if error.raw_os_error() == Some(ESRCH) => Brought::HostGone,
            Err(error) => Brought::Lost(error.to_string()),
        };
        let is_last = matches!(brought, Brought::Lost(_) | Brought::HostGone);
        let is_machine = matches!(brought, Brought::Message(Message::Machine(_), _));
        if events.send(wrap(brought)).is_err() || is_last {
            return;
        }
        if is_machine && placer.is_none() {
            // Nothing but pages follows MACHINE, and those need the RAM that is being made now.
            placer = slot.wait().as_ref();
            if let Some(placer) = placer {
                receiver.accept_pages(placer.ram().map().total_pages());
            }
        }
    }
}

/// Takes one frame: a message for the conductor, or pages, which are placed at once.
fn step(
    receiver: &mut Receiver,
    placer: Option<&Placer>,
    buffer: &mut Vec<u8>,
) -> Result<Option<Message>, PumpError> {
    match receiver.recv()? {
        Frame::Message(message) => Ok(Some(message)),
        Frame::Pages(mut pages) => {
            // All data of a frame in one buffer, which stays in the CPU's cache.
            buffer.resize(pages.table.data_bytes() as usize, 0);
            pages.data.read(buffer)?;
            if let Some(placer) = placer {
                place(pages.table, buffer, placer)?;
            }
            Ok(None)
        }
    }
}

fn place(table: &RunTable, data: &[u8], placer: &Placer) -> io::Result<()> {
    let mut rest = data;
    for run in table.runs() {
        let pages = PageRun { first: run.first, pages: u64::from(run.pages) };
        match run.kind {
            RunKind::Zero => placer.place_zero(pages)?,
            RunKind::Data => {
                let (now, later) = rest.split_at(run.data_bytes() as usize);
                placer.place(pages, now)?;
                rest = later;
            }
        }
    }
    Ok(())
}
