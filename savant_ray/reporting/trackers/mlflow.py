"""MLflow: each run is one MLflow run in the experiment `savant_ray`; samples are artifacts."""

from __future__ import annotations

import logging
import os
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

from savant_ray.events import SampleGenerated
from savant_ray.reporting.tensorboard import numbers
from savant_ray.reporting.trackers.tracking import Line

EXPERIMENT = "savant_ray"
IDENTITY = "savant_ray.identity"
LAST_STEP_METRICS = {  # by kind of line: a metric that all lines of this kind have
    "step": "step/learning_rate",
    "validation": "validation/seconds",
    "score": "score/score",
    "checkpoint": "checkpoint/seconds",
}
MAX_METRICS = 1000  # that MLflow accepts in one request


class Mlflow:
    """A `Tracker` that connects when it is opened."""

    def __init__(self, address: str, run: str) -> None:
        self._address, self._name = address, run

    def open(self, identity: str, settings: dict[str, Any]) -> dict[str, int]:
        """See `Tracker`. The settings become parameters of a new run."""
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the default of 7 takes minutes
        for library in ("mlflow", "alembic"):
            logging.getLogger(library).setLevel(logging.WARNING)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient(tracking_uri=self._address)
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        experiment_id = self._client.create_experiment(EXPERIMENT) if experiment is None else experiment.experiment_id
        existing = self._client.search_runs([experiment_id], f"tags.`{IDENTITY}` = '{identity}'", max_results=1)
        if existing:
            run = existing[0]
            self._client.update_run(run.info.run_id, status="RUNNING")
        else:
            run = self._client.create_run(experiment_id, run_name=self._name, tags={IDENTITY: identity})
        self._id = run.info.run_id
        if not run.data.params:  # also if the server failed after it had created the run
            self._client.log_batch(self._id, params=[Param(name, str(value)) for name, value in settings.items()])
        return self._last_steps() if existing else {}

    def send(self, lines: list[Line]) -> None:
        """See `Tracker`."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, round(1000 * datetime.fromisoformat(line["time"]).timestamp()), line["step"])
            for line in lines
            for name, value in numbers(line).items()
        ]
        for start in range(0, len(metrics), MAX_METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + MAX_METRICS])
        for line in lines:
            if line["event"] == SampleGenerated.kind:
                self._client.log_text(self._id, f"{line['prompt']}{line['text']}", _artifact(line["step"]))

    def close(self, finished: bool) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")

    def _last_steps(self) -> dict[str, int]:
        samples = [file.path for file in self._client.list_artifacts(self._id, "samples")]
        sample_steps = (int(PurePosixPath(path).stem.removeprefix("step_")) for path in samples)  # see `_artifact`
        last_steps = {SampleGenerated.kind: max(sample_steps, default=-1)}
        for kind, metric in LAST_STEP_METRICS.items():
            steps = [value.step for value in self._client.get_metric_history(self._id, metric)]
            last_steps[kind] = max(steps, default=-1)
        return last_steps


def _artifact(step: int) -> str:
    return f"samples/step_{step:08}.txt"
