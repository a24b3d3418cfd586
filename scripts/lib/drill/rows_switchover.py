"""Rows 5 to 15, 21 and 22: what fails while the guest stands still. Exactly one copy runs in the end."""

import signal
import time

import guest
from control import Client
from drills import ALL_MODES, HYBRID, POSTCOPY, PRECOPY, drill
from pair import FLAGS, GUESTS, TO_DEST, TO_SOURCE, Pair, Story
from programs import until
from scene import ANSWER_WITHIN_MS


def killed_while_paused(scene, way, kind):
    """vmsend dies while that frame is on the link, before the fence."""
    pair = Pair(scene)
    held = pair.link.hold(way, kind)
    send = pair.send()
    held.caught()
    scene.check("A is paused, and not committed", pair.a.run_state == "paused" and pair.a.phase == "sole")
    begun = time.monotonic()
    send.crash()
    scene.await_running(pair.a)
    scene.check("it resumed within a second", time.monotonic() - begun < 1)
    held.let_go()
    return pair


@drill(5, "vmsend is killed with the guest paused: vmrun resumes it by itself within a second", ALL_MODES)
def sender_dies_while_paused(scene):
    return killed_while_paused(scene, TO_DEST, "END").back()


@drill(5, "vmsend is killed before it hears READY: the same, and B holds", ALL_MODES)
def sender_dies_before_it_hears_ready(scene):
    pair = killed_while_paused(scene, TO_SOURCE, "READY")
    scene.await_phase(pair.b, "in-doubt")
    return pair.back()


def import_fails(scene, points):
    """D's import fails at each of `points`: (fault point, words of the reason)."""
    wanted = GUESTS[scene.mode]
    a = scene.guest(wanted["memory"], cpus=2, cmdline=wanted["cmdline"])
    for number, (point, words) in enumerate(points):
        b = scene.receiver(name=f"t{number}", traps=True, env={"VMFERRY_FAULT_POINT": point})
        link = scene.link_to(b)
        flags = ["--mode", scene.mode, "--on-timeout", "postcopy" if scene.mode == HYBRID else "force"]
        send = scene.send(a, link.address, *flags, "--max-passes", "2")
        scene.ended(send, (1, 5), *words, "on the destination", "the source has the guest")
        scene.check("READY was not said", link.count(TO_SOURCE, "READY") == 0)
        scene.await_running(a)
        guest.await_beats([a])
        until("B is empty again", lambda: b.run_state == "empty")
        scene.check("the receiver waits on", b.mover.is_running())
    c = scene.receiver(name="c")
    scene.ended(scene.send(a, c), 0)
    return Story([a, c])


@drill(6, "the state of a device does not load at D: no READY, the device and the reason are named", ALL_MODES, traps=True)
def device_does_not_load(scene):
    return import_fails(scene, [("import:serial", ["serial"]), ("import:clock", ["clock"])])


@drill(7, "KVM refuses a register at D: no READY, the register is named", ALL_MODES, traps=True)
def vcpu_does_not_synchronise(scene):
    return import_fails(scene, [("vcpu:1:lapic", ["vCPU 1", "LAPIC"]), ("vcpu:0:msrs", ["vCPU 0", "MSR"])])


@drill(8, "the link is dead while a vCPU's synchronisation waits for a page: sockets answer, D gives up", (POSTCOPY,))
def link_dead_while_synchronising(scene):
    pair = Pair(scene, extra="kvmclock=1")
    # The pages that this touches have gone ahead: D is told that it lacks all of them.
    pair.link.rewrite_bytes(TO_DEST, "MISSING", lambda part: part[:8] + b"\xff" * (len(part) - 8))
    pair.link.rewrite(TO_DEST, "END", lambda end: end.update(ahead=[]))
    request = pair.link.hold(TO_SOURCE, "PAGE_REQUEST")
    send = pair.send()
    request.caught()
    pair.link.freeze()
    request.let_go()
    scene.check("READY was not said", pair.link.count(TO_SOURCE, "READY") == 0)
    scene.ended(send, 5, "the source has the guest")
    pair.link.cut()
    return pair.back()


