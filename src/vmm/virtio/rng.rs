//! A source of random numbers (virtio 1.2, section 5.4): the host kernel's.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::Arc;

use serde_json::Value;

use super::{ConfigSpace, Device, DeviceError, Io, Kind};
use crate::state::VirtioRngState;

/// Its one queue.
const QUEUE_SIZES: [u16; 1] = [64];
/// The most bytes for one request: a driver may ask for 4 GiB, and takes less.
const MAX_BYTES: usize = 4096;

/// The kernel's, as a file.
pub const SOURCE: &str = "/dev/urandom";

/// The device.
pub struct Rng {
    config: Arc<ConfigSpace>,
    source: File,
}

impl Rng {
    /// Opens the source: its thread may open nothing.
    pub fn new() -> io::Result<Self> {
        let config = Arc::new(ConfigSpace::new(Vec::new(), 0..0));
        Ok(Self { config, source: File::open(SOURCE)? })
    }
}

impl Device for Rng {
    fn kind(&self) -> Kind {
        Kind::Rng
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn queue_kicked(&mut self, queue: usize, io: &mut Io) -> Result<(), DeviceError> {
        let memory = io.memory();
        while let Some(chain) = io.pop(queue)? {
            let head = chain.head_index();
            let mut writer = chain.writer(&memory)?;
            let mut bytes = vec![0; writer.available_bytes().min(MAX_BYTES)];
            self.source.read_exact(&mut bytes).map_err(DeviceError::Memory)?;
            writer.write_all(&bytes).map_err(DeviceError::Memory)?;
            io.finish(queue, head, bytes.len() as u32)?;
        }
        io.notify(queue)
    }

    fn save(&mut self) -> Result<Value, String> {
        serde_json::to_value(VirtioRngState {}).map_err(|e| e.to_string())
    }

    fn restore(&mut self, state: Value) -> Result<(), String> {
        serde_json::from_value::<VirtioRngState>(state).map(|_| ()).map_err(|e| e.to_string())
    }
}
