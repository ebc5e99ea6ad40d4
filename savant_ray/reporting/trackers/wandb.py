"""Weights & Biases: a project, a run there for each run here; online or not as its own variables say (`WANDB_MODE`)."""

from __future__ import annotations

from typing import Any

from savant_ray.events import SampleGenerated
from savant_ray.reporting.tensorboard import numbers
from savant_ray.reporting.trackers.tracking import TOLD, Line


class Wandb:
    """A `Tracker`; nothing is connected before `open`."""

    def __init__(self, project: str, run: str) -> None:
        self._project, self._name = project, run

    def open(self, identity: str, settings: dict[str, Any]) -> dict[str, int]:
        """See `Tracker`. What one step has to say it takes at once, so that a launch begins behind the last step."""
        import wandb

        quiet = wandb.Settings(silent=True, console="off", x_disable_stats=True)
        self._run = wandb.init(project=self._project, name=self._name, id=identity, resume="allow", settings=quiet)
        self._run.config.update(settings, allow_val_change=True)
        self._last_step = self._run.starting_step - 1
        return dict.fromkeys(TOLD, self._last_step)

    def send(self, lines: list[Line]) -> None:
        """See `Tracker`. It knows no way back: a checkpoint that took its time is told with the step then done."""
        for line in lines:
            told: dict[str, Any] = numbers(line)
            if line["event"] == SampleGenerated.kind:
                told = {"sample": f"{line['prompt']}{line['text']}"}
            self._last_step = max(self._last_step, line["step"])
            self._run.log(told, step=self._last_step)

    def close(self, finished: bool) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=0 if finished else 1)
