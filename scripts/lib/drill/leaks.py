"""Hosts that live on: what vmrun and vmrecv hold stays as it was after many attempts that fail or are cancelled,
and a guest that has gone back and forth many times takes no more than one that has just come."""

import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from link import TO_DEST, TO_SOURCE
from pair import SLOW, await_pages
from programs import Failed, until
from scene import Scene
from soak import Life

WARM_UP = 5
# Longer than the last words of a connection are waited for.
FAREWELL_S = 1.2
# Allocators keep some of what was freed; a leak of a page table or a memfd per attempt is more in sum.
MOST_GROWTH_KIB = 8 << 10
MOMENTS = [(TO_SOURCE, "ACCEPTED"), (TO_DEST, "BARRIER"), (TO_DEST, "STATE"), (TO_DEST, "END"), (TO_SOURCE, "READY")]


@dataclass
class Holds:
    descriptors: int
    memfds: int
    threads: int
    rss_kib: int

    @classmethod
    def of(cls, pid):
        fds = [_target(f) for f in Path(f"/proc/{pid}/fd").iterdir()]
        fields = dict(l.split(":", 1) for l in Path(f"/proc/{pid}/status").read_text().splitlines())
        number = lambda name: int(fields[name].split()[0])
        return cls(len(fds), sum("memfd:" in f for f in fds), number("Threads"), number("VmRSS"))

    def grew_to(self, now):
        same = (self.descriptors, self.memfds, self.threads) == (now.descriptors, now.memfds, now.threads)
        return not same or now.rss_kib - self.rss_kib > MOST_GROWTH_KIB


def _target(link):
    try:
        return os.readlink(link)
    except OSError:  # closed meanwhile
        return ""


def run(kit, args):
    outcomes = [part(kit, args, attempts), part(kit, args, moves)]
    for outcome in outcomes:
        print(json.dumps(outcome) if args.json else "\n".join(f"{k}: {v}" for k, v in outcome.items()), flush=True)
    return 1 if any(outcome["leaks"] != "passed" for outcome in outcomes) else 0


def part(kit, args, look):
    scene, begun = Scene(kit, "precopy"), time.monotonic()
    try:
        outcome = look(scene, args.times)
    except Failed as error:
        outcome = {"leaks": "FAILED", "problem": str(error)}
    failed = outcome["leaks"] != "passed"
    if failed or args.keep:
        outcome["logs"] = str(scene.folder)
    scene.close(failed or args.keep)
    return outcome | {"seconds": round(time.monotonic() - begun, 1)}


def verdict(grown, left):
    return "FAILED" if grown or left else "passed"


def attempts(scene, times):
    """Each ends at another frame, or is cancelled; B's vmrun was there before its vmrecv."""
    a, b = scene.guest(memory="64M", cmdline="fill=24M ws=1M rate=5"), scene.host("b", "b")
    b.program = scene.start("b", "vmrun", "--incoming", "--control", b.control, "--serial", f"file:{b.log}")
    until("vmrun at B answers", lambda: b.status)
    scene.receiver("--attach")
    link = scene.link_to(b)
    watched = {"vmrun at A": a.program.pid, "vmrecv": b.mover.pid, "vmrun at B": b.program.pid}
    for number in range(WARM_UP + times):
        if number == WARM_UP:
            before = settled(scene, a, b, link, watched)
        if number % (len(MOMENTS) + 1) == len(MOMENTS):
            send = scene.send(a, link.address, *SLOW)
            await_pages(send)
            send.signal(signal.SIGTERM)
            send.end().expect(143)
            continue
        link.cut_at(*MOMENTS[number % (len(MOMENTS) + 1)])
        scene.send(a, link.address, "--peer-timeout", "3s").end().expect((1, 5), "the source has the guest")
        link.heal()
    after = settled(scene, a, b, link, watched)
    grown = [name for name in watched if before[name].grew_to(after[name])]
    scene.ended(scene.send(a, b), 0)
    scene.ended(b.mover, 0)
    left = scene.wind_up()
    figures = {name: {"before": asdict(before[name]), "after": asdict(after[name])} for name in watched}
    return {"leaks": verdict(grown, left), "attempts": times, **figures, "grown": grown, "left": left}


def moves(scene, times):
    """One guest, back and forth, by precopy and by postcopy: its vmrun on each side, early and late."""
    life, early, late, left = Life(scene, 0), {}, {}, []
    for number in range(1, times + 1):
        here = life.on
        to = scene.receiver(name=f"h{number}", side="b" if here.side == "a" else "a")
        mode = ("precopy", "postcopy")[number // 2 % 2]  # each of them in both directions
        scene.send(here, to, "--mode", mode).end().expect(0)
        to.mover.end().expect(0)
        until("vmrun at its source has ended", lambda: here.status is None)
        life.moved_to(to)
        left += scene.forget_all_but(to)
        key = f"vmrun at {to.side.upper()} after {mode}"
        late[key] = quiet(to.status["pid"])
        early.setdefault(key, late[key])
    life.await_whole()
    grown = [key for key in late if early[key].grew_to(late[key])]
    figures = {key: {"first": asdict(early[key]), "last": asdict(late[key])} for key in late}
    left += scene.wind_up()
    return {"leaks": verdict(grown, left), "moves": times, **figures, "grown": grown, "left": left}


def quiet(pid):
    """What it holds, once two looks agree."""
    last = None

    def look():
        nonlocal last
        time.sleep(0.2)
        before, last = last, Holds.of(pid)
        same = before and (before.descriptors, before.threads) == (last.descriptors, last.threads)
        return same and last

    return until("nothing changes any more", look)


def settled(scene, a, b, link, watched):
    """What each holds with nothing under way, once two looks agree: threads that say farewell take a second."""
    # What READY may have left held at B is replaced by the next attempt: one that fails early.
    link.cut_at(TO_SOURCE, "ACCEPTED")
    scene.send(a, link.address).end().expect((1, 5))
    link.heal()
    until("B is empty", lambda: b.run_state == "empty")
    last = {}

    def look():
        nonlocal last
        until("A has no mover", lambda: not a.status["mover_attached"])
        time.sleep(FAREWELL_S)  # our own question is a connection as well
        now = {name: Holds.of(pid) for name, pid in watched.items()}
        same = last and all(now[n].descriptors == last[n].descriptors and now[n].threads == last[n].threads for n in now)
        last = now
        return same and now

    return until("nothing changes any more", look)
