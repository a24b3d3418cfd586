//! Frames from the guest's buffers to the network (virtio 1.2, 5.1.6.2).

use std::io::Read;

use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};

use super::tap::MAX_FRAME_BYTES;
use crate::sys::tap::VNET_HEADER_BYTES;
use crate::vmm::memory::TrackedMemory;

/// How many frames are taken before other work has its turn.
const BATCH: usize = 256;

/// What a look at the transmit queue came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transmitted {
    /// Whether the guest is to be told that buffers are free again.
    pub signal: bool,
    /// Whether there may be more.
    pub more: bool,
}

/// Hands frames that the guest has put out to `send`, each with its header, `buffer` being room for
/// one. A chain that holds no frame is given back unsent.
///
/// An error means that the driver has broken its queue.
pub fn transmit(
    memory: &TrackedMemory,
    queue: &mut Queue,
    buffer: &mut [u8],
    mut send: impl FnMut(&[u8]),
) -> Result<Transmitted, Error> {
    let mut taken = 0;
    while taken < BATCH {
        let Some(chain) = queue.iter(memory)?.next() else {
            // The driver kicks for what comes from here on; what came meanwhile is taken now.
            match queue.enable_notification(memory)? {
                true => continue,
                false => break,
            }
        };
        let head = chain.head_index();
        if let Ok(mut reader) = chain.reader(memory) {
            let bytes = reader.available_bytes();
            let fits = bytes > VNET_HEADER_BYTES && bytes <= MAX_FRAME_BYTES.min(buffer.len());
            if fits && reader.read_exact(&mut buffer[..bytes]).is_ok() {
                send(&buffer[..bytes]);
            }
        }
        queue.add_used(memory, head, 0)?;
        taken += 1;
    }
    let signal = taken > 0 && queue.needs_notification(memory)?;
    Ok(Transmitted { signal, more: taken == BATCH })
}
