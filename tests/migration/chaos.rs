//! Kills and cuts at random moments, again and again, with the same guest. Whatever happens: never
//! two runners (the scene's watcher), never none for good, no heartbeat lost, and the exit code of
//! vmsend says who has the guest.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vmferry::control::{Client, RunState};
use vmferry::switchover::Ownership;
use vmferry::wire::FrameType;

use crate::guest::{check_alive, check_beats};
use crate::program::{End, until};
use crate::proxy::{Proxy, Way};
use crate::scene::{Host, Receiver, Scene, kvm};

const ROUNDS: usize = 20;

/// After which frame something happens.
const MOMENTS: &[(Way, FrameType)] = &[
    (Way::ToDest, FrameType::Hello),
    (Way::ToSource, FrameType::Accepted),
    (Way::ToDest, FrameType::Barrier),
    (Way::ToDest, FrameType::State),
    (Way::ToDest, FrameType::End),
    (Way::ToSource, FrameType::Ready),
    (Way::ToDest, FrameType::Run),
    (Way::ToSource, FrameType::Running),
];

/// Random enough, and the same again for the same seed.
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

#[test]
fn kills_and_cuts_at_random_moments() {
    if !kvm() {
        return;
    }
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos().into();
    eprintln!("seed {seed}");
    let mut dice = Dice(seed);
    let scene = Scene::new();
    let first = scene.small("h0");
    // Where the guest has been, in order; it is on the last.
    let mut stations = vec![first.host.clone()];
    for round in 1..=ROUNDS {
        let mut to = scene.receiver(&format!("h{round}"), &["--linger", "30s", "--peer-timeout", "2s"]);
        let here = stations.last().unwrap().clone();
        let end = disturbed(&scene, &here, &mut to, &mut dice);
        eprintln!("round {round}: vmsend {} {}", end.code, end.stderr.trim());
        if settle(&scene, &here, &mut to, &end) {
            stations.push(to.host.clone());
        }
        check_beats(&stations.iter().collect::<Vec<_>>());
        // A receiver that is left over goes, with its vmrun, and what that may hold.
        to.program.crash();
        if stations.last().unwrap().control != to.control && Client::connect(&to.control, "test").is_ok() {
            to.host.crash();
        }
    }
    check_alive(&stations.iter().collect::<Vec<_>>());
}

/// A migration that is disturbed somewhere between its start and shortly after its end.
fn disturbed(scene: &Scene, from: &Host, to: &mut Receiver, dice: &mut Dice) -> End {
    let link = Proxy::to(&to.address);
    let mut send = scene.send(from, &link.address, &["--peer-timeout", "2s", "--recover-timeout", "2s"]);
    let (way, kind) = MOMENTS[dice.roll(MOMENTS.len() as u64) as usize];
    let moment = Duration::from_micros(dice.roll(4_000));
    let fault = dice.roll(4) as usize;
    let what = ["vmsend dies", "vmrecv dies", "the link breaks", "the link goes silent"][fault];
    eprintln!("{moment:?} after {kind}: {what}");
    link.await_passed(way, kind);
    // The moment itself is what is random here: nothing is waited for.
    std::thread::sleep(moment);
    match fault {
        0 => send.crash(),
        1 => to.program.crash(),
        2 => link.cut(),
        _ => link.freeze(),
    }
    if fault > 1 {
        // It comes back within the time for recovery.
        std::thread::sleep(Duration::from_micros(dice.roll(500_000)));
        link.cut();
        link.heal();
    }
    let end = send.end();
    // What is not settled is settled through a link that works: the recorded destination is this one.
    if (end.code == 7 || end.code < 0) && stays_committed(from) && to.program.is_running() {
        let resumed = scene.resume(from, &[]).end();
        eprintln!("resumed: {} {}", resumed.code, resumed.stderr.trim());
        return resumed;
    }
    end
}

/// Whether that vmrun, once it has noticed that its vmsend is gone and done what that had still asked
/// for, is there and holds a committed guest.
fn stays_committed(host: &Host) -> bool {
    until("it is clear how things stand", || {
        let Ok(mut client) = Client::connect(&host.control, "test") else { return Some(false) };
        let status = client.status().ok()?;
        let leaving = matches!(status.ownership, Ownership::Released { .. });
        (!status.mover_attached && !leaving && status.run_state != RunState::Pausing)
            .then_some(matches!(status.ownership, Ownership::Committed { .. }))
    })
}

/// Checks that the exit code was true, and has the operator decide what is left open; whether the
/// guest is at the destination now.
fn settle(scene: &Scene, from: &Host, to: &mut Receiver, end: &End) -> bool {
    match end.code {
        0 => {
            to.await_running();
            from.await_gone();
            true
        }
        1 | 3 | 5 => {
            assert_eq!(from.status().run_state, RunState::Running, "{end:?}");
            // And it can be sent at once, unless its receiver is dead.
            if to.program.is_running() {
                scene.send(from, &to.address, &[]).end().expect(0, &[]);
                to.await_running();
                return true;
            }
            false
        }
        // vmsend was killed, or could not reach the other side any more.
        -9 | 7 => {
            let open = stays_committed(from);
            if Client::connect(&from.control, "test").is_err() {
                to.await_running();
                return true;
            }
            if !open {
                from.await_running();
                return false;
            }
            // The receiver is dead: only an operator can tell, who looks there.
            if to.status().run_state == RunState::Running {
                from.vmctl(&["quit", "--force"]).expect(0, &[]);
                return true;
            }
            to.host.crash();
            from.vmctl(&["resume", "--force", "--peer-fenced"]).expect(0, &[]);
            false
        }
        code => panic!("exit code {code}: {end:?}"),
    }
}
