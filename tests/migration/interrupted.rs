//! Postcopy that is interrupted: what is said of it meanwhile, on both sides, and what cannot go on by
//! itself says so and goes on by hand.

use std::fs;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vmferry::control::{Client, LinkState, RunState, Status};

use crate::guest::check_beats;
use crate::postcopy::{Pair, SLOWLY, await_serving, check_answers, check_whole, lacks_pages};
use crate::program::{End, Program, until};
use crate::scene::{Host, Scene, binary, kvm};

/// `vmsend --status`, for people or as JSON.
fn status_of(scene: &Scene, host: &Host, json: bool) -> (End, String) {
    let mut command = scene.command("vmsend");
    command.arg("--vm").arg(&host.control).arg("--status").args(json.then_some("--json"));
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let end = End {
        code: output.status.code().unwrap(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        lines: text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect(),
    };
    (end, text)
}

/// Waits until what `host` waits for has all of `words`, and checks that vmctl says so.
#[track_caller]
fn await_awaited(host: &Host, words: &[&str]) -> Status {
    let has_all = |text: &str| words.iter().all(|word| text.contains(word));
    let mut last = String::new();
    let status = until_or(&format!("it waits for {words:?}"), || {
        let status = host.status();
        last = status.awaited.clone().unwrap_or_default();
        if has_all(&last) { Ok(status) } else { Err(last.clone()) }
    });
    let said = std::process::Command::new(binary("vmctl")).arg(&host.control).arg("status").output().unwrap();
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.contains("waits for: "), "{said}");
    status
}

