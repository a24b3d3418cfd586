"""Runs scenarios in the lab; see scripts/lab."""

import argparse
import json
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import checks
import hosts
from images import HOST_KERNEL, Images, make_ext4

ROOT = Path(__file__).resolve().parents[3]
TESTS = ROOT / "tests/lab"
PROGRAMS = ["vmrun", "vmsend", "vmrecv", "vmctl"]
# How often a lab that has stopped is started again: hosts that were alive are never tried again.
MOST_RESTARTS = 2


@dataclass(frozen=True)
class Scenario:
    name: str
    folder: str
    about: str
    settings: dict
    host_cpus: int = 1


def scenarios():
    """All of them by name."""
    all_ = [Scenario("boot", "boot", "boots Debian's kernel in vmrun, from vmlinux and bzImage, with 1 to 4 vCPUs", {})]
    all_.append(Scenario("demo", "demo", "runs scripts/demo --linux on a host whose KVM can", {}))
    about = "runs the unit tests of guest memory on the hosts' kernel, with two CPUs"
    all_.append(Scenario("units", "units", about, {"TESTS": "migrate::ram::"}, host_cpus=2))
    for mode in ("precopy", "hybrid", "postcopy"):
        for cpus in (1, 2):
            name = f"linux-{mode}-{cpus}"
            about = f"moves a Linux guest with disk and network A → B → A: {mode}, {cpus} vCPU{'s' * (cpus > 1)}"
            all_.append(Scenario(name, "linux", about, {"MODE": mode, "CPUS": cpus}))
    for mode in ("precopy", "postcopy"):
        about = f"the same with a whole Debian as the guest, by systemd: {mode}, 2 vCPUs"
        settings = {"MODE": mode, "CPUS": 2, "MEMORY": "384M", "SYSTEM": "debian"}
        all_.append(Scenario(f"debian-{mode}", "linux", about, settings))
    for mode in ("precopy", "postcopy"):
        about = f"the same with sockets between host and guest as well: {mode}, 1 vCPU"
        all_.append(Scenario(f"vsock-{mode}", "linux", about, {"MODE": mode, "VSOCK": 1}))
    for mode in ("precopy", "postcopy"):
        for cpus in (1, 2):
            about = f"the same with QEMU's microvm, to compare with: {mode}, {cpus} vCPU{'s' * (cpus > 1)}"
            all_.append(Scenario(f"qemu-{mode}-{cpus}", "linux", about, {"MODE": mode, "CPUS": cpus, "VMM": "qemu"}))
    return {s.name: s for s in all_}


GROUPS = {
    "linux": lambda name: name.startswith("linux-"),
    "qemu": lambda name: name.startswith("qemu-"),
    "ci": lambda name: name in ("units", "linux-precopy-1", "linux-postcopy-1"),
    "all": lambda name: True,
}


def chosen(words):
    """The scenarios that the words of a command line mean, in order."""
    known, names = scenarios(), []
    for word in words:
        found = [n for n in known if word == n or word in GROUPS and GROUPS[word](n)]
        if not found:
            sys.exit(f"lab: no scenario or group {word} (scripts/lab list)")
        names += [n for n in found if n not in names]
    return [known[n] for n in names]


def report(scenario, outcome, out, words, figures):
    """Prints how a run went; gives whether it passed."""
    problems = []
    if outcome.timed_out:
        problems.append(f"not done after {outcome.seconds:.0f} s, and both hosts were alive")
    problems += [f"host {n} ended with {rc}" for n, rc in outcome.rcs.items() if rc != 0 and not outcome.timed_out]
    for lines in outcome.lines.values():
        problems += [text for _, text in lines if re.search(r"LAB-DIE|GUEST-BAD|GUEST-FAIL", text)]
        for _, text in lines:
            if result := re.match(r"LAB-RESULT (.*)", text):
                print(f"  {result[1]}")
    if scenario.folder == "linux":
        problems += checks.wrong_beats(checks.stays(out))[:5]
        print(f"  {len(checks.beat_times(outcome.lines))} heartbeats; while it was moved: " + ", ".join(f"{k} {v:.2f}" for k, v in figures.items()))
        if not problems and words.get("DEVICES") != "0":
            problems += checks.disk(out / "shared.raw")
    for problem in problems[:20]:
        print(f"  FAILED: {problem}")
    verdict = "FAILED" if problems else "passed"
    print(f"{scenario.name}: {verdict} in {outcome.seconds:.0f} s (consoles and files: {out})", flush=True)
    return not problems


