//! The table of a PAGES frame: which pages it carries, and which of them are zero.
//!
//! The payload is a head of 16 bytes, the table of runs, and the data of all data runs one after
//! the other. The sender writes head and table from a small buffer and the data straight from guest
//! memory; the receiver checks the table against the RAM map and reads the data straight into place.

use thiserror::Error;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::limits::{MAX_PAGE_DATA_BYTES, MAX_RUNS};
use crate::memory::{PAGE_BYTES, PageIndex, PageRun};

/// Bytes before the table.
pub const PAGES_HEAD_BYTES: usize = size_of::<RawHead>();

/// Bytes of one run in the table.
pub const RUN_BYTES: usize = size_of::<RawRun>();

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHead {
    runs: U32,
    page_bytes: U32,
    reserved: [U32; 2],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRun {
    first: U64,
    pages: U32,
    kind: U32,
}

const _: () = assert!(PAGES_HEAD_BYTES == 16 && RUN_BYTES == 16);

/// What a run of pages is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum RunKind {
    /// The pages' bytes are in the data part of the frame.
    Data = 0,
    /// The pages are all zero; nothing of them is in the data part.
    Zero = 1,
}

/// Consecutive pages of one kind, at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first page.
    pub first: PageIndex,
    /// How many pages.
    pub pages: u32,
    /// What they are.
    pub kind: RunKind,
}

impl Run {
    /// The pages without their kind.
    pub fn page_run(&self) -> PageRun {
        PageRun { first: self.first, pages: u64::from(self.pages) }
    }

    /// Bytes of this run in the data part of the frame.
    pub fn data_bytes(&self) -> u64 {
        match self.kind {
            RunKind::Data => u64::from(self.pages) * PAGE_BYTES,
            RunKind::Zero => 0,
        }
    }
}

/// Why a table is refused, by the one who sends it or the one who receives it.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs)] // the messages say it
pub enum TableError {
    #[error("a PAGES frame has no runs")]
    Empty,
    #[error("a PAGES frame says that it has {0} runs, more than {MAX_RUNS}")]
    TooMany(u32),
    #[error("a PAGES frame of {payload} bytes is too short for its head and table of {runs} runs")]
    Truncated { payload: usize, runs: u32 },
    #[error("a PAGES frame is for pages of {0} bytes, only {PAGE_BYTES} is spoken here")]
    PageSize(u32),
    #[error("a PAGES frame has bytes set that are reserved")]
    Reserved,
    #[error("run {run} of a PAGES frame is empty")]
    EmptyRun { run: usize },
    #[error("run {run} of a PAGES frame has kind {kind}, which is not known here")]
    UnknownKind { run: usize, kind: u32 },
    #[error(
        "run {run} of a PAGES frame (page {first}, {pages} pages) is beyond the guest's RAM of {total} pages"
    )]
    OutOfRange { run: usize, first: u64, pages: u32, total: u64 },
    #[error("a PAGES frame has more than {MAX_PAGE_DATA_BYTES} bytes of page data")]
    TooMuchData,
    #[error("a PAGES frame has {got} bytes of data where its table says {said}")]
    DataLength { got: u64, said: u64 },
}

/// The table of one PAGES frame. Grown with [`RunTable::push`] by the sender, and cleared and used
/// again; made by [`RunTable::decode`] at the receiver.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunTable {
    runs: Vec<Run>,
    data_bytes: u64,
}

impl RunTable {
    /// A table without runs.
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets all runs and keeps the allocation.
    pub fn clear(&mut self) {
        self.runs.clear();
        self.data_bytes = 0;
    }

    /// The runs in the order of their data.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Whether there are no runs.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Bytes of the data part, which follows the table.
    pub fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    /// How many pages the frame is about: (with data, zero).
    pub fn pages(&self) -> (u64, u64) {
        let data = self.data_bytes / PAGE_BYTES;
        let all: u64 = self.runs.iter().map(|r| u64::from(r.pages)).sum();
        (data, all - data)
    }

    /// Bytes of head and table, which come before the data.
    pub fn encoded_bytes(&self) -> usize {
        PAGES_HEAD_BYTES + self.runs.len() * RUN_BYTES
    }

    /// How many pages of a run of `kind` still fit into the frame; 0 when it is full.
    pub fn room(&self, kind: RunKind) -> u32 {
        if self.runs.len() >= MAX_RUNS as usize {
            return 0;
        }
        match kind {
            RunKind::Zero => u32::MAX,
            RunKind::Data => ((u64::from(MAX_PAGE_DATA_BYTES) - self.data_bytes) / PAGE_BYTES) as u32,
        }
    }

