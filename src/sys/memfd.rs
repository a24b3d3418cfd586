//! Sealed memfds: guest RAM that another process may map, but neither shrink nor grow.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Makes a memfd of `bytes` bytes, all zero, close-on-exec, sealed with
/// `F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL`: whoever maps it never meets SIGBUS because its
/// peer truncated it (memfd_create(2)). No memory is allocated until a page is touched.
///
/// `name` shows in `/proc/PID/fd` and `/proc/PID/maps`.
pub fn create_sealed(name: &CStr, bytes: u64) -> io::Result<File> {
    create(name, bytes, MFdFlags::empty())
}

/// The same of huge pages of 2 MiB (hugetlb), of which `bytes` is a multiple. None is taken from the
/// host's pool, nor set aside, before it is mapped. Such a file cannot be written by write(2).
pub fn create_sealed_huge(name: &CStr, bytes: u64) -> io::Result<File> {
    create(name, bytes, MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB)
}

/// One that holds `content`, sealed like [`create_sealed`]: made without ftruncate(2), which movers may not call.
pub fn sealed_with(name: &CStr, content: &[u8]) -> io::Result<File> {
    let file = open(name, MFdFlags::empty())?;
    file.write_all_at(content, 0)?;
    seal(file)
}

fn create(name: &CStr, bytes: u64, kind: MFdFlags) -> io::Result<File> {
    let file = open(name, kind)?;
    file.set_len(bytes)?;
    seal(file)
}

fn open(name: &CStr, kind: MFdFlags) -> io::Result<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING | kind;
    Ok(File::from(memfd_create(name, flags)?))
}

fn seal(file: File) -> io::Result<File> {
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sealed_memfd_keeps_its_size_and_can_be_written() {
        let file = create_sealed(c"test", 1 << 20).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 1 << 20);
        assert!(file.set_len(4096).is_err());
        assert!(file.set_len(2 << 20).is_err());
        file.write_all_at(b"x", 4096).unwrap();
        let file = sealed_with(c"test", b"content").unwrap();
        assert_eq!(file.metadata().unwrap().len(), 7);
        assert!(file.write_all_at(b"x", 7).is_err() && file.set_len(0).is_err());
    }
}
