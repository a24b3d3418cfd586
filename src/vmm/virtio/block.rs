//! A disk (virtio 1.2, section 5.2): a raw image on the host.

mod holder;
mod image;
mod ranges;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::Reader;
use vm_memory::bitmap::BitmapSlice;
use zerocopy::{FromZeros, IntoBytes};

pub use image::ImageConfig;

use super::{Chain, ConfigSpace, Device, DeviceError, Io, Kind};
use crate::state::VirtioBlockState;
use crate::vmm::memory::TrackedMemory;
use image::{DIRECT_BLOCK, Image, SECTOR};
use ranges::{MAX_RANGES, MAX_SECTORS, Range};

/// Its one queue.
const QUEUE_SIZES: [u16; 1] = [128];
/// How much of a request goes through the buffer at a time.
const CHUNK: usize = 256 << 10;
/// How long until the lock is tried again, the first time and at most.
const RECLAIM_WAIT: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// The device.
pub struct Block {
    id: String,
    image: Image,
    config: Arc<ConfigSpace>,
    /// The block size that the driver is told.
    block_bytes: u32,
    /// The driver flushes; without, every write is flushed.
    flushes: bool,
    bounce: Vec<u8>,
    /// When the image's lock is tried again, and the wait after that.
    reclaim: Option<(Instant, Duration)>,
    /// An error of the host has been told.
    complained: bool,
}

/// Why a request is not done, for its status byte.
enum Failure {
    /// The driver's fault, or the host's.
    Error,
    Unsupported,
    /// It was not ended: an order waits. It is begun anew, here or where the guest goes on.
    Interrupted,
    /// The device cannot go on.
    Broken(DeviceError),
}

impl From<io::Error> for Failure {
    /// Of guest memory.
    fn from(error: io::Error) -> Self {
        Self::Broken(DeviceError::Memory(error))
    }
}

impl Block {
    /// Opens the image of a disk named `id`, and locks it, as far as it is not the source's yet.
    /// `properties` as for [`super::HostEnd::open`].
    pub fn open(
        id: &str,
        config: &ImageConfig,
        properties: Option<&BTreeMap<String, String>>,
    ) -> io::Result<Self> {
        let said = |name: &str| properties.and_then(|p| p.get(name));
        let readonly = config.readonly || said("readonly").is_some_and(|text| text == "true");
        let image = Image::open(&ImageConfig { readonly, ..config.clone() })?;
        match properties {
            None => image.lock()?,
            Some(_) if readonly => image.join()?,
            // The source has it to itself: `restore` joins.
            Some(_) => {}
        }
        let wanted = said("block_bytes").and_then(|text| text.parse().ok());
        let block_bytes = wanted.filter(|b| [SECTOR, DIRECT_BLOCK].contains(b)).unwrap_or(image.block_bytes);
        let mut space = Vec::new();
        space.extend((image.bytes / u64::from(SECTOR)).to_le_bytes());
        space.extend(0u32.to_le_bytes()); // size_max: not offered
        // A request needs two descriptors besides those of its data.
        space.extend((u32::from(QUEUE_SIZES[0]) - 2).to_le_bytes());
        space.extend([0; 4]); // geometry: not offered
        space.extend(block_bytes.to_le_bytes());
        space.extend([0; 12]); // topology, cache mode, more queues: not offered
        space.extend(ranges::config());
        Ok(Self {
            id: id.into(),
            image,
            config: Arc::new(ConfigSpace::new(space, 0..0)),
            block_bytes,
            flushes: false,
            // Room for whole blocks at both ends, wherever the vector begins.
            bounce: vec![0; CHUNK + 3 * DIRECT_BLOCK as usize],
            reclaim: None,
            complained: false,
        })
    }

