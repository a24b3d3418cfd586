"""What a random drill may do to a migration, and when: the faults, and the choice of one by a seed."""

import os
import random
import signal
import time
from dataclasses import asdict, dataclass
from typing import Callable

from drills import HYBRID, POSTCOPY, PRECOPY
from link import TO_DEST, TO_SOURCE

# After which frame it happens. The switchover's come first, and are chosen half of the time.
_SWITCHOVER = [(TO_DEST, "STATE"), (TO_DEST, "END"), (TO_SOURCE, "READY"), (TO_DEST, "RUN"), (TO_SOURCE, "RUNNING")]
_BEFORE = [(TO_DEST, "HELLO"), (TO_SOURCE, "HELLO_ACK"), (TO_DEST, "MACHINE"), (TO_SOURCE, "ACCEPTED"),
           (TO_DEST, "JOIN"), (TO_SOURCE, "JOINED"), (TO_DEST, "PAGES")]
_PASSES = [(TO_DEST, "BARRIER"), (TO_SOURCE, "PASS_DONE")]
_LATER = [(TO_DEST, "MISSING"), (TO_SOURCE, "PAGE_REQUEST"), (TO_SOURCE, "RUNNING"), (TO_SOURCE, "DONE")]
_FRAMES = {PRECOPY: _BEFORE + _PASSES, HYBRID: _BEFORE + _PASSES + _LATER, POSTCOPY: _BEFORE + _LATER}
# The seconds that something may last: shorter and longer than --peer-timeout.
_LASTS = (0.05, 0.3, 1.0, 3.0, 6.0)
# A vmrecv lingers for a source that was killed, in vain.
RECEIVER = ["--peer-timeout", "4s", "--linger", "8s"]
SENDER = ["--peer-timeout", "4s", "--recover-timeout", "8s"]
PAUSES = "the guest is paused and resumed"


@dataclass(frozen=True)
class Fault:
    """`strike` is done at the moment, `mend` (where there is something to mend) after a while."""

    name: str
    strike: Callable
    mend: Callable = lambda play: None
    cable: bool = False
    harmless: bool = False  # the guest moves all the same, at once
    moment: bool = True  # it waits for its moment; else the link does it, at the frame

    @property
    def lasts(self):
        return self.mend is not Fault.mend


@dataclass(frozen=True)
class Choice:
    """All that is random in one round; the same again for the same seed and number."""

    round: int
    mode: str
    fault: str
    way: str
    frame: str
    count: int  # at the how-manieth of these frames
    delay_s: float  # and how long after it
    bytes: int | None  # or instead: after so many bytes
    lasts_s: float
    rate: str  # what vmsend is limited to
    revoke: bool  # whether `vmsend --resume` asks for the guest back

    def about(self):
        if not BY_NAME[self.fault].moment:
            return f"{self.fault}: {self.frame} {self.way}"
        when = f"after {self.bytes} bytes" if self.bytes else f"{self.delay_s * 1000:.1f} ms after {self.frame} {self.way}"
        return f"{self.fault}, {when}" + (f" ({self.count}.)" if self.count > 1 and not self.bytes else "")

    asdict = asdict


def choose(seed, number, modes, cabled):
    """What happens in that round."""
    dice = random.Random(f"{seed}/{number}")
    mode = dice.choice(modes)
    fault = dice.choice([f for f in FAULTS if cabled or not f.cable])
    way, frame = dice.choice(_SWITCHOVER if dice.random() < 0.5 else _FRAMES[mode])
    count = dice.randint(1, 12) if frame in ("PAGES", "PAGE_REQUEST") else 1
    delay = dice.choice([0.0, dice.uniform(0, 0.004), dice.uniform(0, 2)])
    by_bytes = int(2 ** dice.uniform(6, 25)) if dice.random() < 0.15 else None
    lasts, rate, revoke = dice.choice(_LASTS), dice.choice(["4M", "8M", "24M"]), dice.random() < 0.25
    return Choice(number, mode, fault.name, way, frame, count, delay, by_bytes, lasts, rate, revoke)


def _kill(*what):
    """Kills movers (`send`, `recv`) and vmruns (`a`, `b`)."""

    def strike(play):
        for each in what:
            if each in ("a", "b"):
                play.scene.crash(getattr(play, each))
            elif getattr(play, each).is_running():
                getattr(play, each).crash()

    return strike


def _signal_vmrun(host, number):
    try:
        os.kill(host.pid, number)
    except (OSError, TypeError):
        pass  # it has gone already


