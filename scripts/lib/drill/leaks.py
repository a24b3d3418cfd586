"""Many attempts that fail, in hosts that live on: what vmrun and vmrecv hold stays as it was."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from link import TO_DEST, TO_SOURCE
from programs import Failed, until
from scene import Scene

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
    scene = Scene(kit, "precopy")
    try:
        outcome = attempts(scene, args.times)
    except Failed as error:
        outcome = {"leaks": "FAILED", "problem": str(error)}
    failed = outcome["leaks"] != "passed"
    if failed or args.keep:
        outcome["logs"] = str(scene.folder)
    scene.close(failed or args.keep)
    print(json.dumps(outcome) if args.json else "\n".join(f"{k}: {v}" for k, v in outcome.items()))
    return 1 if failed else 0


def attempts(scene, times):
    a, b = scene.guest(), scene.receiver()
    link = scene.link_to(b)
    watched = {"vmrun at A": a.program.pid, "vmrecv": b.mover.pid, "vmrun at B": b.status["pid"]}
    for number in range(WARM_UP + times):
        if number == WARM_UP:
            before = settled(scene, a, b, link, watched)
        link.cut_at(*MOMENTS[number % len(MOMENTS)])
        scene.send(a, link.address, "--peer-timeout", "3s").end().expect((1, 5), "the source has the guest")
        link.heal()
    after = settled(scene, a, b, link, watched)
    grown = [name for name in watched if before[name].grew_to(after[name])]
    scene.ended(scene.send(a, b), 0)
    scene.ended(b.mover, 0)
    left = scene.wind_up()
    figures = {name: {"before": asdict(before[name]), "after": asdict(after[name])} for name in watched}
    return {"leaks": "FAILED" if grown or left else "passed", "attempts": times, **figures, "grown": grown, "left": left}


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
        now = {name: Holds.of(pid) for name, pid in watched.items()}
        same = last and all(now[n].descriptors == last[n].descriptors and now[n].threads == last[n].threads for n in now)
        last = now
        time.sleep(FAREWELL_S)
        return same and now

    return until("nothing changes any more", look)
