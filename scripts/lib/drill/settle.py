"""After a random fault: brings back what was killed as an operator would, checks that the exit codes were true, and
moves the guest on undisturbed. Also what may be left of a round."""

from dataclasses import dataclass, field

import faults
from programs import Failed, until

# Who has the guest, by the exit code of vmsend (docs/failures.md). 7 and what was killed leave it open.
_SOURCE_HAS_IT = (1, 4, 5, 130, 143)
_KILLED = -9
_RESUMES = 4


@dataclass
class End:
    what: str  # how it was settled
    code: int  # of the vmsend that was disturbed
    lives: bool = True
    resumed: list = field(default_factory=list)  # the exit codes of `vmsend --resume`


def settle(play, life):
    """Ends with the guest at the other host, or lost where its vmrun was killed."""
    scene, a, b = play.scene, play.a, play.b
    take_over_receiver(play)
    code = scene.ended(play.send, range(-64, 200)).code
    end = End("moved", code)
    if code == _KILLED or code in (6, 7):
        resume(play, end)
        until("it is clear who has the guest", lambda: play.fault.name == faults.PAUSES or not is_held(a))
    if play.fault.name == faults.PAUSES:
        let_go_on(play)
    check_code(play, end)
    if runs(b) and not b.missing:
        return moved(play, life, end)
    if runs(a):
        end.what = "stayed, then moved"
        return again(play, life, end)
    if a.phase == "committed" and not ever_ran(play):
        return forced(play, life, end)
    scene.check(f"a guest is lost only with its vmrun ({code}; A {a.status}; B {b.status})", lost_a_vmrun(play))
    life.listen()
    return End("lost with its vmrun", code, lives=False, resumed=end.resumed)


def runs(host):
    return host.run_state == "running"


def is_held(host):
    """It owns its guest, and does not run it: its mover's pause is just ending, or an operator's stands."""
    return host.phase == "sole" and not runs(host)


def let_go_on(play):
    """An operator's pause goes with the guest, wherever it is: it is ended there."""
    until("the movers have ended", lambda: not any((h.status or {}).get("mover_attached") for h in (play.a, play.b)))
    for host in (play.a, play.b):
        if is_held(host):
            play.scene.vmctl(host, "resume").expect(0)


def lost_a_vmrun(play):
    return play.a.name in play.scene.killed or play.b.name in play.scene.killed


def take_over_receiver(play):
    """A vmrecv that was killed is started anew where its vmrun holds the guest."""
    b = play.b
    if play.recv.is_running() or not b.status:
        return
    until("B has no mover", lambda: not (s := b.status) or not s["mover_attached"] and s["run_state"] != "pausing")
    if b.phase == "in-doubt" or b.missing:
        play.scene.take_over(b, *faults.RECEIVER, b.address)


def resume(play, end):
    """`vmsend --resume`, until it is settled."""
    scene, a, b = play.scene, play.a, play.b
    for _ in range(_RESUMES):
        until("A has no mover", lambda: not (s := a.status) or not s["mover_attached"] and s["run_state"] != "pausing")
        if a.phase != "committed" or not b.status or not play.recv.is_running():
            return
        words = ["--revoke"] if play.choice.revoke else []
        code = scene.ended(scene.resume(a, *faults.SENDER, *words), range(-64, 200)).code
        end.resumed.append(code)
        if code not in (6, 7):
            return


def check_code(play, end):
    """What the exit code says is so."""
    a, b, scene = play.a, play.b, play.scene
    code = end.resumed[-1] if end.resumed else end.code
    if code == 0:
        scene.check("exit code 0: B has the guest, and all of it", b.name in scene.killed or runs(b) and not b.missing)
    elif code in _SOURCE_HAS_IT:
        if a.name not in scene.killed:
            until(f"exit code {code}: A has the guest", lambda: runs(a))
    elif code == 8:
        scene.check("exit code 8: a vmrun is gone", lost_a_vmrun(play))
    elif code not in (_KILLED, 6, 7):
        raise Failed(f"exit code {code} of {play.send.name}: {play.send.stderr().strip()[-300:]}")
    if play.fault.harmless:
        scene.check(f"the guest moves at once ({end.code})", end.code == 0)


def ever_ran(play):
    """Whether B may have let the guest run: it said so, or the guest has told something there."""
    seen = [e["status"]["run_state"] for e in play.scene.report()["events"] if e["socket"] == str(play.b.control)]
    told = play.b.log.exists() and play.b.log.stat().st_size > 0
    return "running" in seen or told or runs(play.b)


def moved(play, life, end):
    """B has the guest; whatever A still holds is ended as an operator would, who has looked at B."""
    scene, a, b = play.scene, play.a, play.b
    if play.recv.is_running():
        until("A is settled", lambda: not a.status or not a.status["mover_attached"])
    if a.phase == "committed":
        scene.discard(a)
        end.what = "moved, settled by hand"
    until("vmrun at A ends", lambda: a.status is None)
    if play.recv.is_running():
        # Where its source is gone it waits for as long as --linger.
        scene.ended(play.recv, (0, 8), patience=30)
    until("B has no mover", lambda: not (s := b.status) or not s["mover_attached"])
    life.moved_to(b)
    return end


def again(play, life, end):
    """A has the guest: the next try, undisturbed, moves it."""
    scene, a, b = play.scene, play.a, play.b
    until("A has no mover", lambda: not a.status["mover_attached"])
    if play.recv.is_running() and b.name not in scene.killed:
        # A copy that it holds is replaced by the next session.
        until("B is free", lambda: b.run_state == "empty" or b.phase == "in-doubt")
    else:
        scene.discard(b)
        b = scene.receiver(*faults.RECEIVER, name=f"{b.name}x", side=b.side)
    scene.ended(scene.send(a, b, "--peer-timeout", "10s"), 0)
    scene.ended(b.mover, 0)
    until("vmrun at A ends", lambda: a.status is None)
    life.moved_to(b)
    return end


def forced(play, life, end):
    """Both hold still, B never ran: it is made certain that it does not, and A goes on with nothing lost."""
    scene, a, b = play.scene, play.a, play.b
    if play.recv.is_running():
        play.recv.crash()
    if b.status:
        scene.crash(b)
    until("A has no mover", lambda: not a.status["mover_attached"])
    scene.vmctl(a, "resume").expect(3)
    scene.vmctl(a, "resume", "--force", "--peer-fenced").expect(0)
    end.what = "fenced, then moved"
    return again(play, life, end)


def tidy(scene, keep):
    """Ends all but the host that is kept, forgets them, and says what is left behind of them."""
    for host in scene.hosts.values():
        if host is not keep:
            scene.discard(host)
            scene.end_receiver(host)
    return scene.forget_all_but(keep)
