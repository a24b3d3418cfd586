//! What a device works with: its queues, guest memory, its interrupt.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};

use super::{DeviceError, Interrupt};
use crate::vmm::memory::TrackedMemory;

/// A request: a chain of buffers that the driver has made available.
pub type Chain = DescriptorChain<Arc<TrackedMemory>>;

/// The queues of a device, once its driver has set DRIVER_OK, and what goes with them. Every write
/// to guest memory goes through [`Io::memory`], which notes the pages as dirty (D1).
pub struct Io {
    memory: Arc<TrackedMemory>,
    interrupt: Arc<Interrupt>,
    attention: Arc<AtomicBool>,
    queues: Vec<Option<Queue>>,
    /// Queues whose buffers were not all looked at, one bit each.
    again: u64,
    /// Queues with used buffers of which the driver was not told yet, one bit each.
    finished: u64,
}

impl Io {
    /// For a device of `queues` queues; none is active. While `attention` is set, [`Io::pop`] gives
    /// nothing: an order for the device waits.
    pub(super) fn new(
        memory: Arc<TrackedMemory>,
        interrupt: Arc<Interrupt>,
        attention: Arc<AtomicBool>,
        queues: usize,
    ) -> Self {
        Self {
            memory,
            interrupt,
            attention,
            queues: (0..queues).map(|_| None).collect(),
            again: 0,
            finished: 0,
        }
    }

    /// Guest memory.
    pub fn memory(&self) -> Arc<TrackedMemory> {
        Arc::clone(&self.memory)
    }

    /// Whether the driver has set that queue up, and the device.
    pub fn is_active(&self, queue: usize) -> bool {
        self.queues.get(queue).is_some_and(Option::is_some)
    }

    /// The next request of a queue; `None` where there is none, and the driver will kick when it
    /// adds one. A request that is taken must be ended by [`Io::finish`] or given back by
    /// [`Io::put_back`].
    pub fn pop(&mut self, queue: usize) -> Result<Option<Chain>, DeviceError> {
        let Some(Some(q)) = self.queues.get_mut(queue) else { return Ok(None) };
        if self.attention.load(Ordering::SeqCst) {
            self.again |= 1 << queue;
            return Ok(None);
        }
        loop {
            if let Some(chain) = q.iter(Arc::clone(&self.memory))?.next() {
                return Ok(Some(chain));
            }
            if !q.enable_notification(&*self.memory)? {
                return Ok(None);
            }
        }
    }

    /// How many requests the driver has put out that were not taken.
    pub fn available(&self, queue: usize) -> Result<u16, DeviceError> {
        let Some(Some(q)) = self.queues.get(queue) else { return Ok(0) };
        Ok(q.avail_idx(&*self.memory, Ordering::Acquire)?.0.wrapping_sub(q.next_avail()))
    }

    /// Whether an order for the device waits: a request that takes long is given back then
    /// ([`Io::put_back`]) and begun anew after it.
    pub fn is_wanted(&self) -> bool {
        self.attention.load(Ordering::SeqCst)
    }

    /// Guest memory and a queue, for work that takes several requests at a time. `None` where the
    /// driver has not set the queue up, and where an order for the device waits: then it is looked at
    /// again after that. Interrupts are up to the caller ([`Io::signal`]).
    pub fn lend(&mut self, queue: usize) -> Option<(&TrackedMemory, &mut Queue)> {
        let q = self.queues.get_mut(queue)?.as_mut()?;
        if self.attention.load(Ordering::SeqCst) {
            self.again |= 1 << queue;
            return None;
        }
        Some((&self.memory, q))
    }

    /// There may be more in a queue than was taken: it is looked at again after orders and others
    /// had their turn.
    pub fn look_again(&mut self, queue: usize) {
        self.again |= 1u64.checked_shl(queue as u32).unwrap_or(0);
    }

    /// Interrupts the driver for buffers that were used in a lent queue.
    pub fn signal(&self) {
        self.interrupt.used();
    }

    /// Gives back the request that was taken last: the next [`Io::pop`] has it again. The driver
    /// will not kick for it ([`Io::look_again`]).
    pub fn put_back(&mut self, queue: usize) {
        if let Some(Some(q)) = self.queues.get_mut(queue) {
            q.go_to_previous_position();
        }
    }

    /// Ends a request (its chain's `head_index`), of which the first `written` writable bytes are
    /// filled.
    pub fn finish(&mut self, queue: usize, head: u16, written: u32) -> Result<(), DeviceError> {
        if let Some(Some(q)) = self.queues.get_mut(queue) {
            q.add_used(&*self.memory, head, written)?;
            self.finished |= 1 << queue;
        }
        Ok(())
    }

    /// Interrupts the driver for what was finished, if anything was and it wants that.
    pub fn notify(&mut self, queue: usize) -> Result<(), DeviceError> {
        let bit = 1u64.checked_shl(queue as u32).unwrap_or(0);
        if self.finished & bit == 0 {
            return Ok(());
        }
        self.finished &= !bit;
        if let Some(Some(q)) = self.queues.get_mut(queue)
            && q.needs_notification(&*self.memory)?
        {
            self.interrupt.used();
        }
        Ok(())
    }

    /// Tells the driver that the configuration space has changed.
    pub fn config_changed(&self) {
        self.interrupt.config_changed();
    }

    /// The queues as the driver set them up; an inactive one is `None`.
    pub(super) fn start(&mut self, queues: Vec<Option<Queue>>) {
        self.queues = queues;
        (self.again, self.finished) = (0, 0);
    }

    pub(super) fn stop(&mut self, queue: usize) {
        if let Some(q) = self.queues.get_mut(queue) {
            *q = None;
        }
    }

    pub(super) fn stop_all(&mut self) {
        self.queues.iter_mut().for_each(|q| *q = None);
        (self.again, self.finished) = (0, 0);
    }

    pub(super) fn any_active(&self) -> bool {
        self.queues.iter().any(Option::is_some)
    }

    pub(super) fn take_again(&mut self) -> u64 {
        std::mem::take(&mut self.again)
    }

    pub(super) fn wants_again(&self) -> bool {
        self.again != 0
    }

    pub(super) fn look_at_all(&mut self) {
        self.again = u64::MAX;
    }

    pub(super) fn queue_states(&self) -> Vec<Option<QueueState>> {
        self.queues.iter().map(|q| q.as_ref().map(Queue::state)).collect()
    }
}