    /// Does one request and fills in its status; the number of bytes that are filled from the start. `None`
    /// where it was interrupted: `wanted` says that an order waits.
    fn request(
        &mut self,
        chain: Chain,
        memory: &TrackedMemory,
        wanted: &dyn Fn() -> bool,
    ) -> Result<Option<u32>, DeviceError> {
        let mut reader = chain.clone().reader(memory)?;
        let mut writer = chain.writer(memory)?;
        let room = writer.available_bytes().checked_sub(1);
        let room = room.ok_or(DeviceError::Request("it has no byte for its status"))?;
        let mut status = writer.split_at(room)?;
        let mut header = [0; 16];
        reader.read_exact(&mut header).map_err(|_| DeviceError::Request("it has no whole header"))?;
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let done = match u32::from_le_bytes([a, b, c, d]) {
            VIRTIO_BLK_T_IN => self.read(sector, room, &mut writer, wanted),
            VIRTIO_BLK_T_OUT => self.write(sector, reader.available_bytes(), &mut reader, wanted),
            VIRTIO_BLK_T_FLUSH => self.flush(),
            VIRTIO_BLK_T_DISCARD => self.clear(false, &mut reader, wanted),
            VIRTIO_BLK_T_WRITE_ZEROES => self.clear(true, &mut reader, wanted),
            VIRTIO_BLK_T_GET_ID => self.tell_id(room, &mut writer),
            _ => Err(Failure::Unsupported),
        };
        let code = match done {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(Failure::Error) => VIRTIO_BLK_S_IOERR,
            Err(Failure::Unsupported) => VIRTIO_BLK_S_UNSUPP,
            Err(Failure::Interrupted) => return Ok(None),
            Err(Failure::Broken(e)) => return Err(e),
        };
        status.write_all(&[code as u8]).map_err(DeviceError::Memory)?;
        let filled = writer.bytes_written();
        Ok(Some((if filled == room { filled + 1 } else { filled }) as u32))
    }

    fn read(
        &mut self,
        sector: u64,
        bytes: usize,
        into: &mut impl Write,
        wanted: &dyn Fn() -> bool,
    ) -> Result<(), Failure> {
        let mut at = self.place(sector, bytes)?;
        for bytes in chunks(bytes, wanted) {
            let bytes = bytes?;
            let (start, skip, whole) = self.span(at, bytes);
            let buffer = aligned(&mut self.bounce, whole);
            let done = self.image.file.read_exact_at(buffer, start);
            if let Err(e) = done {
                return Err(self.host_error("read", &e));
            }
            into.write_all(&aligned(&mut self.bounce, whole)[skip..skip + bytes])?;
            at += bytes as u64;
        }
        Ok(())
    }

    fn write(
        &mut self,
        sector: u64,
        bytes: usize,
        from: &mut impl Read,
        wanted: &dyn Fn() -> bool,
    ) -> Result<(), Failure> {
        if self.image.readonly {
            return Err(Failure::Error);
        }
        let mut at = self.place(sector, bytes)?;
        for bytes in chunks(bytes, wanted) {
            let bytes = bytes?;
            let (start, skip, whole) = self.span(at, bytes);
            let buffer = aligned(&mut self.bounce, whole);
            // What is around it in its blocks stays. Nobody else writes it: requests are done one
            // after the other.
            let around = if bytes == whole { Ok(()) } else { self.image.file.read_exact_at(buffer, start) };
            from.read_exact(&mut buffer[skip..skip + bytes])?;
            if let Err(e) = around.and_then(|()| self.image.file.write_all_at(buffer, start)) {
                return Err(self.host_error("write", &e));
            }
            at += bytes as u64;
        }
        if self.flushes { Ok(()) } else { self.flush() }
    }

    /// Discards ranges, or makes them zero.
    fn clear(
        &mut self,
        zero: bool,
        from: &mut Reader<'_, impl BitmapSlice>,
        wanted: &dyn Fn() -> bool,
    ) -> Result<(), Failure> {
        let bytes = from.available_bytes();
        let fits =
            bytes.is_multiple_of(size_of::<Range>()) && bytes <= MAX_RANGES as usize * size_of::<Range>();
        if self.image.readonly || !fits {
            return Err(Failure::Error);
        }
        let mut range = Range::new_zeroed();
        for n in 0..bytes / size_of::<Range>() {
            if n > 0 && wanted() {
                return Err(Failure::Interrupted);
            }
            from.read_exact(range.as_mut_bytes())?;
            let (sectors, flags) = (range.sectors.get(), range.flags.get());
            if flags & !(if zero { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP } else { 0 }) != 0 {
                return Err(Failure::Unsupported);
            }
            let bytes = sectors as usize * SECTOR as usize;
            let at = self.place(range.sector.get(), bytes)?;
            if sectors == 0 || sectors > MAX_SECTORS {
                return Err(Failure::Error);
            }
            let done = match zero {
                true => self.image.zero(at, bytes as u64, flags != 0),
                false => self.image.discard(at, bytes as u64).map(|()| true),
            };
            if !done.map_err(|e| self.host_error("clear", &e))? {
                self.write(range.sector.get(), bytes, &mut io::repeat(0), wanted)?;
            }
        }
        if self.flushes { Ok(()) } else { self.flush() }
    }

    fn flush(&mut self) -> Result<(), Failure> {
        self.image.flush().map_err(|e| self.host_error("flush", &e))
    }

    fn tell_id(&self, room: usize, into: &mut impl Write) -> Result<(), Failure> {
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (place, byte) in id.iter_mut().zip(self.id.bytes()) {
            *place = byte;
        }
        Ok(into.write_all(&id[..room.min(id.len())])?)
    }

