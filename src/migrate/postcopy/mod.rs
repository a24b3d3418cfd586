//! Postcopy: the guest runs at the destination before all its pages are there.
//!
//! At the destination a [`pager`] holds the userfaultfd of the receiving `vmrun`: it asks for the
//! pages that somebody waits for and puts every page into place whole. At the source a [`server`]
//! answers those requests on a channel of their own, and pushes the rest meanwhile. What they decide
//! is pure: [`wanted`] at the destination, [`owed`] and [`heard`] at the source.

pub mod heard;
mod hidden;
pub mod latency;
#[cfg(test)]
mod model;
pub mod owed;
pub mod pager;
pub mod server;
pub mod wanted;
