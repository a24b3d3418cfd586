"""Rows 1 to 4, 23, 24, 26 and 27: what fails before the guest is paused, or keeps it from moving."""

import os
import signal
import socket
import time

import guest
import net
from drills import ALL_MODES, HYBRID, POSTCOPY, PRECOPY, drill
from pair import GUESTS, SLOW, TO_DEST, TO_SOURCE, Pair, Story, await_pages, moving
from programs import until


@drill(1, "nobody listens, nobody is there, the cable is out: exit 1 in time, never paused", ALL_MODES, cable=True)
def no_destination(scene):
    a = scene.guest()
    flags = ["--mode", scene.mode, "--connect-timeout", "700ms"]
    for name, address in [("refused", f"tcp:{net.ADDRESS['b']}:9"), ("nobody", f"tcp:{net.NOBODY}:9")]:
        begun = time.monotonic()
        scene.ended(scene.send(a, address, *flags), 1, address, "the source has the guest")
        scene.check(f"{name}: soon enough", time.monotonic() - begun < 5)
    scene.net.plug("down")
    scene.ended(scene.send(a, f"tcp:{net.ADDRESS['b']}:9", *flags), 1, "the source has the guest")
    scene.check_never_paused(a)
    return Story([a])


@drill(2, "another version, missing features, a machine that D cannot be: exit 3, every item by name")
def refused_by_name(scene):
    pair = Pair(scene)

    def refused(kind, change, *words):
        pair.link.rewrite(TO_DEST, kind, change)
        scene.ended(pair.send(), 3, *words, "on the destination", "the source has the guest, untouched")
        until("B is empty", lambda: pair.b.run_state == "empty")

    refused("HELLO", lambda h: h.update(version_min=7, version_max=9), "version", "7 to 9")
    refused("HELLO", lambda h: h.update(features=["must:levitation", "must:telepathy"]), "levitation", "telepathy")

    def machine(m):
        m["capabilities"].append("KVM_CAP_MIND_READING")
        m["msrs"].append(0x12345678)
        for entry in m["cpuid"]:
            if (entry["function"], entry["index"]) == (7, 0):
                entry["ebx"] = entry["ecx"] = 0xFFFFFFFF

    refused("MACHINE", machine, "KVM_CAP_MIND_READING", "0x12345678", "CPUID")
    scene.check("no page was sent", pair.link.count(TO_DEST, "PAGES") == 0)
    scene.check_never_paused(pair.a)
    return pair.back()


def given_up(pair, send, codes):
    """The attempt ends by itself, without a trace, while the guest runs."""
    pair.scene.ended(send, codes, "the source has the guest", patience=15)
    until("no trace of it at A", lambda: not (s := pair.a.status)["dirty_log"] and not s["mover_attached"])
    pair.scene.check_never_paused(pair.a)


@drill(3, "the link breaks in precopy", (PRECOPY, HYBRID))
def link_breaks(scene):
    pair, send = moving(scene)
    pair.link.cut()
    given_up(pair, send, (1, 5))
    return pair.back()


@drill(3, "the link breaks in the middle of a frame", (PRECOPY, HYBRID))
def link_breaks_within_a_frame(scene):
    pair, send = moving(scene)
    pair.link.cut_after(70_000)
    given_up(pair, send, (1, 5))
    return pair.back()


@drill(3, "the link goes silent in precopy: noticed within --peer-timeout", (PRECOPY, HYBRID))
def link_goes_silent(scene):
    pair, send = moving(scene, ["--peer-timeout", "2s"])
    begun = time.monotonic()
    pair.link.freeze()
    given_up(pair, send, (1, 5))
    scene.check("noticed in time", time.monotonic() - begun < 8)
    pair.link.cut()
    return pair.back()


@drill(3, "the cable is unplugged in precopy, and plugged in again", (PRECOPY, HYBRID), cable=True)
def cable_is_unplugged(scene):
    pair, send = moving(scene, ["--peer-timeout", "2s"])
    scene.net.plug("down")
    given_up(pair, send, (1, 5))
    until("B has noticed as well", lambda: pair.b.run_state == "empty")
    scene.net.plug("up")
    pair.link.cut()
    return pair.back()


@drill(3, "vmrecv is killed in precopy", (PRECOPY, HYBRID))
def receiver_dies(scene):
    pair, send = moving(scene)
    pair.b.mover.crash()
    given_up(pair, send, (1, 5))
    until("B has dropped its copy", lambda: pair.b.run_state in ("empty", None))
    return pair.fresh()


