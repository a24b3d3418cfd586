//! Bytes as a string of hexadecimal digits, in JSON.

use std::fmt;

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The bytes of a KVM structure, in the kernel's layout. In JSON a string of lower-case
/// hexadecimal digits, two a byte. The length is checked where the structure is known.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct HexBytes(pub Vec<u8>);

impl fmt::Debug for HexBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HexBytes({} bytes)", self.0.len())
    }
}

impl Serialize for HexBytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut out = String::with_capacity(self.0.len() * 2);
        for byte in &self.0 {
            out.push(char::from(DIGITS[usize::from(byte >> 4)]));
            out.push(char::from(DIGITS[usize::from(byte & 15)]));
        }
        serializer.serialize_str(&out)
    }
}

struct HexVisitor;

impl Visitor<'_> for HexVisitor {
    type Value = HexBytes;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string of an even number of hexadecimal digits")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<HexBytes, E> {
        let digit = |c: u8| char::from(c).to_digit(16).map(|d| d as u8);
        let pairs = text.as_bytes().chunks(2);
        let bytes = pairs.map(|pair| match pair {
            [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
            _ => None,
        });
        bytes
            .collect::<Option<Vec<u8>>>()
            .map(HexBytes)
            .ok_or_else(|| E::custom("not an even number of hexadecimal digits"))
    }
}

impl<'de> Deserialize<'de> for HexBytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(HexVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_survive_and_bad_digits_are_refused() {
        let bytes = HexBytes(vec![0, 0x7f, 0xa5, 0xff]);
        let json = serde_json::to_string(&bytes).unwrap();
        assert_eq!(json, "\"007fa5ff\"");
        assert_eq!(serde_json::from_str::<HexBytes>(&json).unwrap(), bytes);
        for bad in ["\"0\"", "\"0g\"", "\"é0\"", "12", "\"+1\""] {
            assert!(serde_json::from_str::<HexBytes>(bad).is_err(), "{bad}");
        }
    }
}
