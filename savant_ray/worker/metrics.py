"""A run's numbers among Ray's metrics: what each worker's events say, with the labels `run` and `rank`.

Ray collects them from the worker's memory every few seconds, in a thread of its own, and offers them to Prometheus
on each node, as `ray_savant_…`; a gauge that nobody sets for two collections is gone (Ray 2.60), so that all are set
again and again: a validation's figure holds until the next one. Figures of a step are rank 0's, as its event is; each
rank has its own memory, its own wait for data and the micro-batches that it skipped.
"""

from __future__ import annotations

import hashlib
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeVar

from ray.util.metrics import Counter, Gauge

from savant_ray.events import (
    AttemptStarted,
    CheckpointFailed,
    CheckpointSaved,
    Event,
    LogicScored,
    MicroBatchSkipped,
    StepDone,
    ValidationDone,
)

Share = TypeVar("Share")
LABELS = ("run", "rank")
MOST_CHARACTERS = 100
REPEAT_SECONDS = 1.0  # Ray collects every 10 s, and never more often than this


@dataclass(frozen=True)
class Metric:
    """A number that an event sets, or that it adds up if `counts`."""

    name: str
    event: type[Event]
    field: str  # of the event, None in it = unknown; "" = the event itself is counted
    description: str
    counts: bool = False

    @property
    def exported(self) -> str:
        """Its name in Prometheus."""
        return f"ray_{self.name}_total" if self.counts else f"ray_{self.name}"

    def value(self, event: Event) -> float | None:
        """What the event says of it."""
        return attrgetter(self.field)(event) if self.field else 1


METRICS = (
    Metric("savant_step", StepDone, "step", "Optimizer steps done"),
    Metric("savant_loss", StepDone, "train_loss", "Training loss of the step, nats per token"),
    Metric("savant_learning_rate", StepDone, "learning_rate", "Learning rate of the step"),
    Metric("savant_grad_norm", StepDone, "grad_norm", "Gradient norm before clipping"),
    Metric("savant_tokens", StepDone, "tokens", "Target tokens that these workers trained on", counts=True),
    Metric("savant_tokens_per_second", StepDone, "tokens_per_second", "Target tokens per second of the step"),
    Metric("savant_share_of_peak", StepDone, "share_of_peak", "Useful FLOPs over what the device can do"),
    Metric("savant_step_seconds", StepDone, "step_seconds", "Duration of the step"),
    Metric("savant_compute_seconds", StepDone, "compute_seconds", "Of the step, forward and backward passes"),
    Metric("savant_reduce_seconds", StepDone, "reduce_seconds", "Of the step, adding up gradients over all ranks"),
    Metric("savant_update_seconds", StepDone, "update_seconds", "Of the step, the optimizer's update"),
    Metric("savant_data_wait_seconds", StepDone, "data_wait_seconds", "Wait for the data of the step"),
    Metric("savant_memory_gb", StepDone, "memory_gb", "GiB: of a GPU the peak since the last step, else resident"),
    Metric("savant_skipped_updates", StepDone, "update_skipped", "Steps without a finite gradient", counts=True),
    Metric("savant_skipped_micro_batches", MicroBatchSkipped, "", "Micro-batches without a finite loss", counts=True),
    Metric("savant_validation_loss", ValidationDone, "validation_loss", "Loss on held-out text, nats per token"),
    Metric("savant_last_loop_residual", ValidationDone, "last_residual", "How much the last loop changes the stream"),
    Metric("savant_token_cosine", ValidationDone, "last_cosine", "Mean cosine between tokens; near 1: collapsed"),
    Metric("savant_logic_score", LogicScored, "score", "Share of logic problems answered right"),
    Metric("savant_checkpoint_seconds", CheckpointSaved, "seconds", "Until the checkpoint was complete"),
    Metric("savant_checkpoint_stall_seconds", CheckpointSaved, "stall_seconds", "Of them training stood still"),
    Metric("savant_failed_checkpoints", CheckpointFailed, "", "Checkpoints that could not be written", counts=True),
    Metric("savant_workers", AttemptStarted, "workers", "Workers of this launch"),
)
MEMORY, DATA_WAIT = "savant_memory_gb", "savant_data_wait_seconds"  # of each rank


class RunMetrics:
    """One per worker. What goes wrong with it ends it, and not the training."""

    def __init__(self, run: str, rank: int) -> None:
        self._meters: dict[str, Gauge | Counter] = {}
        self._newest: dict[str, float] = {}  # of the gauges
        self._rank = rank
        with suppress(Exception):
            labels = {"run": ascii_name(run), "rank": str(rank)}
            self._meters = {metric.name: _meter(metric, labels) for metric in METRICS}
        threading.Thread(target=self._repeat, name="metrics", daemon=True).start()

    def observe(self, event: Event) -> None:
        """Takes over what the event says; a few microseconds, no waiting."""
        for metric in METRICS:
            if type(event) is metric.event:
                self._take(metric.name, metric.value(event))

    def watched(self, shares: Iterable[Share], memory_gb: Callable[[], float]) -> Iterator[Share]:
        """The shares of the steps, one by one; rank 0's own figures come with its events."""
        iterator = iter(shares)
        while True:
            started = time.perf_counter()
            try:
                share = next(iterator)
            except StopIteration:
                return
            if self._rank != 0:
                self._take(DATA_WAIT, time.perf_counter() - started)
            yield share
            if self._rank != 0:
                with suppress(Exception):
                    self._take(MEMORY, memory_gb())

    def _take(self, name: str, value: float | None) -> None:
        meter = self._meters.get(name)
        try:
            if isinstance(meter, Gauge) and value is not None:
                self._newest[name] = value
                meter.set(value)
            elif isinstance(meter, Counter) and value:
                meter.inc(int(value))
        except Exception:  # whatever Ray's metrics run into
            self._meters = {}

    def _repeat(self) -> None:
        while self._meters:
            time.sleep(REPEAT_SECONDS)
            for name, value in list(self._newest.items()):
                self._take(name, value)


def ascii_name(run: str) -> str:
    """Return the run's name as Ray accepts it: of at most 100 printable ASCII characters.

    A name that has to be changed ends in a hash of the original, so that different names stay different.
    """
    if run.isascii() and run.isprintable() and len(run) <= MOST_CHARACTERS:
        return run
    plain = unicodedata.normalize("NFKD", run).encode("ascii", "ignore").decode()
    plain = "".join(character for character in plain if character.isprintable()).strip()
    digest = hashlib.sha256(run.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{plain[: MOST_CHARACTERS - len(digest) - 1]}-{digest}".removeprefix("-")


def _meter(metric: Metric, labels: dict[str, str]) -> Gauge | Counter:
    meter = (Counter if metric.counts else Gauge)(metric.name, metric.description, LABELS)
    meter.set_default_tags(labels)
    return meter
