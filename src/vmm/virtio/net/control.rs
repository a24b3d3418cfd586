//! The control queue (virtio 1.2, 5.1.6.5), of whose commands one is known: the driver's word that it
//! has announced the guest.

use std::io::{Read, Write};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};

use crate::vmm::memory::TrackedMemory;

/// The class and the command by which the driver says that it has announced the guest.
const ANNOUNCED: [u8; 2] = [VIRTIO_NET_CTRL_ANNOUNCE as u8, VIRTIO_NET_CTRL_ANNOUNCE_ACK as u8];

/// What a look at the control queue came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Commands {
    /// Whether the guest is to be told that commands are done.
    pub signal: bool,
    /// The driver has announced the guest.
    pub announced: bool,
    /// Whether there may be more.
    pub more: bool,
}

/// Does the commands that the driver has put out, as many as the queue holds.
///
/// An error means that the driver has broken its queue.
pub fn commands(memory: &TrackedMemory, queue: &mut Queue, may_announce: bool) -> Result<Commands, Error> {
    let mut done = Commands::default();
    let mut left = queue.size();
    while left > 0 {
        let Some(chain) = queue.iter(memory)?.next() else {
            match queue.enable_notification(memory)? {
                true => continue,
                false => break,
            }
        };
        let head = chain.head_index();
        let mut command = [0; 2];
        let read = chain.clone().reader(memory).is_ok_and(|mut r| r.read_exact(&mut command).is_ok());
        let known = read && may_announce && command == ANNOUNCED;
        let ack = [if known { VIRTIO_NET_OK } else { VIRTIO_NET_ERR } as u8];
        let told = chain.writer(memory).is_ok_and(|mut w| w.write_all(&ack).is_ok());
        queue.add_used(memory, head, u32::from(told))?;
        done.announced |= known;
        left -= 1;
    }
    done.signal = left < queue.size() && queue.needs_notification(memory)?;
    done.more = left == 0;
    Ok(done)
}
