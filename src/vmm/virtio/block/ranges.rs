//! Discard and write-zeroes: ranges of a disk, without their data.

use std::io;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::image::{DIRECT_BLOCK, Image, SECTOR};

/// The most sectors of one range, 1 GiB: how long the host may take for it holds up a pause.
pub const MAX_SECTORS: u32 = 1 << 21;
/// The most ranges of one request.
pub const MAX_RANGES: u32 = 32;

/// One range of a request: `struct virtio_blk_discard_write_zeroes`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Range {
    /// Where it begins.
    pub sector: U64,
    /// How many sectors it has.
    pub sectors: U32,
    /// VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, for write-zeroes.
    pub flags: U32,
}

/// The configuration from `max_discard_sectors` on (virtio 1.2, 5.2.4).
pub fn config() -> Vec<u8> {
    let alignment = DIRECT_BLOCK / SECTOR;
    let words = [MAX_SECTORS, MAX_RANGES, alignment, MAX_SECTORS, MAX_RANGES];
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.extend([1, 0, 0, 0]); // write_zeroes_may_unmap
    bytes
}

impl Image {
    /// The content of a range is not needed any more. Where the file system cannot give its space back,
    /// it keeps it.
    pub fn discard(&self, at: u64, bytes: u64) -> io::Result<()> {
        self.punch(at, bytes).map(|_| ())
    }

    /// Makes a range zero, with its space given back if `unmap`. `false` where the file system cannot:
    /// then zeros have to be written.
    pub fn zero(&self, at: u64, bytes: u64, unmap: bool) -> io::Result<bool> {
        match unmap {
            true => self.punch(at, bytes),
            false => self.allocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, at, bytes),
        }
    }

    fn punch(&self, at: u64, bytes: u64) -> io::Result<bool> {
        self.allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, at, bytes)
    }

    fn allocate(&self, how: FallocateFlags, at: u64, bytes: u64) -> io::Result<bool> {
        let how = how | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(&self.file, how, at as i64, bytes as i64) {
            Ok(()) => Ok(true),
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }
}
