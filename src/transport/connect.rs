//! Connecting to and listening on an [`Address`] of any kind.

use std::io::ErrorKind;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;

use super::cancel::PollError;
use super::tcp::{self, Tcp};
use super::unix::{self, Unix};
use super::{Address, CancelToken, Stream, StreamError, exec};

/// Connects to `address` within `timeout`. `peer_timeout` becomes TCP_USER_TIMEOUT; the stream ends
/// its waits with `cancel`, and so does the connecting.
pub fn connect(
    address: &Address,
    timeout: Duration,
    peer_timeout: Duration,
    cancel: &CancelToken,
) -> Result<Stream, StreamError> {
    match address {
        Address::Tcp { port: 0, .. } => {
            let cause = "port 0 is for listening only".to_owned();
            Err(StreamError::Connect { peer: address.to_string(), cause })
        }
        Address::Tcp { host, port } => tcp::connect(host, *port, timeout, peer_timeout, cancel),
        Address::Unix(path) => unix::connect(path, cancel),
        Address::Exec(command) => exec::connect(command, cancel),
        Address::Stdio => stdio(cancel),
    }
}

fn stdio(cancel: &CancelToken) -> Result<Stream, StreamError> {
    Stream::from_stdio(cancel.clone())
        .map_err(|e| StreamError::Connect { peer: "-".to_owned(), cause: e.to_string() })
}

/// Something that streams come from.
#[derive(Debug)]
pub struct Listener {
    kind: Kind,
    local: Address,
}

#[derive(Debug)]
enum Kind {
    Tcp(Tcp),
    Unix(Unix),
    /// One stream, once.
    Single {
        address: Address,
        taken: AtomicBool,
    },
}

impl Listener {
    /// Listens on `address`. For `exec:` and `-` nothing happens yet: the one stream that they are
    /// is made by the first [`Listener::accept`]. `peer_timeout` as in [`connect`].
    pub fn bind(address: &Address, peer_timeout: Duration) -> Result<Self, StreamError> {
        let (kind, local) = match address {
            Address::Tcp { host, port } => {
                let tcp = Tcp::listen(host, *port, peer_timeout)?;
                let at = tcp.local().map_err(|e| StreamError::Listen {
                    address: address.to_string(),
                    cause: e.to_string(),
                })?;
                (Kind::Tcp(tcp), Address::Tcp { host: at.ip().to_string(), port: at.port() })
            }
            Address::Unix(path) => (Kind::Unix(Unix::listen(path)?), address.clone()),
            Address::Exec(_) | Address::Stdio => {
                (Kind::Single { address: address.clone(), taken: AtomicBool::new(false) }, address.clone())
            }
        };
        Ok(Self { kind, local })
    }

    /// The address with the port that was taken.
    pub fn local(&self) -> &Address {
        &self.local
    }

    /// Whether there can be another stream after the first.
    pub fn takes_many(&self) -> bool {
        self.local.takes_many()
    }

    /// Takes the next stream, which ends its waits with `cancel`; so does this. `None` when `until`
    /// comes first. A caller that hung up before it was taken is passed over. For `exec:` and `-`,
    /// the second call is an error.
    pub fn accept(
        &self,
        until: Option<Instant>,
        cancel: &CancelToken,
    ) -> Result<Option<Stream>, StreamError> {
        let failed = |source| StreamError::Io {
            doing: "taking a connection on",
            peer: self.local.to_string(),
            source,
        };
        loop {
            cancel.check()?;
            let taken = match &self.kind {
                Kind::Tcp(tcp) => tcp.accept(),
                Kind::Unix(unix) => unix.accept(),
                Kind::Single { taken, .. } if taken.swap(true, Ordering::AcqRel) => {
                    let source = std::io::Error::other("it is one connection, and that one has ended");
                    return Err(failed(source));
                }
                Kind::Single { address: Address::Exec(command), .. } => {
                    return exec::connect(command, cancel).map(Some);
                }
                Kind::Single { .. } => return stdio(cancel).map(Some),
            };
            match taken {
                Ok((fd, peer)) => {
                    return Stream::from_socket(fd, peer, cancel.clone()).map(Some).map_err(failed);
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    let Some(fd) = self.fd() else { continue };
                    match cancel.poll(fd, PollFlags::POLLIN, until) {
                        Ok(true) => {}
                        Ok(false) => return Ok(None),
                        Err(PollError::Cancelled(e)) => return Err(e),
                        Err(PollError::Io(e)) => return Err(failed(e)),
                    }
                }
                Err(e) if is_the_callers(&e) => {}
                Err(e) => return Err(failed(e)),
            }
        }
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.kind {
            Kind::Tcp(tcp) => Some(tcp.as_fd()),
            Kind::Unix(unix) => Some(unix.as_fd()),
            Kind::Single { .. } => None,
        }
    }

    /// Where the socket's file is, if there is one.
    pub fn path(&self) -> Option<&std::path::Path> {
        match &self.kind {
            Kind::Unix(unix) => Some(unix.path()),
            _ => None,
        }
    }
}

/// accept(2) passes on errors of the connection that it would have given.
fn is_the_callers(error: &std::io::Error) -> bool {
    use ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, TimedOut};
    use nix::libc::{EHOSTUNREACH, ENETDOWN, ENETUNREACH, ENOPROTOOPT, EPROTO};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted | TimedOut)
        || matches!(error.raw_os_error(), Some(EPROTO | ENETDOWN | ENETUNREACH | EHOSTUNREACH | ENOPROTOOPT))
}
