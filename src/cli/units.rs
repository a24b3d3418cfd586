//! Quantities on command lines.
//!
//! Sizes and rates are in bytes, with `K`, `M`, `G`, `T` for powers of 1024 (`KiB`, `MiB`, … say the
//! same). Rates may also be in bits a second, the way network links are sold: `1Gbit` is 10⁹ bits.
//! Times have their unit: `300ms`, `2s`, `1m 30s`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A size in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// A rate in bytes a second; 0 is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rate(pub u64);

impl FromStr for Size {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is no size: use bytes or 64K, 512M, 2G, 1T (powers of 1024)");
        scaled(text, 1024, &["", "B", "iB"]).map(Self).ok_or_else(bad)
    }
}

impl FromStr for Rate {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || {
            format!(
                "{text:?} is no rate: use bytes per second as 100M, 1G (powers of 1024), or bits as 800Mbit, 10Gbit"
            )
        };
        let text = text.strip_suffix("/s").unwrap_or(text);
        let rate = match text.strip_suffix("bit") {
            Some(bits) => scaled(bits, 1000, &[""]).map(|bits| bits / 8),
            None => scaled(text, 1024, &["", "B", "iB"]),
        };
        rate.map(Self).ok_or_else(bad)
    }
}

/// `text` as a number with one of K, M, G, T (powers of `base`) and one of `endings`.
fn scaled(text: &str, base: u64, endings: &[&str]) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim_start();
    let power = match unit.chars().next().map(|c| c.to_ascii_uppercase()) {
        Some('K') => 1,
        Some('M') => 2,
        Some('G') => 3,
        Some('T') => 4,
        _ => 0,
    };
    let ending = if power == 0 { unit } else { &unit[1..] };
    if !endings.contains(&ending) || power == 0 && ending == "iB" {
        return None;
    }
    let factor = base.checked_pow(power)?;
    match number.split_once('.') {
        None => number.parse::<u64>().ok()?.checked_mul(factor),
        // A part of a byte is no size.
        Some((whole, part)) if power > 0 && !part.is_empty() && part.len() <= 6 => {
            let whole = whole.parse::<u64>().ok()?.checked_mul(factor)?;
            let part =
                u128::from(part.parse::<u64>().ok()?) * u128::from(factor) / 10u128.pow(part.len() as u32);
            whole.checked_add(u64::try_from(part).ok()?)
        }
        Some(_) => None,
    }
}

/// `300ms`, `2s`, `1m 30s`; a number alone is refused, since its unit would be a guess.
pub fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|_| format!("{text:?} is no time: say the unit, as in 300ms, 2s, 5m"))
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
            if self.0 >= 1 << shift {
                let value = self.0 as f64 / (1u64 << shift) as f64;
                let digits = usize::from(!self.0.is_multiple_of(1 << shift));
                return write!(f, "{value:.digits$}{unit}");
            }
        }
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/s", Size(self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        let cases = [
            ("0", 0),
            ("4096", 4096),
            ("64K", 64 << 10),
            ("512M", 512 << 20),
            ("2GiB", 2 << 30),
            ("1.5g", 3 << 29),
        ];
        for (text, bytes) in cases {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "M", "1.5", "-1", "5X", "1 2", "99999999999T", "1iB", "1.M", "1,5G", "5µ"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn rates_are_bytes_unless_bits_are_said() {
        let cases =
            [("100M", 100 << 20), ("100M/s", 100 << 20), ("1Gbit", 125_000_000), ("800Mbit/s", 100_000_000)];
        for (text, rate) in cases {
            assert_eq!(text.parse(), Ok(Rate(rate)), "{text}");
        }
        assert!("1GiBbit".parse::<Rate>().is_err());
    }

    #[test]
    fn times_say_their_unit() {
        assert_eq!(duration("300ms"), Ok(Duration::from_millis(300)));
        assert!(duration("300").unwrap_err().contains("unit"));
    }

    #[test]
    fn sizes_are_shown_short() {
        for (bytes, text) in [(512 << 20, "512M"), (3 << 29, "1.5G"), (100, "100"), (1 << 30, "1G")] {
            assert_eq!(Size(bytes).to_string(), text);
        }
    }
}
