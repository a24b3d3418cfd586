"""What most drills begin with: a guest at A, a receiver at B, a link in between, in one of the modes."""

import guest
from drills import HYBRID, POSTCOPY, PRECOPY
from link import TO_DEST, TO_SOURCE
from programs import until
from scene import Story

# The guest of each mode: small; one that precopy cannot follow; one that visits all its memory in seconds.
GUESTS = {
    PRECOPY: dict(memory="32M", cmdline="fill=8M ws=1M rate=5"),
    HYBRID: dict(memory="48M", cmdline="fill=12M ws=8M rate=1"),
    POSTCOPY: dict(memory="64M", cmdline="fill=24M ws=1M rate=2 scan=1"),
}
# And how it is sent: in postcopy so slowly that the guest is first at most of its pages.
FLAGS = {
    PRECOPY: ["--mode", "precopy"],
    HYBRID: ["--mode", "hybrid", "--bwlimit", "12M", "--downtime", "1ms"],
    POSTCOPY: ["--mode", "postcopy", "--bwlimit", "512K"],
}
# A guest and flags with which the passes of precopy take seconds.
BIG = dict(memory="64M", cmdline="fill=32M ws=1M rate=5")
SLOW = ["--bwlimit", "4M", "--peer-timeout", "2s"]


class Pair:
    """A guest at A and a receiver at B that is reached through a link."""

    def __init__(self, scene, receiver=(), extra="", **how):
        self.scene = scene
        wanted = GUESTS[scene.mode]
        self.a = scene.guest(wanted["memory"], cmdline=f"{wanted['cmdline']} {extra}")
        self.b = scene.receiver(*receiver, **how)
        self.link = scene.link_to(self.b)
        self.control = scene.folder / "send.sock"

    def send(self, *words, dest=None):
        """A vmsend in the scene's mode. Hybrid goes over to postcopy after its first pass."""
        patience = [] if "--peer-timeout" in words else ["--peer-timeout", "3s"]
        words = [*FLAGS[self.scene.mode], "--control", self.control, *patience, *words]
        send = self.scene.send(self.a, dest or self.link.address, *words)
        if self.scene.mode == HYBRID and not dest:
            self.link.await_passed(TO_DEST, "PAGES")
            self.scene.vmctl(self.control, "switch-now").expect(0)
        return send

    def in_postcopy(self, *words):
        """A migration whose guest runs at B, with pages missing."""
        send = self.send(*words)
        self.await_postcopy()
        if self.scene.mode == HYBRID:
            self.scene.vmctl(self.control, "set", "--bwlimit", "512K").expect(0)
        return send

    def await_postcopy(self):
        until("it runs at B without all its pages", lambda: self.b.run_state == "running" and self.b.missing > 0)

    def moved(self):
        """It is over, and the guest lives at B."""
        self.scene.ended(self.b.mover, 0)
        self.scene.ended(self.a.program, 0, "migrated to")
        return Story([self.a, self.b])

    def back(self):
        """The guest goes on at A, and another try moves it."""
        self.scene.await_running(self.a)
        guest.await_beats([self.a])
        self.link.heal()
        self.scene.ended(self.scene.send(self.a, self.b, "--peer-timeout", "10s"), 0)
        return self.moved()

    def fresh(self):
        """The guest goes on at A; a new receiver takes it."""
        self.scene.await_running(self.a)
        guest.await_beats([self.a])
        c = self.scene.receiver(name="c")
        self.scene.ended(self.scene.send(self.a, c), 0)
        self.scene.ended(c.mover, 0)
        self.scene.ended(self.a.program, 0, "migrated to")
        return Story([self.a, c])


def moving(scene, receiver=()):
    """A big guest whose pages are on their way, slowly: (pair, vmsend)."""
    pair = Pair.__new__(Pair)
    pair.scene, pair.control = scene, scene.folder / "send.sock"
    pair.a = scene.guest(**BIG)
    pair.b = scene.receiver(*receiver)
    pair.link = scene.link_to(pair.b)
    send = scene.send(pair.a, pair.link.address, "--mode", scene.mode, "--control", pair.control, *SLOW)
    await_pages(send)
    return pair, send


def await_pages(send):
    send.await_line("pages on their way", lambda l: l.get("progress", {}).get("sent_bytes", 0) > 1 << 20)


__all__ = ["BIG", "FLAGS", "GUESTS", "Pair", "SLOW", "Story", "TO_DEST", "TO_SOURCE", "await_pages", "moving"]
