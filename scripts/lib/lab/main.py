"""Runs scenarios in the lab; see scripts/lab."""

import argparse
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import hosts
from images import Images

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


def scenarios():
    """All of them by name."""
    all_ = [Scenario("boot", "boot", "boots Debian's kernel in vmrun, from vmlinux and bzImage, with 1 and 2 vCPUs", {})]
    for mode in ("precopy", "hybrid", "postcopy"):
        for cpus in (1, 2):
            name = f"linux-{mode}-{cpus}"
            about = f"moves a Linux guest with disk and network A → B → A: {mode}, {cpus} vCPU{'s' * (cpus > 1)}"
            all_.append(Scenario(name, "linux", about, {"MODE": mode, "CPUS": cpus}))
    return {s.name: s for s in all_}


GROUPS = {
    "linux": lambda name: name.startswith("linux-"),
    "ci": lambda name: name in ("linux-precopy-2", "linux-postcopy-1"),
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


def beats(outcome):
    """The longest time between two heartbeats that follow each other, over both consoles, and what
    is wrong with their order: each has to come once."""
    found = []
    for name, lines in outcome.lines.items():
        for at, text in lines:
            if match := re.match(r"GUEST@\w+ HB (\d+) [\d.]+$", text):
                found.append((int(match[1]), at))
    numbers = [n for n, _ in sorted(found)]
    wrong = [f"beat {n} came {numbers.count(n)} times" for n in sorted(set(numbers)) if numbers.count(n) > 1]
    wrong += [f"no beat between {a} and {b}" for a, b in zip(numbers, numbers[1:]) if b > a + 1]
    times = [at for _, at in sorted(found)]
    gap = max((b - a for a, b in zip(times, times[1:])), default=0.0)
    return gap, len(numbers), wrong


def report(scenario, outcome, out):
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
        gap, count, wrong = beats(outcome)
        problems += wrong[:5]
        print(f"  heartbeats {count}, longest gap {gap:.2f} s")
    for problem in problems[:20]:
        print(f"  FAILED: {problem}")
    verdict = "FAILED" if problems else "passed"
    print(f"{scenario.name}: {verdict} in {outcome.seconds:.0f} s (consoles and files: {out})", flush=True)
    return not problems


def attempt(scenario, images, args):
    """Runs a scenario, with another lab when one has stopped. Gives whether it passed, and how many labs stopped."""
    out = Path(args.work) / "out" / scenario.name
    settings_file = Path(args.work) / "settings"
    words = scenario.settings | dict(word.split("=", 1) for word in args.set)
    settings_file.write_text("".join(f"{k}={shlex.quote(str(v))}\n" for k, v in words.items()))
    files = [(Path(args.bin) / p, f"bin/{p}") for p in PROGRAMS]
    files += [(TESTS / scenario.folder, scenario.folder), (settings_file, "settings")]
    lab = hosts.Settings(cpus=args.host_cpus, timeout_s=args.timeout)
    for restarts in range(MOST_RESTARTS + 1):
        print(f"{scenario.name}: {scenario.about}", flush=True)
        outcome = hosts.run(images, files, out, scenario.folder, lab)
        if outcome.lab is None:
            return report(scenario, outcome, out), restarts
        print(f"{scenario.name}: THE LAB STOPPED, which says nothing of the test: {outcome.lab}", flush=True)
    print(f"{scenario.name}: not tested: the lab stopped {MOST_RESTARTS + 1} times", flush=True)
    return False, MOST_RESTARTS + 1


def main():
    parser = argparse.ArgumentParser(prog="scripts/lab", description="Moves Linux guests between two emulated hosts.")
    parser.add_argument("--bin", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list the scenarios")
    commands.add_parser("setup", help="download and build what the lab boots")
    run = commands.add_parser("run", help="run scenarios")
    run.add_argument("names", nargs="+", metavar="NAME", help="a scenario, or a group: " + ", ".join(GROUPS))
    run.add_argument("--timeout", type=int, default=600, metavar="SECONDS", help="for each scenario (600)")
    run.add_argument("--host-cpus", type=int, default=1, metavar="N", help="CPUs of each emulated host (1)")
    run.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="set a variable of the scenario's scripts")
    args = parser.parse_args()
    if args.command == "list":
        for scenario in scenarios().values():
            print(f"{scenario.name:20} {scenario.about}")
        return 0
    images = Images(args.work, TESTS)
    images.build(lambda text: print(f"lab: {text}", file=sys.stderr, flush=True))
    if args.command == "setup":
        return 0
    passed, stopped, wanted = 0, 0, chosen(args.names)
    for scenario in wanted:
        good, restarts = attempt(scenario, images, args)
        passed, stopped = passed + good, stopped + restarts
    print(f"{passed} of {len(wanted)} scenarios passed; the lab stopped {stopped} times")
    return 0 if passed == len(wanted) else 1


sys.exit(main())