/// As `until`, and says what was there instead.
#[track_caller]
fn until_or<T>(what: &str, mut test: impl FnMut() -> Result<T, String>) -> T {
    let end = std::time::Instant::now() + crate::program::PATIENCE;
    loop {
        match test() {
            Ok(value) => return value,
            Err(instead) => assert!(std::time::Instant::now() < end, "never: {what}, but {instead}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

// Point 5: `vmsend --status` and `vmctl status` say what is waited for, whoever is missing.
#[test]
fn both_sides_say_what_is_waited_for() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let (end, text) = status_of(&pair.scene, &pair.a, false);
    assert!(end.code == 0 && text.contains("the guest runs here") && !text.contains("waits for"), "{text}");
    let mut send = pair.in_postcopy();
    let dest = pair.link.address.clone();
    await_awaited(&pair.a, &["pages to be sent to", &dest, "where the guest runs"]);
    await_awaited(&pair.b, &["pages from the source"]);

    pair.link.cut();
    let status =
        await_awaited(&pair.a, &["the connection to", &dest, "down for", "to connect", "the next in"]);
    let mover = status.mover.unwrap();
    assert!(mover.program == "vmsend" && !mover.gone && mover.report.moved, "{mover:?}");
    assert!(mover.report.owed_pages.is_some_and(|pages| pages > 0), "{mover:?}");
    assert_eq!(mover.report.phase, "reconnect");
    let (end, text) = status_of(&pair.scene, &pair.a, false);
    assert_eq!(end.code, 0, "{end:?}");
    for words in ["committed to", "pages owed", "down for", "waits for: the connection to", "epoch"] {
        assert!(text.contains(words), "{words:?} is not in {text}");
    }
    let (end, _) = status_of(&pair.scene, &pair.a, true);
    assert_eq!(end.lines[0]["ownership"]["phase"], "committed");
    assert_eq!(end.lines[0]["mover"]["report"]["link"]["state"], "down", "{end:?}");
    assert_eq!(end.lines[0]["mover"]["report"]["address"], dest.as_str());
    // The guest comes to a page that it lacks, and stands there.
    let listens = pair.b.address.clone();
    let status =
        await_awaited(&pair.b, &["the source to come back to", &listens, "needed now: 1 page, at 0x"]);
    let report = status.mover.unwrap().report;
    assert!(matches!(report.link, LinkState::Down { .. }), "{report:?}");
    assert!(report.requests.is_some_and(|r| r.pages == 1), "{report:?}");

    pair.b.program.crash();
    await_awaited(
        &pair.b,
        &["a vmrecv (the last one went", "vmrecv --resume --control", "pages that are missing"],
    );
    send.crash();
    let status = await_awaited(&pair.a, &["a vmsend (the last one went", "vmsend --resume --vm"]);
    assert!(status.mover.is_some_and(|m| m.gone && m.report.owed_pages.is_some()));
    pair.link.heal();
    pair.resume_receiver();
    await_awaited(&pair.b, &["the source to come back to", &listens]);
    pair.scene.resume(&pair.a, &[]).end().expect(0, &[]);
    pair.check_moved();
    let status = pair.b.await_status("nothing is told of it any more", |s| s.mover.is_none());
    assert_eq!((status.awaited, status.missing_pages), (None, None));
}

// Row 21: a pause that cannot be done at once says on what it depends, within a bounded time.
#[test]
fn a_pause_on_a_dead_link_says_what_it_waits_for() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let mut send = pair.in_postcopy();
    pair.link.cut();
    await_awaited(&pair.b, &["the source to come back to", "needed now: 1 page"]);
    let end = pair.b.vmctl(&["--timeout", "500ms", "pause"]);
    let status = check_answers(&pair.b);
    match end.code {
        // The kernel lets the vCPU out of its fault.
        0 => assert_eq!(status.run_state, RunState::Paused),
        // It may have come to that since.
        1 if status.run_state == RunState::Paused => {}
        1 => {
            end.expect(
                1,
                &["no answer to pause within", "the source to come back to", "needed now", "until resume"],
            );
            assert_eq!(status.run_state, RunState::Pausing);
            assert!(status.awaited.unwrap().contains("the vCPUs and devices to stop"));
        }
        code => panic!("{code}: {end:?}"),
    }
    pair.b.vmctl(&["resume"]).expect(0, &[]);
    pair.link.heal();
    send.end().expect(0, &[]);
    pair.check_moved();
}

// Row 20: host S is gone. Nothing can bring the pages back; it is said, and nobody is misled.
#[test]
fn the_source_vmrun_and_its_sender_die_in_postcopy() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let mut send = pair.in_postcopy();
    pair.a.host.crash();
    send.await_note("the source's vmrun is gone");
    send.crash();
    let status = await_awaited(&pair.b, &["the source to come back to", "pages", "down for"]);
    assert!(lacks_pages(&status), "{status:?}");
    assert!(pair.b.program.is_running());
    // Who asks at A hears what was there, and where the guest may be.
    let words = ["a.sock", "has committed its guest to", "went with it", "lost"];
    pair.scene.resume(&pair.a, &[]).end().expect(7, &words);
    let (end, text) = status_of(&pair.scene, &pair.a, false);
    end.expect(1, &words);
    assert_eq!(text, "");
    // The operator ends it.
    pair.b.vmctl(&["quit", "--force"]).expect(0, &[]);
    pair.b.program.end().expect(8, &["the guest"]);
}

// Row 20: with nobody left who knows better, B's end is the guest's.
#[test]
fn the_destination_vmrun_and_its_receiver_die_in_postcopy() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let args = [SLOWLY, &["--recover-timeout", "1s"]].concat();
    let mut send = pair.scene.send(&pair.a, &pair.link.address, &args);
    pair.await_postcopy();
    await_serving(&mut send);
    pair.b.program.crash();
    pair.b.host.crash();
    send.end().expect(6, &["on the link", "pages were not sent", "the source keeps them", "vmsend --resume"]);
    assert!(pair.a.is_committed());
    await_awaited(&pair.a, &["a vmsend", "vmsend --resume --vm"]);
}

