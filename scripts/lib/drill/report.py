"""What a drill has shown, as a row of a table and as a JSON object."""

import json
import time
import traceback
from dataclasses import asdict, dataclass, field

import guest
from programs import Failed
from scene import ANSWER_WITHIN_MS, Scene

HEAD = f"{'row':>3}  {'drill':38} {'mode':8} {'':6} {'time':>6} {'runs':4} {'beats':>6} {'answer':>8}  exits"


@dataclass
class Outcome:
    row: int
    drill: str
    mode: str
    verdict: str = "passed"  # or FAILED, or skipped
    seconds: float = 0.0
    runs: str = "-"  # on which host the guest runs in the end
    beats: int = 0
    verified_passes: int = 0
    exits: list = field(default_factory=list)
    answer_ms: float = 0.0  # the longest that a control socket took, less what a bystander was late
    answer_raw_ms: float = 0.0
    answers: int = 0
    left: list = field(default_factory=list)
    problems: list = field(default_factory=list)
    logs: str | None = None

    def line(self):
        start = f"{self.row:>3}  {self.drill:38} {self.mode:8} {self.verdict:7}"
        if self.verdict == "skipped":
            return f"{start} {self.problems[0]}"
        figures = f"{self.seconds:5.1f}s {self.runs:4} {self.beats:>6} {self.answer_ms:5.1f} ms"
        text = f"{start}{figures}  {', '.join(self.exits)}"
        text += "".join(f"\n       {problem}" for problem in self.problems + [f"left behind: {l}" for l in self.left])
        return text + (f"\n       logs: {self.logs}" if self.logs else "")

    def json(self):
        return json.dumps(asdict(self))


def play(drill, mode, kit):
    """Plays a drill and looks at what it leaves: the one place where a verdict is made."""
    outcome = Outcome(drill.row, drill.name, mode)
    why = kit.loopback if drill.cable else None
    if why:
        outcome.verdict, outcome.problems = "skipped", [f"it needs a cable, and there is none: {why}"]
        return outcome
    begun = time.monotonic()
    scene = Scene(kit, mode)
    try:
        judge(drill.play(scene), scene, outcome)
    except Exception as error:  # whatever it is, the drill has failed, and its programs have to go
        outcome.problems.append(f"{error}" if isinstance(error, Failed) else traceback.format_exc())
    outcome.exits = scene.ends
    if outcome.problems or outcome.left:
        outcome.verdict = "FAILED"
    keep = kit.keep or outcome.verdict == "FAILED"
    outcome.logs = str(scene.folder) if keep else None
    scene.close(keep)
    outcome.left += scene.net.left()
    outcome.seconds = round(time.monotonic() - begun, 1)
    return outcome


def judge(story, scene, outcome):
    """Who runs, whether the guest is whole, how soon everyone answered, what is left behind."""
    last = story.hosts[-1]
    if story.lives:
        scene.await_running(last)
        scene.check("it has all its pages", not last.missing)
        outcome.beats, outcome.verified_passes = guest.await_verified(story.hosts)
        outcome.runs = last.name.upper()
    running = [host.name for host in scene.hosts.values() if host.run_state == "running"]
    if running != [last.name] * story.lives:
        outcome.problems.append(f"running: {running}")
    seen = scene.report()
    outcome.left = scene.wind_up()
    outcome.beats, outcome.verified_passes = guest.story(story.hosts)
    outcome.answers, outcome.answer_ms, outcome.answer_raw_ms = seen["answers"], seen["worst_ms"], seen["worst_raw_ms"]
    outcome.problems += [f"two runners: {hosts}" for hosts in seen["two_runners"]]
    outcome.problems += [f"not answered within {ANSWER_WITHIN_MS} ms: {late}" for late in seen["late"]]
