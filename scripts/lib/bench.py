"""Moves the trial guest with this project's programs and with QEMU, in turn, and compares.

Called by scripts/bench, which builds the programs first. Python's standard library only.
"""

import argparse
import json
import mmap
import os
import platform
import re
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

PATIENCE_S = 120  # for anything that should take seconds
AFTER_S = 2.0  # how long the guest is watched after the move
BEFORE_S = 1.0  # and before it
QEMU_MACHINE = [
    "-accel", "kvm", "-M", "microvm,acpi=off", "-nodefaults", "-no-user-config", "-display", "none",
]

PROFILES = {
    "loaded": dict(memory="1G", fill="512M", ws="64M", rate=100, beat=2, vcpus=1),
    "smp": dict(memory="1G", fill="512M", ws="64M", rate=100, beat=2, vcpus=2),
    "idle": dict(memory="4G", fill="64M", ws="4M", rate=1, beat=2, vcpus=1),
    "quick": dict(memory="256M", fill="128M", ws="16M", rate=50, beat=2, vcpus=1),
}


class Failed(Exception):
    """A run that did not move its guest, or moved it wrong."""


class Serial:
    """What a guest prints, each line with the time at which it came: the reading end of a FIFO."""

    def __init__(self, path):
        os.mkfifo(path)
        self.path = path
        self.lines = []  # (seconds, text)
        self.rest = b""  # what came after the last line feed
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        self._changed = threading.Condition()
        self._done_read, self._done_write = os.pipe()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        try:  # the clock should not wait behind what it measures; only root may
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), -10)
        except OSError:
            pass
        while True:
            ready, _, _ = select.select([self._fd, self._done_read], [], [])
            if self._done_read in ready:
                return
            data = os.read(self._fd, 65536)
            now = time.monotonic()
            *lines, self.rest = (self.rest + data).split(b"\n")
            with self._changed:
                self.lines += [(now, line.decode("ascii", "replace")) for line in lines]
                self._changed.notify_all()

    def wait_for(self, wanted, what):
        """Waits until a line matches `wanted`; gives its index."""
        until = time.monotonic() + PATIENCE_S
        at = 0
        with self._changed:
            while True:
                while at < len(self.lines):
                    if re.match(wanted, self.lines[at][1]):
                        return at
                    at += 1
                if not self._changed.wait(timeout=max(0, until - time.monotonic())):
                    raise Failed(f"{what}: waited {PATIENCE_S} s in vain")

    def close(self):
        os.write(self._done_write, b"x")
        self._thread.join()
        for fd in (self._fd, self._done_read, self._done_write):
            os.close(fd)


def beats(lines):
    """(seconds, counter) of the heartbeat lines among `lines`."""
    return [(t, int(text[2:])) for t, text in lines if re.fullmatch(r"b \d+", text)]


def examine(source, dest):
    """What the two serial logs of one move show, from outside the guest."""
    before, after = list(source.lines), list(dest.lines)
    if source.rest and after:  # a line that began at the source and ended at the destination
        after[0] = (after[0][0], source.rest.decode("ascii", "replace") + after[0][1])
    for _, text in before + after:
        if re.search(r"CORRUPT|FAULT|STALLED|CLOCK BACK", text):
            raise Failed(f"the guest says: {text}")
    ours, theirs = beats(before), beats(after)
    if not ours or not theirs:
        raise Failed("no heartbeat on both sides")
    counters = [n for _, n in ours + theirs]
    skips = sum(b != a + 1 for a, b in zip(counters, counters[1:]))
    first = theirs[0][0]
    gaps = [b[0] - a[0] for a, b in zip(theirs, theirs[1:]) if a[0] < first + AFTER_S]
    quiet = [b[0] - a[0] for a, b in zip(ours, ours[1:]) if b[0] < source.move_started]
    return {
        "downtime_ms": (first - ours[-1][0]) * 1e3,
        "worst_after_ms": max(gaps, default=0) * 1e3,
        "worst_before_ms": max(quiet[-int(BEFORE_S * 400):], default=0) * 1e3,
        "counter_skips": skips,
    }


