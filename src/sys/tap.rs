//! TAP interfaces: the ioctls of /dev/net/tun (Documentation/networking/tuntap.rst, linux/if_tun.h).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use libc::{IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, c_int, ifreq};
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

const _: () = assert!(size_of::<ifreq>() == 40);

/// The longest name of an interface (`IFNAMSIZ` with its closing zero).
pub const MAX_NAME_BYTES: usize = libc::IFNAMSIZ - 1;
/// The header before every frame: `struct virtio_net_hdr_v1`, virtio 1.2, 5.1.6.
pub const VNET_HEADER_BYTES: usize = 12;

mod raw {
    #![allow(missing_docs)] // the kernel's ioctls, wrapped and described below
    use libc::{c_int, ifreq};
    use nix::{ioctl_readwrite_bad, ioctl_write_int_bad, ioctl_write_ptr_bad};

    ioctl_readwrite_bad!(tun_set_iff, libc::TUNSETIFF, ifreq);
    ioctl_write_ptr_bad!(tun_set_vnet_header_size, libc::TUNSETVNETHDRSZ, c_int);
    ioctl_write_int_bad!(tun_set_offload, libc::TUNSETOFFLOAD);
    ioctl_readwrite_bad!(get_interface_flags, libc::SIOCGIFFLAGS, ifreq);
    ioctl_write_ptr_bad!(set_interface_flags, libc::SIOCSIFFLAGS, ifreq);
}

/// Whether this network namespace has an interface `name`.
pub fn exists(name: &str) -> bool {
    if_nametoindex(name).is_ok()
}

/// Attaches to the tap `name`, and makes it if it is not there. Reads and writes never block, and
/// are whole frames after a [`VNET_HEADER_BYTES`] header (IFF_VNET_HDR); all offloads are off.
///
/// A tap that was made goes when the file is closed, unless it was made persistent by somebody. An
/// existing one keeps its state. EBUSY: another program is attached. EPERM: neither CAP_NET_ADMIN
/// nor the tap's owner. EINVAL: it is no tap, or one with several queues.
pub fn attach(name: &str) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")?;
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR) as i16;
    // SAFETY: the kernel reads a struct ifreq and writes it back.
    unsafe { raw::tun_set_iff(file.as_raw_fd(), &mut request) }?;
    let size = VNET_HEADER_BYTES as c_int;
    // SAFETY: the kernel reads an int.
    unsafe { raw::tun_set_vnet_header_size(file.as_raw_fd(), &size) }?;
    set_offloads(&file, 0)?;
    Ok(file)
}

/// Says which of TUN_F_CSUM, TUN_F_TSO4, … the reader of the tap can deal with.
pub fn set_offloads(tap: &File, offloads: u32) -> io::Result<()> {
    let flags = c_int::try_from(offloads).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the argument is a number.
    unsafe { raw::tun_set_offload(tap.as_raw_fd(), flags) }?;
    Ok(())
}

/// Sets the interface `name` up, as `ip link set NAME up` does.
pub fn set_up(name: &str) -> io::Result<()> {
    let any = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut request = request(name)?;
    // SAFETY: the kernel reads a struct ifreq and fills in its flags.
    unsafe { raw::get_interface_flags(any.as_raw_fd(), &mut request) }?;
    // SAFETY: SIOCGIFFLAGS has filled in this member of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as i16;
    // SAFETY: the kernel reads a struct ifreq.
    unsafe { raw::set_interface_flags(any.as_raw_fd(), &request) }?;
    Ok(())
}

/// A request about the interface `name`.
fn request(name: &str) -> io::Result<ifreq> {
    // A name with % would be a pattern, after which the kernel makes up a name.
    if name.is_empty() || name.len() > MAX_NAME_BYTES || name.contains(['%', '\0']) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: struct ifreq is plain data, for which all zeroes is valid.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    for (to, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = byte as libc::c_char;
    }
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_none_are_refused_before_the_kernel_sees_them() {
        for bad in ["", "tap%d", "a-name-of-16-byte", "x\0y"] {
            assert_eq!(attach(bad).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{bad:?}");
        }
        assert!(exists("lo"));
        assert!(!exists("no-such-tap"));
    }
}
