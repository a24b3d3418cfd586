//! Pages that come after the guest: who may say what of them to a `vmrun`.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use vmferry::control::{Client, ClientError, FailureCode, RunState};
use vmferry::switchover::Ownership;
use vmferry::sys::bitmap::SharedBitmap;

use crate::host::{Vmrun, attempt, kvm};
use crate::incoming::{Source, source};

/// Fills the memory of a guest that may lack pages; `None` where there is no userfaultfd for that.
fn load(source: &mut Source, dest: &Vmrun) -> Option<Client> {
    let mut client = dest.client();
    let machine = source.mover.machine().unwrap();
    let ram: Vec<OwnedFd> = match client.prepare(attempt(1, 1), &machine, vec![], true) {
        Ok((_, ram)) => ram,
        Err(error) if error.code() == Some(FailureCode::Unsuitable) => {
            assert_ne!(std::env::var("REQUIRE_KVM").as_deref(), Ok("1"), "{error}, and REQUIRE_KVM=1");
            eprintln!("SKIPPED: {error}");
            return None;
        }
        Err(error) => panic!("{error}"),
    };
    for ((from, to), region) in source.ram.iter().zip(ram).zip(machine.ram.regions()) {
        let mut bytes = vec![0; region.bytes as usize];
        File::from(from.try_clone().unwrap()).read_exact_at(&mut bytes, 0).unwrap();
        File::from(to).write_all_at(&bytes, 0).unwrap();
    }
    Some(client)
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, ClientError>, code: FailureCode, words: &str) {
    let error = result.unwrap_err();
    assert!(error.code() == Some(code) && error.to_string().contains(words), "{error}");
}

#[test]
fn one_receiver_fetches_pages_and_ends_it_when_all_have_come() {
    if !kvm() {
        return;
    }
    let mut source = source();
    let dest = Vmrun::incoming();
    let Some(mut client) = load(&mut source, &dest) else { return };
    let (a, mut other) = (attempt(1, 1), dest.client());
    refused(other.postcopy_arm(a, "here"), FailureCode::Busy, "only the receiver that loads");
    refused(client.postcopy_arm(attempt(2, 1), "here"), FailureCode::Refused, "session");
    let (_, _, present) = client.postcopy_arm(a, "here").unwrap();
    refused(client.postcopy_arm(a, "here"), FailureCode::Refused, "once");
    drop(other);
    let mut other = dest.client();
    refused(other.postcopy_adopt(), FailureCode::Busy, "another mover");
    refused(client.postcopy_adopt(), FailureCode::Refused, "nothing to take over");
    client.import(a, &source.state, source.bytes).unwrap();
    client.promise(a, false).unwrap();
    refused(other.postcopy_adopt(), FailureCode::Busy, "another mover");
    drop(client);
    dest.until("the receiver is gone", || !dest.status().mover_attached);
    // Another takes over what the first has left, and the guest runs as far as it has its pages.
    let (postcopy, _, adopted, _) = other.postcopy_adopt().unwrap();
    assert!(postcopy.attempt == a && postcopy.listen == "here");
    source.mover.fence(a, "there").unwrap();
    assert_eq!(other.run(a).unwrap().run_state, RunState::Running);
    let total = source.mover.machine().unwrap().ram.total_pages();
    assert_eq!(dest.status().missing_pages, Some(total));
    let marks = SharedBitmap::new(&adopted, total).unwrap();
    marks.words().iter().for_each(|word| word.store(u64::MAX, Ordering::Release));
    marks.words()[0].store(!1, Ordering::Release);
    refused(other.postcopy_done(a), FailureCode::Refused, "1 pages are still missing");
    // The memfd that the first was given is the same set.
    assert!(SharedBitmap::new(&present, total).unwrap().set(0));
    refused(dest.client().postcopy_done(a), FailureCode::Busy, "only the receiver that fetches");
    refused(other.postcopy_done(attempt(2, 1)), FailureCode::Refused, "another session");
    assert_eq!(dest.status().missing_pages, Some(0));
    other.postcopy_done(a).unwrap();
    let status = dest.status();
    assert!(matches!(status.ownership, Ownership::Sole { .. }), "{status:?}");
    assert_eq!(status.missing_pages, None);
    dest.beats();
}