    /// Adds a run (joined to the one before where it continues it), if it fits: [`RunTable::room`].
    pub fn push(&mut self, run: Run) -> Result<(), TableError> {
        if run.pages == 0 {
            return Err(TableError::EmptyRun { run: self.runs.len() });
        }
        if run.data_bytes() + self.data_bytes > u64::from(MAX_PAGE_DATA_BYTES) {
            return Err(TableError::TooMuchData);
        }
        if let Some(last) = self.runs.last_mut()
            && last.kind == run.kind
            && last.first.0.checked_add(u64::from(last.pages)) == Some(run.first.0)
            && let Some(pages) = last.pages.checked_add(run.pages)
        {
            last.pages = pages;
        } else {
            if self.runs.len() >= MAX_RUNS as usize {
                return Err(TableError::TooMany(MAX_RUNS + 1));
            }
            self.runs.push(run);
        }
        self.data_bytes += run.data_bytes();
        Ok(())
    }

    /// Appends head and table to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let head = RawHead {
            runs: U32::new(self.runs.len() as u32),
            page_bytes: U32::new(PAGE_BYTES as u32),
            reserved: [U32::ZERO; 2],
        };
        out.extend_from_slice(head.as_bytes());
        for run in &self.runs {
            let raw = RawRun {
                first: U64::new(run.first.0),
                pages: U32::new(run.pages),
                kind: U32::new(run.kind as u32),
            };
            out.extend_from_slice(raw.as_bytes());
        }
    }

    /// Bytes of the table that follows `head`, the first [`PAGES_HEAD_BYTES`] of a PAGES payload of
    /// `payload_bytes`.
    pub fn table_bytes(head: &[u8; PAGES_HEAD_BYTES], payload_bytes: u32) -> Result<usize, TableError> {
        let raw: RawHead = zerocopy::transmute!(*head);
        let runs = raw.runs.get();
        match runs {
            0 => return Err(TableError::Empty),
            r if r > MAX_RUNS => return Err(TableError::TooMany(r)),
            _ => {}
        }
        if u64::from(raw.page_bytes.get()) != PAGE_BYTES {
            return Err(TableError::PageSize(raw.page_bytes.get()));
        }
        if raw.reserved.iter().any(|r| r.get() != 0) {
            return Err(TableError::Reserved);
        }
        let bytes = runs as usize * RUN_BYTES;
        let payload = payload_bytes as usize;
        if payload < PAGES_HEAD_BYTES + bytes {
            return Err(TableError::Truncated { payload, runs });
        }
        Ok(bytes)
    }

    /// Takes the table of a PAGES frame whose data part has `data_bytes`, for a guest with
    /// `total_pages` of RAM, into `self` (whose allocation is used again). `table` has the length
    /// that [`RunTable::table_bytes`] gave.
    pub fn decode_into(&mut self, table: &[u8], data_bytes: u64, total_pages: u64) -> Result<(), TableError> {
        self.clear();
        let runs = <[RawRun]>::ref_from_bytes(table)
            .map_err(|_| TableError::Truncated { payload: table.len(), runs: 0 })?;
        if runs.len() > MAX_RUNS as usize {
            return Err(TableError::TooMany(runs.len() as u32));
        }
        for (i, raw) in runs.iter().enumerate() {
            let run = checked_run(i, raw, total_pages)?;
            self.data_bytes += run.data_bytes();
            if self.data_bytes > u64::from(MAX_PAGE_DATA_BYTES) {
                return Err(TableError::TooMuchData);
            }
            self.runs.push(run);
        }
        if self.data_bytes != data_bytes {
            return Err(TableError::DataLength { got: data_bytes, said: self.data_bytes });
        }
        Ok(())
    }

    /// Head and table at once, from a whole PAGES payload: for tools and tests. Gives the table and
    /// the offset of the data.
    pub fn decode(payload: &[u8], total_pages: u64) -> Result<(Self, usize), TableError> {
        let short = TableError::Truncated { payload: payload.len(), runs: 0 };
        let Some((head, rest)) = payload.split_first_chunk::<PAGES_HEAD_BYTES>() else {
            return Err(short);
        };
        let bytes = Self::table_bytes(head, u32::try_from(payload.len()).unwrap_or(u32::MAX))?;
        let (table, data) = rest.split_at_checked(bytes).ok_or(short)?;
        let mut decoded = Self::new();
        decoded.decode_into(table, data.len() as u64, total_pages)?;
        Ok((decoded, PAGES_HEAD_BYTES + bytes))
    }
}

