//! Live migration of running KVM microVMs.
//!
//! Four programs share this library: `vmrun` boots and hosts a microVM (or holds an empty one),
//! `vmsend` moves it away, `vmrecv` takes it in, `vmctl` asks and tells. The movers are processes of
//! their own: the code that parses bytes from the network holds neither KVM nor the devices, and
//! when a mover dies the guest's RAM and state are still with its `vmrun`.
//!
//! Exactly one copy of a guest may run. Which one is decided in [`switchover`], and nowhere else.
//!
//! Modules depend downwards only (a test reads the `use` lines):
//!
//! ```text
//! bin → cli → {migrate, vmm} → {control, transport, state} → {wire, memory, switchover} → sys
//! ```
//!
//! `migrate` and `vmm` never import each other: they meet at [`control`], the socket protocol.

#![deny(unsafe_code)]
#![warn(missing_docs)]

// The fuzzer's targets name the library by its name, also where they are a part of its tests.
#[cfg(test)]
extern crate self as vmferry;

pub mod cli;
pub mod control;
#[cfg(any(fuzzing, test))]
pub mod fuzzing;
pub mod memory;
pub mod migrate;
pub mod state;
pub mod switchover;
pub mod sys;
pub mod transport;
pub mod vmm;
pub mod wire;