def _stop(which):
    def strike(play):
        if which in ("a", "b"):
            host = getattr(play, which)
            play.scene.tell_watcher(f"pardon {host.control}")
            _signal_vmrun(host, signal.SIGSTOP)
        elif getattr(play, which).is_running():
            getattr(play, which).stop()

    return strike


def _go_on(which):
    def mend(play):
        if which in ("a", "b"):
            host = getattr(play, which)
            _signal_vmrun(host, signal.SIGCONT)
            play.scene.tell_watcher(f"mind {host.control}")
        elif getattr(play, which).is_running():
            getattr(play, which).go_on()

    return mend


def _cut_and_heal(play):
    play.link.cut()
    play.link.heal()


def _slow_link(play):
    play.link.delay(0.02)


def _fast_link(play):
    play.link.delay(0)


def _pause_and_resume(play):
    """An operator pauses the guest wherever it is, and lets it go on at once; either may be refused."""
    for host in (play.a, play.b):
        for word in ("pause", "resume"):
            play.scene.vmctl(host, word)


def _wish(play):
    """An operator who wants the guest to run, everywhere. Without both words it runs on at the source at most,
    which ends the migration."""
    for host in (play.a, play.b):
        play.scene.vmctl(host, "resume", "--force")


FAULTS = [
    Fault("nothing", lambda play: None, harmless=True),
    Fault("vmsend is killed", _kill("send")),
    Fault("vmrecv is killed", _kill("recv")),
    Fault("both movers are killed", _kill("send", "recv")),
    Fault("vmrun at the source is killed", _kill("a")),
    Fault("vmrun at the destination is killed", _kill("b")),
    Fault("the source's programs are killed", _kill("send", "a")),
    Fault("the destination's programs are killed", _kill("recv", "b")),
    Fault("vmsend stands still", _stop("send"), _go_on("send")),
    Fault("vmrecv stands still", _stop("recv"), _go_on("recv")),
    Fault("vmrun at the source stands still", _stop("a"), _go_on("a")),
    Fault("vmrun at the destination stands still", _stop("b"), _go_on("b")),
    Fault("the cable is pulled", lambda p: p.scene.net.plug("down"), lambda p: p.scene.net.plug("up"), cable=True),
    Fault("the cable is narrow (tbf)", lambda p: p.scene.net.limit("3mbit", p.a.side),
          lambda p: p.scene.net.limit(None, p.a.side), cable=True),
    Fault("the link breaks", lambda p: p.link.cut(), lambda p: p.link.heal()),
    Fault("the link breaks within a frame", lambda p: p.link.cut_after(p.choice.count * 1000), lambda p: p.link.heal()),
    Fault("the link goes silent", lambda p: p.link.freeze(), lambda p: (p.link.cut(), p.link.heal())),
    Fault("the link is slow", _slow_link, _fast_link),
    Fault("a frame is lost with the link", lambda p: p.link.cut_at(p.choice.way, p.choice.frame),
          lambda p: p.link.heal(), moment=False),
    Fault("a frame comes twice", lambda p: p.link.repeat(p.choice.way, p.choice.frame), moment=False),
    Fault("a frame waits", lambda p: setattr(p, "held", p.link.hold(p.choice.way, p.choice.frame)),
          lambda p: p.held.let_go(), moment=False),
    Fault("the operator cancels", lambda p: p.scene.vmctl(p.socket, "cancel")),
    Fault("vmsend gets SIGTERM", lambda p: p.send.is_running() and p.send.signal(signal.SIGTERM)),
    Fault(PAUSES, _pause_and_resume),
    Fault("the guest is wished to run on both sides", _wish),
]
BY_NAME = {fault.name: fault for fault in FAULTS}


def await_moment(play):
    """Waits until the chosen moment has come; False where the migration has ended before."""
    link, choice = play.link, play.choice

    def come():
        if not play.fault.moment:
            return not link.rules
        if choice.bytes:
            return link.bytes_passed >= choice.bytes
        return link.count(choice.way, choice.frame) >= choice.count

    with link.changed:
        while not come():
            if not play.send.is_running():
                return False
            link.changed.wait(0.02)
    if play.fault.moment and not choice.bytes:
        time.sleep(choice.delay_s)  # the moment itself is what is random here
    return True


def await_mending(play):
    """Lets it last; not for long where the migration has ended of it."""
    over, begun = None, time.monotonic()
    while time.monotonic() < begun + play.choice.lasts_s:
        over = over or (None if play.send.is_running() else time.monotonic())
        if over and time.monotonic() > over + 0.3:
            return
        time.sleep(0.01)
