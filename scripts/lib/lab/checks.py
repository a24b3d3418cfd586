"""What is found out about a run from outside: on the consoles of both hosts, and on the guest's disk."""

import hashlib
import re
import subprocess
import tempfile
from pathlib import Path

# What the guest's kernel says on its console, which may come into the middle of another's line.
OF_THE_KERNEL = re.compile(r"\[ *\d+\.\d{6}\] [^\n]*\n")


def stays(out):
    """What the guest has printed, from its first stay on a host to its last: a line may begin on one and end on another."""
    files = [out / "a/serial-1", out / "b/serial-1", out / "a/serial-2"]
    return "".join(file.read_text(errors="replace") for file in files if file.exists())


def wrong_beats(said):
    """What is wrong with the guest's heartbeats in what it has said: each number has to come once, and its time may not
    go back."""
    found = re.findall(r"HB (\d+) (\d+\.\d+)\s*\n", OF_THE_KERNEL.sub("", said))
    wrong = [] if found else ["the guest has no heartbeat"]
    for (number, up), (following, later) in zip(found, found[1:]):
        if int(following) != int(number) + 1:
            wrong.append(f"beat {following} comes after beat {number}")
        elif float(later) < float(up):
            wrong.append(f"the guest's clock went back from {up} to {later} after beat {number}")
    return wrong


def beat_times(lines_of_hosts):
    """When heartbeats came, of lines as `hosts.Outcome` has them: all but those that another line has come into."""
    return sorted(
        at for lines in lines_of_hosts.values() for at, text in lines if re.match(r"GUEST@\w+ HB \d+ [\d.]+(\s*\[.*)?$", text)
    )


def moves(lines_of_hosts):
    """When each move began and was reported to be over."""
    found = []
    for lines in lines_of_hosts.values():
        began = None
        for at, text in lines:
            if text.startswith("LAB-MOVING"):
                began = at
            elif began and text.startswith("LAB-RESULT moved"):
                found.append((began, at))
                began = None
    return sorted(found)


def pings(lines_of_hosts, out):
    """When answers came, for each host and each of its `ping`s, by the clock that stamps the consoles."""
    found = []
    for name, lines in lines_of_hosts.items():
        clocks = [at - float(match[1]) for at, text in lines if (match := re.match(r"LAB-CLOCK ([\d.]+)$", text))]
        for file in sorted((out / name).glob("ping-*")) if clocks else []:
            answers = re.findall(r"^\[([\d.]+)\] \d+ bytes from", file.read_text(), re.M)
            # A console may be slow: the least that a line needed is nearest.
            found.append([float(at) + min(clocks) for at in answers])
    return found


def longest_gap(times, moves):
    """The longest time between two of `times` while the guest was moved."""
    gaps = [later - at for at, later in zip(times, times[1:]) if any(later > began and at < over for began, over in moves)]
    return max(gaps, default=float("nan"))


def figures(lines_of_hosts, out):
    """What is compared with another VMM's: the longest gaps while the guest was moved, of pings and of heartbeats, and
    the downtime as it was said, of all moves and from both hosts."""
    said = "\n".join(text for lines in lines_of_hosts.values() for _, text in lines if text.startswith("LAB-RESULT"))
    longest = lambda pattern: max(map(float, re.findall(pattern, said)), default=float("nan"))
    while_moved = moves(lines_of_hosts)
    return {
        "ping gap, s": max((longest_gap(times, while_moved) for times in pings(lines_of_hosts, out)), default=float("nan")),
        "heartbeat gap, s": longest_gap(beat_times(lines_of_hosts), while_moved),
        "downtime said, ms": longest(r"downtime .*total_ms=([\d.]+)"),
        "in all, s": longest(r"moved total_s=([\d.]+)"),
        "clock, ms": longest(r"change_ms=-?([\d.]+)"),
    }


def disk(image):
    """What is wrong with the guest's data disk when the guest has powered off: its file system is whole, and
    each file is the one that the guest wrote last."""
    if subprocess.run(["/sbin/e2fsck", "-fn", image], capture_output=True).returncode != 0:
        return ["the file system of the data disk is damaged"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["/sbin/debugfs", "-R", f"rdump / {folder}", image], check=True, capture_output=True)
        files = Path(folder)
        if not (files / "digests").exists():
            return ["the guest has left no list of its files"]
        said = [line.split() for line in (files / "digests").read_text().splitlines()]
        wrong = [name for digest, name in said if hashlib.md5((files / name).read_bytes()).hexdigest() != digest]
    return [f"file {name} on the data disk is not what the guest wrote" for name in wrong] or ([] if said else ["the guest wrote no files"])
