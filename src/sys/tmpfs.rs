//! A file for guest RAM on a tmpfs of its own, which makes transparent huge pages where it is asked to.
//!
//! Whether a memfd may have huge pages is a setting of the whole host (`shmem_enabled` in
//! `/sys/kernel/mm/transparent_hugepage`), and it says `never` unless somebody has changed it. A mounted tmpfs has a setting
//! of its own (tmpfs(5), `huge=`). So one is mounted, at no place: it is gone with its last file.

use std::fs::File;
use std::io;

use rustix::fs::{AtFlags, Mode, OFlags, openat, unlinkat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
};

/// Makes a file of `bytes` bytes, all zero, close-on-exec, of which nothing is allocated until it is touched, and
/// then in huge pages where a mapping with MADV_HUGEPAGE is touched. Unlike a memfd it cannot be sealed: whoever
/// gets it must not truncate it.
///
/// `name` shows in `/proc/PID/fd` and `/proc/PID/maps`. Needs CAP_SYS_ADMIN and Linux 5.2: `EPERM` and `ENOSYS` tell of
/// that.
pub fn create(name: &str, bytes: u64) -> io::Result<File> {
    create_with("advise", name, bytes)
}

/// The same on a tmpfs that makes huge pages as `huge` says.
pub(crate) fn create_with(huge: &str, name: &str, bytes: u64) -> io::Result<File> {
    let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&tmpfs, "source", name)?;
    // Without a limit, like a memfd: by default a tmpfs takes half of the host's memory.
    fsconfig_set_string(&tmpfs, "size", "0")?;
    fsconfig_set_string(&tmpfs, "mode", "0700")?;
    fsconfig_set_string(&tmpfs, "huge", huge)?;
    fsconfig_create(&tmpfs)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC
        | MountAttrFlags::MOUNT_ATTR_NOSUID;
    let root = fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let how = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = File::from(openat(&root, name, how, Mode::RUSR | Mode::WUSR)?);
    unlinkat(&root, name, AtFlags::empty())?;
    file.set_len(bytes)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;
    use crate::sys::window::RamWindow;

    #[test]
    fn what_is_touched_where_huge_pages_are_advised_is_a_huge_page() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: this needs root, to mount a tmpfs");
            return;
        }
        let file = create("test", 8 << 20).unwrap();
        assert_eq!((file.metadata().unwrap().len(), file.metadata().unwrap().blocks()), (8 << 20, 0));
        let window = RamWindow::new(&file, 8 << 20).unwrap();
        window.advise_huge().unwrap();
        window.touch((2 << 20) + 5);
        let settings = "/sys/kernel/mm/transparent_hugepage";
        let host = std::fs::read_to_string(format!("{settings}/shmem_enabled")).unwrap_or_default();
        if !host.contains("[deny]") {
            assert_eq!(file.metadata().unwrap().blocks() * 512, 2 << 20);
        }
        // What is written in other ways, as pages that arrive one by one, comes in small pages.
        file.write_all_at(b"x", 0).unwrap();
        assert!(file.metadata().unwrap().blocks() * 512 <= (2 << 20) + 4096);
    }
}
