//! What `--vsock` says.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;

use super::door::ASIDE_BYTES;
use crate::vmm::virtio::is_device_id;

/// Context ids below mean the hypervisor, this machine, the host (virtio 1.2, 5.10.4).
const FIRST_GUEST_CID: u64 = 3;
/// The upper half of a context id is reserved, and so is its highest value.
const LAST_GUEST_CID: u64 = u32::MAX as u64 - 1;
/// What unix(7) allows, less the `_PORT` that is added for a service of the host; the socket's other name
/// is no longer than that.
const MAX_PATH_BYTES: usize = 107 - "_4294967295".len();
const _: () = assert!(ASIDE_BYTES <= "_4294967295".len());

/// The Unix socket by which programs of the host reach the guest; the services that the guest
/// reaches listen at `PATH_PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketPath(pub PathBuf);

impl FromStr for SocketPath {
    type Err = NoVsockSpec;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.is_empty() || text.len() > MAX_PATH_BYTES || text.contains([',', '\0']) {
            true => Err(NoVsockSpec::Path(text.into())),
            false => Ok(Self(text.into())),
        }
    }
}

impl fmt::Display for SocketPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

/// `--vsock cid=N,path=PATH[,id=ID]`: sockets between host and guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockSpec {
    /// The guest's context id.
    pub cid: u64,
    /// The host's end.
    pub path: SocketPath,
    /// Its id; `vsock` with its number if it is not given.
    pub id: Option<String>,
}

/// Text that describes no socket device.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs)] // the messages say it
pub enum NoVsockSpec {
    #[error("{0:?} is no context id of a guest: use a number from {FIRST_GUEST_CID} to {LAST_GUEST_CID}")]
    Cid(String),
    #[error("{0:?} is no path for a socket: use up to {MAX_PATH_BYTES} bytes without a comma")]
    Path(String),
    #[error("{0:?} is no socket device: use cid=N,path=PATH[,id=ID]")]
    Form(String),
}

impl FromStr for VsockSpec {
    type Err = NoVsockSpec;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || NoVsockSpec::Form(text.into());
        let (mut cid, mut path, mut id) = (None, None, None);
        for word in text.split(',') {
            let (key, value) = word.split_once('=').ok_or_else(bad)?;
            let twice = match key {
                "cid" => cid.replace(guest_cid(value)?).is_some(),
                "path" => path.replace(value.parse()?).is_some(),
                "id" if is_device_id(value) => id.replace(value.to_owned()).is_some(),
                _ => return Err(bad()),
            };
            if twice {
                return Err(bad());
            }
        }
        Ok(Self { cid: cid.ok_or_else(bad)?, path: path.ok_or_else(bad)?, id })
    }
}

/// Reads the context id of a guest.
pub fn guest_cid(text: &str) -> Result<u64, NoVsockSpec> {
    let cid = text.parse().ok().filter(|cid| (FIRST_GUEST_CID..=LAST_GUEST_CID).contains(cid));
    cid.ok_or_else(|| NoVsockSpec::Cid(text.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_described_by_words() {
        let device: VsockSpec = "cid=3,path=/run/vm.vsock,id=v".parse().unwrap();
        assert_eq!(
            (device.cid, device.path.to_string(), device.id),
            (3, "/run/vm.vsock".into(), Some("v".into()))
        );
        let complaint = |text: &str| text.parse::<VsockSpec>().unwrap_err().to_string();
        for text in
            ["", "cid=3", "path=/x", "cid=3,cid=4,path=/x", "cid=3,path=/x,mac=1", "cid=3,path=/x,id="]
        {
            assert!(complaint(text).contains("cid=N,path=PATH"), "{text}");
        }
        for cid in ["", "2", "-1", "4294967295", "x"] {
            assert!(complaint(&format!("cid={cid},path=/x")).contains("context id"), "{cid}");
        }
        assert!(complaint("cid=3,path=").contains("no path"));
        assert!(complaint(&format!("cid=3,path={}", "x".repeat(97))).contains("up to 96 bytes"));
    }
}