@drill(9, "vmrecv is killed before READY is heard: the guest goes on at A, B does not run its copy", ALL_MODES)
def receiver_dies_before_ready(scene):
    return destination_dies_before_ready(scene, host=False)


@drill(9, "vmrecv and vmrun at B are killed before READY is heard", ALL_MODES)
def host_dies_before_ready(scene):
    return destination_dies_before_ready(scene, host=True)


def destination_dies_before_ready(scene, host):
    pair = Pair(scene)
    ready = pair.link.hold(TO_SOURCE, "READY")
    send = pair.send()
    ready.caught()
    pair.b.mover.crash()
    if host:
        scene.crash(pair.b)
    pair.link.cut()
    ready.let_go()
    scene.ended(send, 5, "the source has the guest")
    return pair.fresh()


@drill(10, "READY is lost: A resumes; B holds, unrun, until A's next session says that it is over", ALL_MODES)
def ready_is_lost(scene):
    pair = Pair(scene)
    pair.link.cut_at(TO_SOURCE, "READY")
    scene.ended(pair.send(), 5, "the source has the guest")
    scene.await_running(pair.a)
    scene.check("B holds", pair.b.phase == "in-doubt" and pair.b.run_state == "paused")
    scene.vmctl(pair.b, "resume").expect(3)
    scene.vmctl(pair.b, "quit").expect(3)
    pair.b.mover.signal(signal.SIGTERM)
    pair.b.mover.await_note("not now")
    return pair.back()


@drill(11, "vmsend is killed between the fence and RUN: both hold, vmsend --resume says RUN", ALL_MODES)
def sender_dies_after_the_fence(scene):
    pair = held_at_run(scene)
    scene.ended(scene.send(pair.a, pair.b), 1, "committed")
    scene.check_both_hold(pair.a, pair.b)
    pair.link.heal()
    scene.ended(scene.resume(pair.a), 0)
    return pair.moved()


def held_at_run(scene):
    """A is committed, B holds, RUN never came, vmsend is dead and the link down."""
    pair = Pair(scene)
    run = pair.link.hold(TO_DEST, "RUN")
    send = pair.send()
    run.caught()
    send.crash()
    pair.link.cut()
    run.let_go()
    scene.check_both_hold(pair.a, pair.b)
    return pair


@drill(12, "RUN is lost with the link: both hold, and it is settled by itself when the link is back", ALL_MODES)
def run_is_lost(scene):
    pair = Pair(scene)
    pair.link.cut_at(TO_DEST, "RUN")
    send = pair.send()
    pair.link.await_cut()
    send.await_note("both sides hold still")
    scene.check_both_hold(pair.a, pair.b)
    pair.link.heal()
    scene.ended(send, 0)
    return pair.moved()


@drill(13, "the guest is wanted back before RUN has come: B answers REVOKED", ALL_MODES)
def revoke_comes_first(scene):
    pair = held_at_run(scene)
    pair.link.heal()
    scene.ended(scene.resume(pair.a, "--revoke"), 1, "gave the guest back", "the source has the guest")
    scene.check("RUN was not said", pair.link.count(TO_DEST, "RUN") == 0)
    return pair.back()


@drill(13, "the guest is wanted back when B runs it already: B answers RUNNING", ALL_MODES)
def run_comes_first(scene):
    pair = Pair(scene)
    pair.link.cut_at(TO_SOURCE, "RUNNING")
    send = pair.send()
    pair.link.await_cut()
    send.crash()
    scene.await_running(pair.b)
    pair.link.heal()
    scene.ended(scene.resume(pair.a, "--revoke"), 0)
    return pair.moved()


