"""Row 25: peers that lie, babble, replay or say nothing. The waiting receiver takes the next honest sender."""

import json
import random
import socket
import struct
import time
from pathlib import Path

from control import Client
from drills import ALL_MODES, PRECOPY, drill
from pair import TO_SOURCE, Pair, moving
from programs import until
from wire import HEADER_BYTES, MAGIC, Header, crc32c, frame

SESSION = b"\x09" * 16
# What a receiver may grow by, whatever is said to it: MiB of memory, descriptors.
MOST_MIB, MOST_DESCRIPTORS = 80, 600


class Peer:
    """A source made by hand, on host A."""

    def __init__(self, scene, receiver, session=SESSION, epoch=1):
        self.socket = scene.net.socket("a")
        self.socket.settimeout(30)
        name, port = receiver.address.removeprefix("tcp:").rsplit(":", 1)
        self.socket.connect((name, int(port)))
        self.session, self.epoch, self.sequence = session, epoch, 0

    def say(self, kind, value=b""):
        payload = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.raw(frame(kind, payload, self.session, self.epoch, self.sequence))
        self.sequence += 1
        return self

    def raw(self, data):
        try:
            self.socket.sendall(data)
        except OSError:
            pass  # it has hung up already
        return self

    def hear(self):
        """The kind of the next frame that is no sign of life; None when the other side has hung up."""
        try:
            while head := self.socket.recv(HEADER_BYTES, socket.MSG_WAITALL):
                header = Header.decode(head)
                self.socket.recv(header.payload_bytes, socket.MSG_WAITALL)
                if header.kind not in ("PING", "PONG"):
                    return header.kind
        except OSError:
            pass
        return None

    def hear_all(self):
        return list(iter(self.hear, None))

    def done(self):
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        return self


def hello(machine, **changes):
    base = dict(version_min=1, version_max=1, release="drill", host="drill", vm_uuid=machine["uuid"],
                vm_name=machine["name"], resume=False, channels=0, features=[], verify=False, peer_timeout_ms=5000)
    return base | changes


def pages(first, count, kind, data_pages):
    """A PAGES payload with one run, whose data is zeros."""
    return struct.pack("<IIQQII", 1, 4096, 0, first, count, kind) + bytes(4096 * data_pages)


class Weight:
    """What a process takes, and that it takes no more than it may."""

    def __init__(self, scene, program):
        self.scene, self.pid = scene, program.pid
        self.begin = self.now()

    def now(self):
        text = Path(f"/proc/{self.pid}/status").read_text()
        # One that is just ending has no memory any more.
        peak = next((int(l.split()[1]) for l in text.splitlines() if l.startswith("VmHWM")), 0)
        return peak / 1024, len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def check(self):
        (mib, descriptors), (was_mib, _) = self.now(), self.begin
        self.scene.check(f"memory is bounded ({was_mib:.0f} to {mib:.0f} MiB)", mib - was_mib < MOST_MIB)
        self.scene.check(f"descriptors are bounded ({descriptors})", descriptors < MOST_DESCRIPTORS)


def honest(pair):
    """The receiver is as it was, and takes an honest guest."""
    pair.scene.check("the receiver waits on", pair.b.mover.is_running())
    until("B is empty", lambda: pair.b.run_state == "empty")
    pair.scene.ended(pair.send(dest=pair.b.address), 0)
    return pair.moved()


@drill(25, "garbage, truncated, oversized and damaged first words")
def bytes_that_are_no_stream(scene):
    pair = Pair(scene)
    weight = Weight(scene, pair.b.mover)
    good = Header("HELLO", 2, 1, SESSION, 0, crc32c(b"{}")).encode()
    oversized = bytearray(good)
    oversized[8:12] = b"\xff" * 4
    oversized[44:] = struct.pack("<I", crc32c(oversized[:44]))
    damaged = good[:20] + bytes([good[20] ^ 1]) + good[21:]
    dice = random.Random(5)
    texts = [b"", b"GET / HTTP/1.1\r\n\r\n", dice.randbytes(100_000), MAGIC, good[:20], good, bytes(oversized), damaged]
    for text in texts + [good[:n] + dice.randbytes(60) for n in range(0, 48, 4)]:
        heard = Peer(scene, pair.b).raw(text).done().hear_all()
        scene.check(f"it is refused or hung up on: {heard}", set(heard) <= {"REFUSED"})
    weight.check()
    return honest(pair)


