"""Random drills: one guest goes back and forth between two hosts, and in each round something fails at some moment.

The choices of a round depend on the seed and its number alone, so that it can be played again; what comes of them
is the machine's doing. After each round the same is judged as after a drill (settle.py, judge below).
"""

import json
import shutil
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path

import drills
import faults
import guest
import settle
from programs import Failed, until
from scene import ANSWER_WITHIN_MS, Scene

GUEST = dict(memory="48M", cmdline="fill=16M ws=1M rate=5 scan=4")
FLAGS = {
    drills.PRECOPY: ["--mode", "precopy"],
    drills.HYBRID: ["--mode", "hybrid", "--downtime", "1ms"],
    drills.POSTCOPY: ["--mode", "postcopy"],
}


class Life:
    """One guest, from its start until it is lost: where it is, and what it has told."""

    def __init__(self, scene, number):
        self.scene, self.tale = scene, guest.Tale()
        self.on, self._heard = scene.guest(**GUEST, name=f"g{number}"), 0

    def listen(self):
        """Takes in what it has told since."""
        if self.on.log.exists():
            with open(self.on.log, "rb") as log:
                log.seek(self._heard)
                text = log.read()
            self._heard += len(text)
            self.tale.hear(text.decode("ascii", "replace"))
        return self.tale

    def moved_to(self, host):
        self.listen()
        self.on, self._heard = host, 0

    def await_whole(self):
        """It beats, and has verified all of its memory anew from here on."""
        beat, passes = self.listen().beat, self.tale.passes
        until("more heartbeats", lambda: self.listen().beat >= beat + 3)
        # Two passes: the first may have begun before.
        until("the guest has verified all its memory again", lambda: self.listen().passes >= passes + 2)


class Play:
    """One round under way: who takes part."""

    def __init__(self, scene, choice, life):
        self.scene, self.choice, self.a = scene, choice, life.on
        self.fault = faults.BY_NAME[choice.fault]
        side = "b" if self.a.side == "a" else "a"
        self.b = scene.receiver(*faults.RECEIVER, name=f"h{choice.round}", side=side)
        for host in (self.a, self.b):
            host.pid = (host.status or {}).get("pid")
        self.link = scene.link_to(self.b, self.a.side)
        self.socket = scene.folder / f"send{choice.round}.sock"
        self.held = self.send = None

    @property
    def recv(self):
        return self.b.mover

    def disturbed(self):
        """Starts the migration and does to it what was chosen; whether the moment came."""
        choice = self.choice
        if not self.fault.moment:
            self.fault.strike(self)
        words = [*FLAGS[choice.mode], *faults.SENDER, "--bwlimit", choice.rate, "--control", self.socket]
        self.send = self.scene.send(self.a, self.link.address, *words)
        came = faults.await_moment(self)
        if self.fault.moment and came:
            self.fault.strike(self)
        if choice.mode == drills.HYBRID and self.send.is_running():
            self.scene.vmctl(self.socket, "switch-now")
        if came and self.fault.lasts:
            faults.await_mending(self)
        if came or not self.fault.moment:
            self.fault.mend(self)
        return came


