//! A network namespace of a test's own.

use std::fs::File;

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, setsockopt, socket, sockopt};

/// Runs `test` on a thread in a network namespace of its own, which ends with it. Says so where that is
/// not allowed, and fails with `REQUIRE_KVM`.
pub fn in_a_namespace(test: impl FnOnce() + Send + 'static) {
    let run = move || {
        let alone = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET);
        alone.map(|()| test()).is_ok()
    };
    if !std::thread::spawn(run).join().unwrap() {
        assert!(std::env::var_os("REQUIRE_KVM").is_none(), "no network namespace can be made");
        eprintln!("skipped: no network namespace can be made");
    }
}

/// A socket on all frames of the namespace (packet(7)); reads end after 10 s.
pub fn all_frames() -> File {
    let (family, kind) = (AddressFamily::Packet, SockType::Raw);
    let all = socket(family, kind, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll).unwrap();
    setsockopt(&all, sockopt::ReceiveTimeout, &nix::sys::time::TimeVal::new(10, 0)).unwrap();
    all.into()
}