def unit_tests(work):
    """The program of the library's unit tests, as scripts/test builds it, without what only a debugger reads."""
    command = ["cargo", "test", "--locked", "--features", "fault-points", "--lib", "--no-run", "--message-format=json"]
    said = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    program = next(made["executable"] for made in map(json.loads, said.splitlines()) if made.get("executable"))
    subprocess.run(["strip", "-o", work / "units", program], check=True)
    return work / "units"


def attempt(scenario, images, args):
    """Runs a scenario, with another lab when one has stopped. Gives whether it passed, how many labs stopped, and
    the figures of a guest that was moved."""
    out = Path(args.work) / "out" / scenario.name
    settings_file = Path(args.work) / "settings"
    words = scenario.settings | dict(word.split("=", 1) for word in args.set)
    settings_file.write_text("".join(f"{k}={shlex.quote(str(v))}\n" for k, v in words.items()))
    files = [(Path(args.bin) / p, f"bin/{p}") for p in PROGRAMS]
    files += [(TESTS / scenario.folder, scenario.folder), (settings_file, "settings")]
    if scenario.folder == "demo":
        make_ext4(images.guest_data, "64M")
        files += [(ROOT / "scripts/lib" / name, f"demo/{name}") for name in ("demo.sh", "demo-linux")]
        files += [(images.guest_data, "demo/data.ext4")]
    if scenario.folder == "units":
        files += [(unit_tests(Path(args.work)), "units/program")]
    lab = hosts.Settings(cpus=max(args.host_cpus, scenario.host_cpus), timeout_s=args.timeout)
    for restarts in range(MOST_RESTARTS + 1):
        print(f"{scenario.name}: {scenario.about}", flush=True)
        outcome = hosts.run(images, files, out, scenario.folder, lab)
        if outcome.lab is None:
            figures = checks.figures(outcome.lines, out) if scenario.folder == "linux" else None
            return report(scenario, outcome, out, words, figures), restarts, figures
        print(f"{scenario.name}: THE LAB STOPPED, which says nothing of the test: {outcome.lab}", flush=True)
    print(f"{scenario.name}: not tested: the lab stopped {MOST_RESTARTS + 1} times", flush=True)
    return False, MOST_RESTARTS + 1, None


def show(table):
    """Prints the figures of all scenarios side by side."""
    for number, (name, figures) in enumerate(table.items()):
        if number == 0:
            print(f"{'longest of both ways':20}" + "".join(f"{column:>20}" for column in figures))
        print(f"{name:20}" + "".join(f"{figure:20.2f}" for figure in figures.values()))


def main():
    parser = argparse.ArgumentParser(prog="scripts/lab", description="Moves Linux guests between two emulated hosts.")
    parser.add_argument("--bin", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list the scenarios")
    images = argparse.ArgumentParser(add_help=False)
    images.add_argument("--kernel", default=HOST_KERNEL, metavar="PACKAGE",
        help=f"the guest's kernel: a Debian package, such as linux-image-amd64, or a file of one ({HOST_KERNEL})")
    commands.add_parser("setup", parents=[images], help="download and build what the lab boots")
    commands.add_parser("guest", parents=[images], help="download and build a guest alone, as scripts/demo --linux boots it")
    run = commands.add_parser("run", parents=[images], help="run scenarios")
    run.add_argument("names", nargs="+", metavar="NAME", help="a scenario, or a group: " + ", ".join(GROUPS))
    run.add_argument("--timeout", type=int, default=600, metavar="SECONDS", help="for each scenario (600)")
    run.add_argument("--host-cpus", type=int, default=1, metavar="N", help="CPUs of each emulated host (1)")
    run.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="set a variable of the scenario's scripts")
    args = parser.parse_args()
    # Also where a shell has started this in the background, with SIGINT ignored: no host is left behind.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    if args.command == "list":
        for scenario in scenarios().values():
            print(f"{scenario.name:20} {scenario.about}")
        return 0
    images = Images(args.work, TESTS, args.kernel)
    say = lambda text: print(f"lab: {text}", file=sys.stderr, flush=True)
    if args.command == "guest":
        images.build_guest(say)
        return 0
    images.build(say)
    if args.command == "setup":
        return 0
    passed, stopped, wanted, table = 0, 0, chosen(args.names), {}
    for scenario in wanted:
        good, restarts, figures = attempt(scenario, images, args)
        passed, stopped = passed + good, stopped + restarts
        if good and figures:
            table[scenario.name] = figures
    show(table)
    print(f"{passed} of {len(wanted)} scenarios passed; the lab stopped {stopped} times")
    return 0 if passed == len(wanted) else 1


sys.exit(main())
