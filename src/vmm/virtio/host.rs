//! What a device is connected to on the host: text, parsed, and opened.

use std::fmt;
use std::path::Path;

use thiserror::Error;

use super::block::{Block, ImageConfig};
use super::net::{MAC_PROPERTY, MacAddress, Net, Tap, TapSpec};
use super::rng::{self, Rng};
use super::vsock::{CID_PROPERTY, SocketPath, Vsock, guest_cid};
use super::{Device, Kind};
use crate::state::DeviceDescription;

/// The host's end of a device, as flags, `--remap` and machine descriptions name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostEnd {
    /// A disk's image.
    Image(ImageConfig),
    /// A tap, for a network card.
    Net {
        /// The interface.
        tap: TapSpec,
        /// The card's address in a machine that boots, a random one by default; a card that comes in
        /// keeps its own.
        mac: Option<MacAddress>,
    },
    /// The kernel's random numbers.
    Rng,
    /// A Unix socket, for sockets between host and guest.
    Vsock {
        /// Where programs of the host connect.
        path: SocketPath,
        /// The context id of a guest that boots; one that comes in keeps its own.
        cid: Option<u64>,
    },
}

/// Text that names no host end of that kind.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{text:?} is no host end of a {kind} device: {reason}")]
pub struct NoHostEnd {
    /// The kind of device that it is for.
    pub kind: &'static str,
    /// The text.
    pub text: String,
    /// What is wrong with it.
    pub reason: String,
}

/// Why a host end could not be opened. The message names it.
#[derive(Debug, Error)]
#[error("{what}: {reason}")]
pub struct OpenError {
    /// The path or interface.
    pub what: String,
    /// What failed.
    pub reason: String,
}

impl HostEnd {
    /// The kind of device that it is for.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Image(_) => Kind::Block,
            Self::Net { .. } => Kind::Net,
            Self::Rng => Kind::Rng,
            Self::Vsock { .. } => Kind::Vsock,
        }
    }

    /// Whether a machine that comes in may say itself what its device of that kind is connected to
    /// here. Not where that is a path: a guest could have itself connected to any file of this host.
    pub fn is_for_the_peer_to_say(kind: Kind) -> bool {
        !matches!(kind, Kind::Block | Kind::Vsock)
    }

    /// Reads the text of a description or of `--remap`; [`HostEnd`]'s `Display` writes it.
    pub fn parse(kind: Kind, text: &str) -> Result<Self, NoHostEnd> {
        let fail = |reason: &str| NoHostEnd { kind: kind.name(), text: text.into(), reason: reason.into() };
        match kind {
            Kind::Block => ImageConfig::parse(text).map(Self::Image).map_err(|e| fail(&e)),
            Kind::Net => match text.parse() {
                Ok(tap) => Ok(Self::Net { tap, mac: None }),
                Err(e) => Err(fail(&e.to_string())),
            },
            Kind::Rng if text == "kernel" => Ok(Self::Rng),
            Kind::Rng => Err(fail("there is only \"kernel\"")),
            Kind::Vsock => match text.parse() {
                Ok(path) => Ok(Self::Vsock { path, cid: None }),
                Err(e) => Err(fail(&e.to_string())),
            },
        }
    }

    /// Opens it and makes the device named `id`, with nothing done yet. `theirs` is the device that comes
    /// in, which it has to be like; `None` for a machine that boots.
    pub fn open(&self, id: &str, theirs: Option<&DeviceDescription>) -> Result<Box<dyn Device>, OpenError> {
        let properties = theirs.map(|device| &device.properties);
        let said = |name: &str| properties.and_then(|all| all.get(name)).map_or("", |text| text);
        match self {
            Self::Image(config) => match Block::open(id, config, properties) {
                Ok(block) => Ok(Box::new(block)),
                Err(e) => Err(OpenError { what: config.path.display().to_string(), reason: e.to_string() }),
            },
            Self::Net { tap, mac } => {
                let fail = |reason: String| OpenError { what: format!("tap {}", tap.name), reason };
                let mac = match properties {
                    None => mac.map_or_else(MacAddress::random, Ok).map_err(|e| fail(e.to_string()))?,
                    Some(_) => said(MAC_PROPERTY).parse().map_err(|e| fail(format!("{e}")))?,
                };
                let tap = Tap::open(tap).map_err(|e| fail(e.reason().to_owned()))?;
                Ok(Box::new(Net::new(tap, mac)))
            }
            Self::Rng => match Rng::new() {
                Ok(rng) => Ok(Box::new(rng)),
                Err(e) => Err(OpenError { what: rng::SOURCE.into(), reason: e.to_string() }),
            },
            Self::Vsock { path: SocketPath(path), cid } => {
                let fail = |reason: String| OpenError { what: path.display().to_string(), reason };
                let cid = cid.map_or_else(|| guest_cid(said(CID_PROPERTY)), Ok);
                let cid = cid.map_err(|e| fail(e.to_string()))?;
                let device = match theirs {
                    None => Vsock::boot(cid, path),
                    Some(theirs) => Vsock::arriving(cid, path, theirs.host.as_deref().map(Path::new)),
                };
                Ok(Box::new(device.map_err(|e| fail(e.to_string()))?))
            }
        }
    }
}

impl fmt::Display for HostEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image(config) => config.fmt(f),
            Self::Net { tap, .. } => tap.fmt(f),
            Self::Rng => f.write_str("kernel"),
            Self::Vsock { path, .. } => path.fmt(f),
        }
    }
}
