"""Launches as places on a strip: time flows evenly while a run is trained, and a pause takes little room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from savant_ray.reporting.page.history import Launch

LONGEST_PAUSE = 0.03  # of the time trained
SHORTEST = 0.004  # of the strip: what is still seen


@dataclass(frozen=True)
class Stretch:
    """A launch on the strip; places in percent of its width."""

    launch: Launch
    left: float
    width: float
    checkpoints: tuple[tuple[float, int], ...]  # (place, step)


def timeline(launches: Sequence[Launch]) -> list[Stretch]:
    """Where each launch and its checkpoints lie."""
    trained = sum(launch.seconds for launch in launches) or 1.0
    widths = [max(launch.seconds / trained, SHORTEST) for launch in launches]
    pauses = [
        min(max(after.started - before.ended, 0.0) / trained, LONGEST_PAUSE) for before, after in pairwise(launches)
    ]
    total = sum(widths) + sum(pauses)
    stretches, left = [], 0.0
    for launch, width, pause in zip(launches, widths, [*pauses, 0.0], strict=False):
        places = [(left + width * _share(launch, time), step) for time, step in launch.checkpoints]
        marks = tuple((100 * place / total, step) for place, step in places)
        stretches.append(Stretch(launch, 100 * left / total, 100 * width / total, marks))
        left += width + pause
    return stretches


def _share(launch: Launch, time: float) -> float:
    """How much of the launch had passed."""
    return min(1.0, (time - launch.started) / launch.seconds) if launch.seconds > 0 else 1.0
