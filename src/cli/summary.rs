//! The closing words of a `vmsend` that has moved its guest.

use crate::migrate::outcome::Summary;

use super::progress::size;

/// The closing summary for people.
pub fn text(s: &Summary) -> String {
    let d = &s.downtime;
    let ahead = s.warm_up_pages.filter(|pages| *pages > 0).map_or_else(String::new, |pages| {
        format!("\n{pages} pages went ahead of the guest, while it ran at the source")
    });
    let waits = s.latency.as_ref().map_or_else(String::new, |latency| {
        let us = |name: &str| latency.get(name).and_then(serde_json::Value::as_u64).unwrap_or(0);
        format!(
            "\n{} pages came after the guest, which waited for {}: p50 {} µs, p90 {} µs, p99 {} µs, max {} µs, {:.1} ms in all",
            s.postcopy_pages.unwrap_or(0),
            us("count"),
            us("p50_us"),
            us("p90_us"),
            us("p99_us"),
            us("max_us"),
            us("total_us") as f64 / 1e3
        )
    });
    format!(
        "moved in {:.2} s: {} passes, {} on the wire over {} channel{}, {} data pages, {} zero pages of {} RAM\n\
         downtime {:.1} ms: pause {:.1}, export {:.1}, last pass {:.1}, verify {:.1}, import {:.1}, synchronise {:.1}, \
         ready {:.1}, fence {:.1}, run {:.1}{ahead}{waits}",
        s.total_ms / 1e3,
        s.passes,
        size(s.wire_bytes),
        s.channels.max(1),
        if s.channels > 1 { "s" } else { "" },
        s.data_pages,
        s.zero_pages,
        size(s.memory_bytes),
        d.total_ms,
        d.pause_ms,
        d.export_ms,
        d.last_pass_ms,
        d.verify_ms,
        d.import_ms,
        d.sync_ms,
        d.ready_ms,
        d.fence_ms,
        d.run_ms,
    )
}
