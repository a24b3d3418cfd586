//! Migrations of real guests between real processes, and everything that can go wrong with them.
//!
//! A test that needs /dev/kvm, root, or fault points says so and passes where that is missing, unless
//! REQUIRE_KVM=1. In each test a watcher asks every vmrun all the time who runs: never two.

mod guest;
mod peer;
mod program;
mod proxy;
mod scene;

mod bad_input;
mod chaos;
mod devices;
mod drivers;
mod fence;
mod floods;
mod happy;
mod hostile;
mod hugepages;
mod interrupted;
mod leaks;
mod lies;
mod network;
mod postcopy;
mod precopy;
mod receiver;
mod recovery;
mod sandbox;
mod switchover;
mod warm_up;