class Processes:
    """Processes of one run; all are gone when it is over."""

    def __init__(self, directory):
        self.directory = directory
        self.all = []

    def start(self, name, command, **more):
        errors = open(self.directory / f"{name}.err", "wb")
        process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.DEVNULL, stderr=errors,
            **{"stdout": subprocess.DEVNULL, **more})
        errors.close()
        self.all.append(process)
        return process

    def errors(self, name):
        return (self.directory / f"{name}.err").read_text(errors="replace").strip()

    def end(self):
        for process in self.all:
            if process.poll() is None:
                process.kill()
            process.wait()


def cpu_seconds(pid):
    """User and system time of a live process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def listens(path):
    """Whether somebody takes connections on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def guest_cmdline(p):
    return f"vcpus={p['vcpus']} fill={p['fill']} ws={p['ws']} rate={p['rate']} beat={p['beat']}"


def settle(source):
    """Waits until the guest has filled its memory and has run under load for a while."""
    filled = source.wait_for(r"heartbeat: filled", "the guest to fill its memory")
    until = source.lines[filled][0] + BEFORE_S
    time.sleep(max(0, until - time.monotonic()))


def warm(p):
    """Takes as much memory as the guest has, and lets it go.

    A machine that is itself a virtual machine may give back what it does not use, by huge pages (free page reporting);
    to have one again takes milliseconds, more than all that is measured here. So no move begins with that.
    """
    size = int(p["memory"][:-1]) << {"M": 20, "G": 30}[p["memory"][-1]]
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, size, mmap.PAGESIZE):
            memory[at] = 1


def watch(dest):
    """Waits for the guest's first words at the destination, and a while longer."""
    first = dest.wait_for(r"b? ?\d+", "the first heartbeat at the destination")
    time.sleep(max(0, dest.lines[first][0] + AFTER_S - time.monotonic()))


class Ours:
    """A move by vmsend and vmrecv."""

    def __init__(self, name, bin_dir, channels, kernel, mode="precopy"):
        self.name, self.bin, self.channels, self.kernel, self.mode = name, bin_dir, channels, kernel, mode

    def move(self, p, processes, source, dest):
        here = processes.directory
        a, b = here / "a.sock", here / "b.sock"
        host_a = processes.start("vmrun-a", [
            self.bin / "vmrun", "--kernel", self.kernel, "--memory", p["memory"], "--cpus", p["vcpus"],
            "--cmdline", guest_cmdline(p), "--serial", f"file:{source.path}", "--control", a])
        settle(source)
        host_b = processes.start("vmrun-b", [
            self.bin / "vmrun", "--incoming", "--serial", f"file:{dest.path}", "--control", b])
        until = time.monotonic() + PATIENCE_S
        while not listens(b):
            if host_b.poll() is not None or time.monotonic() > until:
                raise Failed(f"vmrun --incoming: {processes.errors('vmrun-b')}")
            time.sleep(0.005)
        receiver = processes.start(
            "vmrecv", [self.bin / "vmrecv", "--attach", "--control", b, "--json", "tcp:127.0.0.1:0"],
            stdout=subprocess.PIPE)
        port = None
        for line in receiver.stdout:
            found = re.search(rb"127\.0\.0\.1:(\d+)", line)
            if found:
                port = int(found[1])
                break
        if port is None:
            raise Failed(f"vmrecv: {processes.errors('vmrecv')}")
        warm(p)
        cpu_before = [cpu_seconds(host_a.pid), cpu_seconds(host_b.pid)]
        source.move_started = start = time.monotonic()
        # QEMU's source keeps its memory until it is ended, too: giving it back while the guest is
        # watched would cost CPU that between two hosts is not the destination's.
        sender = processes.start(
            "vmsend", [self.bin / "vmsend", "--vm", a, "--channels", self.channels, "--mode", self.mode, "--keep-source",
                       "--json", f"tcp:127.0.0.1:{port}"],
            stdout=subprocess.PIPE)
        output, _ = sender.communicate(timeout=PATIENCE_S)
        total = time.monotonic() - start
        cpu_b = cpu_seconds(host_b.pid) - cpu_before[1]
        if sender.returncode != 0:
            raise Failed(f"vmsend ended with {sender.returncode}: {processes.errors('vmsend')}")
        receiver.stdout.read()
        receiver.wait(timeout=PATIENCE_S)
        watch(dest)
        result = json.loads(output.splitlines()[-1])["result"]
        return {
            "total_s": total,
            "wire_bytes": result["wire_bytes"],
            "passes": result["passes"],
            "own_downtime_ms": result["downtime"]["total_ms"],
            "downtime_parts_ms": result["downtime"],
            "latency": result.get("latency"),
            "cpu_dest_vmrun_s": cpu_b,
        }


