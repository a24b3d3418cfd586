"""Two emulated hosts with a full KVM each, on one wire, and somebody who watches them.

Each host is a QEMU with TCG that emulates AMD's SVM. Every line of their consoles is stamped with
this machine's clock: the one clock that both hosts have in common. Each virtual CPU gives a sign of
life every two seconds; a host that gives none for STOPPED_AFTER_S has stopped, which emulated hosts
sometimes do, and says nothing about what was tested.

Why they stop, in QEMU 7.2: its helpers for VMRUN and VMEXIT change the CPU's requests for interrupts without a lock. One that
another thread asks for at that moment, such as the timer's, is forgotten until another is asked for; a host that waits
for its timer then waits for ever. So each host is poked a few times a second: a character comes in on its console.
"""

import os
import re
import shutil
import socket
import subprocess
import tarfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from images import make_ext4

HOSTS = {"a": "52:54:00:77:00:01", "b": "52:54:00:77:00:02"}
# What nested KVM needs of the model, and what this emulator does not bear in guests of guests.
CPU = "max,family=23,model=1,stepping=2,-pku,-mpx"
# The emulated TSC is this machine's: a host that has to measure it, on a busy machine, may find seven times its rate.
KERNEL_WORDS = "console=ttyS0 reboot=t panic=-1 mitigations=off quiet tsc=reliable no_timer_check tsc_early_khz={tsc_khz}"
STOPPED_AFTER_S = 60
# One that goes on after so long a silence has lost that time, and so has its guest: a scenario that fails then says nothing.
STOOD_STILL_S = 20
# A host that has not come up by then has stopped, too.
UP_WITHIN_S = 120
# How often hosts are poked and looked at.
LOOK_EVERY_S = 0.2
NICE = -10
# How long the other host may go on when one has ended with a failure.
GRACE_S = 20


STARTED = time.time() - time.monotonic()


def clock():
    """Seconds since the epoch, as of the start: not turned while gaps are measured."""
    return STARTED + time.monotonic()


@dataclass
class Settings:
    cpus: int = 1
    memory_mib: int = 1536
    mtu: int = 9000
    timeout_s: int = 600
    shared_mib: int = 64


@dataclass
class Host:
    name: str
    process: subprocess.Popen
    lines: list = field(default_factory=list)  # (time, text)
    seen: dict = field(default_factory=dict)  # CPU number -> time of its last sign of life
    silence_s: float = 0.0  # the longest between two signs of life of a CPU
    rc: int | None = None
    broken: bool = False

    def read(self, log):
        """Reads the console to its end, on a thread of its own."""
        for raw in self.process.stdout:
            now, text = clock(), raw.decode(errors="replace").rstrip("\r\n")
            # It may have come into another's line, before that line's end.
            if tick := re.match(r"(.*)LAB-TICK (\d+)$", text):
                cpu = int(tick[2])
                self.silence_s = max(self.silence_s, now - self.seen.get(cpu, now))
                self.seen[cpu] = now
                text = tick[1].rstrip("\r")
                if not text:
                    continue
            self.lines.append((now, text))
            log.write(f"{now:.3f} {text}\n")
            log.flush()
            if end := re.search(r"LAB-END host=\w+ rc=(\d+)", text):
                self.rc = int(end[1])
            if "LAB-BROKEN" in text or "Kernel panic" in text and not text.startswith("GUEST@"):
                self.broken = True

    def poke(self):
        """Has its console's interrupt come, and with it those that were forgotten; once the host has its user space, which
        does not echo."""
        if not self.seen:
            return
        try:
            os.write(self.process.stdin.fileno(), b"\0")
        except OSError:
            pass  # it has ended, or takes nothing: both are seen elsewhere

    def stopped(self, now, cpus, began):
        """Why this host counts as stopped, or None."""
        if self.broken:
            return "its kernel has given up"
        if self.process.poll() is not None:
            return None if self.rc is not None else f"QEMU ended by itself ({self.process.returncode})"
        if len(self.seen) < cpus:
            return f"not up after {UP_WITHIN_S} s" if now - began > UP_WITHIN_S else None
        silent = [cpu for cpu, at in self.seen.items() if now - at > STOPPED_AFTER_S]
        return f"no sign of life from CPU {silent[0]} for {STOPPED_AFTER_S} s" if silent else None


@dataclass
class Outcome:
    """How a run ended: `lab` says why the lab itself failed; `rcs` are those of the scenario."""

    lab: str | None
    timed_out: bool
    rcs: dict
    lines: dict
    seconds: float

    @property
    def passed(self):
        return self.lab is None and not self.timed_out and all(rc == 0 for rc in self.rcs.values())


