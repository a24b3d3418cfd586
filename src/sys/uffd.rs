//! Page faults of another process, served here: userfaultfd(2) over shared memory, in missing mode; for
//! huge pages out of the pool in minor mode too.
//!
//! Addresses are those of the process that registered its memory, wherever the descriptor is used;
//! the bytes that are copied are read from the process that calls.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use userfaultfd::{Error, Event, EventBuffer, FeatureFlags, RegisterMode, Uffd, UffdBuilder};

/// Bytes of a page, the unit of every fault.
const PAGE_BYTES: u64 = 4096;
/// UFFD_FEATURE_MISSING_HUGETLBFS.
const MISSING_HUGETLBFS: u64 = 1 << 4;
/// UFFD_FEATURE_MINOR_HUGETLBFS, which the crate does not name.
const MINOR_HUGETLBFS: u64 = 1 << 9;
/// UFFD_USER_MODE_ONLY.
const USER_MODE_ONLY: i32 = 1;
/// What a process has to say first of all to a new userfaultfd.
const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
/// Faults that are read at once.
const BATCH: usize = 64;

/// `struct uffdio_api` of linux/userfaultfd.h.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// A userfaultfd, or a duplicate of one.
#[derive(Debug)]
pub struct FaultFd(Uffd);

/// What came of putting pages into place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// This many bytes were placed, from the start on.
    Bytes(u64),
    /// The first page is there already.
    Exists,
}

impl FaultFd {
    /// A new one for this process's memory. KVM's faults are kernel-mode faults, so it is not
    /// restricted to user mode: that takes /dev/userfaultfd or CAP_SYS_PTRACE.
    pub fn new() -> io::Result<Self> {
        Self::make(FeatureFlags::empty())
    }

    /// The same for memory of huge pages (hugetlb), from Linux 5.13 on.
    pub fn for_huge_pages() -> io::Result<Self> {
        Self::make(FeatureFlags::from_bits_retain(MISSING_HUGETLBFS | MINOR_HUGETLBFS))
    }

