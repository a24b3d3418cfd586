//! What a mover tells while it works.

use crate::control::mover::MoverProgress;

/// Whoever watches a mover: the progress line, the JSON events, both or nobody.
pub trait Observer: Send {
    /// Called a few times a second, and at each change of phase.
    fn progress(&mut self, progress: &MoverProgress);
    /// Something that a person should read, in one line.
    fn note(&mut self, text: &str);
}

/// Nobody watches.
#[derive(Debug)]
pub struct Silent;

impl Observer for Silent {
    fn progress(&mut self, _: &MoverProgress) {}
    fn note(&mut self, _: &str) {}
}
