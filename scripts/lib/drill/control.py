"""A control socket (docs/control.md), asked over one connection."""

import json
import socket
import time

CONTROL_VERSION = 1


class Refused(Exception):
    """An error that was answered."""


class Client:
    def __init__(self, path, timeout=10.0):
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        self._socket.connect(str(path))
        self._rest, self._number = b"", 0
        self.ask("hello", version=CONTROL_VERSION, client="drill")

    def ask(self, command, **arguments):
        """The final answer."""
        return self.timed(command, **arguments)[0]

    def timed(self, command, **arguments):
        """The final answer, and how many milliseconds the first one took."""
        self._number += 1
        begun = time.monotonic()
        self._socket.sendall(json.dumps({"id": self._number, "cmd": command} | arguments).encode() + b"\n")
        first = None
        while True:
            answer = self._line()
            if answer.get("id") != self._number:
                continue
            first = first or (time.monotonic() - begun) * 1000
            if "pending" in answer:
                continue
            if "error" in answer:
                raise Refused(answer["error"]["message"])
            return answer["ok"], first

    def first_answer(self, command, **arguments):
        """`done`, `pending` or `refused`, and how many milliseconds that took. Later answers are not waited for."""
        self._number += 1
        begun = time.monotonic()
        self._socket.sendall(json.dumps({"id": self._number, "cmd": command} | arguments).encode() + b"\n")
        while (answer := self._line()).get("id") != self._number:
            pass
        said = "pending" if "pending" in answer else "refused" if "error" in answer else "done"
        return said, (time.monotonic() - begun) * 1000

    def _line(self):
        while b"\n" not in self._rest:
            part = self._socket.recv(65536)
            if not part:
                raise ConnectionError("the control socket was closed")
            self._rest += part
        line, self._rest = self._rest.split(b"\n", 1)
        return json.loads(line)

    def close(self):
        self._socket.close()


def status(path):
    """The status of whoever serves at `path`; None where nobody does."""
    try:
        client = Client(path)
    except OSError:
        return None
    try:
        return client.ask("status")
    except (OSError, ValueError):
        return None
    finally:
        client.close()