    /// For huge pages of ours that are only asked after: nobody serves faults, and the kernel's are
    /// none. By the system call, which everybody may make for that, also in the sandbox; the crate
    /// would want /dev/userfaultfd where there is one.
    pub(super) fn for_own_huge_pages() -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
        // SAFETY: it takes nothing but flags, and makes a descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new, and nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let mut api = Api { api: UFFD_API, features: MINOR_HUGETLBFS, ioctls: 0 };
        // SAFETY: UFFDIO_API reads and writes one `struct uffdio_api`, which is ours alone.
        if unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self::from_fd(fd))
    }

    fn make(features: FeatureFlags) -> io::Result<Self> {
        UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            .user_mode_only(false)
            .require_features(features)
            .create()
            .map(Self)
            .map_err(other)
    }

    /// Takes a descriptor that another process has passed.
    pub fn from_fd(fd: OwnedFd) -> Self {
        // SAFETY: the descriptor is owned and handed over. If it is no userfaultfd, every ioctl on
        // it fails with ENOTTY, and reads give bytes that are checked as events.
        Self(unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) })
    }

    /// A duplicate to pass on.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        // SAFETY: the descriptor stays open while `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }.try_clone_to_owned()
    }

    /// From here on faults on missing pages of `bytes` at `start` wait for whoever holds this.
    pub fn register(&self, start: u64, bytes: u64) -> io::Result<()> {
        self.0.register(start as *mut _, bytes as usize).map(drop).map_err(other)
    }

    /// The same for huge pages: faults wait also on one that is in the file already, until it is shown.
    pub fn register_hidden(&self, start: u64, bytes: u64) -> io::Result<()> {
        self.register_for(start, bytes, RegisterMode::MISSING | RegisterMode::MINOR)
    }

    /// For pages that are there, but not mapped; missing ones are the kernel's.
    pub(super) fn register_minor(&self, start: u64, bytes: u64) -> io::Result<()> {
        self.register_for(start, bytes, RegisterMode::MINOR)
    }

    fn register_for(&self, start: u64, bytes: u64, mode: RegisterMode) -> io::Result<()> {
        self.0.register_with_mode(start as *mut _, bytes as usize, mode).map(drop).map_err(other)
    }

    /// Ends that; whoever waits goes on and finds what is there, or zeros.
    pub fn unregister(&self, start: u64, bytes: u64) -> io::Result<()> {
        self.0.unregister(start as *mut _, bytes as usize).map_err(other)
    }

    /// The pages whose faults wait to be read now; none if there are none.
    pub fn read_faults(&self) -> io::Result<Vec<u64>> {
        let mut buffer = EventBuffer::new(BATCH);
        let mut faults = Vec::new();
        let events = match self.0.read_events(&mut buffer) {
            Ok(events) => events,
            Err(error) if errno(&error) == Some(Errno::EAGAIN) => return Ok(faults),
            Err(error) => return Err(other(error)),
        };
        for event in events {
            if let Event::Pagefault { addr, .. } = event.map_err(other)? {
                faults.push(addr as u64 & !(PAGE_BYTES - 1));
            }
        }
        Ok(faults)
    }

    /// Puts whole pages of `data` at `start`, each at once, and wakes whoever waits for them. Stops
    /// before a page that is there.
    pub fn copy(&self, start: u64, data: &[u8]) -> io::Result<Placed> {
        loop {
            // SAFETY: the source is a slice of ours. The destination is memory of the registering
            // process inside a registered range (the kernel refuses any other), which is guest RAM
            // that no Rust reference points to.
            let result = unsafe { self.0.copy(data.as_ptr().cast(), start as *mut _, data.len(), true) };
            match result {
                Ok(bytes) => return Ok(Placed::Bytes(bytes as u64)),
                Err(Error::PartiallyCopied(bytes)) if bytes as isize > 0 => {
                    return Ok(Placed::Bytes(bytes as u64));
                }
                Err(error) => match errno(&error) {
                    Some(Errno::EEXIST) => return Ok(Placed::Exists),
                    Some(Errno::EAGAIN) => std::thread::yield_now(),
                    _ => return Err(other(error)),
                },
            }
        }
    }

    /// Puts one zero page at `start` and wakes whoever waits for it.
    pub fn zero(&self, start: u64) -> io::Result<Placed> {
        loop {
            // SAFETY: as for `copy`; zeros come from the kernel.
            match unsafe { self.0.zeropage(start as *mut _, PAGE_BYTES as usize, true) } {
                Ok(bytes) => return Ok(Placed::Bytes(bytes as u64)),
                Err(error) => match errno(&error) {
                    Some(Errno::EEXIST) => return Ok(Placed::Exists),
                    Some(Errno::EAGAIN) => std::thread::yield_now(),
                    _ => return Err(other(error)),
                },
            }
        }
    }

    /// Maps the page of `bytes` bytes at `start` as it is in the file (UFFDIO_CONTINUE), and wakes whoever
    /// waits for it, unless it was mapped before; `false` where the file has a hole there.
    pub fn show(&self, start: u64, bytes: u64) -> io::Result<bool> {
        loop {
            match self.0.r#continue(start as *mut _, bytes as usize, true) {
                Ok(_) => return Ok(true),
                Err(error) => match errno(&error) {
                    Some(Errno::EEXIST) => return Ok(true),
                    Some(Errno::EFAULT) => return Ok(false),
                    Some(Errno::EAGAIN) => std::thread::yield_now(),
                    _ => return Err(other(error)),
                },
            }
        }
    }

    /// Lets whoever waits in the range look again: they fault anew, and are told of anew.
    pub fn wake(&self, start: u64, bytes: u64) -> io::Result<()> {
        self.0.wake(start as *mut _, bytes as usize).map_err(other)
    }
}

impl AsFd for FaultFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor stays open while `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

/// The system's error in one of the crate's, which has an `Errno` type of its own.
fn errno(error: &Error) -> Option<Errno> {
    match error {
        Error::SystemError(errno) | Error::CopyFailed(errno) | Error::ZeropageFailed(errno) => {
            Some(Errno::from_raw(*errno as i32))
        }
        // An error that the crate takes for a count.
        Error::PartiallyCopied(bytes) if (*bytes as isize) < 0 => {
            i32::try_from((*bytes as isize).unsigned_abs()).ok().map(Errno::from_raw)
        }
        _ => None,
    }
}

fn other(error: Error) -> io::Error {
    match (errno(&error), error) {
        (Some(errno), _) => errno.into(),
        (None, Error::OpenDevUserfaultfd(error)) => error,
        (None, error) => io::Error::other(error),
    }
}
