//! Who has an image locked, for messages.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;

/// The process of this host that has an open-file-description lock on the file, where this one may see
/// it: the kernel does not name the holder, /proc/PID/fdinfo does (proc_pid_fdinfo(5)).
pub fn of(file: &File) -> Option<u32> {
    let inode = file.metadata().ok()?.ino();
    let pids = fs::read_dir("/proc").ok()?.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
    let mut others = pids.filter(|pid| *pid != std::process::id());
    others.find(|pid| holds(*pid, inode).unwrap_or(false))
}

fn holds(pid: u32, inode: u64) -> Option<bool> {
    let ends = format!(":{inode}");
    // lock:	1: OFDLCK  ADVISORY  WRITE -1 08:01:1234 9223372036854775791 9223372036854775791
    let names = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.contains(&"OFDLCK") && words.get(6).is_some_and(|file| file.ends_with(&ends))
    };
    let open = fs::read_dir(format!("/proc/{pid}/fdinfo")).ok()?.flatten();
    Some(open.filter_map(|fd| fs::read_to_string(fd.path()).ok()).any(|text| text.lines().any(names)))
}
