"""Rows 16 to 20: what fails while the guest runs at B and lacks pages."""

from drills import HYBRID, POSTCOPY, drill
from pair import TO_DEST, TO_SOURCE, Pair, Story
from programs import until

MODES = (HYBRID, POSTCOPY)


def still_lacks(pair):
    """B runs, lacks pages, and answers; A holds its copy."""
    pair.scene.check("B runs and lacks pages", pair.b.run_state == "running" and pair.b.missing > 0)
    pair.scene.check("A holds", pair.a.phase == "committed" and pair.a.run_state == "paused")


@drill(16, "the link dies in postcopy, three times: it connects by itself, and sends what is missing only", MODES)
def link_dies_in_postcopy(scene):
    pair = Pair(scene)
    send = pair.in_postcopy()
    for _ in range(3):
        before = pair.b.missing
        pair.link.cut()
        still_lacks(pair)
        pair.link.heal()
        until("pages come again", lambda: pair.b.missing < before)
        if pair.b.missing < 200:
            break
    scene.ended(send, 0)
    return pair.moved()


@drill(16, "the cable is unplugged in postcopy, and plugged in again", MODES, cable=True)
def cable_is_unplugged_in_postcopy(scene):
    pair = Pair(scene, ["--peer-timeout", "1s"])
    send = pair.in_postcopy("--peer-timeout", "1s")
    scene.net.plug("down")
    send.await_note("the connection is lost")
    still_lacks(pair)
    scene.net.plug("up")
    pair.link.cut()
    pair.link.heal()
    scene.ended(send, 0)
    return pair.moved()


@drill(17, "the link dies again and again in the recovery handshake, at each of its frames", MODES)
def link_dies_in_the_handshake(scene):
    pair = Pair(scene)
    send = pair.in_postcopy()
    for way, kind in [(TO_SOURCE, "HELLO_ACK"), (TO_SOURCE, "RECEIVED"), (TO_SOURCE, "JOINED"), (TO_DEST, "JOIN")]:
        pair.link.cut()
        pair.link.cut_at(way, kind)
        pair.link.heal()
        pair.link.await_cut()
        still_lacks(pair)
    pair.link.heal()
    scene.ended(send, 0)
    return pair.moved()


@drill(18, "vmsend is killed in postcopy: vmsend --resume serves the rest", MODES)
def sender_dies_in_postcopy(scene):
    pair = Pair(scene)
    send = pair.in_postcopy()
    send.crash()
    still_lacks(pair)
    scene.vmctl(pair.a, "resume").expect(3)
    scene.ended(scene.resume(pair.a), 0)
    return pair.moved()


@drill(19, "vmrecv is killed in postcopy: the guest waits for its next missing page; vmrecv --resume goes on", MODES)
def receiver_dies_in_postcopy(scene):
    pair = Pair(scene)
    send = pair.in_postcopy()
    pair.b.mover.crash()
    still_lacks(pair)
    send.await_note("the connection is lost")
    scene.take_over(pair.b)
    scene.ended(send, 0)
    return pair.moved()


@drill(19, "both movers are killed in postcopy: both are resumed", MODES)
def both_movers_die_in_postcopy(scene):
    pair = Pair(scene)
    send = pair.in_postcopy()
    send.crash()
    pair.b.mover.crash()
    still_lacks(pair)
    scene.take_over(pair.b)
    scene.ended(scene.resume(pair.a), 0)
    return pair.moved()


@drill(20, "vmrun at A is killed in postcopy: vmsend has its memory open, and finishes", MODES)
def source_vmrun_dies_in_postcopy(scene):
    pair = Pair(scene)
    send = pair.in_postcopy()
    scene.crash(pair.a)
    scene.ended(send, 0)
    scene.ended(pair.b.mover, 0)
    return Story([pair.a, pair.b])


@drill(20, "vmrun at A and vmsend are killed in postcopy: the guest is lost; B answers, and can be ended", MODES)
def source_host_dies_in_postcopy(scene):
    pair = Pair(scene)
    send = pair.in_postcopy()
    scene.crash(pair.a)
    send.crash()
    pair.link.cut()
    until("B lacks pages", lambda: pair.b.missing > 0)
    pair.b.mover.crash()
    scene.vmctl(pair.b, "quit", "--force").expect(0)
    return Story([pair.a, pair.b], lives=False)


@drill(20, "vmrun at B is killed in postcopy: the guest is lost, vmrecv says so (exit 8), A keeps its old copy", MODES)
def destination_vmrun_dies_in_postcopy(scene):
    pair = Pair(scene)
    send = pair.in_postcopy("--recover-timeout", "1s")
    scene.crash(pair.b)
    scene.ended(pair.b.mover, 8, "the guest")
    scene.ended(send, (6, 8))
    scene.check("A holds what it had", pair.a.phase == "committed" and pair.a.run_state == "paused")
    scene.vmctl(pair.a, "resume").expect(3)
    return Story([pair.a], lives=False)
