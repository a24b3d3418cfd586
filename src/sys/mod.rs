//! System calls that the ecosystem's crates do not wrap: the unsafe FFI lives here (and in
//! `vmm::memory`) and nowhere else.
#![allow(unsafe_code)]

pub mod bitmap;
pub mod fdpass;
pub mod holes;
pub mod kick;
pub mod kvm_ext;
pub mod memfd;
pub mod pod;
pub mod sandbox;
pub mod schedule;
pub mod socket_file;
pub mod spawn;
pub mod tap;
pub mod tmpfs;
pub mod uffd;
pub mod view;
pub mod window;