class Soak:
    def __init__(self, kit, args):
        self.kit, self.args = kit, args
        self.seed = args.seed if args.seed is not None else time.time_ns() % 1_000_000
        self.modes = [args.mode] if args.mode else list(drills.ALL_MODES)
        self.scene = self.life = None
        self.counts = {name: Counter() for name in ("modes", "faults", "ends", "vmsend", "resumed")}
        self.failures, self.rounds, self.missed, self.answers, self.worst, self.beats, self.lives = [], 0, 0, 0, 0.0, 0, 0
        self.verified = 0

    def run(self):
        begun = time.monotonic()
        programs = Path(tempfile.mkdtemp(prefix="vmferry-soak-"))
        try:
            # What is built meanwhile is not what is drilled.
            for name in ("vmrun", "vmsend", "vmrecv", "vmctl"):
                shutil.copy2(self.kit.programs / name, programs)
            self.kit = replace(self.kit, programs=programs)
            for number in self.numbers(begun):
                self.round(number)
            self.end_scene(False)
        finally:
            if self.scene:
                self.scene.close(keep=False)
            shutil.rmtree(programs, ignore_errors=True)
        self.tell(self.summary(time.monotonic() - begun))
        return 1 if self.failures or not self.rounds else 0

    def numbers(self, begun):
        if self.args.round is not None:
            yield self.args.round
            return
        number = 0
        while time.monotonic() - begun < self.args.minutes * 60:
            yield (number := number + 1)

    def round(self, number):
        if not self.scene:
            self.scene = Scene(self.kit, "soak")
            self.life = None
        choice = faults.choose(self.seed, number, self.modes, self.scene.net.cable)
        row = {"round": number, "seed": self.seed, **choice.asdict(), "problems": []}
        begun = time.monotonic()
        try:
            if not self.life:
                self.lives += 1
                self.life = Life(self.scene, number)
            self.play(choice, row)
        except Exception as error:  # whatever it is, the round has failed, and its programs have to go
            row["problems"].append(str(error) if isinstance(error, Failed) else traceback.format_exc())
        row["seconds"] = round(time.monotonic() - begun, 1)
        self.rounds += 1
        self.count(row)
        if row["problems"]:
            row["logs"] = str(self.scene.folder)
            self.failures.append({k: row[k] for k in ("round", "fault", "mode", "problems", "logs")})
            self.end_scene(True)
        self.tell(row)

    def play(self, choice, row):
        self.scene.tell_watcher("anew")
        life = self.life
        play = Play(self.scene, choice, life)
        row["moment"] = play.disturbed()
        end = settle.settle(play, life)
        row |= {"end": end.what, "vmsend": end.code, "resumed": end.resumed}
        if end.lives:
            life.await_whole()
        seen = self.scene.report()
        row |= {"answers": seen["answers"], "answer_ms": seen["worst_ms"], "beats": life.tale.beat}
        row["problems"] += [f"two runners: {hosts}" for hosts in seen["two_runners"]]
        row["problems"] += [f"not answered within {ANSWER_WITHIN_MS} ms: {late}" for late in seen["late"]]
        # A guest that is lost may still run as far as it has its pages.
        running = [h.name for h in self.scene.hosts.values() if h.run_state == "running" and (end.lives or not h.missing)]
        if running != [life.on.name] * end.lives:
            row["problems"].append(f"running: {running}")
        if row["problems"]:
            return
        row["problems"] += [f"left behind: {what}" for what in settle.tidy(self.scene, life.on if end.lives else None)]
        if not end.lives:
            self.verified += life.tale.passes
            self.beats += life.tale.beat
            self.life = None

    def count(self, row):
        for name, key in (("modes", "mode"), ("faults", "fault"), ("ends", "end"), ("vmsend", "vmsend")):
            self.counts[name][row.get(key, "failed")] += 1
        self.counts["resumed"].update(row.get("resumed", []))
        self.missed += not row.get("moment", True)
        self.answers += row.get("answers", 0)
        self.worst = max(self.worst, row.get("answer_ms", 0.0))

    def end_scene(self, failed):
        """Ends the guest and everything else; the next round begins anew."""
        if not self.scene:
            return
        if self.life:
            self.beats += self.life.tale.beat
            self.verified += self.life.tale.passes
        left = [] if failed else self.scene.wind_up()
        self.scene.close(failed or self.kit.keep)
        left += self.scene.net.left()
        if left and not failed:
            self.failures.append({"round": "end", "problems": left, "logs": None})
        self.scene = self.life = None

    def summary(self, seconds):
        return {
            "soak": "FAILED" if self.failures else "passed", "seed": self.seed, "rounds": self.rounds,
            "minutes": round(seconds / 60, 1), **{k: dict(v.most_common()) for k, v in self.counts.items()},
            "moment_never_came": self.missed, "guests": self.lives, "beats": self.beats, "verified_passes": self.verified,
            "answers": self.answers, "answer_ms": self.worst, "failures": self.failures,
        }

    def tell(self, row):
        if self.args.json:
            print(json.dumps(row), flush=True)
        elif "soak" in row:
            print("\n".join(f"{key}: {value}" for key, value in row.items()), flush=True)
        else:
            choice = faults.choose(self.seed, row["round"], self.modes, self.kit.loopback is None)
            verdict = "FAILED" if row["problems"] else row["end"]
            text = f"{row['round']:>5} {row['mode']:8} {row['seconds']:5.1f}s {verdict:28} {choice.about()}"
            text += "" if row.get("moment", True) else " (never came)"
            text += "".join(f"\n      {problem}" for problem in row["problems"])
            if row["problems"]:
                mode = f" --mode {self.args.mode}" if self.args.mode else ""
                text += f"\n      again: scripts/drill soak --seed {self.seed} --round {row['round']}{mode}; logs: {row['logs']}"
            print(text, flush=True)
