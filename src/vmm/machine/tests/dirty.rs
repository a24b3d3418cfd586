//! The dirty log.

use super::*;

#[test]
fn the_dirty_log_sees_writes_and_takes_pages_back() {
    if !kvm_is_here() {
        return;
    }
    let guest = Guest::boot(1, 64, "fill=16M ws=4M rate=5");
    let machine = &guest.machine;
    let pages = machine.ram().map().total_pages();
    let everything = PageRun { first: PageIndex(0), pages };
    let take = || {
        let mut words = vec![0; (pages / 64) as usize];
        let count = machine.dirty_take(&mut words).unwrap();
        let set = PageSet::from_words(words, pages);
        assert_eq!(set.count(), count);
        set
    };
    assert!(matches!(machine.dirty_take(&mut []), Err(VmmError::DirtyLog("off"))));
    machine.run().unwrap();
    guest.wait_for_beats();
    machine.dirty_start().unwrap();
    assert!(machine.dirty_start().is_err(), "it is on");
    machine.dirty_clear(everything).unwrap();
    guest.wait_for_beats();
    let some = take();
    assert!(some.count() > 0 && some.count() < pages / 2, "{} of {pages}", some.count());

    guest.pause();
    machine.dirty_clear(everything).unwrap();
    let _ = take();
    machine.dirty_clear(everything).unwrap();
    assert!(take().is_empty(), "a paused guest writes nothing");
    // A page that was taken and not cleared comes again; one that was put back too.
    machine.ram().write(GuestPhysAddr(5 * PAGE_BYTES), b"device").unwrap();
    let mut back = PageSet::new(pages);
    back.insert(PageIndex(9));
    machine.dirty_put_back(&back);
    let taken = take();
    assert_eq!(taken.count(), 2);
    assert!(taken.contains(PageIndex(5)) && taken.contains(PageIndex(9)));
    machine.ram().write(GuestPhysAddr(7 * PAGE_BYTES), b"device").unwrap();
    assert_eq!(take().count(), 3, "what was taken and not cleared comes with what is new");
    machine.dirty_clear(PageRun { first: PageIndex(0), pages: 8 }).unwrap();
    let left = take();
    assert!(left.count() == 1 && left.contains(PageIndex(9)), "{left:?}");
    machine.dirty_clear(everything).unwrap();
    assert!(take().is_empty());
    machine.dirty_stop().unwrap();

    // A second session begins anew.
    machine.dirty_start().unwrap();
    machine.dirty_clear(everything).unwrap();
    machine.run().unwrap();
    guest.wait_for_beats();
    assert!(!take().is_empty());
    machine.dirty_stop().unwrap();
}

#[test]
fn a_large_machine_has_ram_above_four_gib() {
    if !kvm_is_here() || host::open_kvm().is_ok_and(|kvm| too_little_memory(&kvm, 6 << 30)) {
        return;
    }
    let guest = Guest::boot(2, 5 << 10, "fill=64M ws=16M rate=50 place=spread");
    let machine = &guest.machine;
    assert_eq!(machine.ram().map().regions().len(), 2);
    machine.run().unwrap();
    guest.wait_for_beats();
    let pages = machine.ram().map().total_pages();
    let timed = |what: &str, call: &dyn Fn()| {
        let began = Instant::now();
        call();
        eprintln!("5 GiB: {what} took {:?}", began.elapsed());
    };
    let mut words = vec![0; (pages / 64) as usize];
    timed("dirty_start", &|| machine.dirty_start().unwrap());
    timed("dirty_clear of everything", &|| {
        machine.dirty_clear(PageRun { first: PageIndex(0), pages }).unwrap()
    });
    guest.wait_for_beats();
    let began = Instant::now();
    assert!(machine.dirty_take(&mut words).unwrap() > 0);
    eprintln!("5 GiB: dirty_take took {:?}", began.elapsed());
    timed("dirty_stop", &|| machine.dirty_stop().unwrap());
}

fn too_little_memory(kvm: &Kvm, bytes: u64) -> bool {
    HostAbilities::of_this_host(kvm).is_ok_and(|host| host.memory_available_bytes < bytes)
}

#[test]
fn only_what_was_taken_is_cleared() {
    if !kvm_is_here() {
        return;
    }
    let guest = Guest::boot(1, 64, "fill=8M ws=8M rate=0");
    let machine = &guest.machine;
    let pages = machine.ram().map().total_pages();
    let everything = PageRun { first: PageIndex(0), pages };
    machine.run().unwrap();
    guest.wait_for_beats();
    machine.dirty_start().unwrap();
    machine.dirty_clear(everything).unwrap();
    machine.dirty_clear(everything).unwrap();
    guest.wait_for_beats();
    // Nothing was taken since: these clears must not lose what the guest wrote meanwhile.
    machine.dirty_clear(everything).unwrap();
    guest.pause();
    let mut words = vec![0; (pages / 64) as usize];
    assert!(machine.dirty_take(&mut words).unwrap() > 0);
}
