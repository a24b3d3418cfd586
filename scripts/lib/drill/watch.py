"""Asks every vmrun of a drill all the time who runs, how soon it answers, and what changed.

A process of its own, so that nothing else that a drill does delays it. Lines come on standard input: a path
to watch; `pardon PATH`, whose answers are not judged before `mind PATH`, because the drill itself has stopped who
gives them; `report`, which is answered with one JSON object on standard output; `anew`, which forgets what was
counted so far and who is gone. At the end of input it ends.

An answer that comes late may be the machine's doing. A bystander, a process that does nothing but answer a
byte, is asked all the time as well: what it was late by at the same time is not held against a vmrun. Nor is the
time for which its thread was seen ready and without a processor.
"""

import glob
import json
import os
import select
import socket
import sys
import time

EVERY_S = 0.01
LOOK_AFTER_S = 0.015
# For an answer that is still to come when a report is asked for.
PATIENCE_S = 3.0


def read(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


class Thread:
    """What a thread is at: whether it has a processor, or waits for one, or for something else in the kernel."""

    def __init__(self, task):
        self.task, self.name, self.starved = task, read(f"{task}/comm").strip(), 0.0
        self.look(first=True)

    def look(self, first=False):
        """Adds up for how long it has been ready without a processor: since the last look, less what it ran for."""
        now, ran = time.monotonic(), int((read(f"{self.task}/schedstat").split() or [0])[0]) / 1e9
        state = (read(f"{self.task}/stat").rsplit(")", 1)[-1].split() or ["?"])[0]
        self.stack = [line.split()[1].split("+")[0] for line in read(f"{self.task}/stack").splitlines()][:4]
        if not first and self.state == "R":
            self.starved += max(0.0, now - self.at - (ran - self.ran))
        self.at, self.ran, self.state = now, ran, state

    def waits_for_thread(self):
        return self.state == "S" and any("futex" in name for name in self.stack)

    def __str__(self):
        return f"{self.name} {self.state} {self.starved * 1000:.0f} ms {' '.join(self.stack)}"


class Late:
    """A vmrun that lets us wait. Its first thread serves the socket; that may wait for another of its own."""

    def __init__(self, pid):
        tasks = sorted(glob.glob(f"/proc/{pid}/task/*"), key=lambda task: not task.endswith(f"/{pid}"))
        self.threads = [Thread(task) for task in tasks]

    def look(self):
        waits = self.threads[0].waits_for_thread() if self.threads else False
        for thread in self.threads if waits else self.threads[:1]:
            thread.look()

    def starved_s(self):
        """For how long who has to answer was ready and had no processor, as far as we have looked."""
        self.look()
        return max([thread.starved for thread in self.threads] + [0.0])


class Line:
    """One connection to a control socket, which never blocks."""

    def __init__(self, path, first):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self.socket.connect(path)
        self.rest, self.number, self.asked = b"", 0, {}
        credentials = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self.pid, self.late = int.from_bytes(credentials[:4], sys.byteorder), None
        self.ask("hello", version=1, client="watch")
        self.ask(first)

    def ask(self, command, **arguments):
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "cmd": command} | arguments).encode() + b"\n")
        self.asked[self.number] = time.monotonic()

    def read(self):
        """What has come, as (id or None, milliseconds since it was asked, object); None at the end."""
        try:
            data = self.socket.recv(1 << 20)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *lines, self.rest = (self.rest + data).split(b"\n")
        now, found = time.monotonic(), []
        for line in lines:
            value = json.loads(line)
            asked = self.asked.pop(value.get("id"), None)
            found.append((value.get("id"), None if asked is None else (asked, now), value))
        return found