/// A guest that moves through a command which is the receiver, until it runs there without all pages.
fn through_a_command(args: &[&str]) -> (Scene, crate::scene::Vmrun, Host, Program) {
    let scene = Scene::new();
    let a = scene.guest("a", "64M", 1, "fill=24M ws=1M rate=2 scan=1");
    let b = scene.host("b");
    let script = format!(
        "cd {} && echo $$ > sh.pid && sh -c 'echo $$ > recv.pid; exec {} --control {} --serial file:{} -' 2> recv.err; echo $? > recv.code",
        scene.path("").display(),
        binary("vmrecv"),
        b.control.display(),
        b.log.display()
    );
    let mut send = scene.send(&a, &format!("exec:{script}"), &[SLOWLY, args].concat());
    until("vmrun answers", || Client::connect(&b.control, "test").ok());
    b.await_status("it runs without all its pages", lacks_pages);
    await_serving(&mut send);
    (scene, a, b, send)
}

/// A receiver at an address takes over, and a sender is told of it.
#[track_caller]
fn go_on_by_hand(scene: &Scene, a: &mut crate::scene::Vmrun, b: &Host) {
    let mut command = scene.command("vmrecv");
    command.arg("--json").arg("--resume").arg("--control").arg(&b.control);
    scene.start("vmrecv-resume", command).end().expect(1, &["which cannot come again", "say LISTEN"]);
    let mut command = scene.command("vmrecv");
    command.args(["--json", "--resume", "tcp:127.0.0.1:0"]).arg("--control").arg(&b.control);
    let mut receiver = scene.start("vmrecv-resume", command);
    let note = receiver.await_note("waiting for a machine at ");
    let address = note.rsplit(' ').next().unwrap().to_owned();
    scene.resume(a, &[&address]).end().expect(0, &[]);
    receiver.end().expect(0, &[]);
    a.program.end().expect(0, &["migrated to", &address]);
    check_whole(&[a, b]);
}

#[test]
fn the_command_that_is_the_connection_dies_in_postcopy() {
    if !kvm() {
        return;
    }
    let (scene, mut a, b, mut send) = through_a_command(&["--recover-timeout", "1s"]);
    let pid: i32 = fs::read_to_string(scene.path("recv.pid")).unwrap().trim().parse().unwrap();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    let words = ["the guest runs at the destination", "may not lead to it again", "vmrecv --resume", "DEST"];
    send.end().expect(6, &words);
    assert!(a.is_committed() && lacks_pages(&check_answers(&b)));
    go_on_by_hand(&scene, &mut a, &b);
}

#[test]
fn a_receiver_whose_one_connection_is_lost_in_postcopy_says_how_it_goes_on() {
    if !kvm() {
        return;
    }
    let (scene, mut a, b, mut send) = through_a_command(&[]);
    send.crash();
    let code =
        until("vmrecv ends", || fs::read_to_string(scene.path("recv.code")).ok().filter(|c| !c.is_empty()));
    let said = fs::read_to_string(scene.path("recv.err")).unwrap();
    assert_eq!(code.trim(), "6", "{said}");
    for words in ["cannot come again", "the guest runs here and lacks", "vmrecv --resume --control", "DEST"] {
        assert!(said.contains(words), "{words:?} is not in {said}");
    }
    assert!(a.is_committed() && lacks_pages(&check_answers(&b)));
    go_on_by_hand(&scene, &mut a, &b);
}

// Where it does lead there again it helps.
#[test]
fn a_command_that_leads_to_the_same_receiver_is_run_again() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::new();
    let port = pair.link.address.rsplit(':').next().unwrap().to_owned();
    let bridge =
        format!("exec:exec bash -c 'exec 3<>/dev/tcp/127.0.0.1/{port}; cat <&3 & exec cat >&3 3<&-'");
    let mut send = pair.scene.send(&pair.a, &bridge, SLOWLY);
    pair.await_postcopy();
    await_serving(&mut send);
    for _ in 0..2 {
        pair.link.cut();
        await_awaited(&pair.a, &["the connection to exec:", "down for"]);
        pair.link.heal();
        pair.b.program.await_note("has come back");
        check_beats(&[&pair.a, &pair.b]);
    }
    send.end().expect(0, &[]);
    pair.check_moved();
}
