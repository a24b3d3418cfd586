//! What postcopy has to survive beyond a single cut, what is left of it in the end, and what it says
//! when it cannot go on.

use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vmferry::control::{LinkState, RunState, Status};
use vmferry::wire::FrameType;

use crate::chaos::Dice;
use crate::guest::{check_alive, check_beats};
use crate::postcopy::{Pair, SLOWLY, await_serving, check_answers, check_whole, lacks_pages};
use crate::program::until;
use crate::proxy::Way;
use crate::scene::{Scene, kvm, never_paused, skip, vmctl};

const CUTS: usize = 20;

// Rows 16 and 17.
#[test]
fn the_link_is_cut_twenty_times_at_random_moments() {
    if !kvm() {
        return;
    }
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos().into();
    eprintln!("seed {seed}");
    let mut dice = Dice(seed);
    let mut pair = Pair::new();
    let mut send = pair.in_postcopy();
    for cut in 1..=CUTS {
        // After so many frames of pages, or none.
        let frames = pair.link.passed(Way::ToDest, FrameType::Pages) + dice.roll(4);
        until("pages come, or all have", || {
            let is_time = pair.link.passed(Way::ToDest, FrameType::Pages) >= frames || !send.is_running();
            is_time.then_some(())
        });
        let status = check_answers(&pair.b);
        if !lacks_pages(&status) {
            eprintln!("all pages have come before cut {cut}");
            break;
        }
        pair.link.cut();
        assert!(pair.a.is_committed());
        // At once, or when the source has tried to come back in vain: it surely does while much is missing.
        if dice.roll(2) == 0 && status.missing_pages > Some(200) {
            let tries =
                |s: &Status| matches!(&s.mover, Some(m) if matches!(m.report.link, LinkState::Down { .. }));
            pair.a.await_status("the source notices", tries);
        }
        pair.link.heal();
    }
    send.end().expect(0, &[]);
    pair.check_moved();
}

// Row 16: a page channel breaks after its last page, and main lives. The guest is paused, so that
// nothing but the background sends.
#[test]
fn a_page_channel_breaks_after_its_last_page() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    pair.a.vmctl(&["pause"]).expect(0, &[]);
    let control = pair.scene.path("send.sock");
    let args = ["--mode", "postcopy", "--channels", "1", "--bwlimit", "1M", "--control"];
    let args = [&args[..], &[control.to_str().unwrap()]].concat();
    let mut send = pair.scene.send(&pair.a, &pair.link.address, &args);
    await_serving(&mut send);
    // Fast as far as it need not be caught, then two frames a second.
    pair.b.await_status("most of it is there", |s| s.missing_pages.is_some_and(|n| n < 400));
    vmctl(&control, &["set", "--bwlimit", "256K"]).expect(0, &[]);
    pair.b.await_status("a few frames are missing", |s| s.missing_pages.is_some_and(|n| n < 96));
    let last = pair.link.hold(Way::ToDest, FrameType::Pages).caught();
    send.await_line("everything is sent", |line| {
        (line["progress"]["phase"] == "postcopy" && line["progress"]["left_bytes"] == 0).then_some(())
    });
    assert!(pair.b.status().missing_pages.is_some());
    last.lose();
    send.await_note("going on:");
    send.end().expect(0, &[]);
    pair.b.program.end().expect(0, &[]);
    assert_eq!(pair.b.status().run_state, RunState::Paused);
    pair.b.vmctl(&["resume"]).expect(0, &[]);
    check_whole(&[&pair.a, &pair.b]);
}

// Row 16, where the operator has limited the time.
#[test]
fn the_time_for_recovery_is_over() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let args = [SLOWLY, &["--recover-timeout", "500ms"]].concat();
    let mut send = pair.scene.send(&pair.a, &pair.link.address, &args);
    pair.await_postcopy();
    await_serving(&mut send);
    pair.link.cut();
    send.end().expect(6, &["lacks pages", "--resume"]);
    assert!(pair.a.is_committed());
    assert!(lacks_pages(&check_answers(&pair.b)));
    pair.link.heal();
    pair.scene.resume(&pair.a, &[]).end().expect(0, &[]);
    pair.check_moved();
}

// Row 21: while a vCPU sits on a page that does not come.
#[test]
fn vmctl_is_answered_while_the_link_is_down() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let mut send = pair.in_postcopy();
    pair.link.cut();
    let stands = |s: &Status| s.awaited.as_ref().is_some_and(|awaited| awaited.contains("needed now"));
    pair.b.await_status("the guest stands at a page that it lacks", stands);
    let status = check_answers(&pair.b);
    assert!(lacks_pages(&status) && status.summary.contains("its receiver takes them at"), "{status:?}");
    let mut client = pair.b.client();
    client.set_timeout(Duration::from_millis(500));
    // Done, where the kernel lets the vCPU out of its fault; else under way until the page has come.
    let paused = client.pause(false).is_ok();
    let state = check_answers(&pair.b).run_state;
    assert!(state == RunState::Paused || (!paused && state == RunState::Pausing), "{state:?}");
    pair.b.vmctl(&["resume"]).expect(0, &[]);
    check_answers(&pair.a);
    pair.a.vmctl(&["resume"]).expect(3, &[]);
    pair.link.heal();
    send.end().expect(0, &[]);
    pair.check_moved();
}