class Watch:
    def __init__(self):
        self.paths, self.askers, self.listeners, self.pardoned = [], {}, {}, set()
        self.runs = {}  # path -> whether its answer in this round says so
        self.worst = (0.0, 0.0)  # milliseconds: less what the bystander was late, and raw
        self.answers, self.late, self.two, self.events = 0, [], [], []
        self.suspects = None
        self.bystander = self.start_bystander()
        self.open, self.last = None, 0.0  # since when it is asked, and when it answered last
        self.busy_since = time.monotonic()  # since when it has not waited for anything
        self.waits = []  # (asked, answered) of the bystander, lately

    @staticmethod
    def start_bystander():
        ours, theirs = socket.socketpair()
        if os.fork() == 0:
            ours.close()
            while data := theirs.recv(1):
                theirs.send(data)
            os._exit(0)
        theirs.close()
        return ours

    def connect(self):
        for path in self.paths:
            for lines, first in ((self.askers, "status"), (self.listeners, "events")):
                if path not in lines and os.path.exists(path):
                    try:
                        lines[path] = Line(path, first)
                    except OSError:
                        pass

    def drop(self, lines, path):
        lines.pop(path).socket.close()

    def answered(self, path, times, command):
        """Judges how long an answer took."""
        if path in self.pardoned:
            return
        asked, now = times
        raw = (now - asked) * 1000
        self.answers += 1
        late = self.askers[path].late if path in self.askers else None
        excused = max(self.excused(asked, now), late.starved_s() if late else 0.0) * 1000
        took = max(0.0, raw - excused)
        self.worst = max(self.worst[0], took), max(self.worst[1], raw)
        if took >= 100:
            self.late.append({"socket": path, "ms": round(took, 1), "raw_ms": round(raw, 1), "asked": command,
                              "time_ms": round((time.time() - now + asked) * 1000),
                              "threads": [str(thread) for thread in late.threads] if late else []})

    def round(self, to_report=False):
        """Asks everyone, and waits until all have answered or a while has passed; to report, only waits."""
        if not to_report:
            self.ask_all()
        until = time.monotonic() + 0.05
        while time.monotonic() < until:
            self.ask_bystander()
            sockets = {self.bystander: None}
            sockets |= {line.socket: (lines, path) for lines in (self.askers, self.listeners) for path, line in lines.items()}
            begun = time.monotonic()
            if begun > self.busy_since + EVERY_S / 2:
                self.waits.append((self.busy_since, begun))  # so was it here
            ready, _, _ = select.select([*sockets, *[sys.stdin] * (not to_report)], [], [], EVERY_S)
            now = self.busy_since = time.monotonic()
            if now > begun + EVERY_S:
                self.waits.append((begun + EVERY_S, now))  # who asks was late itself
            if self.bystander in ready:
                self.bystander.recv(1)
                self.waits = self.waits[-500:] + [(self.open, now)]
                self.open, self.last = None, now
            for sock in ready:
                if sock is sys.stdin:
                    return
                if sock is not self.bystander:
                    self.hear(*sockets[sock])
            if not self.open and not any(line.asked for line in self.askers.values()):
                break
            self.look_at_late()
        if not to_report:
            self.judge()

    def ask_all(self):
        self.runs.clear()
        self.connect()
        for path, line in list(self.askers.items()):
            if not line.asked:
                try:
                    line.ask("status")
                except OSError:
                    self.drop(self.askers, path)

    def look_at_late(self):
        """Looks at a vmrun that lets us wait."""
        for line in self.askers.values():
            waits = line.asked and time.monotonic() - min(line.asked.values()) > LOOK_AFTER_S
            if waits and not line.late:
                line.late = Late(line.pid)
            elif waits:
                line.late.look()
            elif not line.asked:
                line.late = None

    def ask_bystander(self):
        """Has it asked again soon after each of its answers."""
        now = time.monotonic()
        if self.open is None and now > self.last + EVERY_S / 2:
            self.bystander.send(b"x")
            self.open = now

    def excused(self, asked, now):
        """For how many seconds between the two times the bystander was waited for as well."""
        total, end = 0.0, asked
        for a, b in sorted(self.waits):
            if b > end and a < now:
                total += min(b, now) - max(a, end)
                end = b
        return total

    def hear(self, lines, path):
        if path not in lines:
            return
        found = lines[path].read()
        if found is None:
            self.drop(lines, path)
            return
        for number, times, value in found:
            if times and number:
                self.answered(path, times, "hello" if number == 1 else "status")
            if "event" in value:
                self.events.append({"socket": path, "event": value["event"], "status": value["status"]})
            elif lines is self.askers and number != 1 and "ok" in value:
                self.runs[path] = value["ok"]["run_state"] == "running"

    def judge(self):
        """A guest that moves between two answers may be seen on both; not twice in a row."""
        running = sorted(path for path, runs in self.runs.items() if runs)
        if len(running) > 1 and self.suspects == running:
            self.two.append(running)
        self.suspects = running if len(running) > 1 else None

    def report(self):
        # What is asked is answered first, where it is at all.
        begun = time.monotonic()
        while any(line.asked for line in self.askers.values()) and time.monotonic() < begun + PATIENCE_S:
            self.round(to_report=True)
        now = time.monotonic()
        for path, line in self.askers.items():
            for asked in line.asked.values():
                self.answered(path, (asked, now), "no answer yet")
        return {
            "answers": self.answers, "worst_ms": round(self.worst[0], 1), "worst_raw_ms": round(self.worst[1], 1),
            "late": self.late[:20], "two_runners": self.two[:20], "events": self.events,
        }

    def serve(self):
        rest = b""
        while True:
            self.round()
            came = select.select([sys.stdin], [], [], 0 if self.suspects else EVERY_S)[0]
            self.busy_since = time.monotonic()
            if not came:
                continue
            data = os.read(sys.stdin.fileno(), 65536)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self.obey(*line.decode().split(" ", 1))

    def obey(self, word, path=None):
        if word == "report":
            print(json.dumps(self.report()), flush=True)
        elif word == "anew":
            self.paths = [path for path in self.paths if os.path.exists(path)]
            self.worst, self.answers = (0.0, 0.0), 0
            self.late, self.two, self.events = [], [], []
        elif word == "pardon":
            self.pardoned.add(path)
        elif word == "mind":
            for line in (lines[path] for lines in (self.askers, self.listeners) if path in lines):
                line.asked = dict.fromkeys(line.asked, time.monotonic())  # asked while it stood still
            self.pardoned.discard(path)
        elif word not in self.paths:
            self.paths.append(word)


if __name__ == "__main__":
    watch = Watch()  # with its bystander, which has no privilege
    try:  # what judges others should not be late itself; only root may
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    except OSError:
        pass
    watch.serve()
