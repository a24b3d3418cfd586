//! Address newtypes. A guest-physical address, an address in the process that runs KVM and an
//! address in this process are all 64-bit numbers, and mixing them up is the classic way to
//! corrupt a guest: so they are three types, and only the maps convert between them.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes in the smallest page, the unit of the dirty log and of the stream.
pub const PAGE_BYTES: u64 = 4096;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address!(
    /// A guest-physical address in bytes.
    GuestPhysAddr
);
address!(
    /// A virtual address in the `vmrun` that runs the guest: what its userfaultfd speaks of.
    VmmAddr
);
address!(
    /// A virtual address in the process that holds the value.
    LocalAddr
);

/// The number of a 4 KiB page of guest RAM, counted densely over all regions in the order of the
/// [`super::RamMap`] (a gap between regions has no index). Bit `n` of a [`super::PageSet`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PageIndex(pub u64);

impl fmt::Display for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {}", self.0)
    }
}
