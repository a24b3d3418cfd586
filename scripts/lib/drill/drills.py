"""The list of drills: each is a function with a row of the failure table (docs/failures.md) and its modes."""

from dataclasses import dataclass
from typing import Callable

PRECOPY, HYBRID, POSTCOPY = "precopy", "hybrid", "postcopy"
ALL_MODES = (PRECOPY, HYBRID, POSTCOPY)


@dataclass(frozen=True)
class Drill:
    row: int
    name: str
    about: str
    modes: tuple
    traps: bool  # it needs programs with fault points
    cable: bool  # it needs a cable, and so root
    fast: bool  # part of `scripts/drill ci`
    play: Callable


ALL = []


def drill(row, about, modes=(PRECOPY,), traps=False, cable=False, fast=True):
    """Registers a function that takes a Scene and gives its Story."""

    def register(play):
        name = play.__name__.replace("_", "-")
        ALL.append(Drill(row, name, about, modes, traps, cable, fast, play))
        return play

    return register


def chosen(words):
    """The drills that the words of a command line mean: a row's number, or a drill's name."""
    found = []
    for word in words:
        these = [d for d in ALL if word in (str(d.row), d.name)]
        if not these:
            raise SystemExit(f"drill: there is no row or drill {word} (scripts/drill list)")
        found += [d for d in these if d not in found]
    return found