def run(images, scenario_files, out, scenario, settings):
    """Boots both hosts, runs the scenario, brings /out of each back to `out`; see Outcome."""
    out = Path(out)
    shutil.rmtree(out, ignore_errors=True)
    work = out / "work"
    work.mkdir(parents=True)
    with tarfile.open(work / "payload.tar", "w") as tar:
        for path, name in scenario_files:
            tar.add(path, name)
    # Both hosts see it: the guest's data.
    make_ext4(work / "shared.raw", f"{settings.shared_mib}M")
    began, hosts, readers, logs = clock(), {}, [], []
    try:
        for name in HOSTS:
            with open(work / f"{name}.raw", "wb") as disk:
                disk.truncate(64 << 20)
            command = _qemu(name, images, work, scenario, settings)
            errors = open(out / f"{name}.qemu", "w")
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
            os.set_blocking(process.stdin.fileno(), False)
            _go_first(process.pid)
            hosts[name] = Host(name, process)
            logs.append(open(out / f"{name}.log", "w"))
            readers.append(threading.Thread(target=hosts[name].read, args=(logs[-1],)))
            readers[-1].start()
        lab, timed_out = _watch(hosts, settings, began)
        if lab:
            for name in hosts:
                _autopsy(work / f"{name}.mon", out / f"{name}.stopped")
    finally:
        for host in hosts.values():
            host.process.kill()
            host.process.wait()
            host.process.stdin.close()
        for reader in readers:
            reader.join()
        for log in logs:
            log.close()
    for name in hosts:
        (out / name).mkdir()
        subprocess.run(["tar", "-C", out / name, "-xf", work / f"{name}.raw"], stderr=subprocess.DEVNULL)
    # What the guest has left on its disk is for the scenario's checks.
    (work / "shared.raw").rename(out / "shared.raw")
    shutil.rmtree(work)
    rcs = {name: host.rc for name, host in hosts.items()}
    failed = timed_out or any(rc != 0 for rc in rcs.values())
    stillest = max(hosts.values(), key=lambda host: host.silence_s)
    if lab is None and failed and stillest.silence_s > STOOD_STILL_S:
        lab = f"host {stillest.name}: stood still for {stillest.silence_s:.0f} s"
    return Outcome(lab, timed_out, rcs, {name: host.lines for name, host in hosts.items()}, clock() - began)


def _go_first(pid):
    """What hosts emulate is timed: they go before whatever else this machine does, where root says so."""
    try:
        os.setpriority(os.PRIO_PROCESS, pid, NICE)
        # Each has a session, and so a share of the CPUs, of its own (sched(7), autogroups).
        Path(f"/proc/{pid}/autogroup").write_text(str(NICE))
    except OSError:
        pass


def _qemu(name, images, work, scenario, settings):
    other = next(h for h in HOSTS if h != name)
    wire = f"dgram,id=wire,local.type=unix,local.path={work}/{name}.wire,remote.type=unix,remote.path={work}/{other}.wire"
    disk = lambda file, serial, more: [
        "-drive", f"file={file},if=none,id={serial},format=raw,{more}",
        "-device", f"virtio-blk-pci,drive={serial},serial={serial}" + (",share-rw=on" if serial == "shared" else ""),
    ]
    # Two hosts have the file of the shared disk open: nobody but them may look after that.
    return [
        "qemu-system-x86_64", "-name", f"lab-{name}", "-machine", "q35", "-accel", "tcg,thread=multi,tb-size=512",
        "-cpu", CPU, "-smp", str(settings.cpus), "-m", str(settings.memory_mib), "-nodefaults", "-display", "none", "-no-reboot",
        "-kernel", str(images.host_vmlinux), "-initrd", str(images.host_initrd),
        "-append", f"{KERNEL_WORDS.format(tsc_khz=images.tsc_khz())} lab.host={name} lab.scenario={scenario}",
        *disk(images.host_root, "root", "readonly=on"),
        *disk(work / "payload.tar", "payload", "readonly=on"),
        *disk(work / f"{name}.raw", "out", "cache=unsafe"),
        *disk(work / "shared.raw", "shared", "file.locking=off,cache=writeback"),
        "-netdev", wire, "-device", f"virtio-net-pci,netdev=wire,mac={HOSTS[name]},host_mtu={settings.mtu}",
        "-device", "virtio-rng-pci", "-serial", "stdio", "-monitor", f"unix:{work}/{name}.mon,server=on,wait=off",
    ]


def _watch(hosts, settings, began):
    """Waits for the end; gives why the lab failed (or None) and whether time was up."""
    failed_at = None
    while True:
        now = clock()
        if all(h.process.poll() is not None for h in hosts.values()) and all(h.rc is not None for h in hosts.values()):
            return None, False
        for host in hosts.values():
            host.poke()
            if why := host.stopped(now, settings.cpus, began):
                # A host that ended after its script failed is no failure of the lab.
                return f"host {host.name}: {why}", False
        if any(h.rc not in (None, 0) for h in hosts.values()):
            failed_at = failed_at or now
            if now - failed_at > GRACE_S:
                return None, False
        if now - began > settings.timeout_s:
            return None, True
        time.sleep(LOOK_EVERY_S)


def _autopsy(monitor, file):
    """What a stopped host was at, by QEMU's monitor."""
    try:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(3)
        connection.connect(str(monitor))
        connection.sendall(b"info cpus\ninfo registers -a\ninfo lapic 0\n")
        said = b""
        while more := connection.recv(65536):
            said += more
    except OSError:
        pass
    if said := locals().get("said"):
        Path(file).write_bytes(said)
