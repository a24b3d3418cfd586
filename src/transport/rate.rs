//! One limit for the bytes of all bulk channels, which may be changed at any time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{CancelToken, StreamError};
use crate::wire::limits::MAX_PAGE_DATA_BYTES;

/// How long a burst may be, as time at the set rate.
const BURST: Duration = Duration::from_millis(50);

/// The longest single wait, so that a new rate is soon felt.
const STEP: Duration = Duration::from_millis(100);

/// A token bucket in bytes a second. Clones share it.
#[derive(Clone, Debug)]
pub struct RateLimiter {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// Bytes a second, 0 is unlimited.
    rate: AtomicU64,
    bucket: Mutex<Bucket>,
}

#[derive(Debug)]
struct Bucket {
    /// Bytes that may go now; negative: what has gone ahead of its time.
    level: f64,
    filled: Instant,
}

impl RateLimiter {
    /// `rate` in bytes a second; 0 is unlimited.
    pub fn new(rate: u64) -> Self {
        let bucket = Mutex::new(Bucket { level: 0.0, filled: Instant::now() });
        Self { inner: Arc::new(Inner { rate: AtomicU64::new(rate), bucket }) }
    }

    /// Bytes a second; 0 is unlimited.
    pub fn rate(&self) -> u64 {
        self.inner.rate.load(Ordering::Relaxed)
    }

    /// Changes the rate; those who wait feel it within a tenth of a second.
    pub fn set_rate(&self, rate: u64) {
        self.inner.rate.store(rate, Ordering::Relaxed);
    }

    /// How many bytes of page data a frame should have, so that a slow link is used evenly: a
    /// multiple of 4096, from 16 KiB to the most that a frame may have.
    pub fn frame_bytes(&self) -> u32 {
        match self.rate() {
            0 => MAX_PAGE_DATA_BYTES,
            rate => ((rate / 20).clamp(16 << 10, u64::from(MAX_PAGE_DATA_BYTES)) as u32) & !4095,
        }
    }

    /// Waits until `bytes` may be sent. Call it before the send, without holding a lock that the
    /// heartbeat needs.
    pub fn take(&self, bytes: u64, cancel: &CancelToken) -> Result<(), StreamError> {
        let now = Instant::now();
        {
            let mut bucket = self.inner.bucket.lock().unwrap_or_else(PoisonError::into_inner);
            if self.rate() == 0 {
                // Nothing is owed for what went while there was no limit.
                *bucket = Bucket { level: 0.0, filled: now };
                return Ok(());
            }
            bucket.fill(self.rate(), now);
            bucket.level -= bytes as f64;
        }
        // The debt is everyone's: whoever comes later waits for what came before as well.
        loop {
            cancel.check()?;
            let rate = self.rate();
            let wait = {
                let mut bucket = self.inner.bucket.lock().unwrap_or_else(PoisonError::into_inner);
                bucket.fill(rate, Instant::now());
                if rate == 0 || bucket.level >= 0.0 {
                    return Ok(());
                }
                Duration::from_secs_f64((-bucket.level / rate as f64).clamp(0.0005, STEP.as_secs_f64()))
            };
            cancel.wait(Instant::now() + wait);
        }
    }
}

impl Bucket {
    fn fill(&mut self, rate: u64, now: Instant) {
        let most = rate as f64 * BURST.as_secs_f64();
        let passed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.level = (self.level + passed * rate as f64).min(most);
        self.filled = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bucket_gives_what_time_has_put_in() {
        let start = Instant::now();
        let mut bucket = Bucket { level: -1000.0, filled: start };
        bucket.fill(1000, start + Duration::from_millis(500));
        assert!((bucket.level + 500.0).abs() < 1e-6);
        // An idle hour is no credit beyond a burst.
        bucket.fill(1000, start + Duration::from_secs(3600));
        assert!((bucket.level - 50.0).abs() < 1e-6);
    }

    #[test]
    fn it_never_gives_more_than_the_rate_over_all_threads() {
        let limiter = RateLimiter::new(10 << 20);
        let cancel = CancelToken::new().unwrap();
        let begun = Instant::now();
        std::thread::scope(|s| {
            for _ in 0..2 {
                s.spawn(|| (0..16).for_each(|_| limiter.take(64 << 10, &cancel).unwrap()));
            }
        });
        // 2 MiB at 10 MiB/s is 200 ms, less the burst of 50 ms; slower is always allowed.
        assert!(begun.elapsed() >= Duration::from_millis(149), "{:?}", begun.elapsed());
    }

    #[test]
    fn a_wait_feels_a_new_rate_and_a_cancel() {
        let limiter = RateLimiter::new(1);
        let cancel = CancelToken::new().unwrap();
        std::thread::scope(|s| {
            let waits = s.spawn(|| limiter.take(1 << 30, &cancel));
            limiter.set_rate(0);
            waits.join().unwrap().unwrap();
            limiter.set_rate(1);
            let waits = s.spawn(|| limiter.take(1 << 30, &cancel));
            cancel.cancel("enough");
            assert!(
                matches!(waits.join().unwrap(), Err(StreamError::Cancelled { reason }) if reason == "enough")
            );
        });
    }

    #[test]
    fn frames_are_smaller_on_slow_links() {
        assert_eq!(RateLimiter::new(0).frame_bytes(), MAX_PAGE_DATA_BYTES);
        assert_eq!(RateLimiter::new(1).frame_bytes(), 16 << 10);
        assert_eq!(RateLimiter::new(1_000_000).frame_bytes(), 12 * 4096);
        assert_eq!(RateLimiter::new(u64::MAX).frame_bytes(), MAX_PAGE_DATA_BYTES);
    }
}
