//! Programs of the host that have connected and not said yet to which port of the guest: they write
//! `CONNECT PORT` and a line feed, as to Firecracker.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// The most at a time; the others wait in the socket's backlog.
const MAX_CALLERS: usize = 32;
/// How long a program may take for its line.
const LINE_WITHIN: Duration = Duration::from_secs(5);
/// The longest line, without its end.
const MAX_LINE_BYTES: usize = "CONNECT 4294967295\r".len();

/// The callers, by numbers that are theirs for as long as they wait.
#[derive(Default)]
pub struct Callers {
    waiting: BTreeMap<u32, Caller>,
    next: u32,
}

struct Caller {
    socket: UnixStream,
    line: Vec<u8>,
    until: Instant,
}

impl Callers {
    /// Whether another one may come in.
    pub fn has_room(&self) -> bool {
        self.waiting.len() < MAX_CALLERS
    }

    /// Takes one in; its socket does not block.
    pub fn admit(&mut self, socket: UnixStream, now: Instant) {
        let caller = Caller { socket, line: Vec::new(), until: now + LINE_WITHIN };
        // Fewer callers than numbers: it has not come round to one that waits.
        self.waiting.insert(self.next, caller);
        self.next = self.next.wrapping_add(1) % FIRST_FREE_NUMBER;
    }

    /// One may have written: its socket and the port, once its line is whole. Who says something else,
    /// or has gone, is let go. Nothing beyond the line is read.
    pub fn heard(&mut self, number: u32) -> Option<(UnixStream, u32)> {
        let caller = self.waiting.get_mut(&number)?;
        loop {
            let mut byte = [0];
            match (&caller.socket).read(&mut byte) {
                Ok(1) if byte[0] == b'\n' => break,
                Ok(1) if caller.line.len() < MAX_LINE_BYTES => caller.line.push(byte[0]),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return None,
                _ => {
                    self.waiting.remove(&number);
                    return None;
                }
            }
        }
        let caller = self.waiting.remove(&number)?;
        port(&caller.line).map(|port| (caller.socket, port))
    }

    /// Lets those go whose time is over.
    pub fn expire(&mut self, now: Instant) {
        self.waiting.retain(|_, caller| now < caller.until);
    }

    /// When [`Callers::expire`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        self.waiting.values().map(|caller| caller.until).min()
    }

    /// Their sockets, by number.
    pub fn sockets(&self) -> impl Iterator<Item = (u32, BorrowedFd<'_>)> {
        self.waiting.iter().map(|(number, caller)| (*number, caller.socket.as_fd()))
    }

    /// Lets all go.
    pub fn clear(&mut self) {
        self.waiting.clear();
    }
}

/// Numbers of callers are below.
pub const FIRST_FREE_NUMBER: u32 = u32::MAX;

fn port(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?.trim_end_matches('\r');
    let (word, port) = line.split_once(' ')?;
    port.parse().ok().filter(|_| word.eq_ignore_ascii_case("connect"))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn caller(callers: &mut Callers, now: Instant) -> UnixStream {
        let (device, program) = UnixStream::pair().unwrap();
        device.set_nonblocking(true).unwrap();
        callers.admit(device, now);
        program
    }

    #[test]
    fn a_line_names_the_port_and_what_follows_it_is_left() {
        let mut callers = Callers::default();
        let mut program = caller(&mut callers, Instant::now());
        program.write_all(b"CONNECT 52").unwrap();
        assert!(callers.heard(0).is_none());
        program.write_all(b"00\nhello").unwrap();
        let (mut socket, port) = callers.heard(0).unwrap();
        let mut rest = [0; 5];
        socket.read_exact(&mut rest).unwrap();
        assert_eq!((port, &rest), (5200, b"hello"));
        assert_eq!(callers.sockets().count(), 0);
    }

    #[test]
    fn who_says_something_else_or_nothing_is_let_go() {
        let now = Instant::now();
        let mut callers = Callers::default();
        let long = "CONNECT ".to_owned() + &"1".repeat(40);
        for (number, text) in
            (0..).zip(["GET / HTTP/1.1\n", "CONNECT -1\n", "CONNECT 4294967296\n", "CONNECT\n", "\n", &long])
        {
            let mut program = caller(&mut callers, now);
            program.write_all(text.as_bytes()).unwrap();
            assert!(callers.heard(number).is_none(), "{text}");
            assert_eq!(callers.sockets().count(), 0, "{text}");
            // A reset where it had not read all of it.
            assert!(matches!(program.read(&mut [0]), Ok(0) | Err(_)), "{text}");
        }
        drop(caller(&mut callers, now));
        assert!(callers.heard(6).is_none() && callers.deadline().is_none());
        let _silent: Vec<_> = (0..MAX_CALLERS).map(|_| caller(&mut callers, now)).collect();
        assert!(!callers.has_room());
        let deadline = callers.deadline().unwrap();
        callers.expire(deadline - Duration::from_millis(1));
        assert!(!callers.has_room());
        callers.expire(deadline);
        assert!(callers.has_room() && callers.deadline().is_none());
    }
}
