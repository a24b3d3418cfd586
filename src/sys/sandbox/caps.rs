//! Capabilities of the calling thread (capabilities(7)). Threads that it starts later have the same.

use std::io;

/// Capabilities that a program may have to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// To use files and sockets that belong to other users.
    DacOverride,
    /// To listen on a TCP port below 1024.
    NetBindService,
}

impl Keep {
    /// Its number in `linux/capability.h`.
    fn number(self) -> u32 {
        match self {
            Self::DacOverride => 1,
            Self::NetBindService => 10,
        }
    }

    /// As it is called there.
    pub fn name(self) -> &'static str {
        match self {
            Self::DacOverride => "CAP_DAC_OVERRIDE",
            Self::NetBindService => "CAP_NET_BIND_SERVICE",
        }
    }
}

/// `_LINUX_CAPABILITY_VERSION_3`.
const VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: libc::c_int,
}

/// `__user_cap_data_struct`; the first of two holds the lower 32 capabilities.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Drops all capabilities of this thread but those of `keep` that it has.
pub(super) fn drop_all_but(keep: &[Keep]) -> io::Result<()> {
    let header = Header { version: VERSION_3, pid: 0 };
    let mut data = [Data::default(); 2];
    // SAFETY: version 3 reads the header and writes two data structs; pid 0 is this thread.
    let rc = unsafe { libc::syscall(libc::SYS_capget, &header, data.as_mut_ptr()) };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    let wanted = keep.iter().fold(0, |bits, k| bits | 1 << k.number());
    let kept = data[0].permitted & wanted;
    let data = [Data { effective: kept, permitted: kept, inheritable: 0 }, Data::default()];
    // SAFETY: as above, and nothing is written.
    match unsafe { libc::syscall(libc::SYS_capset, &header, data.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
