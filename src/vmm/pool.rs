//! The host's pool of huge pages.

use std::fs;

use crate::memory::HUGE_PAGE_BYTES;

/// Where the kernel tells of its huge pages of 2 MiB.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Huge pages of 2 MiB at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HugePool {
    /// Those that a new machine can have: neither used nor set aside, and those that the kernel would
    /// make when asked (`nr_overcommit_hugepages`).
    pub free: u64,
    /// All that there are.
    pub total: u64,
}

impl HugePool {
    /// That of this host; empty where its kernel has none.
    pub fn of_this_host() -> Self {
        let read = |name: &str| -> u64 {
            let text = fs::read_to_string(format!("{POOL}/{name}")).unwrap_or_default();
            text.trim().parse().unwrap_or(0)
        };
        let more = read("nr_overcommit_hugepages").saturating_sub(read("surplus_hugepages"));
        let free = read("free_hugepages").saturating_sub(read("resv_hugepages"));
        Self { free: free.saturating_add(more), total: read("nr_hugepages") }
    }

    /// Why RAM of `bytes` cannot be made of it, for people; `None` if it can.
    pub fn problem(self, bytes: u64) -> Option<String> {
        let wanted = bytes.div_ceil(HUGE_PAGE_BYTES);
        let Self { free, total } = self;
        (wanted > free).then(|| {
            format!(
                "{wanted} free huge pages of 2 MiB are needed, {free} of {total} are free; as root, \
                 `echo {} > {POOL}/nr_hugepages` makes more, early after boot with the best success",
                total + (wanted - free)
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_few_are_named_with_what_would_help() {
        let pool = HugePool { free: 10, total: 50 };
        assert_eq!(pool.problem(20 << 20), None);
        let text = pool.problem((20 << 20) + 1).unwrap();
        assert!(text.contains("11 free huge pages") && text.contains("10 of 50"), "{text}");
        assert!(text.contains("echo 51 >"), "{text}");
    }
}
