//! The places of those who are not taken in: who have not said yet who they are, wait for an answer, or
//! are being turned away.
//!
//! When all are taken, a newcomer gets that of the caller who has been heard longest, among those of
//! the address that has the most places: so many callers of one address are in each other's way first,
//! and a slow one gives way to whoever comes after it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::transport::CancelToken;

/// Callers that are heard at once. Each is a thread and three descriptors.
const MAX_CALLERS: usize = 128;
/// How long a caller keeps its place in any case: an honest one says HELLO at once, so this is for a
/// round trip and one retransmission.
const GRACE: Duration = Duration::from_millis(250);

/// All places.
#[derive(Clone, Debug, Default)]
pub(super) struct Places(Arc<Mutex<Taken>>);

#[derive(Debug, Default)]
struct Taken {
    /// By number, which grows: the first of an address is the one heard longest.
    seats: Vec<Seat>,
    next: u64,
}

#[derive(Debug)]
struct Seat {
    number: u64,
    address: String,
    since: Instant,
    token: CancelToken,
}

/// A place, free again when dropped.
#[derive(Debug)]
pub struct Place {
    places: Places,
    number: u64,
}

impl Places {
    /// A place for `peer` (an address with a port), whose hearing `token` ends. `None` while all
    /// are taken by callers who have just come.
    pub fn take(&self, peer: &str, token: &CancelToken) -> Option<Place> {
        let mut taken = self.lock();
        if taken.seats.len() >= MAX_CALLERS && !taken.make_room() {
            return None;
        }
        let number = taken.next;
        taken.next += 1;
        let address = peer.rsplit_once(':').map_or(peer, |(address, _)| address).to_owned();
        taken.seats.push(Seat { number, address, since: Instant::now(), token: token.clone() });
        Some(Place { places: self.clone(), number })
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Taken {
    #[cfg(any(test, fuzzing))]
    fn of_one(token: CancelToken) -> Self {
        let seat = Seat { number: 0, address: String::new(), since: Instant::now(), token };
        Self { seats: vec![seat], next: 1 }
    }

    /// Whether somebody had to go.
    fn make_room(&mut self) -> bool {
        let mut counts = HashMap::<&str, usize>::new();
        for seat in &self.seats {
            *counts.entry(&seat.address).or_default() += 1;
        }
        let most = counts.values().copied().max().unwrap_or(0);
        let slowest =
            self.seats.iter().position(|s| counts[s.address.as_str()] == most && s.since.elapsed() >= GRACE);
        let Some(slowest) = slowest else { return false };
        self.seats.remove(slowest).token.cancel("others are waiting to be heard");
        true
    }
}

impl Place {
    /// A place at a door of its own, for a caller that came by none.
    #[cfg(any(test, fuzzing))]
    pub fn alone(token: CancelToken) -> Self {
        Self { number: 0, places: Places(Arc::new(Mutex::new(Taken::of_one(token)))) }
    }

    /// Gives it back; false when it was given to somebody else meanwhile, which ends the connection.
    pub fn leave(&self) -> bool {
        let mut taken = self.places.lock();
        let before = taken.seats.len();
        taken.seats.retain(|s| s.number != self.number);
        taken.seats.len() < before
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> CancelToken {
        CancelToken::new().unwrap()
    }

    /// As if everybody had come at that time.
    fn came_at(places: &Places, since: Instant) {
        places.lock().seats.iter_mut().for_each(|seat| seat.since = since);
    }

    #[test]
    fn the_slowest_of_the_address_with_most_places_gives_way() {
        let places = Places::default();
        let (honest, first) = (token(), token());
        let _honest = places.take("tcp:192.0.2.1:1", &honest).unwrap();
        let slow = places.take("tcp:192.0.2.2:1", &first).unwrap();
        let others: Vec<_> =
            (2..MAX_CALLERS).map(|n| places.take(&format!("tcp:192.0.2.2:{n}"), &token()).unwrap()).collect();
        // Nobody goes who has just come, or, since this may have taken its time, will have.
        came_at(&places, Instant::now() + GRACE * 1000);
        assert!(places.take("tcp:192.0.2.3:1", &token()).is_none());
        came_at(&places, Instant::now() - GRACE);
        let newcomer = places.take("tcp:192.0.2.3:1", &token()).unwrap();
        assert!(first.reason().is_some() && honest.reason().is_none());
        assert!(!slow.leave() && newcomer.leave());
        // A place that was left is free.
        assert!(places.take("tcp:192.0.2.3:2", &token()).is_some());
        assert_eq!(others.iter().filter(|place| place.leave()).count(), MAX_CALLERS - 2);
    }
}
