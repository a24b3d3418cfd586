//! The control socket of real `vmrun` processes with real guests.
//!
//! Without /dev/kvm the tests that need a guest say so and pass, unless REQUIRE_KVM=1.

#[path = "control/busy.rs"]
mod busy;
#[path = "control/disk.rs"]
mod disk;
#[path = "control/guest.rs"]
mod guest;
#[path = "control/host.rs"]
mod host;
#[path = "control/incoming.rs"]
mod incoming;
#[path = "control/kernel_image.rs"]
mod kernel_image;
#[path = "control/leases.rs"]
mod leases;
#[path = "control/postcopy.rs"]
mod postcopy;
#[path = "control/socket.rs"]
mod socket;
