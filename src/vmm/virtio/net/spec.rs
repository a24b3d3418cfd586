//! What `--net` and `--remap ID=TAP` say.

use std::fmt;
use std::io;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::sys::tap;

/// An Ethernet address of one station. As text: six bytes in hexadecimal, with colons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// A random one of those that are administered locally (IEEE 802, bit 1 of the first byte).
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 6];
        io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
        bytes[0] = bytes[0] & !1 | 2;
        Ok(Self(bytes))
    }
}

impl FromStr for MacAddress {
    type Err = NoNetSpec;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || NoNetSpec::Mac(text.into());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
            *byte = u8::from_str_radix(part.ok_or_else(bad)?, 16).map_err(|_| bad())?;
        }
        // A group's address, or none at all, is no station's.
        match parts.next().is_some() || bytes[0] & 1 != 0 || bytes == [0; 6] {
            true => Err(bad()),
            false => Ok(Self(bytes)),
        }
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl TryFrom<String> for MacAddress {
    type Error = NoNetSpec;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

/// The tap that a network card is connected to: `NAME`, or `new:NAME` for one that is made, set up,
/// and gone with its `vmrun`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TapSpec {
    /// The interface.
    pub name: String,
    /// Whether it is made if it is not there.
    pub make: bool,
}

impl FromStr for TapSpec {
    type Err = NoNetSpec;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, make) = match text.strip_prefix("new:") {
            Some(name) => (name, true),
            None => (text, false),
        };
        let fits = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | '%' | ':' | ',');
        match name.is_empty() || name.len() > tap::MAX_NAME_BYTES || !name.chars().all(fits) {
            true => Err(NoNetSpec::Tap(text.into())),
            false => Ok(Self { name: name.into(), make }),
        }
    }
}

impl fmt::Display for TapSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.make { "new:" } else { "" }, self.name)
    }
}

/// `--net tap=NAME[,mac=MAC][,id=ID]`: a network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetSpec {
    /// What it is connected to.
    pub tap: TapSpec,
    /// Its address; a random one if it is not given.
    pub mac: Option<MacAddress>,
    /// Its id; `net` with its number if it is not given.
    pub id: Option<String>,
}

/// Text that describes no network card.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs)] // the messages say it
pub enum NoNetSpec {
    #[error("{0:?} is no Ethernet address of one station: use six bytes as in 52:54:00:12:34:56")]
    Mac(String),
    #[error("{0:?} is no tap: use the name of an interface, up to 15 bytes, or new:NAME")]
    Tap(String),
    #[error("{0:?} is no network card: use tap=NAME[,mac=MAC][,id=ID]")]
    Form(String),
}

impl FromStr for NetSpec {
    type Err = NoNetSpec;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || NoNetSpec::Form(text.into());
        let (mut tap, mut mac, mut id) = (None, None, None);
        for word in text.split(',') {
            let (key, value) = word.split_once('=').ok_or_else(bad)?;
            let twice = match key {
                "tap" => tap.replace(value.parse::<TapSpec>()?).is_some(),
                "mac" => mac.replace(value.parse::<MacAddress>()?).is_some(),
                "id" if crate::vmm::virtio::is_device_id(value) => id.replace(value.to_owned()).is_some(),
                _ => return Err(bad()),
            };
            if twice {
                return Err(bad());
            }
        }
        Ok(Self { tap: tap.ok_or_else(bad)?, mac, id })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_is_described_by_words() {
        let card: NetSpec = "tap=tap0,mac=52:54:00:12:34:56,id=lan".parse().unwrap();
        assert_eq!(card.tap, TapSpec { name: "tap0".into(), make: false });
        assert_eq!(card.mac.unwrap().to_string(), "52:54:00:12:34:56");
        assert_eq!(card.id.as_deref(), Some("lan"));
        let short: NetSpec = "tap=new:vm-7".parse().unwrap();
        assert_eq!((short.tap.to_string(), short.mac, short.id), ("new:vm-7".into(), None, None));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let complaint = |text: &str| text.parse::<NetSpec>().unwrap_err().to_string();
        for text in
            ["", "tap0", "mac=52:54:00:12:34:56", "tap=a,tap=b", "tap=a,mtu=9", "tap=a,id=", "tap=a,id=x y"]
        {
            assert!(complaint(text).contains("tap=NAME[,mac=MAC]"), "{text}");
        }
        for text in ["tap=", "tap=new:", "tap=a/b", "tap=tap%d", "tap=a-name-of-16-byte"] {
            assert!(complaint(text).contains("is no tap"), "{text}");
        }
        for mac in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "53:54:00:12:34:56",
            "5:54:0:12:34:56",
            "00:00:00:00:00:00",
            "+2:54:00:12:34:56",
        ] {
            assert!(complaint(&format!("tap=a,mac={mac}")).contains("Ethernet address"), "{mac}");
        }
    }

    #[test]
    fn random_addresses_are_local_and_of_one_station() {
        for _ in 0..20 {
            let mac = MacAddress::random().unwrap();
            assert_eq!(mac.0[0] & 3, 2);
            assert_eq!(mac.to_string().parse(), Ok(mac));
        }
    }
}
