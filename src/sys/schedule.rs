//! How the calling thread shares the host's CPUs with others (sched(7), sched_setattr(2)).
//!
//! Pages that a guest waits for pass through half a dozen threads of two hosts, each of which wakes up
//! for a few microseconds of work. Where background work keeps the CPUs busy, every one of those
//! wake-ups would wait for the end of somebody's time slice: milliseconds for one page.

use std::io;

/// The nice value of background work: of a CPU that others want as well it gets about a quarter.
pub const BACKGROUND_NICE: i32 = 5;

/// The time slice of threads that do little and are waited for, in nanoseconds: the shortest that the
/// kernel gives. Who has a shorter slice than the thread that runs takes the CPU from it when it wakes
/// up; its share of the CPU stays the same. Kernels before 6.12 have one slice for all.
const PROMPT_SLICE_NS: u64 = 100_000;

/// Makes the calling thread, and no other, yield to the others of the host, for good. One that is nicer
/// already stays so.
pub fn yield_to_others() -> io::Result<()> {
    let mut attr = attributes()?;
    attr.sched_nice = attr.sched_nice.max(BACKGROUND_NICE);
    set(&attr)
}

/// Makes the calling thread, and no other, run soon after it has been woken, for good.
pub fn be_prompt() -> io::Result<()> {
    let mut attr = attributes()?;
    attr.sched_runtime = PROMPT_SLICE_NS;
    set(&attr)
}

/// Says in the log, and nowhere else, that a thread is scheduled as any other: it works all the same.
pub fn log_unchanged(what: &str, result: io::Result<()>) {
    if let Err(error) = result {
        tracing::debug!("{what} is scheduled as any other thread: {error}");
    }
}

fn attributes() -> io::Result<libc::sched_attr> {
    // SAFETY: a plain C struct of integers, for which zeros are valid.
    let mut attr: libc::sched_attr = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::sched_attr>() as libc::c_uint;
    // SAFETY: `attr` is writable for `size` bytes and outlives the call; 0 means the calling thread.
    let done = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, size, 0) };
    if done == 0 { Ok(attr) } else { Err(io::Error::last_os_error()) }
}

fn set(attr: &libc::sched_attr) -> io::Result<()> {
    // SAFETY: `attr` is readable for the size that it says itself (the kernel filled it in), and
    // outlives the call; 0 means the calling thread.
    let done = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, std::ptr::from_ref(attr), 0) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_thread_that_asks_is_scheduled_otherwise_and_keeps_its_policy() {
        let before = attributes().unwrap();
        let there = std::thread::spawn(|| {
            be_prompt().unwrap();
            yield_to_others().unwrap();
            yield_to_others().unwrap();
            attributes().unwrap()
        });
        let changed = there.join().unwrap();
        assert_eq!(changed.sched_nice, before.sched_nice.max(BACKGROUND_NICE));
        assert_eq!(changed.sched_policy, before.sched_policy);
        let after = attributes().unwrap();
        assert_eq!((after.sched_nice, after.sched_runtime), (before.sched_nice, before.sched_runtime));
    }
}