    /// The byte at which a request begins, if all of it is on the disk.
    fn place(&self, sector: u64, bytes: usize) -> Result<u64, Failure> {
        let whole = bytes.is_multiple_of(SECTOR as usize);
        let at = sector.checked_mul(SECTOR.into()).filter(|_| whole).ok_or(Failure::Error)?;
        let end = at.checked_add(bytes as u64).filter(|end| *end <= self.image.bytes);
        end.map(|_| at).ok_or(Failure::Error)
    }

    /// The whole blocks of the image that hold some bytes: where they begin, where in them the bytes
    /// begin, and how long they are.
    fn span(&self, at: u64, bytes: usize) -> (u64, usize, usize) {
        let block = self.image.block_bytes as usize;
        let skip = (at % block as u64) as usize;
        (at - skip as u64, skip, (skip + bytes).next_multiple_of(block))
    }

    /// Told once, or a guest could fill the log.
    fn host_error(&mut self, what: &str, error: &io::Error) -> Failure {
        if !std::mem::replace(&mut self.complained, true) {
            tracing::warn!("disk {}: cannot {what} its image: {error} (told once)", self.id);
        }
        Failure::Error
    }

    /// Makes the lock exclusive, or says when that is tried next.
    fn take_back(&mut self, wait: Duration) {
        let next = (Instant::now() + wait, (wait * 2).min(RECLAIM_WAIT.1));
        self.reclaim = (!self.image.reclaim()).then_some(next);
    }
}

/// The lengths of the parts of a request, until an order waits.
fn chunks(bytes: usize, wanted: &dyn Fn() -> bool) -> impl Iterator<Item = Result<usize, Failure>> {
    (0..bytes).step_by(CHUNK).map(move |at| match at > 0 && wanted() {
        true => Err(Failure::Interrupted),
        false => Ok((bytes - at).min(CHUNK)),
    })
}

/// `bytes` of the buffer that begin where O_DIRECT can have them.
fn aligned(buffer: &mut [u8], bytes: usize) -> &mut [u8] {
    let from = (buffer.as_ptr() as usize).wrapping_neg() % DIRECT_BLOCK as usize;
    &mut buffer[from..from + bytes]
}

impl Device for Block {
    fn kind(&self) -> Kind {
        Kind::Block
    }

    fn features(&self) -> u64 {
        let by_kind = match self.image.readonly {
            true => 1 << VIRTIO_BLK_F_RO,
            false => 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES,
        };
        1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_SEG_MAX | by_kind
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn properties(&self) -> BTreeMap<String, String> {
        [
            ("bytes", self.image.bytes.to_string()),
            ("block_bytes", self.block_bytes.to_string()),
            ("readonly", self.image.readonly.to_string()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    fn activate(&mut self, features: u64) {
        self.flushes = features & 1 << VIRTIO_BLK_F_FLUSH != 0;
    }

    fn reset(&mut self) {
        self.flushes = false;
    }

    fn queue_kicked(&mut self, queue: usize, io: &mut Io) -> Result<(), DeviceError> {
        let memory = io.memory();
        while let Some(chain) = io.pop(queue)? {
            let head = chain.head_index();
            let Some(written) = self.request(chain, &memory, &|| io.is_wanted())? else {
                io.put_back(queue);
                io.look_again(queue);
                return Ok(());
            };
            io.finish(queue, head, written)?;
            // A disk may take long for the next one.
            io.notify(queue)?;
        }
        Ok(())
    }

    fn deadline(&self) -> Option<Instant> {
        self.reclaim.map(|(at, _)| at)
    }

    fn timeout(&mut self, _: &mut Io) -> Result<(), DeviceError> {
        if let Some((_, wait)) = self.reclaim {
            self.take_back(wait);
        }
        Ok(())
    }

    fn resume(&mut self, _: bool, _: &mut Io) -> Result<(), DeviceError> {
        self.take_back(RECLAIM_WAIT.0);
        Ok(())
    }

    fn save(&mut self) -> Result<Value, String> {
        self.image.flush().map_err(|e| format!("its image cannot be flushed: {e}"))?;
        self.image.share().map_err(|e| e.to_string())?;
        serde_json::to_value(VirtioBlockState {}).map_err(|e| e.to_string())
    }

    fn restore(&mut self, state: Value) -> Result<(), String> {
        serde_json::from_value::<VirtioBlockState>(state).map_err(|e| e.to_string())?;
        self.image.join().map_err(|e| format!("its image: {e}"))?;
        self.image.forget_cache();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
