"""Two hosts: two network namespaces with a cable between them. Without root, loopback is all there is."""

import ctypes
import errno
import itertools
import os
import socket
import subprocess
import threading
from pathlib import Path

from programs import Failed, until

ADDRESS = {"a": "198.51.100.1", "b": "198.51.100.2"}
# In the range for documentation, on the cable's network, and nobody's.
NOBODY = "198.51.100.77"
_CLONE_NEWNET = 0x40000000
_numbers = itertools.count(1)


def may_make_namespaces():
    """Why namespaces cannot be made here, or None."""
    if os.geteuid() != 0:
        return "not root"
    name = f"drill-{os.getpid()}-try"
    if not _ip("netns", "add", name):
        return "`ip netns add` fails"
    _ip("netns", "del", name)
    return None


def remove_all():
    """Removes every namespace that this process has made, also one that was being made."""
    for path in Path("/run/netns").glob(f"drill-{os.getpid()}-*"):
        _ip("netns", "del", path.name)


class Cabled:
    """Host A and host B, with a cable of their own."""

    cable = True

    def __init__(self):
        number = next(_numbers)
        self.names = {side: f"drill-{os.getpid()}-{number}{side}" for side in "ab"}
        a, b = self.names["a"], self.names["b"]
        commands = [
            ("netns", "add", a),
            ("netns", "add", b),
            ("-n", a, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", b),
        ]
        for side, name in self.names.items():
            commands += [
                ("-n", name, "addr", "add", f"{ADDRESS[side]}/24", "dev", "cable"),
                ("-n", name, "link", "set", "cable", "up"),
                ("-n", name, "link", "set", "lo", "up"),
            ]
        for command in commands:
            if not _ip(*command):
                raise Failed(f"ip {' '.join(command)} failed")

    def address(self, side):
        return ADDRESS[side]

    def prefix(self, side):
        """What a command that runs on that host begins with."""
        return ["ip", "netns", "exec", self.names[side]]

    def plug(self, state):
        """The cable at host B: `up` or `down`. It is up once A reaches B again, which the kernel takes up to some
        seconds for: what it asked for B's address in the meantime has to be given up first (EHOSTUNREACH)."""
        if not _ip("-n", self.names["b"], "link", "set", "cable", state):
            raise Failed(f"the cable cannot be set {state}")
        if state == "up":
            until("host A reaches host B", self.reaches)

    def reaches(self):
        """Whether a call from A is answered at B, where nobody listens on that port: by a refusal."""
        with self.socket("a") as caller:
            caller.settimeout(1)
            return caller.connect_ex((ADDRESS["b"], 1)) == errno.ECONNREFUSED

    def limit(self, rate, side="a"):
        """No more than `rate` (as in 20mbit) leaves that host; None: whatever the cable carries."""
        words = ["tc", "-n", self.names[side], "qdisc", "replace" if rate else "del", "dev", "cable", "root"]
        if rate:
            words += ["tbf", "rate", rate, "burst", "32kb", "latency", "50ms"]
        subprocess.run(words, check=True)

    def socket(self, side):
        """A new TCP socket on that host. It stays there: only its making is done in the namespace."""
        made = []

        def make():
            space = os.open(f"/run/netns/{self.names[side]}", os.O_RDONLY)
            if ctypes.CDLL(None, use_errno=True).setns(space, _CLONE_NEWNET) == 0:
                made.append(socket.socket())
            os.close(space)

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        if not made:
            raise Failed("a namespace cannot be entered")
        return made[0]

    def close(self):
        for name in self.names.values():
            _ip("netns", "del", name)

    def left(self):
        return [f"namespace {name}" for name in self.names.values() if Path("/run/netns", name).exists()]


class Loopback:
    """Both hosts are this one."""

    cable = False

    def address(self, side):
        return "127.0.0.1"

    def prefix(self, side):
        return []

    def socket(self, side):
        return socket.socket()

    def close(self):
        pass

    def left(self):
        return []


def _ip(*words):
    quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.run(["ip", *words], **quiet).returncode == 0
