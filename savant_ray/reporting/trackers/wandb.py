"""Weights & Biases: each run is one W&B run in the project; W&B's environment variables such as `WANDB_MODE` apply."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from savant_ray.events import SampleGenerated
from savant_ray.reporting.tensorboard import numbers
from savant_ray.reporting.trackers.tracking import SENT_KINDS, Line


class Wandb:
    """A `Tracker` that connects when it is opened."""

    def __init__(self, project: str, run: str) -> None:
        self._project, self._name = project, run

    def open(self, identity: str, settings: dict[str, Any]) -> dict[str, int]:
        """See `Tracker`. W&B rejects steps before its last one, so only lines after that step are sent."""
        import wandb

        quiet = wandb.Settings(silent=True, console="off", x_disable_stats=True)
        with _no_prompt():
            self._run = wandb.init(project=self._project, name=self._name, id=identity, resume="allow", settings=quiet)
        self._run.config.update(settings, allow_val_change=True)
        self._last_step = self._run.starting_step - 1
        return dict.fromkeys(SENT_KINDS, self._last_step)

    def send(self, lines: list[Line]) -> None:
        """See `Tracker`. W&B rejects earlier steps, so the line of a slow checkpoint is sent with a later step."""
        for line in lines:
            values: dict[str, Any] = numbers(line)
            if line["event"] == SampleGenerated.kind:
                values = {"sample": f"{line['prompt']}{line['text']}"}
            self._last_step = max(self._last_step, line["step"])
            self._run.log(values, step=self._last_step)

    def close(self, finished: bool) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=0 if finished else 1)


@contextmanager
def _no_prompt() -> Iterator[None]:
    """Replace standard input, so that W&B raises an error without an API key instead of asking for one in this thread.

    The prompt would wait forever among the output of the run, and Python aborts at exit if a thread reads standard input.
    """
    stdin = sys.stdin
    with Path(os.devnull).open() as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = stdin
