//! What the structured messages say. JSON objects with these field names.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::FrameType;
use super::limits::{MAX_BITMAP_WORDS, SPARSE_WORDS};
use super::message::{MessageError, words};
use crate::switchover::Attempt;

/// S→D: who calls, and what it can do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The oldest version of this protocol that the source speaks.
    pub version_min: u32,
    /// The newest.
    pub version_max: u32,
    /// The source's release, for the log.
    pub release: String,
    /// The source host's name, for the log.
    pub host: String,
    /// The guest's uuid.
    pub vm_uuid: String,
    /// The guest's name.
    pub vm_name: String,
    /// The session of the header is under way and the connection was lost.
    pub resume: bool,
    /// The session before this one, which never was and never will be committed: a receiver that
    /// still holds it may drop it.
    pub superseded: Option<Attempt>,
    /// How many bulk channels will join; 0: pages come on the main channel.
    pub channels: u32,
    /// What the source can do, by name; `must:NAME` is refused where NAME is not known.
    pub features: Vec<String>,
    /// The digests of RAM will be compared.
    pub verify: bool,
    /// How long a silence the source takes for death, in milliseconds.
    pub peer_timeout_ms: u64,
}

impl Hello {
    /// For a receiver that has taken over a guest and has not heard its source yet.
    pub fn unknown(vm_uuid: String, vm_name: String) -> Self {
        Self {
            version_min: 0,
            version_max: 0,
            release: String::new(),
            host: String::new(),
            vm_uuid,
            vm_name,
            resume: true,
            superseded: None,
            channels: 0,
            features: Vec::new(),
            verify: false,
            peer_timeout_ms: u64::MAX,
        }
    }

    /// Bulk channels, and with postcopy the urgent one, which comes last.
    pub fn all_channels(&self) -> u32 {
        let urgent = self.channels > 0 && self.wants_postcopy();
        self.channels.saturating_add(u32::from(urgent))
    }

    /// Whether pages may come after the guest.
    pub fn wants_postcopy(&self) -> bool {
        self.features.iter().any(|f| f.trim_start_matches("must:") == super::POSTCOPY)
    }
}

/// D→S: what was agreed on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloAck {
    /// The version that is spoken from here on.
    pub version: u32,
    /// The features that both have.
    pub features: Vec<String>,
    /// With `resume`: how far the session of the header is here.
    pub resume_phase: Option<ResumePhase>,
    /// The destination's release, for the log.
    pub release: String,
    /// The destination host's name, for the log.
    pub host: String,
    /// How long a silence the destination takes for death, in milliseconds.
    pub peer_timeout_ms: u64,
    /// With `resume`: pages are missing here; RECEIVED says which are there.
    #[serde(default)]
    pub fetching: bool,
}

/// How far a session is at the destination when the source comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResumePhase {
    /// The guest is being loaded.
    Loading,
    /// READY was said, and the source's word is waited for.
    InDoubt,
    /// The guest runs here (or ran, and has been sent on).
    Running,
    /// The guest never ran here and never will.
    Revoked,
    /// Nothing is known of the session.
    Unknown,
}

/// D→S: no.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Error)]
#[error("{message}")]
pub struct Refused {
    /// For programs.
    pub code: RefusedCode,
    /// For people: the whole sentence, with the cause.
    pub message: String,
    /// With [`RefusedCode::Unsuitable`] and [`RefusedCode::Feature`]: every reason.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Problem>,
}

/// The kinds of refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefusedCode {
    /// Another migration is under way here, or a guest is here already.
    Busy,
    /// No version in common.
    Version,
    /// A mandatory feature is missing here.
    Feature,
    /// This host cannot take the machine; `problems` says all that is in the way.
    Unsuitable,
    /// The session is not the one that is under way, or a channel does not belong to it.
    Session,
    /// The epoch is older than the newest that was seen.
    Stale,
    /// The frame does not belong here, or is malformed.
    Protocol,
    /// It was tried and failed here.
    Failed,
    /// A code of a later version.
    #[serde(other)]
    Other,
}

/// One reason why a host cannot take a machine. Preflight lists them all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What it concerns, for machines: `ram`, `vcpus`, `cpuid`, `msr`, `capability`, `tsc`, `xsave`, `device`.
    pub topic: String,
    /// The whole sentence, for people: what is missing, by name, and on which side.
    pub text: String,
}

/// D→S: a pass is placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassDone {
    /// The pass of the BARRIERs.
    pub pass: u32,
    /// Pages placed in this pass, zero pages included.
    pub pages_placed: u64,
    /// Bytes of page data placed in it.
    pub bytes: u64,
    /// From the end of the pass before (or HELLO) to the last page placed, in microseconds.
    pub elapsed_us: u64,
}

