//! The `vmrun` that a sender takes the guest from, driven over its control socket.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::control::{Client, ClientError};
use crate::memory::PageSet;
use crate::state::MAX_STATE_BYTES;

use super::ram::Ram;

/// A control connection of a sender, with the shared dirty bitmap while logging is on.
#[derive(Debug)]
pub struct SourceVm {
    /// What needs no bookkeeping is asked directly.
    pub client: Client,
    bitmap: Option<File>,
}

/// What an export gives.
#[derive(Debug)]
pub struct Export {
    /// The saved state.
    pub state: Vec<u8>,
    /// Pages of RAM (dense numbers) that restoring it touches, then those that the vCPUs touch first.
    pub first_touched: Vec<u64>,
}

impl SourceVm {
    /// Connects to the `vmrun` at `path`.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        Ok(Self { client: Client::connect(path, "vmsend")?, bitmap: None })
    }

    /// The guest's RAM.
    pub fn ram(&mut self) -> Result<Ram, ClientError> {
        let (layout, memfds) = self.client.ram()?;
        Ram::new(&layout, memfds).map_err(|e| self.broken(e))
    }

    /// Turns dirty logging on.
    pub fn dirty_start(&mut self) -> Result<(), ClientError> {
        let (_, bitmap) = self.client.dirty_start()?;
        self.bitmap = Some(File::from(bitmap));
        Ok(())
    }

    /// Whether logging is on.
    pub fn is_logging(&self) -> bool {
        self.bitmap.is_some()
    }

    /// The pages dirtied since the last take, of `total_pages`.
    pub fn dirty_take(&mut self, total_pages: u64) -> Result<PageSet, ClientError> {
        self.client.dirty_take()?;
        self.shared(total_pages)
    }

    /// The pages of the guest's kernel, of `total_pages`. Logging is on.
    pub fn kernel_image(&mut self, total_pages: u64) -> Result<PageSet, ClientError> {
        self.client.kernel_image()?;
        self.shared(total_pages)
    }

    /// What `vmrun` has written into the shared bitmap.
    fn shared(&self, total_pages: u64) -> Result<PageSet, ClientError> {
        let mut bytes = vec![0; total_pages.div_ceil(64) as usize * 8];
        let read = match &self.bitmap {
            Some(bitmap) => bitmap.read_exact_at(&mut bytes, 0),
            None => Err(io::Error::other("dirty logging is off")),
        };
        read.map_err(|e| self.broken(e))?;
        let words = bytes.as_chunks::<8>().0.iter().map(|w| u64::from_le_bytes(*w)).collect();
        Ok(PageSet::from_words(words, total_pages))
    }

    /// Turns dirty logging off.
    pub fn dirty_stop(&mut self) -> Result<(), ClientError> {
        self.bitmap = None;
        self.client.dirty_stop()
    }

    /// Saves the state of the paused guest.
    pub fn export(&mut self) -> Result<Export, ClientError> {
        let (blob, memfd) = self.client.export()?;
        if blob.bytes > MAX_STATE_BYTES as u64 {
            return Err(self.broken(io::Error::other(format!("a state of {} bytes", blob.bytes))));
        }
        let mut state = vec![0; blob.bytes as usize];
        File::from(memfd).read_exact_at(&mut state, 0).map_err(|e| self.broken(e))?;
        Ok(Export { state, first_touched: blob.first_touched })
    }

    fn broken(&self, source: io::Error) -> ClientError {
        ClientError::Io { path: self.client.path().to_owned(), source }
    }
}