class Qmp:
    """A QMP monitor."""

    def __init__(self, path, process, errors):
        until = time.monotonic() + PATIENCE_S
        self.socket = socket.socket(socket.AF_UNIX)
        while True:
            try:
                self.socket.connect(str(path))
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > until:
                    raise Failed(f"qemu does not start: {errors()}") from None
                time.sleep(0.01)
        self.socket.settimeout(PATIENCE_S)
        self.stream = self.socket.makefile("rw")
        self._next()
        self.ask("qmp_capabilities")

    def _next(self):
        line = self.stream.readline()
        if not line:
            raise Failed("qemu has gone away")
        return json.loads(line)

    def ask(self, command, **arguments):
        self.stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.stream.flush()
        while True:
            answer = self._next()
            if "error" in answer:
                raise Failed(f"qemu, {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def await_migrated(self):
        while True:
            event = self._next()
            if event.get("event") == "MIGRATION":
                status = event["data"]["status"]
                if status == "completed":
                    return
                if status in ("failed", "cancelled"):
                    raise Failed(f"qemu: the migration {status}")

    def close(self):
        self.stream.close()
        self.socket.close()


class Qemu:
    """A move by QEMU: precopy, or postcopy at once with the capabilities that are named."""

    def __init__(self, name, program, channels, kernel, cpu, postcopy=()):
        self.name, self.program, self.channels, self.kernel, self.cpu = name, program, channels, kernel, cpu
        self.postcopy = postcopy

    def start(self, name, p, processes, serial, *more):
        monitor = processes.directory / f"{name}.qmp"
        process = processes.start(name, [
            self.program, *QEMU_MACHINE, "-cpu", self.cpu, "-m", p["memory"], "-smp", p["vcpus"],
            "-chardev", f"file,id=s,path={serial.path},append=on",
            "-serial", "chardev:s", "-qmp", f"unix:{monitor},server=on,wait=off",
            "-kernel", self.kernel, "-append", guest_cmdline(p), *more])
        qmp = Qmp(monitor, process, lambda: processes.errors(name))
        if self.channels > 1:
            qmp.ask("migrate-set-capabilities", capabilities=[{"capability": "multifd", "state": True}])
            qmp.ask("migrate-set-parameters", **{"multifd-channels": self.channels})
        wanted = ["events", *self.postcopy]
        qmp.ask("migrate-set-capabilities", capabilities=[{"capability": name, "state": True} for name in wanted])
        return process, qmp

    def move(self, p, processes, source, dest):
        _, a = self.start("qemu-a", p, processes, source)
        settle(source)
        _, b = self.start("qemu-b", p, processes, dest, "-incoming", "defer")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        b.ask("migrate-incoming", uri=f"tcp:127.0.0.1:{port}")
        a.ask("migrate-set-parameters", **{"max-bandwidth": 1 << 40, "downtime-limit": 300})
        warm(p)
        source.move_started = start = time.monotonic()
        a.ask("migrate", uri=f"tcp:127.0.0.1:{port}")
        if self.postcopy:
            a.ask("migrate-start-postcopy")
        a.await_migrated()
        total = time.monotonic() - start
        watch(dest)
        info = a.ask("query-migrate")
        for monitor in (a, b):
            monitor.close()
        return {
            "total_s": total,
            "wire_bytes": info["ram"]["transferred"],
            "passes": info["ram"]["dirty-sync-count"],
            "own_downtime_ms": info["downtime"],
        }


def run(mover, profile):
    """One move in a directory of its own; what was measured."""
    with tempfile.TemporaryDirectory(prefix="vmferry-bench-") as directory:
        directory = Path(directory)
        processes = Processes(directory)
        source, dest = Serial(directory / "serial-a"), Serial(directory / "serial-b")
        try:
            figures = mover.move(profile, processes, source, dest)
            figures.update(examine(source, dest))
        finally:
            processes.end()
            source.close()
            dest.close()
    return figures


def qemu_cpu(program, kernel):
    """`host` where QEMU can have it, else without a register that some KVMs refuse to set."""
    for cpu in ("host", "host,-arch-capabilities"):
        with tempfile.TemporaryDirectory(prefix="vmferry-bench-") as directory:
            try:
                done = subprocess.run(
                    [program, *QEMU_MACHINE, "-cpu", cpu, "-m", "64M", "-no-reboot", "-serial", "null",
                     "-kernel", kernel, "-append", "fill=1M ws=1M stop_after=5"],
                    cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, timeout=20)
            except subprocess.TimeoutExpired:
                continue
            if done.returncode == 0:
                return cpu
    raise Failed("this QEMU cannot run the trial guest with -accel kvm")


def median(runs, key):
    return statistics.median(r[key] for r in runs)


def ratio(ours, theirs, key):
    """The median of the ratios run by run: what drifts on the machine drifts for both."""
    pairs = [a[key] / b[key] for a, b in zip(ours, theirs) if b[key] > 0]
    return statistics.median(pairs) if pairs else float("nan")


def table(results, yardstick):
    """The medians as a table in Markdown."""
    head = ["", "total, s", "downtime, ms", "worst pause after, ms", "sent, MiB",
            "total ÷ QEMU", "downtime ÷ QEMU"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name, runs in results.items():
        row = [name, f"{median(runs, 'total_s'):.2f}", f"{median(runs, 'downtime_ms'):.1f}",
               f"{median(runs, 'worst_after_ms'):.1f}", f"{median(runs, 'wire_bytes') / 2**20:.0f}"]
        base = results.get(yardstick)
        if base and name != yardstick:
            row += [f"{ratio(runs, base, 'total_s'):.2f}", f"{ratio(runs, base, 'downtime_ms'):.2f}"]
        else:
            row += ["1" if base else "–"] * 2
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in rows)


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="scripts/bench", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Moves the trial guest with this project's programs and with Debian's QEMU, in turn, over\n"
                    "loopback TCP, and prints a table of medians. Downtime is measured from outside, for both\n"
                    "alike: from the source's last heartbeat line to the destination's first, by the host's clock.",
        epilog="Profiles: " + "; ".join(
            f"{name}: " + " ".join(f"{k}={v}" for k, v in p.items()) for name, p in PROFILES.items()))
    parser.add_argument("--runs", type=int, help="moves per row (default 5; 1 with --quick)")
    parser.add_argument("--quick", action="store_true", help="one move of a small guest per row, for CI")
    parser.add_argument("--profile", choices=PROFILES, default=None, help="which guest (default: loaded)")
    for name in ("memory", "fill", "ws"):
        parser.add_argument(f"--{name}", metavar="SIZE", help=f"the guest's {name}")
    parser.add_argument("--rate", type=int, metavar="N", help="pages dirtied per ms")
    parser.add_argument("--beat", type=int, metavar="MS", help="time between heartbeats")
    parser.add_argument("--vcpus", type=int, metavar="N", help="vCPUs")
    parser.add_argument("--channels", default="1,2", help="channels of our rows (default 1,2)")
    parser.add_argument("--no-qemu", action="store_true", help="only our rows")
    parser.add_argument("--other", type=Path, metavar="DIR", help="another build of our programs, as further rows")
    parser.add_argument("--rows", metavar="REGEX", default="", help="only rows whose name matches, e.g. postcopy")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure of every run there")
    parser.add_argument("--bin", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--kernel", type=Path, required=True, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def movers(options):
    """The rows of the table, and which of them is the yardstick."""
    rows = []
    if not options.no_qemu:
        program = "qemu-system-x86_64"
        cpu = qemu_cpu(program, options.kernel)
        version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
        version = re.search(r"version (\d+\.\d+)", version)[1]
        rows.append(Qemu(f"QEMU {version} precopy", program, 1, options.kernel, cpu))
        rows.append(Qemu(f"QEMU {version} multifd 2", program, 2, options.kernel, cpu))
        for what, capabilities in [("postcopy", ["postcopy-ram"]),
                                   ("postcopy + preempt", ["postcopy-ram", "postcopy-preempt"])]:
            rows.append(Qemu(f"QEMU {version} {what}", program, 1, options.kernel, cpu, capabilities))
    builds = [("vmferry", options.bin)] + ([("other build", options.other)] if options.other else [])
    for channels in options.channels.split(","):
        for name, bin_dir in builds:
            what = f"{name}, {channels} channel{'s' if channels != '1' else ''}"
            rows.append(Ours(what, bin_dir, int(channels), options.kernel))
    for mode in ("postcopy", "hybrid"):
        for name, bin_dir in builds:
            rows.append(Ours(f"{name}, {mode}", bin_dir, 2, options.kernel, mode))
    chosen = [row for row in rows if re.search(options.rows, row.name)]
    if not chosen:
        raise Failed(f"no row matches {options.rows}: {', '.join(row.name for row in rows)}")
    return chosen


def main(arguments):
    options = parse(arguments)
    options.kernel, options.bin = options.kernel.resolve(), options.bin.resolve()
    options.other = options.other and options.other.resolve()
    profile = dict(PROFILES[options.profile or ("quick" if options.quick else "loaded")])
    for name in profile:
        given = getattr(options, name)
        if given is not None:
            profile[name] = given
    count = options.runs or (1 if options.quick else 5)
    rows = movers(options)
    machine = {"cpus": os.cpu_count(), "memory_gib": round(
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30), "kernel": ".".join(platform.release().split(".")[:2])}
    print(f"Guest: {' '.join(f'{k}={v}' for k, v in profile.items())}; medians of {count} "
          f"run{'s' if count > 1 else ''}; host: {machine['cpus']} CPUs, {machine['memory_gib']} GiB, "
          f"Linux {machine['kernel']}, load {os.getloadavg()[0]:.1f}; {time.strftime('%Y-%m-%d')}.\n", flush=True)
    results = {mover.name: [] for mover in rows}
    failures = []
    for number in range(count):
        for mover in rows:
            try:
                figures = run(mover, profile)
                results[mover.name].append(figures)
                if figures["counter_skips"]:
                    failures.append(f"{mover.name}: the heartbeat counter skipped")
                said = f"{figures['total_s']:.2f} s, downtime {figures['downtime_ms']:.1f} ms"
            except (Failed, subprocess.TimeoutExpired, OSError, ValueError) as error:
                failures.append(f"{mover.name}: {error}")
                said = f"FAILED: {error}"
            print(f"bench: run {number + 1} of {count}, {mover.name}: {said}", file=sys.stderr, flush=True)
    complete = {name: runs for name, runs in results.items() if runs}
    print(table(complete, rows[0].name if isinstance(rows[0], Qemu) else None))
    if options.json:
        everything = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "guest": profile,
                      "runs": results, "failures": failures}
        options.json.write_text(json.dumps(everything, indent=1) + "\n")
    for failure in failures:
        print(f"bench: FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Failed as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