/// S→D: everything has been sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// How many passes there were.
    pub passes: u32,
    /// Data pages sent in all, repetitions included.
    pub pages: u64,
    /// Zero pages sent in all, repetitions included.
    pub zero_pages: u64,
    /// With `verify`: the digest of RAM, in hexadecimal.
    pub digest: Option<String>,
    /// An operator had paused the guest: it stays paused at the destination.
    #[serde(default)]
    pub stays_paused: bool,
    /// The pages of the MISSING frames come after the guest has begun to run.
    #[serde(default)]
    pub postcopy: bool,
    /// With `postcopy`: pages that went on the main channel after a MISSING frame that has them, and so
    /// are missing no more; [`MAX_AHEAD_PAGES`](super::limits::MAX_AHEAD_PAGES) at most.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ahead: Vec<u64>,
}

/// D→S: restored, synchronised, held.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// Reading the state and restoring the devices, in microseconds.
    pub import_us: u64,
    /// Synchronising the vCPUs into KVM, in microseconds.
    pub sync_us: u64,
    /// With `verify`: the digest of RAM before the import, in hexadecimal.
    pub digest: Option<String>,
}

/// D→S: the guest runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// From RUN received to the vCPUs going, in microseconds; 0 when it had been running before.
    pub run_us: u64,
}

/// Which of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The one that has the guest when it starts.
    Source,
    /// The one that takes it in.
    Destination,
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}

/// Either way: this attempt is over, and nothing was committed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Error)]
#[error("the {side} gave up: {reason}")]
pub struct Abort {
    /// Where the cause lies.
    pub side: Side,
    /// For people: the cause.
    pub reason: String,
}

/// Either way, last: what was sent, or what was placed. Both sides compare (D4).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// Data pages, repetitions included.
    pub pages: u64,
    /// Zero pages, repetitions included.
    pub zero_pages: u64,
    /// With `verify`: the digest of RAM, in hexadecimal.
    pub digest: Option<String>,
    /// D→S after postcopy: how long the guest waited for pages, for the summary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency: Option<serde_json::Value>,
}

/// A part of a set of pages: bit `n` of word `w` is page `first + 64 * w + n`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageBitmap {
    /// A multiple of 64.
    pub first: u64,
    /// At most [`MAX_BITMAP_WORDS`].
    pub words: Vec<u64>,
}

impl PageBitmap {
    /// All of a bitmap as parts that fit a frame each.
    pub fn parts(words: &[u64]) -> impl Iterator<Item = Self> + '_ {
        let each = MAX_BITMAP_WORDS;
        words
            .chunks(each)
            .enumerate()
            .map(move |(i, part)| Self { first: (i * each * 64) as u64, words: part.to_vec() })
    }

    /// The parts of a bitmap in which a bit is set; one part at least.
    pub fn sparse_parts(words: &[u64]) -> impl Iterator<Item = Self> + '_ {
        words.chunks(SPARSE_WORDS).enumerate().filter_map(|(i, part)| {
            // In the first part there may be none.
            let part = Self { first: (i * SPARSE_WORDS * 64) as u64, words: part.to_vec() };
            (i == 0 || part.words.iter().any(|word| *word != 0)).then_some(part)
        })
    }

    /// Adds the pages of this part, which came in a frame of `kind`, to the bitmap `into`; an error when
    /// it does not lie within it.
    pub fn add_to(&self, kind: FrameType, into: &mut [u64]) -> Result<(), MessageError> {
        for (word, bits) in self.place_in(kind, into)?.iter_mut().zip(&self.words) {
            *word |= bits;
        }
        Ok(())
    }

    /// Puts this part, which came in a frame of `kind`, into the bitmap `into`; an error when it does
    /// not lie within it.
    pub fn put_into(&self, kind: FrameType, into: &mut [u64]) -> Result<(), MessageError> {
        self.place_in(kind, into)?.copy_from_slice(&self.words);
        Ok(())
    }

    fn place_in<'a>(&self, kind: FrameType, into: &'a mut [u64]) -> Result<&'a mut [u64], MessageError> {
        let outside = || MessageError::Malformed {
            kind,
            cause: format!(
                "{} words from page {} on are beyond the guest's RAM",
                self.words.len(),
                self.first
            ),
        };
        let start = usize::try_from(self.first / 64).map_err(|_| outside())?;
        let end = start.checked_add(self.words.len()).ok_or_else(outside)?;
        into.get_mut(start..end).ok_or_else(outside)
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        std::iter::once(&self.first).chain(&self.words).flat_map(|word| word.to_le_bytes()).collect()
    }

    pub(super) fn decode(kind: FrameType, payload: &[u8]) -> Result<Self, MessageError> {
        let all = words(kind, payload)?;
        let Some((first, words)) =
            all.split_first().filter(|(first, rest)| first.is_multiple_of(64) && !rest.is_empty())
        else {
            let cause = "a part of a bitmap begins with a page number that is a multiple of 64".to_owned();
            return Err(MessageError::Malformed { kind, cause });
        };
        Ok(Self { first: *first, words: words.to_vec() })
    }
}