@drill(14, "host B dies after READY, before it ran: exit 7; the operator fences it and brings A back", ALL_MODES)
def host_dies_between_ready_and_run(scene):
    pair = Pair(scene)
    run = pair.link.hold(TO_DEST, "RUN")
    send = pair.send("--recover-timeout", "1s")
    run.caught()
    pair.b.mover.crash()
    scene.crash(pair.b)
    pair.link.cut()
    run.let_go()
    scene.ended(send, 7, "nobody runs the guest", "--resume", "--force --peer-fenced")
    until("A is held", lambda: not pair.a.status["mover_attached"] and pair.a.phase == "committed")
    scene.vmctl(pair.a, "resume").expect(3)
    scene.vmctl(pair.a, "resume", "--force", "--peer-fenced").expect(0)
    return pair.fresh()


@drill(15, "RUNNING is lost: B runs, and it is settled when the link is back", ALL_MODES)
def running_is_lost(scene):
    pair = Pair(scene)
    pair.link.cut_at(TO_SOURCE, "RUNNING")
    send = pair.send()
    pair.link.await_cut()
    scene.await_running(pair.b)
    scene.check("A holds", pair.a.phase == "committed" and pair.a.run_state == "paused")
    if scene.mode == PRECOPY:  # else it waits for its pages
        guest.await_beats([pair.a, pair.b])
    pair.link.heal()
    scene.ended(send, 0)
    return pair.moved()


@drill(15, "vmsend is killed before it hears RUNNING", ALL_MODES)
def sender_dies_before_it_hears_running(scene):
    pair = Pair(scene)
    running = pair.link.hold(TO_SOURCE, "RUNNING")
    send = pair.send()
    running.caught()
    send.crash()
    running.let_go()
    scene.await_running(pair.b)
    scene.vmctl(pair.a, "resume").expect(3)
    scene.ended(scene.resume(pair.a), 0)
    return pair.moved()


@drill(21, "status, pause, resume at every step, on both sides: answered within 100 ms", ALL_MODES)
def answers_at_every_step(scene):
    pair = Pair(scene)
    worst, said = [0.0], set()

    def ask(where):
        for host in (pair.a, pair.b):
            for command in ("status", "pause", "resume"):
                client = Client(host.control)
                answer, took = client.first_answer(command)
                client.close()
                said.add(answer)
                worst[0] = max(worst[0], took)
                scene.check(f"{host.name} answers {command} at {where} ({took:.0f} ms)", took < ANSWER_WITHIN_MS)

    steps = [(TO_DEST, "HELLO"), (TO_SOURCE, "ACCEPTED"), (TO_DEST, "STATE"), (TO_DEST, "END"), (TO_SOURCE, "READY")]
    steps += [(TO_DEST, "RUN"), (TO_SOURCE, "RUNNING")]
    held = [(kind, pair.link.hold(way, kind)) for way, kind in steps]
    send = scene.send(pair.a, pair.link.address, *FLAGS[scene.mode], "--peer-timeout", "20s", "--max-passes", "2",
                      "--on-timeout", "force" if scene.mode == PRECOPY else "postcopy")
    for kind, frame in held:
        frame.caught()
        ask(kind)
        frame.let_go()
    if scene.mode != PRECOPY:
        pair.link.freeze()  # vCPUs wait for pages, and none comes
        ask("missing pages")
        pair.link.heal()
    scene.ended(send, 0)
    scene.check(f"there was a refusal, and a thing done: {said}", {"done", "refused"} <= said)
    scene.vmctl(pair.b, "resume").expect(0)
    return pair.moved()


@drill(22, "resume at A after the fence: refused but for --force --peer-fenced", ALL_MODES)
def resume_after_the_fence(scene):
    pair = held_at_run(scene)
    for words in (["resume"], ["resume", "--force"], ["quit"]):
        scene.vmctl(pair.a, *words).expect(3)
    scene.vmctl(pair.a, "resume").expect(3, "--force --peer-fenced", pair.link.address)
    scene.vmctl(pair.b, "resume").expect(3)
    # What the two words are for: B is made certain never to run it.
    pair.b.mover.crash()
    scene.crash(pair.b)
    scene.vmctl(pair.a, "resume", "--force", "--peer-fenced").expect(0)
    return pair.fresh()
