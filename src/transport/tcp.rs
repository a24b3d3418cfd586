//! TCP: connecting to every address of a name, listening, and the socket options.

use std::net::{IpAddr, SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};

use super::cancel::PollError;
use super::{CancelToken, Stream, StreamError};

/// How long a queue of callers may wait for `accept`: room for many that say nothing, so that one that
/// means it need not knock again.
const BACKLOG: i32 = 1024;

/// Connects to `host`:`port`, trying every address of the name, within `timeout` in all.
pub(super) fn connect(
    host: &str,
    port: u16,
    timeout: Duration,
    peer_timeout: Duration,
    cancel: &CancelToken,
) -> Result<Stream, StreamError> {
    let name = format!("tcp:{}", SocketText(host, port));
    let until = Instant::now() + timeout;
    let failed = |cause: String| StreamError::Connect { peer: name.clone(), cause };
    let addresses = resolve(host, port, until, cancel).map_err(|e| e.into_error(failed))?;
    let mut causes: Vec<String> = Vec::new();
    for (i, address) in addresses.iter().enumerate() {
        // Each address gets a fair share of what is left.
        let left = until.saturating_duration_since(Instant::now());
        let share = Instant::now() + left / (addresses.len() - i) as u32;
        match connect_one(*address, share, cancel) {
            Ok(socket) => {
                tune(&socket, peer_timeout).map_err(|e| failed(e.to_string()))?;
                return Stream::from_socket(socket.into(), name.clone(), cancel.clone())
                    .map_err(|e| failed(e.to_string()));
            }
            Err(Failed::Cancelled(e)) => return Err(e),
            Err(Failed::Cause(cause)) if addresses.len() == 1 => causes.push(cause),
            Err(Failed::Cause(cause)) => causes.push(format!("{}: {cause}", address.ip())),
        }
    }
    Err(failed(causes.join("; ")))
}

enum Failed {
    Cancelled(StreamError),
    Cause(String),
}

impl Failed {
    fn into_error(self, f: impl FnOnce(String) -> StreamError) -> StreamError {
        match self {
            Self::Cancelled(e) => e,
            Self::Cause(cause) => f(cause),
        }
    }
}

/// The addresses of `host`. A name server that does not answer holds up a thread, not us.
fn resolve(host: &str, port: u16, until: Instant, cancel: &CancelToken) -> Result<Vec<SocketAddr>, Failed> {
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    let (tx, rx) = mpsc::channel();
    let (name, done) = (host.to_owned(), CancelToken::new().map_err(|e| Failed::Cause(e.to_string()))?);
    let wake = done.clone();
    let spawned = std::thread::Builder::new().name("resolve".into()).spawn(move || {
        let found = (name.as_str(), port).to_socket_addrs().map(Iterator::collect::<Vec<_>>);
        let _ = tx.send(found);
        wake.cancel("resolved");
    });
    spawned.map_err(|e| Failed::Cause(e.to_string()))?;
    match cancel.poll(done.as_fd(), PollFlags::POLLIN, Some(until)) {
        Err(PollError::Cancelled(e)) => return Err(Failed::Cancelled(e)),
        Err(PollError::Io(e)) => return Err(Failed::Cause(e.to_string())),
        Ok(false) => return Err(Failed::Cause(format!("the name {host} was not resolved in time"))),
        Ok(true) => {}
    }
    match rx.recv() {
        Ok(Ok(addresses)) if !addresses.is_empty() => Ok(addresses),
        Ok(Err(e)) => Err(Failed::Cause(format!("the name {host} cannot be resolved: {e}"))),
        _ => Err(Failed::Cause(format!("the name {host} has no address"))),
    }
}

fn connect_one(address: SocketAddr, until: Instant, cancel: &CancelToken) -> Result<Socket, Failed> {
    let cause = |e: std::io::Error| Failed::Cause(e.to_string());
    let begun = Instant::now();
    cancel.check().map_err(Failed::Cancelled)?;
    let socket =
        Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP)).map_err(cause)?;
    socket.set_nonblocking(true).map_err(cause)?;
    match socket.connect(&address.into()) {
        Ok(()) => return Ok(socket),
        Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => {}
        Err(e) => return Err(cause(e)),
    }
    match cancel.poll(socket.as_fd(), PollFlags::POLLOUT, Some(until)) {
        Err(PollError::Cancelled(e)) => Err(Failed::Cancelled(e)),
        Err(PollError::Io(e)) => Err(cause(e)),
        Ok(false) => Err(Failed::Cause(format!("no answer within {} ms", begun.elapsed().as_millis()))),
        Ok(true) => match socket.take_error().map_err(cause)? {
            Some(e) => Err(cause(e)),
            None => Ok(socket),
        },
    }
}

/// What waits in the kernel of a channel. Without a limit it would be megabytes, and a page in it that a guest
/// comes to need would be sent a second time.
const UNSENT_BYTES: u32 = 128 << 10;

/// Nothing waits for more to send; no more waits to be sent than [`UNSENT_BYTES`]; a peer that takes or
/// answers nothing is given up after `peer_timeout`; an idle connection is probed. Buffers are left to the kernel's own tuning,
/// which a set size would switch off (docs/protocol.md has the measurement).
fn tune(socket: &Socket, peer_timeout: Duration) -> std::io::Result<()> {
    let probe = (peer_timeout / 4).max(Duration::from_secs(1));
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_notsent_lowat(UNSENT_BYTES)?;
    socket.set_tcp_user_timeout(Some(peer_timeout))?;
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(probe).with_interval(probe).with_retries(4))
}

/// A listening socket.
#[derive(Debug)]
pub(super) struct Tcp {
    socket: TcpListener,
    peer_timeout: Duration,
}

impl Tcp {
    /// Listens on `host`:`port`; port 0 is any free one.
    pub(super) fn listen(host: &str, port: u16, peer_timeout: Duration) -> Result<Self, StreamError> {
        let name = format!("tcp:{}", SocketText(host, port));
        let failed = |cause: String| StreamError::Listen { address: name.clone(), cause };
        let addresses: Vec<_> = (host, port).to_socket_addrs().map_err(|e| failed(e.to_string()))?.collect();
        let mut last = failed(format!("the name {host} has no address"));
        for address in addresses {
            match listen_one(address) {
                Ok(socket) => return Ok(Self { socket: socket.into(), peer_timeout }),
                Err(e) => last = failed(e.to_string()),
            }
        }
        Err(last)
    }

    /// The port that was taken.
    pub(super) fn local(&self) -> std::io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    pub(super) fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Takes the next caller, if one is waiting.
    pub(super) fn accept(&self) -> std::io::Result<(OwnedFd, String)> {
        let (stream, from) = self.socket.accept()?;
        let socket = SockRef::from(&stream);
        socket.set_nonblocking(true)?;
        let owned: OwnedFd = stream.into();
        let socket = Socket::from(owned);
        // Options that a connection does not take are the matter of that one caller.
        tune(&socket, self.peer_timeout)
            .map_err(|e| std::io::Error::new(std::io::ErrorKind::ConnectionAborted, e))?;
        Ok((socket.into(), format!("tcp:{from}")))
    }
}

fn listen_one(address: SocketAddr) -> std::io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // A receiver that is started again is not held up by the connections of the one before.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// HOST:PORT with brackets where needed.
struct SocketText<'a>(&'a str, u16);

impl std::fmt::Display for SocketText<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0.contains(':') {
            true => write!(f, "[{}]:{}", self.0, self.1),
            false => write!(f, "{}:{}", self.0, self.1),
        }
    }
}
