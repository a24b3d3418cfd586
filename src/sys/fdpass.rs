//! Bytes with file descriptors over a Unix stream socket (SCM_RIGHTS, unix(7)).

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// The most descriptors that the kernel puts into one message (`SCM_MAX_FD`). The receive buffer has
/// room for all of them, so that none is installed in this process without being seen.
const KERNEL_MAX_FDS: usize = 253;

/// What one [`receive`] gave.
#[derive(Debug)]
pub struct Received {
    /// How many bytes; 0 is the end of the stream.
    pub bytes: usize,
    /// The descriptors that came with them, close-on-exec.
    pub fds: Vec<OwnedFd>,
    /// Descriptors were lost on the way in (this process has too many open).
    pub fds_lost: bool,
}

/// Sends the first part of `bytes`, `fds` with its first byte; gives how many bytes went out.
///
/// When at least one did, all of `fds` did too. Never blocks and never raises SIGPIPE.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights[..] };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    let iov = [IoSlice::new(bytes)];
    Ok(sendmsg::<()>(socket.as_raw_fd(), &iov, control, flags, None)?)
}

/// Receives bytes, and the descriptors that come with them. Never blocks.
///
/// Own code rather than nix's: its `recvmsg` forgets descriptors that the kernel has already
/// installed when some of them did not fit.
pub fn receive(socket: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<Received> {
    // u64 for the alignment of cmsghdr.
    let mut control = [0u64; (KERNEL_MAX_FDS * size_of::<RawFd>() + 32) / 8 + 1];
    let mut iov = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    // SAFETY: msghdr is plain data, for which all zeroes is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control);
    let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
    // SAFETY: `header` points to `into` and `control` with their true lengths, and both outlive the call.
    let bytes = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut header, flags) };
    if bytes < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut fds = Vec::new();
    // SAFETY: recvmsg has filled `header`; CMSG_FIRSTHDR and CMSG_NXTHDR stay within msg_controllen.
    let mut cmsg = unsafe { libc::CMSG_FIRSTHDR(&header) };
    while !cmsg.is_null() {
        // SAFETY: not null, so it is a whole cmsghdr within `control`.
        let head = unsafe { &*cmsg };
        if head.cmsg_level == libc::SOL_SOCKET && head.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: as above, and CMSG_LEN(0) only computes.
            let (data, empty) = unsafe { (libc::CMSG_DATA(cmsg), libc::CMSG_LEN(0)) };
            let count = (head.cmsg_len as usize).saturating_sub(empty as usize) / size_of::<RawFd>();
            for i in 0..count {
                // SAFETY: the kernel wrote `count` descriptors at `data`; they need not be aligned.
                let fd = unsafe { data.cast::<RawFd>().add(i).read_unaligned() };
                // SAFETY: the kernel has just installed it for us, and nobody else knows of it.
                fds.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
        // SAFETY: `cmsg` lies in `header`'s control buffer.
        cmsg = unsafe { libc::CMSG_NXTHDR(&header, cmsg) };
    }
    Ok(Received { bytes: bytes as usize, fds, fds_lost: header.msg_flags & libc::MSG_CTRUNC != 0 })
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn descriptors_come_with_the_bytes() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        assert_eq!(send(a.as_fd(), b"hello", &[writer.as_fd(), writer.as_fd()]).unwrap(), 5);
        drop(writer);
        let mut buffer = [0; 16];
        let got = receive(b.as_fd(), &mut buffer).unwrap();
        assert_eq!((got.bytes, got.fds.len(), got.fds_lost), (5, 2, false));
        // The pipe's write end lives on in what came, and only there.
        drop(got);
        assert_eq!(reader.read(&mut buffer).unwrap(), 0);
        assert_eq!(receive(b.as_fd(), &mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(a);
        assert_eq!(receive(b.as_fd(), &mut buffer).unwrap().bytes, 0);
    }
}
