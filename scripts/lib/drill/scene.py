"""One drill's hosts: a folder, the programs in it, a link, and somebody who watches."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import guest
import net
from control import status
from link import Link
from programs import Failed, Program, until

_PR_SET_CHILD_SUBREAPER = 36
ANSWER_WITHIN_MS = 100


@dataclass
class Kit:
    """What all drills share."""

    programs: Path  # the release build
    trapped: Path | None  # the same with fault points
    loopback: str | None  # why there is no cable, where there is none
    keep: bool = False


@dataclass(eq=False)
class Host:
    """A vmrun as seen from outside."""

    name: str
    side: str  # "a" or "b": the namespace that it is in
    control: Path
    log: Path
    program: Program | None = None  # vmrun, where the drill has started it
    mover: Program | None = None  # its vmrecv
    address: str | None = None  # where that waits

    @property
    def status(self):
        return status(self.control)

    @property
    def phase(self):
        return (self.status or {}).get("ownership", {}).get("phase")

    @property
    def run_state(self):
        return (self.status or {}).get("run_state")

    @property
    def missing(self):
        """How many pages are missing here, in postcopy."""
        return (self.status or {}).get("missing_pages") or 0


@dataclass
class Story:
    """How a drill has ended: where the guest has been, in order."""

    hosts: list
    lives: bool = True  # it runs on the last of them


_open = []  # the scenes that were not closed yet


def close_all():
    """Ends whatever there still is, of a kit that is stopped in the middle of a drill."""
    for each in list(_open):
        each.close(keep=False)
    net.remove_all()


class Scene:
    """Whatever was started in it is ended when it is closed, also what the programs started."""

    def __init__(self, kit, mode, cabled=True):
        # What vmrecv leaves behind becomes our child, so that it can be reaped.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.kit, self.mode = kit, mode
        self.folder = Path(tempfile.mkdtemp(prefix="vmferry-drill-"))
        self.hosts, self.programs, self.links, self.killed = {}, [], [], set()
        self.ends = []
        self.net = self._watch = None
        _open.append(self)
        self.net = net.Cabled() if cabled and not kit.loopback else net.Loopback()
        watch = [sys.executable, Path(__file__).with_name("watch.py")]
        with open(self.folder / "watch.err", "wb") as err:
            self._watch = subprocess.Popen(watch, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err)

    # Programs.

    def start(self, side, name, *words, traps=False, env=None, prefix=(), stdout=None):
        """`name`, one of the four programs, on a host."""
        binaries = self.kit.trapped if traps else self.kit.programs
        number = len(self.programs)
        command = [*self.net.prefix(side), *prefix, binaries / name, *words]
        program = Program(self.folder, f"{name}-{number}", command, env, stdout)
        self.programs.append(program)
        return program

    def host(self, name, side):
        """The host of that name, which is watched from here on."""
        if name not in self.hosts:
            host = Host(name, side, self.folder / f"{name}.sock", self.folder / f"{name}.log")
            self.hosts[name] = host
            self.tell_watcher(str(host.control))
        return self.hosts[name]

    def guest(self, memory="32M", cpus=1, cmdline="fill=8M ws=1M rate=5", name="a", side="a", devices=()):
        """A vmrun with a heartbeat guest that has filled its memory. It drives none of the `devices`."""
        host = self.host(name, side)
        words = ["--control", host.control, "--serial", f"file:{host.log}", "--kernel", "builtin:heartbeat"]
        words += ["--memory", memory, "--cpus", cpus, "--cmdline", f"vcpus={cpus} {cmdline} beat=5 status=50"]
        host.program = self.start(side, "vmrun", *words, *devices)

        def filled():
            if not host.program.is_running():
                raise Failed(f"vmrun ended: {host.program.stderr()}")
            return "heartbeat: filled" in guest.output([host])

        until("the guest has filled its memory", filled)
        return host

    def receiver(self, *words, name="b", side="b", listen=None, serial=None, **how):
        """A vmrecv that waits on that host."""
        host = self.host(name, side)
        words = ["--json", "--insecure", "--control", host.control, *words]
        if "--attach" not in words:
            words += ["--serial", serial or f"file:{host.log}"]
        host.mover = self.start(side, "vmrecv", listen or f"tcp:{self.net.address(side)}:0", *words, **how)
        host.address = host.mover.await_note("waiting for a machine at ").split()[-1]
        return host

    def take_over(self, host, *words):
        """`vmrecv --resume` for a host whose vmrecv has died. `words` may end with where it listens."""
        words = ["--json", "--insecure", "--resume", "--control", host.control, *words]
        host.mover = self.start(host.side, "vmrecv", *words)
        host.mover.await_note("waiting for a machine at ")
        return host.mover

    def send(self, host, dest, *words, **how):
        """`vmsend --json` from a host."""
        address = dest if isinstance(dest, str) else dest.address
        words = ["--vm", host.control, "--json", "--insecure", *words, address]
        return self.start(host.side, "vmsend", *words, **how)

    def resume(self, host, *words):
        """`vmsend --resume`."""
        until(f"{host.name} has no mover", lambda: not (host.status or {}).get("mover_attached"))
        return self.start(host.side, "vmsend", "--vm", host.control, "--json", "--insecure", "--resume", *words)

    def vmctl(self, host, *words):
        """How `vmctl` on its socket ends. `host` may be the path of another socket."""
        path = host.control if isinstance(host, Host) else host
        return self.start("a", "vmctl", path, *words).end()

    def link_to(self, receiver, side="a"):
        """A link to it in the drill's hand. It begins on host A, unless another is named."""
        listener = self.net.socket(side)
        listener.bind((self.net.address(side), 0))
        listener.listen(64)
        name, port = receiver.address.removeprefix("tcp:").rsplit(":", 1)

        def connect():
            made = self.net.socket(side)
            made.settimeout(5)
            made.connect((name, int(port)))
            made.settimeout(None)
            return made

        link = Link(listener, connect)
        self.links.append(link)
        return link

    def ended(self, program, codes, *words, patience=60):
        """Waits until it ends, with one of `codes` and all of `words`; notes the code for the report."""
        end = program.end(patience)
        self.ends.append(f"{program.name.split('-')[0]} {end.code}")
        return end.expect(codes, *words)

    def crash(self, host):
        """Ends a vmrun as a crash would."""
        self.killed.add(host.name)
        if here := host.status:
            os.kill(here["pid"], signal.SIGKILL)
            until(f"vmrun {host.name} is gone", lambda: host.status is None)

    # What has to hold.

    def await_running(self, host):
        until(f"the guest runs on {host.name}", lambda: host.run_state == "running")

    def await_phase(self, host, phase):
        until(f"{host.name} is {phase}", lambda: host.phase == phase)

    def check(self, what, truth):
        if not truth:
            raise Failed(f"not so: {what}")

    def check_both_hold(self, a, b):
        """Committed here, acknowledged there, and nobody runs it."""
        until(f"{a.name} is committed", lambda: a.phase == "committed" and a.run_state == "paused")
        until(f"{b.name} is in doubt", lambda: b.phase == "in-doubt" and b.run_state == "paused")

    def changes(self, host):
        """The run states that `host` has told so far, as events."""
        found = [e["status"] for e in self.report()["events"] if e["socket"] == str(host.control)]
        return [s["run_state"] for s in found]

    def check_never_paused(self, host):
        other = [state for state in self.changes(host) if state != "running"]
        self.check(f"{host.name} was never paused ({other})", not other and host.run_state == "running")

    def tell_watcher(self, line):
        self._watch.stdin.write(f"{line}\n".encode())
        self._watch.stdin.flush()

    def report(self):
        """What the watcher has seen."""
        self.tell_watcher("report")
        line = self._watch.stdout.readline()
        if not line:
            raise Failed("the watcher has died: " + (self.folder / "watch.err").read_text()[-400:])
        (self.folder / "watch.json").write_bytes(line)
        return json.loads(line)

    # The end.

    def wind_up(self):
        """Ends everything as an operator would, and says what is left behind."""
        for host in self.hosts.values():
            if host.mover and host.mover.is_running():
                host.mover.signal(signal.SIGTERM)
        for host in self.hosts.values():
            self.discard(host)
        for host in self.hosts.values():
            self.end_receiver(host)
        return self._left()

    def discard(self, host):
        """Ends a vmrun with its guest."""
        if host.status:
            if host.phase in ("in-doubt", "committed"):
                self.killed.add(host.name)  # its record tells of an open question, and stays
            self.vmctl(host, "quit", "--force")
            until(f"vmrun {host.name} ends", lambda: host.status is None)

    def end_receiver(self, host):
        """Ends the vmrecv of a host. It refuses that for as long as it has not seen that its guest is gone."""
        if not host.mover:
            return

        def ended():
            if host.mover.is_running():
                host.mover.signal(signal.SIGTERM)
                time.sleep(0.1)
            return not host.mover.is_running()

        until(f"{host.mover.name} ends", ended, patience=30)

    def forget_all_but(self, keep):
        """Forgets all other hosts, which have ended, their links and their files; says what is left behind."""
        gone = [host for host in self.hosts.values() if host is not keep]
        left = self._left(gone, keep)
        for link in self.links:
            link.close()
        self.links = []
        mine = {keep.program, keep.mover} if keep else set()
        self.programs = [program for program in self.programs if program in mine]
        stay = [str(keep.control), str(keep.log)] if keep else []
        for path in self.folder.iterdir():
            if path.name != "watch.err" and not any(str(path).startswith(s) for s in stay):
                path.unlink(missing_ok=True)
        self.hosts = {keep.name: keep} if keep else {}
        self._reap(self._ended())
        self.killed.clear()
        self.ends.clear()
        return left

    def _left(self, gone=None, keep=None):
        """What is left of the hosts that have `gone`: of all of them, unless it is said."""
        gone = self.hosts.values() if gone is None else gone
        mine = {(keep.status or {}).get("pid")} if keep else set()
        quiet = time.monotonic() + 2
        while (found := self._processes(mine)) and time.monotonic() < quiet:
            self._reap(found)
            time.sleep(0.01)
        left = [f"process {pid} {line}" for pid, line in found.items()]
        for pid in found:
            left += [f"memfd {link} of {pid}" for link in _memfds(pid)]
        # The exceptions: who is killed cannot remove its files, and a record of what was never settled stays.
        names = {host.control.name for host in gone if host.name not in self.killed}
        for path in sorted(self.folder.iterdir()):
            of = next((n for n in names if path.name == n or path.name.startswith(f"{n}.session.json")), None)
            if of and not path.name.startswith(f"{of}.session.json.old"):
                left.append(f"file {path.name}")
        return left

    def _processes(self, but=()):
        """Live processes that name this folder in their command line."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdigit() or int(entry.name) in but:
                    continue
                if str(self.folder).encode() in (line := (entry / "cmdline").read_bytes()):
                    found[int(entry.name)] = line.replace(b"\0", b" ").decode(errors="replace")[:200]
            except OSError:
                pass
        return found

    def _ended(self):
        """Processes that have ended and were left to us by a vmrecv."""
        ours = {program.pid for program in self.programs}
        if self._watch:
            ours.add(self._watch.pid)
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return [int(pid) for pid in children if int(pid) not in ours]

    @staticmethod
    def _reap(pids):
        for pid in pids:
            try:
                os.waitpid(pid, os.WNOHANG)
            except OSError:
                pass

    def close(self, keep):
        """Ends by force whatever there still is."""
        for link in self.links:
            link.close()
        if self._watch:
            self._watch.kill()
            self._watch.communicate()
        for program in self.programs:
            if program.is_running():
                program.go_on()
                program.crash()
        while found := self._processes():
            for pid in found:
                try:
                    os.kill(pid, signal.SIGKILL)
                except OSError:
                    pass
            self._reap(found)
            time.sleep(0.005)
        if self.net:
            self.net.close()
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        _open.remove(self)


def _memfds(pid):
    try:
        links = [os.readlink(f) for f in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return []
    return [link for link in links if "memfd:" in link]
