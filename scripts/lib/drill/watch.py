"""Asks every vmrun of a drill all the time who runs, how soon it answers, and what changed.

A process of its own, so that nothing else that a drill does delays it. Lines come on standard input: a path
to watch, or `report`, which is answered with one JSON object on standard output. At the end of input it ends.

An answer that comes late may be the machine's doing. A bystander, a process that does nothing but answer a
byte, is asked in every round as well: what it was late by at the same time is not held against a vmrun.
"""

import json
import os
import select
import socket
import sys
import time

EVERY_S = 0.01


class Line:
    """One connection to a control socket, which never blocks."""

    def __init__(self, path, first):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self.socket.connect(path)
        self.rest, self.number, self.asked = b"", 0, {}
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
        self.paths, self.askers, self.listeners = [], {}, {}
        self.runs = {}  # path -> whether its answer in this round says so
        self.worst = (0.0, 0.0)  # milliseconds: less what the bystander was late, and raw
        self.answers, self.late, self.two, self.events = 0, [], [], []
        self.suspects = None
        self.bystander = self.start_bystander()
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
        asked, now = times
        raw = (now - asked) * 1000
        self.answers += 1
        excused = max([min(b, now) - a for a, b in self.waits if b > asked and a < now] + [0.0]) * 1000
        took = max(0.0, raw - excused)
        self.worst = max(self.worst[0], took), max(self.worst[1], raw)
        if took >= 100:
            self.late.append({"socket": path, "ms": round(took, 1), "raw_ms": round(raw, 1), "asked": command})

    def round(self):
        """Asks everyone, and waits until all have answered or a while has passed."""
        self.runs.clear()
        self.connect()
        for path, line in list(self.askers.items()):
            if not line.asked:
                try:
                    line.ask("status")
                except OSError:
                    self.drop(self.askers, path)
        asked = time.monotonic()
        self.bystander.send(b"x")
        pending, until = True, asked + 0.05
        while time.monotonic() < until or pending:
            sockets = {self.bystander: None} if pending else {}
            sockets |= {line.socket: (lines, path) for lines in (self.askers, self.listeners) for path, line in lines.items()}
            ready, _, _ = select.select([*sockets, sys.stdin], [], [], EVERY_S)
            now = time.monotonic()
            if self.bystander in ready:
                self.bystander.recv(1)
                pending = False
                self.waits = self.waits[-200:] + [(asked, now)]
            for sock in ready:
                if sock is sys.stdin:
                    return
                if sock is not self.bystander:
                    self.hear(*sockets[sock])
            if not pending and not any(line.asked for line in self.askers.values()):
                break
        self.judge()

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
            if not select.select([sys.stdin], [], [], 0 if self.suspects else EVERY_S)[0]:
                continue
            data = os.read(sys.stdin.fileno(), 65536)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line == b"report":
                    print(json.dumps(self.report()), flush=True)
                elif line.decode() not in self.paths:
                    self.paths.append(line.decode())


if __name__ == "__main__":
    watch = Watch()  # with its bystander, which has no privilege
    try:  # what judges others should not be late itself; only root may
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    except OSError:
        pass
    watch.serve()
