//! The host's end of a network card.

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use libc::{TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6};
use thiserror::Error;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
};

use super::TapSpec;
use crate::sys::tap::{self, VNET_HEADER_BYTES};

/// The longest frame with its header: an IP packet of 64 KiB that was never cut into segments, with
/// an Ethernet header and a VLAN tag.
pub const MAX_FRAME_BYTES: usize = VNET_HEADER_BYTES + 14 + 4 + 65535;

/// Why a tap cannot be used. Nothing has been changed.
#[derive(Debug, Error)]
#[error("tap {tap}: {reason}")]
pub struct TapError {
    tap: String,
    reason: String,
}

impl TapError {
    fn new(spec: &TapSpec, reason: impl Into<String>) -> Self {
        Self { tap: spec.name.clone(), reason: reason.into() }
    }

    /// What failed, without the name of the tap.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    fn of_attach(spec: &TapSpec, error: &io::Error) -> Self {
        let reason = match error.raw_os_error() {
            Some(libc::EBUSY) => "another program is attached to it".into(),
            Some(libc::EPERM) => {
                "attaching is not permitted: it takes CAP_NET_ADMIN, or being the tap's owner".into()
            }
            Some(libc::EINVAL) => "the interface of that name is no tap, or a tap with several queues".into(),
            Some(libc::ENOENT | libc::EACCES | libc::ENXIO) => format!("cannot open /dev/net/tun: {error}"),
            _ => format!("cannot attach to it: {error}"),
        };
        Self::new(spec, reason)
    }
}

/// A tap that this process is attached to. Frames begin with a [`VNET_HEADER_BYTES`] header.
pub struct Tap {
    file: File,
    name: String,
}

impl Tap {
    /// Attaches. No frame goes in or out by that; what the network has for the guest from now on
    /// waits in the tap's queue.
    pub fn open(spec: &TapSpec) -> Result<Self, TapError> {
        if !spec.make && !tap::exists(&spec.name) {
            return Err(TapError::new(spec, "there is no interface of that name"));
        }
        let made = spec.make && !tap::exists(&spec.name);
        let file = tap::attach(&spec.name).map_err(|e| TapError::of_attach(spec, &e))?;
        if made {
            tap::set_up(&spec.name).map_err(|e| TapError::new(spec, format!("cannot be set up: {e}")))?;
        }
        Ok(Self { file, name: spec.name.clone() })
    }

    /// Frames of a socket instead of a network's, with headers.
    #[cfg(any(fuzzing, test))]
    pub(crate) fn of_socket(socket: std::os::fd::OwnedFd) -> Self {
        Self { file: socket.into(), name: "socket".to_owned() }
    }

    /// Tells the kernel what the guest takes, by the features that it has accepted.
    pub fn set_offloads(&self, features: u64) -> Result<(), TapError> {
        tap::set_offloads(&self.file, offloads(features))
            .map_err(|e| TapError { tap: self.name.clone(), reason: format!("cannot set its offloads: {e}") })
    }

    /// Reads a frame with its header into `buffer`, which has [`MAX_FRAME_BYTES`]; `None` when none
    /// waits. A tap that is down or gone has none.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            return match (&self.file).read(buffer) {
                Ok(bytes) => Ok(Some(bytes)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => Err(e),
            };
        }
    }

    /// Writes a frame with its header; whatever the network does not take is lost, as on a wire.
    pub fn write(&self, frame: &[u8]) -> io::Result<()> {
        loop {
            match (&self.file).write(frame) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
                Ok(_) => return Ok(()),
            }
        }
    }

    /// Writes a frame of the host's own: nothing is left to the network to compute.
    pub fn write_plain(&self, frame: &[u8]) -> io::Result<()> {
        let header = [0; VNET_HEADER_BYTES];
        (&self.file).write_vectored(&[IoSlice::new(&header), IoSlice::new(frame)]).map(drop)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// TUN_F_ flags for the features VIRTIO_NET_F_GUEST_ that a driver has accepted. Segments that are
/// not cut need checksums that are not computed (virtio 1.2, 5.1.3.1).
fn offloads(features: u64) -> u32 {
    let has = |feature: u32| features & 1 << feature != 0;
    if !has(VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let mut flags = TUN_F_CSUM;
    let pairs = [(VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4), (VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6)];
    pairs.iter().filter(|(feature, _)| has(*feature)).for_each(|(_, flag)| flags |= flag);
    if flags != TUN_F_CSUM && has(VIRTIO_NET_F_GUEST_ECN) {
        flags |= TUN_F_TSO_ECN;
    }
    flags
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::{setsockopt, sockopt};

    use super::super::namespace::{all_frames, in_a_namespace};
    use super::*;

    #[test]
    fn a_tap_that_is_not_there_is_named() {
        let spec: TapSpec = "no-such-tap".parse().unwrap();
        let error = Tap::open(&spec).err().unwrap().to_string();
        assert_eq!(error, "tap no-such-tap: there is no interface of that name");
        let loopback: TapSpec = "lo".parse().unwrap();
        let error = Tap::open(&loopback).err().unwrap().to_string();
        assert!(error.starts_with("tap lo: "), "{error}");
    }

    #[test]
    fn offloads_follow_the_features() {
        let bits = |list: &[u32]| list.iter().fold(0u64, |all, f| all | 1 << f);
        assert_eq!(offloads(0), 0);
        assert_eq!(offloads(bits(&[VIRTIO_NET_F_GUEST_TSO4])), 0);
        assert_eq!(offloads(bits(&[VIRTIO_NET_F_GUEST_CSUM])), TUN_F_CSUM);
        assert_eq!(offloads(bits(&[VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN])), TUN_F_CSUM);
        let all = bits(&[
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
        ]);
        assert_eq!(offloads(all), TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN);
    }

    #[test]
    fn frames_go_through_a_tap_that_only_one_program_has() {
        in_a_namespace(|| {
            let tap = Tap::open(&"new:vmtest0".parse().unwrap()).unwrap();
            let error = Tap::open(&"vmtest0".parse().unwrap()).err().unwrap().to_string();
            assert_eq!(error, "tap vmtest0: another program is attached to it");
            tap.set_offloads(1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4).unwrap();

            let wire = all_frames();
            let announced = super::super::rarp("52:54:00:12:34:56".parse().unwrap());
            tap.write_plain(&announced).unwrap();
            let mut seen = vec![0; 2000];
            while seen[..announced.len()] != announced[..] {
                let bytes = (&wire).read(&mut seen).expect("the frame does not come");
                assert!(bytes > 0);
            }
            // And from the host to the guest, behind a header.
            let host = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
            setsockopt(&host, sockopt::BindToDevice, &"vmtest0".into()).unwrap();
            host.set_broadcast(true).unwrap();
            host.send_to(b"for the guest", "255.255.255.255:9").unwrap();
            let mut frame = vec![0; MAX_FRAME_BYTES];
            let mut frames =
                std::iter::from_fn(|| tap.read(&mut frame).unwrap().map(|n| frame[..n].to_vec()));
            let found =
                frames.find(|f| f.ends_with(b"for the guest")).expect("the frame is in the tap's queue");
            assert_eq!(found[VNET_HEADER_BYTES..][..6], [0xff; 6]);

            drop(tap);
            assert!(!tap::exists("vmtest0"), "a tap that was made goes with its program");
        });
    }
}
