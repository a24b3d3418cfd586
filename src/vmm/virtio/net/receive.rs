//! Frames from the network into the guest's buffers (virtio 1.2, 5.1.6.3 and 5.1.6.4).

use std::io::Write;

use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MRG_RXBUF};
use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueT, Writer};
use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::{Bytes, GuestAddress};

use crate::sys::tap::VNET_HEADER_BYTES;
use crate::vmm::memory::TrackedMemory;

/// Where `flags` and `num_buffers` are in the header.
const FLAGS_AT: usize = 0;
const NUM_BUFFERS_AT: usize = 10;

/// What has become of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// The guest has it; whether it wants to be told.
    Done {
        /// Whether to signal the queue.
        signal: bool,
    },
    /// The guest has not put out enough buffers: to be tried again when it has.
    NoBuffers,
    /// All buffers that the queue can have are there, and are too small; none of them was used.
    TooLarge,
}

/// Writes `frame`, which begins with its header, into the guest's buffers: one of them, or as many
/// as it takes if the driver has accepted VIRTIO_NET_F_MRG_RXBUF. `features` are those that it has accepted.
///
/// An error means that the driver has broken its queue.
pub fn deliver(
    memory: &TrackedMemory,
    queue: &mut Queue,
    frame: &mut [u8],
    features: u64,
) -> Result<Delivery, Error> {
    let before = queue.next_avail();
    let most = if features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0 { queue.size() } else { 1 };
    let mut buffers = Vec::new();
    let mut room = 0;
    while room < frame.len() {
        if buffers.len() == usize::from(most) {
            queue.set_next_avail(before);
            return Ok(Delivery::TooLarge);
        }
        let Some(chain) = queue.iter(memory)?.next() else {
            // The driver kicks when it puts out more; what came meanwhile is taken now.
            if queue.enable_notification(memory)? {
                continue;
            }
            queue.set_next_avail(before);
            return Ok(Delivery::NoBuffers);
        };
        let buffer = Buffer::new(memory, chain);
        // The first holds the header whole (5.1.6.3.1).
        room += if buffers.is_empty() && buffer.room() < VNET_HEADER_BYTES { 0 } else { buffer.room() };
        buffers.push(buffer);
    }
    // A tap says that it knows a checksum to be right also to whoever has not accepted GUEST_CSUM (5.1.6.4.1).
    if features & 1 << VIRTIO_NET_F_GUEST_CSUM == 0 {
        frame[FLAGS_AT] = 0;
    }
    // Whoever has not accepted MRG_RXBUF finds 1 here.
    frame[NUM_BUFFERS_AT..VNET_HEADER_BYTES].copy_from_slice(&(buffers.len() as u16).to_le_bytes());
    let merged = buffers.len() > 1;
    let mut rest = &frame[..];
    let mut written = Vec::new();
    for buffer in buffers {
        let (piece, after) = rest.split_at(rest.len().min(buffer.room()));
        written.push((buffer.head, piece.len() as u32));
        if let Some(mut writer) = buffer.writer {
            writer.write_all(piece).map_err(|_| Error::InvalidChain)?;
        }
        rest = after;
    }
    publish(memory, queue, &written)?;
    // Only the last went through the queue's own count of what was added.
    Ok(Delivery::Done { signal: queue.needs_notification(memory)? || merged })
}

/// One chain of the receive queue. A chain that leads out of RAM, or has nothing to write to, is a
/// buffer without room.
struct Buffer<'a> {
    head: u16,
    writer: Option<Writer<'a, BS<'a, AtomicBitmap>>>,
}

impl<'a> Buffer<'a> {
    fn new(memory: &'a TrackedMemory, chain: DescriptorChain<&'a TrackedMemory>) -> Self {
        Self { head: chain.head_index(), writer: chain.writer(memory).ok() }
    }

    fn room(&self) -> usize {
        self.writer.as_ref().map_or(0, Writer::available_bytes)
    }
}

/// Gives buffers back to the guest, all at once: a driver that saw the first of a frame's buffers
/// without the others would take the frame for damaged.
fn publish(memory: &TrackedMemory, queue: &mut Queue, used: &[(u16, u32)]) -> Result<(), Error> {
    let Some(((last, last_bytes), others)) = used.split_last() else { return Ok(()) };
    for (n, (head, bytes)) in (0..).zip(others) {
        if *head >= queue.size() {
            return Err(Error::InvalidDescriptorIndex);
        }
        let slot = u64::from(queue.next_used().wrapping_add(n) % queue.size());
        // The ring's elements follow its flags and its index (2.7.8): id and length.
        let at = queue.used_ring().checked_add(4 + 8 * slot).ok_or(Error::AddressOverflow)?;
        let element = u64::from(*head) | u64::from(*bytes) << 32;
        memory.write_obj(element.to_le(), GuestAddress(at)).map_err(Error::GuestMemory)?;
    }
    queue.set_next_used(queue.next_used().wrapping_add(others.len() as u16));
    queue.add_used(memory, *last, *last_bytes)
}
