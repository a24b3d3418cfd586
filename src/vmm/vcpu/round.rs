//! One piece of work that every vCPU thread does, and what follows when the last has done it.

use std::sync::{Mutex, PoisonError};

use crate::vmm::VmmError;

type Results<T> = Vec<Result<T, VmmError>>;
type Then<T> = Box<dyn FnOnce(Result<Vec<T>, VmmError>) + Send>;

/// Collects one result from each vCPU; the thread that brings the last one calls what follows.
pub struct Round<T> {
    inner: Mutex<Inner<T>>,
}

struct Inner<T> {
    missing: usize,
    results: Vec<Option<Result<T, VmmError>>>,
    then: Option<Then<T>>,
}

impl<T> Round<T> {
    /// A round over `vcpus` vCPUs. `then` gets all results in order, or the first error.
    pub fn new(vcpus: usize, then: impl FnOnce(Result<Vec<T>, VmmError>) + Send + 'static) -> Self {
        let results = (0..vcpus).map(|_| None).collect();
        Self { inner: Mutex::new(Inner { missing: vcpus, results, then: Some(Box::new(then)) }) }
    }

    /// Brings the result of one vCPU (each brings one).
    pub fn bring(&self, vcpu: u32, result: Result<T, VmmError>) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(place) = inner.results.get_mut(vcpu as usize) else { return };
        if place.replace(result).is_some() {
            return;
        }
        inner.missing -= 1;
        if inner.missing > 0 {
            return;
        }
        let results: Results<T> = inner.results.drain(..).flatten().collect();
        let then = inner.then.take();
        drop(inner);
        if let Some(then) = then {
            then(results.into_iter().collect());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn the_last_result_ends_the_round_and_the_first_error_wins() {
        let (sender, receiver) = mpsc::channel();
        let done = sender.clone();
        let round = Round::new(2, move |all| done.send(all.map_err(|e| e.to_string())).unwrap());
        round.bring(1, Ok('b'));
        assert!(receiver.try_recv().is_err());
        round.bring(0, Ok('a'));
        assert_eq!(receiver.try_recv().unwrap(), Ok(vec!['a', 'b']));
        round.bring(0, Ok('c'));
        assert!(receiver.try_recv().is_err());

        let round = Round::<char>::new(2, move |all| sender.send(all.map_err(|e| e.to_string())).unwrap());
        round.bring(1, Err(VmmError::WrongState("second")));
        round.bring(0, Err(VmmError::WrongState("first")));
        assert!(receiver.try_recv().unwrap().unwrap_err().contains("first"));
    }
}