@drill(3, "vmrun at B is killed in precopy", (PRECOPY, HYBRID))
def receiving_vmrun_dies(scene):
    pair, send = moving(scene)
    scene.crash(pair.b)
    given_up(pair, send, (1, 5))
    return pair.fresh()


@drill(3, "vmrecv hangs in precopy (SIGSTOP), and goes on later", (PRECOPY, HYBRID))
def receiver_hangs(scene):
    pair, send = moving(scene)
    pair.b.mover.stop()
    given_up(pair, send, (1, 5))
    pair.b.mover.go_on()
    until("B has dropped its copy", lambda: pair.b.run_state == "empty")
    return pair.back()


@drill(4, "vmsend is killed in precopy: dirty log off, the next one succeeds", (PRECOPY, HYBRID))
def sender_dies(scene):
    pair, send = moving(scene)
    send.crash()
    until("no trace of it at A", lambda: not (s := pair.a.status)["dirty_log"] and not s["mover_attached"])
    scene.vmctl(pair.a, "status").expect(0)
    scene.check_never_paused(pair.a)
    until("B has dropped its copy", lambda: pair.b.run_state == "empty")
    return pair.back()


@drill(23, "a link slower than the guest dirties (tbf): exit 4 with the figures", cable=True)
def does_not_converge(scene):
    a, b = busy(scene)
    end = scene.ended(scene.send(a, b, "--downtime", "10ms", "--max-passes", "4"), 4, "the source has the guest")
    scene.check(f"figures are given: {end.stderr}", any(c.isdigit() for c in end.stderr))
    guest.await_beats([a])
    scene.net.limit("1gbit")
    scene.ended(scene.send(a, b, "--on-timeout", "force", "--max-passes", "2"), 0)
    scene.ended(b.mover, 0)
    return Story([a, b])


@drill(23, "the same, where a policy is given: switched over by force, or to postcopy", ALL_MODES, cable=True)
def policy_decides(scene):
    a, b = busy(scene)
    flags = {
        PRECOPY: ["--max-passes", "3", "--on-timeout", "force"],
        HYBRID: ["--mode", "hybrid", "--downtime", "10ms"],
        POSTCOPY: ["--max-passes", "3", "--on-timeout", "postcopy", "--downtime", "10ms"],
    }[scene.mode]
    result = scene.ended(scene.send(a, b, *flags), 0).result
    scene.check("pages came after the guest", scene.mode == PRECOPY or result["postcopy_pages"] > 0)
    scene.ended(b.mover, 0)
    return Story([a, b])


def busy(scene):
    """A guest that dirties 20 MB/s, and a link of 40 Mbit/s."""
    a = scene.guest("32M", cmdline="fill=8M ws=4M rate=5")
    b = scene.receiver()
    scene.net.limit("40mbit")
    return a, b


@drill(24, "the host end of D's device cannot be opened: refused before READY", ALL_MODES)
def host_end_cannot_be_opened(scene):
    pair = Pair(scene, ["--remap", f"serial0=file:{scene.folder}/not/there/serial"])
    for _ in range(2):
        end = scene.send(pair.a, pair.link.address, "--mode", scene.mode)
        scene.ended(end, (1, 3, 5), "on the destination", "the source has the guest")
    scene.check("READY was not said", pair.link.count(TO_SOURCE, "READY") == 0)
    scene.check_never_paused(pair.a)
    scene.check("the receiver waits on", pair.b.mover.is_running())
    return pair.fresh()


def device_is_missing(scene, device, ends, right):
    """A guest with a device whose host end cannot be had at D, in each of the ways `ends`, which are arguments of
    vmrecv and what is said. With the `right` one it moves."""
    wanted = GUESTS[scene.mode]
    a = scene.guest(wanted["memory"], cmdline=wanted["cmdline"], devices=device)
    for number, (words, said) in enumerate(ends):
        b = scene.receiver(*words, name=f"t{number}")
        link = scene.link_to(b)
        send = scene.send(a, link.address, "--mode", scene.mode)
        scene.ended(send, (1, 3, 5), *said, "on the destination", "the source has the guest")
        scene.check("READY was not said", link.count(TO_SOURCE, "READY") == 0)
        scene.check_never_paused(a)
        scene.check("the receiver waits on", b.mover.is_running())
    c = scene.receiver(*right, name="c")
    scene.ended(scene.send(a, c, "--mode", scene.mode), 0)
    scene.ended(c.mover, 0)
    return Story([a, c])


