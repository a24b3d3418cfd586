//! What a frame may hold at most. Every length from the peer is compared with these before anything
//! is allocated for it (D5).

use super::FrameType;

/// The largest payload of a structured (JSON) frame in bytes: a machine description with the CPUID
/// table and MSR list of a large host is some 30 KiB.
pub const MAX_JSON_BYTES: u32 = 1 << 20;

/// The largest saved state in bytes.
pub const MAX_STATE_BYTES: u32 = 64 << 20;

/// The most runs in the table of one PAGES frame.
pub const MAX_RUNS: u32 = 4096;

/// The most page data in one PAGES frame, in bytes.
pub const MAX_PAGE_DATA_BYTES: u32 = 1 << 20;

/// The largest payload of a PAGES frame in bytes: its head, a full table, and full data.
pub const MAX_PAGES_PAYLOAD_BYTES: u32 = 16 + MAX_RUNS * 16 + MAX_PAGE_DATA_BYTES;

/// The most words of a bitmap of pages in one frame: 16 GiB of RAM.
pub const MAX_BITMAP_WORDS: usize = 64 << 10;

/// The words of one part of a bitmap that is mostly empty: 128 MiB of RAM.
pub const SPARSE_WORDS: usize = 512;

/// The most pages that END may name as sent ahead of the guest.
pub const MAX_AHEAD_PAGES: usize = 256;

/// The most pages in one PAGE_REQUEST.
pub const MAX_REQUESTED_PAGES: usize = 4096;

/// The slowest rate at which a frame that has begun may arrive, in bytes a second: a peer that
/// drips bytes to stay alive is given up.
pub const MIN_FRAME_RATE: u64 = 64 << 10;

/// The largest payload of a frame of type `kind`, in bytes.
pub fn max_payload(kind: FrameType) -> u32 {
    match kind {
        FrameType::Pages => MAX_PAGES_PAYLOAD_BYTES,
        FrameType::State => MAX_STATE_BYTES,
        FrameType::Missing | FrameType::Received => 8 + 8 * MAX_BITMAP_WORDS as u32,
        FrameType::PageRequest => 8 * MAX_REQUESTED_PAGES as u32,
        FrameType::Ping | FrameType::Pong => 8,
        FrameType::Accepted
        | FrameType::Run
        | FrameType::Revoke
        | FrameType::Revoked
        | FrameType::Released => 0,
        FrameType::Hello
        | FrameType::HelloAck
        | FrameType::Refused
        | FrameType::Machine
        | FrameType::Join
        | FrameType::Joined
        | FrameType::Barrier
        | FrameType::PassDone
        | FrameType::End
        | FrameType::Ready
        | FrameType::Running
        | FrameType::Abort
        | FrameType::Done => MAX_JSON_BYTES,
    }
}