// Row 20, and its opposite: the guest needs both hosts.
#[test]
fn the_source_vmrun_dies_in_postcopy() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let mut send = pair.in_postcopy();
    pair.a.host.crash();
    // vmsend has the memory open.
    send.end().expect(0, &[]);
    pair.b.program.end().expect(0, &[]);
    check_whole(&[&pair.a, &pair.b]);
}

#[test]
fn the_destination_vmrun_dies_in_postcopy() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let mut send = pair.in_postcopy();
    pair.b.host.crash();
    pair.b.program.end().expect(8, &["the guest"]);
    send.end().expect(8, &["the guest"]);
    assert!(pair.a.is_committed());
}

#[test]
fn an_operators_pause_outlives_both_movers() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    pair.a.vmctl(&["pause"]).expect(0, &[]);
    let run = pair.link.hold(Way::ToDest, FrameType::Run);
    let mut send = pair.scene.send(&pair.a, &pair.link.address, &["--mode", "postcopy"]);
    let run = run.caught();
    send.crash();
    pair.b.program.crash();
    pair.link.cut();
    drop(run);
    pair.link.heal();
    pair.resume_receiver();
    pair.scene.resume(&pair.a, &[]).end().expect(0, &[]);
    pair.b.program.end().expect(0, &[]);
    let status = pair.b.status();
    assert_eq!((status.run_state, status.missing_pages), (RunState::Paused, None), "{status:?}");
    pair.b.vmctl(&["resume"]).expect(0, &[]);
    check_whole(&[&pair.a, &pair.b]);
}

// Nothing of the fault handling is left: no range that is registered, no descriptor.
#[test]
fn after_the_end_the_guests_memory_is_its_own() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let mut send = pair.in_postcopy();
    let pid = pair.b.status().pid;
    assert!(registered(pid) > 0 && userfaultfds(pid) == 1, "while pages are missing");
    assert_eq!(userfaultfds(pair.b.program.pid().as_raw() as u32), 1);
    send.end().expect(0, &[]);
    pair.check_moved();
    assert_eq!((registered(pid), userfaultfds(pid)), (0, 0));
}

// Point 7: with --keep-source the remains stay, and do not run.
#[test]
fn the_source_is_kept_as_remains_after_postcopy() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let mut send = pair.scene.send(&pair.a, &pair.link.address, &[SLOWLY, &["--keep-source"]].concat());
    pair.await_postcopy();
    await_serving(&mut send);
    pair.link.cut();
    pair.link.heal();
    send.end().expect(0, &[]);
    pair.b.program.end().expect(0, &[]);
    let status = pair.a.status();
    assert!(status.summary.contains("remains") && status.run_state == RunState::Paused, "{status:?}");
    pair.a.vmctl(&["resume"]).expect(3, &[]);
    check_whole(&[&pair.a, &pair.b]);
    pair.a.vmctl(&["quit"]).expect(0, &[]);
    pair.a.program.end().expect(0, &[]);
}

/// Mappings of a process that a userfaultfd watches for missing pages or minor faults: `um` or `ui` in their
/// VmFlags.
pub fn registered(pid: u32) -> usize {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    maps.lines()
        .filter(|l| l.starts_with("VmFlags:") && l.split_whitespace().any(|f| f == "um" || f == "ui"))
        .count()
}

pub fn userfaultfds(pid: u32) -> usize {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    fds.filter_map(|fd| fs::read_link(fd.path()).ok())
        .filter(|target| target.to_string_lossy().contains("[userfaultfd]"))
        .count()
}

// Row 2: a destination that cannot serve faults says so before anything is sent.
#[test]
fn a_destination_without_userfaultfd_is_refused_where_pages_may_come_later() {
    if !kvm() {
        return;
    }
    if !nix::unistd::geteuid().is_root() {
        skip("this needs root, to hide /dev/userfaultfd");
        return;
    }
    let scene = Scene::new();
    let a = scene.small("a");
    let mut command = std::process::Command::new("unshare");
    let hide = "mount --bind /dev/null /dev/userfaultfd && exec \"$0\" \"$@\"";
    command.args(["--mount", "sh", "-c", hide, crate::scene::binary("vmrecv")]).current_dir(scene.path(""));
    let mut b = scene.receiver_from("b", command, "tcp:127.0.0.1:0", &[]);
    for mode in [&["--mode", "postcopy"], &["--mode", "hybrid"], &["--on-timeout", "postcopy"]] {
        never_paused(&a, || {
            let end = scene.send(&a, &b.address, mode).end();
            end.expect(3, &["userfaultfd", "the source has the guest, untouched"]);
        });
        b.await_status("it is empty", |s| s.run_state == RunState::Empty);
    }
    check_beats(&[&a]);
    scene.send(&a, &b.address, &["--mode", "precopy"]).end().expect(0, &[]);
    b.program.end().expect(0, &[]);
    check_alive(&[&a, &b]);
}

// Every page is needed at once, in an order that nobody can guess.
#[test]
fn two_gib_in_a_hostile_order() {
    if !kvm() {
        return;
    }
    let scene = Scene::new();
    let cmdline = "fill=1900M ws=1800M rate=0 order=random scan=1";
    let a = scene.guest("a", "2G", 2, cmdline);
    let mut b = scene.receiver("b", &[]);
    scene.send(&a, &b.address, &["--mode", "postcopy"]).end().expect(0, &[]);
    b.program.end().expect(0, &[]);
    check_whole(&[&a, &b]);
}