fn checked_run(i: usize, raw: &RawRun, total: u64) -> Result<Run, TableError> {
    let (first, pages) = (raw.first.get(), raw.pages.get());
    let kind = match raw.kind.get() {
        0 => RunKind::Data,
        1 => RunKind::Zero,
        kind => return Err(TableError::UnknownKind { run: i, kind }),
    };
    if pages == 0 {
        return Err(TableError::EmptyRun { run: i });
    }
    match first.checked_add(u64::from(pages)) {
        Some(end) if end <= total => Ok(Run { first: PageIndex(first), pages, kind }),
        _ => Err(TableError::OutOfRange { run: i, first, pages, total }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(first: u64, pages: u32, kind: RunKind) -> Run {
        Run { first: PageIndex(first), pages, kind }
    }

    fn payload(table: &RunTable) -> Vec<u8> {
        let mut out = Vec::new();
        table.encode(&mut out);
        out.resize(out.len() + table.data_bytes() as usize, 0xa5);
        out
    }

    fn sample() -> RunTable {
        let mut table = RunTable::new();
        table.push(run(5, 2, RunKind::Data)).unwrap();
        table.push(run(7, 1, RunKind::Data)).unwrap();
        table.push(run(8, 100, RunKind::Zero)).unwrap();
        table
    }

    #[test]
    fn neighbours_are_joined() {
        assert_eq!(sample().runs(), [run(5, 3, RunKind::Data), run(8, 100, RunKind::Zero)]);
        assert_eq!(sample().pages(), (3, 100));
    }

    #[test]
    fn a_full_table_says_so() {
        let mut table = RunTable::new();
        assert_eq!(table.room(RunKind::Data), 256);
        table.push(run(0, 256, RunKind::Data)).unwrap();
        assert_eq!(table.room(RunKind::Data), 0);
        assert_eq!(table.push(run(1000, 1, RunKind::Data)), Err(TableError::TooMuchData));
        for i in 1..u64::from(MAX_RUNS) {
            table.push(run(i * 1000, 1, RunKind::Zero)).unwrap();
        }
        assert_eq!(table.room(RunKind::Zero), 0);
        assert!(matches!(table.push(run(7, 1, RunKind::Zero)), Err(TableError::TooMany(_))));
    }

    #[test]
    fn every_truncation_and_addition_is_an_error() {
        let whole = payload(&sample());
        assert!(RunTable::decode(&whole, 108).is_ok());
        for n in 0..whole.len() {
            assert!(RunTable::decode(&whole[..n], 108).is_err(), "{n} bytes");
        }
        assert!(RunTable::decode(&[&whole[..], &[0]].concat(), 108).is_err());
    }

    #[test]
    fn lies_are_named() {
        let good = payload(&sample());
        let with = |at: usize, value: &[u8]| {
            let mut bad = good.clone();
            bad[at..at + value.len()].copy_from_slice(value);
            RunTable::decode(&bad, 108).unwrap_err()
        };
        assert!(matches!(RunTable::decode(&good, 107), Err(TableError::OutOfRange { run: 1, .. })));
        assert_eq!(with(0, &[0; 4]), TableError::Empty);
        assert_eq!(with(0, &[0xff; 4]), TableError::TooMany(u32::MAX));
        assert_eq!(with(4, &[0, 0, 32, 0]), TableError::PageSize(2 << 20));
        assert_eq!(with(8, &[1]), TableError::Reserved);
        assert!(matches!(with(16, &[0xff; 8]), TableError::OutOfRange { run: 0, .. }));
        assert_eq!(with(24, &[0; 4]), TableError::EmptyRun { run: 0 });
        assert_eq!(with(28, &[9]), TableError::UnknownKind { run: 0, kind: 9 });
        assert_eq!(with(24, &[2]), TableError::DataLength { got: 3 * 4096, said: 2 * 4096 });
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(
            runs in prop::collection::vec((0u64..10_000, 1u32..20, any::<bool>()), 1..10),
        ) {
            let mut table = RunTable::new();
            for (first, pages, zero) in runs {
                let kind = if zero { RunKind::Zero } else { RunKind::Data };
                table.push(run(first, pages, kind)).unwrap();
            }
            let bytes = payload(&table);
            let (got, at) = RunTable::decode(&bytes, 20_000).unwrap();
            prop_assert_eq!(at, table.encoded_bytes());
            prop_assert_eq!(got, table);
        }

        #[test]
        fn random_bytes_never_panic_and_never_leave_the_ram(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            runs in 0u8..8,
            total in 0u64..1 << 20,
        ) {
            let _ = RunTable::decode(&bytes, total);
            let mut framed = vec![runs, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            framed.extend_from_slice(&bytes);
            if let Ok((table, _)) = RunTable::decode(&framed, total) {
                for r in table.runs() {
                    prop_assert!(r.first.0 + u64::from(r.pages) <= total);
                }
            }
        }
    }
}
