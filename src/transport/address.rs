//! Where a stream goes to or comes from: `tcp:HOST:PORT`, `unix:PATH`, `exec:COMMAND`, `-`.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The longest path of a Unix socket in bytes (`sun_path` less its final zero).
const MAX_UNIX_PATH: usize = 107;

/// An address as it is given on a command line.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Address {
    /// `tcp:HOST:PORT`, an IPv6 address in brackets.
    Tcp {
        /// A name or an IP address, without brackets.
        host: String,
        /// 0: any free port (listening only).
        port: u16,
    },
    /// `unix:PATH`.
    Unix(PathBuf),
    /// `exec:COMMAND`: the standard input and output of `sh -c COMMAND`.
    Exec(String),
    /// `-`: this process's own standard input and output.
    Stdio,
}

/// Why a text is no address.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs)] // the messages say it
pub enum AddressError {
    #[error("{0:?} is no address: tcp:HOST:PORT, unix:PATH, exec:COMMAND or - is wanted")]
    Unknown(String),
    #[error("{0:?}: tcp wants tcp:HOST:PORT, with an IPv6 address in brackets, as in tcp:[::1]:7070")]
    Tcp(String),
    #[error("{0:?}: the port must be a number from 0 to 65535")]
    Port(String),
    #[error("{0:?}: the path of a Unix socket must have 1 to {MAX_UNIX_PATH} bytes and no NUL")]
    Unix(String),
    #[error("{0:?}: exec wants a command")]
    Exec(String),
    #[error("ssh: is not there yet; until then: exec:'ssh {0} vmrecv --control SOCK -'")]
    Ssh(String),
}

impl Address {
    /// Whether more than one connection can be made to it: otherwise pages come on the main channel.
    pub fn takes_many(&self) -> bool {
        matches!(self, Self::Tcp { .. } | Self::Unix(_))
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let whole = || text.to_owned();
        if text == "-" {
            return Ok(Self::Stdio);
        }
        let Some((scheme, rest)) = text.split_once(':') else {
            return Err(AddressError::Unknown(whole()));
        };
        match scheme {
            "tcp" => {
                let (host, port) = rest.rsplit_once(':').ok_or_else(|| AddressError::Tcp(whole()))?;
                let host = match host.strip_prefix('[').map(|h| h.strip_suffix(']')) {
                    Some(Some(inner)) if inner.contains(':') => inner,
                    None if !host.contains([':', ']', '[', '/']) => host,
                    _ => return Err(AddressError::Tcp(whole())),
                };
                if host.is_empty() || host.chars().any(|c| c.is_whitespace() || c.is_control()) {
                    return Err(AddressError::Tcp(whole()));
                }
                if !port.bytes().all(|b| b.is_ascii_digit()) {
                    return Err(AddressError::Port(whole()));
                }
                let port = port.parse().map_err(|_| AddressError::Port(whole()))?;
                Ok(Self::Tcp { host: host.to_owned(), port })
            }
            "unix" if rest.is_empty() || rest.len() > MAX_UNIX_PATH || rest.contains('\0') => {
                Err(AddressError::Unix(whole()))
            }
            "unix" => Ok(Self::Unix(rest.into())),
            "exec" if rest.trim().is_empty() || rest.contains('\0') => Err(AddressError::Exec(whole())),
            "exec" => Ok(Self::Exec(rest.to_owned())),
            "ssh" => Err(AddressError::Ssh(rest.to_owned())),
            _ => Err(AddressError::Unknown(whole())),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Exec(command) => write!(f, "exec:{command}"),
            Self::Stdio => f.write_str("-"),
        }
    }
}

impl TryFrom<String> for Address {
    type Error = AddressError;
    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.to_string()
    }
}

/// Why `address` wants `--insecure`, if it does: guest memory would cross a network in the clear, or
/// be taken from anyone on it. Names count as beyond loopback, `localhost` excepted, since what
/// they resolve to may change.
pub fn needs_insecure(address: &Address) -> Option<String> {
    let Address::Tcp { host, .. } = address else {
        return None;
    };
    let loopback = match host.parse::<IpAddr>() {
        Ok(ip) => ip.to_canonical().is_loopback(),
        Err(_) => host == "localhost",
    };
    (!loopback).then(|| {
        format!(
            "{address} is beyond loopback, and this stream is neither encrypted nor authenticated: \
             say --insecure if the network is trusted, or tunnel it (exec:'ssh …')"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp { host: host.into(), port }
    }

    #[test]
    fn what_is_meant_is_read_and_written_alike() {
        for (text, address) in [
            ("tcp:127.0.0.1:7070", tcp("127.0.0.1", 7070)),
            ("tcp:host-b.example:0", tcp("host-b.example", 0)),
            ("tcp:[::1]:7070", tcp("::1", 7070)),
            ("tcp:[fe80::1%eth0]:1", tcp("fe80::1%eth0", 1)),
            ("unix:/run/a:b", Address::Unix("/run/a:b".into())),
            ("exec:ssh b vmrecv -", Address::Exec("ssh b vmrecv -".into())),
            ("-", Address::Stdio),
        ] {
            assert_eq!(text.parse(), Ok(address.clone()));
            assert_eq!(address.to_string(), text);
        }
    }

    #[test]
    fn what_is_not_an_address_says_what_is_wrong() {
        use AddressError as E;
        let error = |text: &str| text.parse::<Address>().unwrap_err();
        for text in ["", "host:80", "TCP:a:1", "/run/x", "--"] {
            assert_eq!(error(text), E::Unknown(text.into()), "{text}");
        }
        for text in [
            "tcp:",
            "tcp:7070",
            "tcp::7070",
            "tcp:::1:7070",
            "tcp:[::1]",
            "tcp:[a]:1",
            "tcp:[::1:1",
            "tcp:a b:1",
        ] {
            assert_eq!(error(text), E::Tcp(text.into()), "{text}");
        }
        for text in ["tcp:a:", "tcp:a:65536", "tcp:a:+1", "tcp:a:-1", "tcp:a:x"] {
            assert_eq!(error(text), E::Port(text.into()), "{text}");
        }
        assert!(matches!(error("unix:"), E::Unix(_)));
        assert!(matches!(error(&format!("unix:/{}", "x".repeat(107))), E::Unix(_)));
        assert!(matches!(error("exec: "), E::Exec(_)));
        assert!(error("ssh:b").to_string().contains("exec:'ssh b"));
    }

    #[test]
    fn only_loopback_goes_without_saying() {
        for text in [
            "tcp:127.0.0.1:1",
            "tcp:127.9.9.9:1",
            "tcp:[::1]:1",
            "tcp:localhost:1",
            "tcp:[::ffff:127.0.0.1]:1",
            "unix:/x",
            "exec:x",
            "-",
        ] {
            assert_eq!(needs_insecure(&text.parse().unwrap()), None, "{text}");
        }
        for text in ["tcp:0.0.0.0:1", "tcp:[::]:1", "tcp:10.0.0.1:1", "tcp:b:1", "tcp:localhost.evil:1"] {
            let reason = needs_insecure(&text.parse().unwrap());
            assert!(reason.is_some_and(|r| r.starts_with(text) && r.contains("--insecure")), "{text}");
        }
    }
}
