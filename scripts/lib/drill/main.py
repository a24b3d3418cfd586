"""scripts/drill: makes every failure of docs/failures.md happen to real programs, and looks from outside.

Called by scripts/drill, which builds the programs first. Python's standard library only.
"""

import argparse
import signal
import sys
import time
from pathlib import Path

import drills
import leaks
import net
import report
import rows_before  # noqa: F401  (each of these registers its drills)
import rows_hostile  # noqa: F401
import rows_postcopy  # noqa: F401
import rows_switchover  # noqa: F401
import soak
import scene
from scene import Kit


def arguments():
    parser = argparse.ArgumentParser(
        prog="scripts/drill",
        description="Failover drills: two hosts that are network namespaces, real programs, and every failure "
        "of docs/failures.md. Needs /dev/kvm; without root there is no cable, and drills that need one are skipped.",
        epilog="Exits with 0 only when everything that was asked for has passed; skipped is not passed.",
    )
    parser.add_argument("--bin", help=argparse.SUPPRESS)
    parser.add_argument("--traps", help=argparse.SUPPRESS)
    parser.add_argument("--needs-traps", action="store_true", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="list the drills, by row of the failure table")
    run = commands.add_parser("run", help="run some drills")
    run.add_argument("rows", nargs="+", metavar="ROW", help="a row's number, or a drill's name")
    everything = commands.add_parser("all", help="run all drills")
    ci = commands.add_parser("ci", help="run all drills in one mode each, in turn: for every change")
    growth = commands.add_parser("leaks", help="a hundred attempts that fail, a hundred moves, in hosts that live on: does anything grow?")
    growth.add_argument("--times", type=int, default=100, metavar="N", help="how many (100)")
    random = commands.add_parser("soak", help="a guest goes back and forth, and in each round something fails at random")
    random.add_argument("--minutes", type=float, default=10, metavar="N", help="for how long (10)")
    random.add_argument("--seed", type=int, metavar="S", help="what is random depends on it and the number of the round")
    random.add_argument("--round", type=int, metavar="R", help="this round only, with a new guest")
    random.add_argument("--mode", choices=drills.ALL_MODES, help="in this mode only")
    commands.add_parser("model", help="explore the switchover's state machines, and print how many states there are")
    for sub in (run, everything, ci):
        sub.add_argument("--repeat", type=int, default=1, metavar="N", help="play each drill N times")
        sub.add_argument("--mode", choices=drills.ALL_MODES, help="in this mode only")
    for sub in (run, everything, ci, growth, random):
        sub.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
        sub.add_argument("--keep", action="store_true", help="keep the logs of drills that have passed, too")
        sub.add_argument("--loopback", action="store_true", help="no namespaces, even as root")
    return parser.parse_args()


def listing():
    for drill in sorted(drills.ALL, key=lambda d: d.row):
        needs = [what for what, does in [("root", drill.cable), ("fault points", drill.traps)] if does]
        print(f"{drill.row:>3}  {drill.name:38} {','.join(drill.modes)}{'  needs ' + ' and '.join(needs) if needs else ''}")
        print(f"     {drill.about}")
    print(f"{len(drills.ALL)} drills, {sum(len(d.modes) for d in drills.ALL)} with their modes")


def plays(args):
    """What is to be played, as (drill, mode)."""
    these = drills.chosen(args.rows) if args.command == "run" else sorted(drills.ALL, key=lambda d: d.row)
    for number, drill in enumerate(these):
        modes = [m for m in drill.modes if args.mode in (None, m)]
        if args.command == "ci" and modes:
            modes = [modes[number % len(modes)]]
        for mode in modes:
            yield from [(drill, mode)] * args.repeat


def perform(args, kit):
    outcomes, begun = [], time.monotonic()
    if not args.json:
        print(report.HEAD, flush=True)
    for drill, mode in plays(args):
        outcomes.append(outcome := report.play(drill, mode, kit))
        print(outcome.json() if args.json else outcome.line(), flush=True)
    passed = sum(o.verdict == "passed" for o in outcomes)
    if not args.json:
        worst = max((o.answer_ms for o in outcomes), default=0)
        rows = len({o.row for o in outcomes})
        for outcome in (o for o in outcomes if o.verdict == "FAILED"):
            print(outcome.line())  # once more, where the end of a long table is all that is looked at
        print(f"{passed} of {len(outcomes)} passed ({rows} rows) in {time.monotonic() - begun:.0f} s; "
              f"{sum(o.answers for o in outcomes)} answers of control sockets, the longest after {worst:.1f} ms")
    return 0 if outcomes and passed == len(outcomes) else 1


def main():
    args = arguments()
    if args.needs_traps:
        return 0 if args.command in ("run", "all", "ci") and any(d.traps for d, _ in plays(args)) else 1
    if args.command == "list":
        listing()
        return 0
    why = "--loopback" if args.loopback else net.may_make_namespaces()
    if why:
        print(f"drill: no namespaces ({why}): both hosts are on loopback", file=sys.stderr)
    kit = Kit(Path(args.bin), Path(args.traps) if args.traps else None, why, args.keep)
    if args.command == "leaks":
        return leaks.run(kit, args)
    if args.command == "soak":
        return soak.Soak(kit, args).run()
    return perform(args, kit)


class Stopped(BaseException):
    """A signal has come: everything that was made goes."""


def stop(number, frame):
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number)


for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(each, stop)
try:
    code = main()
except Stopped as stopped:
    print(f"drill: stopped by signal {stopped}", file=sys.stderr)
    code = 128 + stopped.args[0]
finally:
    scene.close_all()
sys.exit(code)