@drill(25, "frames out of order, replayed, of another session or epoch, and lies about pages, within an attempt")
def lies_within_an_attempt(scene):
    pair = Pair(scene)
    weight = Weight(scene, pair.b.mover)
    machine = Client(pair.a.control).ask("machine")
    total = sum(r["bytes"] for r in machine["ram"]) // 4096
    huge = machine | {"ram": [{"start": 0, "bytes": 1 << 62}]}
    lies = [
        (1, lambda p: p.say("PAGES", pages(0, 1, 1, 0))),
        (1, lambda p: p.say("MACHINE", huge)),
        (1, lambda p: p.say("MACHINE", machine | {"vcpus": 0})),
        (1, lambda p: p.say("RUN")),
        (1, lambda p: setattr(p, "session", b"\x08" * 16) or p.say("PING", bytes(8))),
        (1, lambda p: setattr(p, "epoch", 2) or p.say("PING", bytes(8))),
        (1, lambda p: setattr(p, "sequence", 5) or p.say("PING", bytes(8))),
        (2, lambda p: p.say("PAGES", pages(total, 1, 1, 0))),
        (2, lambda p: p.say("PAGES", pages((1 << 64) - 1, 1, 1, 0))),
        (2, lambda p: p.say("PAGES", pages(total - 1, (1 << 32) - 1, 1, 0))),
        (2, lambda p: p.say("PAGES", pages(0, 4, 0, 1))),
        (2, lambda p: p.say("STATE", bytes(100)).say("END", {"passes": 1, "pages": total, "zero_pages": 0})),
        (2, lambda p: p.raw(Header("STATE", 64 << 20, 1, p.session, p.sequence, 0).encode()).done()),
        (2, lambda p: p.say("MACHINE", machine)),
        (2, lambda p: p.say("RUN")),
        (2, lambda p: p.say("REVOKE")),
    ]
    for number, (depth, lie) in enumerate(lies):
        until("B is free", lambda: pair.b.run_state == "empty")
        peer = Peer(scene, pair.b, session=bytes([100 + number]) * 16).say("HELLO", hello(machine))
        scene.check(f"HELLO is taken ({number})", peer.hear() == "HELLO_ACK")
        if depth == 2:
            scene.check(f"the machine is taken ({number})", peer.say("MACHINE", machine).hear() == "ACCEPTED")
        lie(peer)
        heard = peer.hear_all()
        scene.check(f"lie {number} is not believed: {heard}", not {"READY", "RUNNING", "DONE"} & set(heard))
    weight.check()
    return honest(pair)


@drill(25, "a second sender is told that it is busy, and disturbs nobody", (PRECOPY,))
def second_sender(scene):
    pair, send = moving(scene)
    machine = Client(pair.a.control).ask("machine")
    for number in range(3):
        peer = Peer(scene, pair.b, session=bytes([200 + number]) * 16).say("HELLO", hello(machine))
        scene.check("it is refused", peer.hear_all() == ["REFUSED"])
    scene.ended(scene.send(pair.a, pair.b), (1, 3), "another mover")
    scene.vmctl(pair.control, "set", "--bwlimit", "0").expect(0)
    scene.ended(send, 0)
    return pair.moved()


@drill(25, "a whole attempt is recorded and replayed", ALL_MODES)
def replayed_attempt(scene):
    pair = Pair(scene)
    pair.link.record()
    pair.link.cut_at(TO_SOURCE, "READY")
    scene.ended(pair.send(), 5, "the source has the guest")
    scene.check("B holds", pair.b.phase == "in-doubt")
    main = next(bytes(r) for r in pair.link.recorded if Header.decode(bytes(r[:48])).kind == "HELLO")
    heard = Peer(scene, pair.b).raw(main).done().hear_all()
    scene.check(f"a replay gets nothing: {heard}", "RUNNING" not in heard and "READY" not in heard)
    scene.check("B holds still", pair.b.phase == "in-doubt" and pair.b.run_state == "paused")
    return pair.back()


@drill(25, "forty peers that drip bytes and five hundred that say nothing: an honest sender gets in")
def slow_loris(scene):
    pair = Pair(scene)
    weight = Weight(scene, pair.b.mover)
    good = Header("HELLO", 1 << 20, 1, SESSION, 0, 0).encode()
    drips = [Peer(scene, pair.b).raw(good[:8]) for _ in range(40)]
    idle = [Peer(scene, pair.b) for _ in range(500)]
    begun = time.monotonic()
    send = pair.send(dest=pair.b.address)
    at = 8
    while send.is_running() and time.monotonic() - begun < 60:
        for drip in drips:
            drip.raw(good[at % 48 : at % 48 + 1])
        at += 1
        if pair.b.mover.is_running():
            weight.check()
        time.sleep(0.1)
    scene.ended(send, 0)
    waited = time.monotonic() - begun
    scene.check(f"it did not wait for long ({waited:.1f} s)", waited < 15)
    for peer in drips + idle:
        peer.socket.close()
    return pair.moved()
