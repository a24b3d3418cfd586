//! How many bytes may be on their way in each direction (virtio 1.2, 5.10.6.3): counters that wrap
//! around at 32 bits, and the receiver's word on how many bytes it keeps.

use std::num::Wrapping;

use super::packet::Header;

/// How many bytes of the guest's are kept for a host that does not read (`buf_alloc`).
pub const BUFFER_BYTES: u32 = 128 << 10;

/// The credit of one stream.
#[derive(Clone, Copy, Debug, Default)]
pub struct Credit {
    /// Bytes that were sent to the guest.
    sent: Wrapping<u32>,
    /// The guest's buffer, and how many bytes have left it.
    peer_buffer: u32,
    peer_forwarded: Wrapping<u32>,
    /// Bytes of the guest that have gone on, and the number that the guest was told.
    forwarded: Wrapping<u32>,
    told: Wrapping<u32>,
    /// There was none left, and the guest has been, or will be, asked for more.
    awaited: bool,
}

impl Credit {
    /// A packet of the guest says how much room it has.
    pub fn heard(&mut self, header: &Header) {
        self.peer_buffer = header.buf_alloc.get();
        self.peer_forwarded = Wrapping(header.fwd_cnt.get());
        self.awaited &= self.left() == 0;
    }

    /// How many bytes the guest takes now. A guest whose numbers make no sense takes none.
    pub fn left(&self) -> u32 {
        self.peer_buffer.saturating_sub((self.sent - self.peer_forwarded).0)
    }

    /// Bytes go to the guest.
    pub fn sent(&mut self, bytes: usize) {
        self.sent += Wrapping(bytes as u32);
    }

    /// Bytes of the guest have gone on.
    pub fn forwarded(&mut self, bytes: usize) {
        self.forwarded += Wrapping(bytes as u32);
    }

    /// Writes the own numbers into a packet for the guest.
    pub fn tell(&mut self, header: &mut Header) {
        header.buf_alloc = BUFFER_BYTES.into();
        header.fwd_cnt = self.forwarded.0.into();
        self.told = self.forwarded;
    }

    /// Whether the guest may be about to run out for no reason: half of the buffer is free again
    /// without its knowledge.
    pub fn is_worth_telling(&self) -> bool {
        (self.forwarded - self.told).0 >= BUFFER_BYTES / 2
    }

    /// There is none left, and more is asked for.
    pub fn wait(&mut self) {
        self.awaited = true;
    }

    /// Whether nothing can be sent before the guest says something.
    pub fn is_awaited(&self) -> bool {
        self.awaited
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn word(buf_alloc: u32, fwd_cnt: u32) -> Header {
        Header { buf_alloc: buf_alloc.into(), fwd_cnt: fwd_cnt.into(), ..Header::default() }
    }

    #[test]
    fn credit_is_what_the_guest_has_room_for() {
        let mut credit = Credit::default();
        assert_eq!(credit.left(), 0);
        credit.heard(&word(100, 0));
        credit.sent(60);
        assert_eq!(credit.left(), 40);
        credit.heard(&word(100, 50));
        assert_eq!(credit.left(), 90);
        // A smaller buffer than what is on its way, and a count of more than was ever sent.
        credit.heard(&word(5, 50));
        assert_eq!(credit.left(), 0);
        credit.heard(&word(100, 61));
        assert_eq!(credit.left(), 0);
    }

    #[test]
    fn waiting_ends_when_there_is_credit() {
        let mut credit = Credit::default();
        credit.wait();
        credit.heard(&word(0, 0));
        assert!(credit.is_awaited());
        credit.heard(&word(1, 0));
        assert!(!credit.is_awaited());
    }

    proptest! {
        /// Whatever is sent and read, and however often the counters wrap, no more than the buffer
        /// is on its way, and a reader who reads everything makes room for all of it.
        #[test]
        fn never_more_than_the_buffer_is_on_its_way(
            start in any::<u32>(),
            buffer in 1u32..1 << 20,
            steps in prop::collection::vec((any::<u32>(), any::<u32>()), 1..60),
        ) {
            let mut credit = Credit { sent: Wrapping(start), ..Credit::default() };
            let (mut on_its_way, mut read) = (0u32, Wrapping(start));
            for (wants, reads) in steps {
                credit.heard(&word(buffer, read.0));
                prop_assert_eq!(credit.left(), buffer - on_its_way);
                let sends = wants.min(credit.left());
                credit.sent(sends as usize);
                on_its_way += sends;
                prop_assert!(on_its_way <= buffer);
                let takes = reads.min(on_its_way);
                on_its_way -= takes;
                read += Wrapping(takes);
            }
        }

        #[test]
        fn the_guest_hears_of_room_before_it_runs_out(pieces in prop::collection::vec(1usize..40_000, 1..50)) {
            let mut credit = Credit::default();
            for bytes in pieces {
                credit.forwarded(bytes);
                if credit.is_worth_telling() {
                    let mut header = Header::default();
                    credit.tell(&mut header);
                    prop_assert!(!credit.is_worth_telling());
                    prop_assert_eq!(header.buf_alloc.get(), BUFFER_BYTES);
                }
                prop_assert!((credit.forwarded - credit.told).0 < BUFFER_BYTES);
            }
        }
    }
}
