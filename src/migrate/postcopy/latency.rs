//! How long the guest waited for pages.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Buckets: four to each doubling, from 1 µs to over an hour.
const BUCKETS: usize = 128;

/// A histogram that several threads add to, exact to about a fifth.
#[derive(Debug)]
pub struct Histogram {
    counts: [AtomicU64; BUCKETS],
    total_us: AtomicU64,
    max_us: AtomicU64,
}

/// What a histogram shows, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    /// How many pages were waited for.
    pub count: u64,
    /// Half of them took no longer.
    pub p50_us: u64,
    /// Nine in ten.
    pub p90_us: u64,
    /// All but one in a hundred.
    pub p99_us: u64,
    /// The longest.
    pub max_us: u64,
    /// All together: what vCPUs (and devices) spent waiting.
    pub total_us: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: std::array::from_fn(|_| AtomicU64::new(0)),
            total_us: AtomicU64::new(0),
            max_us: AtomicU64::new(0),
        }
    }
}

impl Histogram {
    /// Adds one wait.
    pub fn add(&self, wait: Duration) {
        let us = wait.as_micros() as u64;
        self.counts[bucket(us)].fetch_add(1, Ordering::Relaxed);
        self.total_us.fetch_add(us, Ordering::Relaxed);
        self.max_us.fetch_max(us, Ordering::Relaxed);
    }

    /// What it shows so far.
    pub fn read(&self) -> Latency {
        let counts: Vec<u64> = self.counts.iter().map(|c| c.load(Ordering::Relaxed)).collect();
        let count: u64 = counts.iter().sum();
        let max_us = self.max_us.load(Ordering::Relaxed);
        let quantile = |part: f64| {
            let wanted = (count as f64 * part).ceil() as u64;
            let mut seen = 0;
            let found = counts.iter().position(|c| {
                seen += c;
                seen >= wanted
            });
            found.filter(|_| count > 0).map_or(0, |i| upper(i).min(max_us))
        };
        Latency {
            count,
            p50_us: quantile(0.5),
            p90_us: quantile(0.9),
            p99_us: quantile(0.99),
            max_us,
            total_us: self.total_us.load(Ordering::Relaxed),
        }
    }
}

fn bucket(us: u64) -> usize {
    if us < 4 {
        return us as usize;
    }
    let doubling = us.ilog2() as usize;
    let quarter = (us >> (doubling - 2) & 3) as usize;
    ((doubling - 1) * 4 + quarter).min(BUCKETS - 1)
}

/// The largest value of a bucket.
fn upper(bucket: usize) -> u64 {
    if bucket < 4 {
        return bucket as u64;
    }
    let (doubling, quarter) = (bucket / 4 + 1, (bucket % 4) as u64);
    ((5 + quarter) << (doubling - 2)) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_within_its_bucket() {
        for us in (0..5000).chain([1 << 20, (1 << 30) + 7]) {
            let b = bucket(us);
            assert!(us <= upper(b) && (b == 0 || us > upper(b - 1)), "{us} in bucket {b}");
            assert!(upper(b) - us <= us / 4, "{us} is shown as {}", upper(b));
        }
    }

    #[test]
    fn quantiles_are_those_of_the_values() {
        let histogram = Histogram::default();
        assert_eq!(histogram.read(), Latency::default());
        (1..=1000).for_each(|us| histogram.add(Duration::from_micros(us)));
        let shown = histogram.read();
        assert_eq!((shown.count, shown.max_us, shown.total_us), (1000, 1000, 500_500));
        assert!((450..=625).contains(&shown.p50_us), "{shown:?}");
        assert!((900..=1000).contains(&shown.p90_us) && shown.p99_us >= 990, "{shown:?}");
    }
}