@drill(24, "the image of a disk is not there at D, is not named, or has another size: refused by name", ALL_MODES)
def disk_cannot_be_opened(scene):
    image, small = scene.folder / "disk.img", scene.folder / "small.img"
    image.write_bytes(bytes(1 << 20))
    small.write_bytes(bytes(512))
    gone = scene.folder / "gone.img"
    ends = [
        ([], ["disk0", "--remap"]),
        (["--remap", f"disk0={gone}"], ["disk0", "gone.img", "No such file"]),
        (["--remap", f"disk0={small}"], ["disk0", "1048576", "512"]),
    ]
    return device_is_missing(scene, ["--disk", image], ends, ["--remap", f"disk0={image}"])


@drill(24, "a tap is missing at D: refused by name; with another it moves", ALL_MODES, cable=True)
def tap_is_missing(scene):
    said = ["device net0", "vmcard7", "there is no interface of that name"]
    return device_is_missing(scene, ["--net", "tap=new:vmcard0,mac=52:54:00:12:34:56"],
                             [(["--remap", "net0=vmcard7"], said)], ["--remap", "net0=new:vmcard8"])


@drill(24, "the socket's path at D is not named, a stranger's, a file or nowhere: refused by name; with another it moves", ALL_MODES)
def vsock_path_is_taken(scene):
    stranger, file = scene.folder / "stranger.v", scene.folder / "file.v"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(stranger))
    listener.listen()
    file.write_text("precious")
    remap = lambda path: ["--remap", f"vsock0={path}"]
    ends = [
        ([], ["vsock0", "--remap"]),
        (remap(stranger), ["vsock0", "stranger.v", "listens there"]),
        (remap(file), ["vsock0", "file.v", "no socket"]),
        (remap(scene.folder / "nowhere" / "v"), ["vsock0", "nowhere"]),
    ]
    here, there = scene.folder / "here.v", scene.folder / "there.v"
    story = device_is_missing(scene, ["--vsock", f"cid=42,path={here}"], ends, remap(there))
    until("A's path is free", lambda: not here.exists())
    scene.check("the guest has its socket at D", there.is_socket())
    scene.check("what is a stranger's stays", stranger.is_socket() and file.read_text() == "precious")
    listener.close()
    return story


@drill(26, "SIGINT and SIGTERM before the fence: cancelled, exit 130 and 143", (PRECOPY, HYBRID))
def signals_before_the_fence(scene):
    pair, send = moving(scene)
    send.signal(signal.SIGINT)
    scene.ended(send, 130, "the source has the guest")
    send = scene.send(pair.a, pair.link.address, "--mode", scene.mode, *SLOW)
    await_pages(send)
    send.signal(signal.SIGTERM)
    scene.ended(send, 143, "the source has the guest")
    scene.check_never_paused(pair.a)
    return pair.back()


@drill(26, "SIGTERM while the guest is paused, before READY: cancelled", ALL_MODES)
def signal_while_paused(scene):
    pair = Pair(scene)
    held = pair.link.hold(TO_SOURCE, "READY")
    send = pair.send()
    held.caught()
    send.signal(signal.SIGTERM)
    scene.ended(send, 143, "the source has the guest")
    held.let_go()
    return pair.back()


@drill(26, "SIGINT and SIGTERM after the fence: refused with a message, and it goes on", ALL_MODES)
def signals_after_the_fence(scene):
    pair = Pair(scene)
    held = pair.link.hold(TO_DEST, "RUN")
    send = pair.send()
    held.caught()
    send.signal(signal.SIGINT)
    send.await_note("too late to cancel")
    send.signal(signal.SIGTERM)
    held.let_go()
    scene.ended(send, 0)
    return pair.moved()


@drill(26, "standard output is closed: nothing changes", ALL_MODES)
def closed_standard_output(scene):
    pair = Pair(scene)
    reading, writing = os.pipe()
    send = scene.send(pair.a, pair.b, "--mode", scene.mode, stdout=writing)
    os.close(reading), os.close(writing)
    scene.ended(send, 0)
    return pair.moved()


@drill(27, "D has not enough memory: refused before anything is sent", ALL_MODES)
def no_memory(scene):
    a = scene.guest("2G")
    b = scene.receiver(prefix=["sh", "-c", 'ulimit -v 1500000; exec "$@"', "sh"])
    link = scene.link_to(b)
    send = scene.send(a, link.address, "--mode", scene.mode)
    scene.ended(send, (1, 3), "emory", "on the destination", "the source has the guest")
    scene.check("no page was sent", link.count(TO_DEST, "PAGES") == 0)
    scene.check_never_paused(a)
    scene.check("the receiver waits on", b.mover.is_running() and b.run_state == "empty")
    return Story([a])
