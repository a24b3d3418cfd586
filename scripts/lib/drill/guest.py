"""What the trial guest tells on its serial port, over all the hosts that it was on."""

import re

from programs import Failed, until

ALARMS = ("CORRUPT", "FAULT", "STALLED", "CLOCK BACK", "did not start", "bad value")
_BEAT = re.compile(r"b (\d+)$")
_PASS = re.compile(r"verified all pass (\d+)$")


class Tale:
    """What it has told so far: the last heartbeat, and the last full pass over memory."""

    def __init__(self):
        self.beat = self.passes = 0
        self._rest = ""

    def hear(self, text):
        """What it says next. Fails on an alarm, and when a beat is missing or came twice: two copies
        that run cannot go unnoticed. A line begun on one host may end on the next."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if alarm := next((a for a in ALARMS if a in line), None):
                raise Failed(f"the guest says {alarm}: {line[:200]}")
            if match := _BEAT.match(line):
                if int(match[1]) != self.beat + 1:
                    raise Failed(f"heartbeat {match[1]} follows {self.beat}")
                self.beat += 1
            elif match := _PASS.match(line):
                self.passes = int(match[1])
        return self


def output(hosts):
    """All that it has printed, in the order of `hosts`."""
    read = lambda host: host.log.read_bytes() if host.log.exists() else b""
    return b"".join(read(host) for host in hosts).decode("ascii", "replace")


def story(hosts):
    """The last heartbeat and the last full pass over memory, by all that it has told on `hosts`."""
    tale = Tale().hear(output(hosts))
    return tale.beat, tale.passes


def await_beats(hosts, more=3):
    """The guest, on the last of `hosts`, prints a few heartbeats more."""
    before, _ = story(hosts)
    until("more heartbeats", lambda: story(hosts)[0] >= before + more)


def await_verified(hosts):
    """The guest has verified all of its memory anew from here on. Gives the beats and passes."""
    _, before = story(hosts)
    # Two passes: the first may have begun before.
    return until("the guest has verified all its memory again", lambda: (s := story(hosts))[1] >= before + 2 and s)
