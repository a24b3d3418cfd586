"""Processes whose output is kept in files, and waiting for what they do."""

import json
import os
import signal
import subprocess
import time

# Long enough for any machine; what is waited for comes much sooner.
PATIENCE_S = 60
STEP_S = 0.004


class Failed(Exception):
    """A drill that did not show what it should."""


def until(what, test, patience=PATIENCE_S):
    """Looks again and again until `test` gives something true; that is the result."""
    end = time.monotonic() + patience
    while True:
        if found := test():
            return found
        if time.monotonic() > end:
            raise Failed(f"never: {what}")
        time.sleep(STEP_S)


class End:
    """How a process ended; of one that a signal killed, `code` is minus the signal's number."""

    def __init__(self, name, code, stderr, lines):
        self.name, self.code, self.stderr, self.lines = name, code, stderr, lines

    def expect(self, codes, *words):
        """Ended with one of `codes`, and says all of `words` on standard error."""
        codes = [codes] if isinstance(codes, int) else codes
        if self.code not in codes:
            raise Failed(f"{self.name} ended with {self.code}, not {codes}: {self.stderr.strip()[-400:]}")
        for word in words:
            if word not in self.stderr:
                raise Failed(f"{self.name} does not say {word!r}: {self.stderr.strip()[-400:]}")
        return self

    @property
    def result(self):
        return self.lines[-1]["result"]


class Program:
    """One process of a drill."""

    def __init__(self, folder, name, command, env=None, stdout=None):
        self.name = name
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        clean = {k: v for k, v in os.environ.items() if not k.startswith("VMFERRY_")}
        with open(self._out, "wb") as out, open(self._err, "wb") as err:
            self.child = subprocess.Popen(
                [str(word) for word in command],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=stdout or out,
                stderr=err,
                env=clean | (env or {}),
            )

    @property
    def pid(self):
        return self.child.pid

    def signal(self, number):
        self.child.send_signal(number)

    def crash(self):
        """Ends it as a crash would."""
        self.child.kill()
        self.child.wait()

    def stop(self):
        """It does nothing until `go_on`, as when its host is overloaded."""
        self.signal(signal.SIGSTOP)

    def go_on(self):
        self.signal(signal.SIGCONT)

    def is_running(self):
        return self.child.poll() is None

    def stderr(self):
        return self._err.read_text(errors="replace")

    def lines(self):
        """The whole JSON lines that it has printed so far."""
        found = []
        for line in self._out.read_text(errors="replace").split("\n")[:-1]:
            try:
                found.append(json.loads(line))
            except ValueError:
                pass
        return found

    def await_line(self, what, pick):
        """Waits until it has printed a JSON line for which `pick` gives something."""

        def look():
            ended = not self.is_running()
            found = next((value for line in self.lines() if (value := pick(line))), None)
            if ended and not found:
                raise Failed(f"{self.name} ended before {what}: {self.stderr().strip()[-400:]}")
            return found

        return until(what, look)

    def await_note(self, text):
        """Waits for a note (a line of --json) that has `text`; gives the note."""
        return self.await_line(f"the note {text!r}", lambda line: text in line.get("text", "") and line["text"])

    def end(self, patience=PATIENCE_S):
        """Waits until it has ended by itself."""
        until(f"{self.name} ends", lambda: not self.is_running(), patience)
        return End(self.name, self.child.returncode, self.stderr(), self.lines())
