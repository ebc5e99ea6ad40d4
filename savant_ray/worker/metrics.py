"""Metrics of a run in Ray's metrics system, from each worker's events, with the labels `run` and `rank`.

Ray collects them from the worker process, every 10 s by default, in a thread of its own and exports them to Prometheus on
each node as `ray_savant_…`. It drops a gauge that was not set between two collections (Ray 2.60), so all gauges are set
again periodically; a validation loss therefore stays until the next one. Metrics of a step come from rank 0, which emits
its event; every rank has its own memory, wait for data and skipped micro-batches.
"""

from __future__ import annotations

import hashlib
import threading
import time
import unicodedata
from contextlib import suppress
from dataclasses import dataclass

from ray.util.metrics import Counter, Gauge

from savant_ray.events import (
    AttemptStarted,
    CheckpointFailed,
    CheckpointSaved,
    Event,
    LogicScored,
    MicroBatchSkipped,
    Rewound,
    SpikeFound,
    StepDone,
    ValidationDone,
)

LABELS = ("run", "rank")
MAX_LABEL_CHARACTERS = 100
REPEAT_SECONDS = 1.0  # shorter than the interval of Ray's collections, 10 s by default


@dataclass(frozen=True)
class Metric:
    """A metric of Ray: a gauge that is set to a field of an event, or a counter that the field is added to."""

    name: str
    event: type[Event]
    field: str  # of the event; a value of None leaves the metric unchanged; "" counts the events
    description: str
    is_counter: bool = False

    @property
    def prometheus_name(self) -> str:
        """Return its name in Prometheus."""
        return f"ray_{self.name}_total" if self.is_counter else f"ray_{self.name}"

    def value(self, event: Event) -> float | None:
        """Return its value in the event, or None if that is unknown."""
        return getattr(event, self.field) if self.field else 1


METRICS = (
    Metric("savant_step", StepDone, "step", "Optimizer steps done"),
    Metric("savant_loss", StepDone, "train_loss", "Training loss of the step, nats per token"),
    Metric("savant_learning_rate", StepDone, "learning_rate", "Learning rate of the step"),
    Metric("savant_grad_norm", StepDone, "grad_norm", "Gradient norm before clipping"),
    Metric("savant_tokens", StepDone, "tokens", "Target tokens that these workers trained on", is_counter=True),
    Metric("savant_tokens_per_second", StepDone, "tokens_per_second", "Target tokens per second of the step"),
    Metric("savant_share_of_peak", StepDone, "share_of_peak", "Useful FLOP/s as a fraction of the device's peak"),
    Metric("savant_step_seconds", StepDone, "step_seconds", "Duration of the step"),
    Metric("savant_compute_seconds", StepDone, "compute_seconds", "Seconds of the step in forward and backward passes"),
    Metric(
        "savant_reduce_seconds",
        StepDone,
        "reduce_seconds",
        "Seconds of the step in the sum of gradients over all workers",
    ),
    Metric(
        "savant_update_seconds",
        StepDone,
        "update_seconds",
        "Seconds of the step in clipping and the optimizer update; on a GPU until the update's kernels are launched",
    ),
    Metric("savant_data_wait_seconds", StepDone, "data_wait_seconds", "Seconds of waiting for the data of the step"),
    Metric(
        "savant_memory_gb",
        StepDone,
        "memory_gb",
        "Memory in GiB: on a GPU the peak since the last step, on a CPU the resident size",
    ),
    Metric(
        "savant_skipped_updates", StepDone, "update_skipped", "Steps that did not change the weights", is_counter=True
    ),
    Metric(
        "savant_skipped_micro_batches", MicroBatchSkipped, "", "Micro-batches without a finite loss", is_counter=True
    ),
    Metric(
        "savant_spikes", SpikeFound, "", "Steps with a loss or gradient norm far above recent ones", is_counter=True
    ),
    Metric("savant_rewinds", Rewound, "", "Returns to a checkpoint because of a spike", is_counter=True),
    Metric("savant_validation_loss", ValidationDone, "validation_loss", "Loss on held-out text, nats per token"),
    Metric(
        "savant_last_loop_residual",
        ValidationDone,
        "last_residual",
        "Relative change of the residual stream in the last loop",
    ),
    Metric(
        "savant_token_cosine",
        ValidationDone,
        "last_cosine",
        "Mean cosine similarity of two tokens' states after the last loop; near 1 all states are alike",
    ),
    Metric("savant_logic_score", LogicScored, "score", "Fraction of logic problems answered correctly"),
    Metric("savant_checkpoint_seconds", CheckpointSaved, "seconds", "Seconds until the checkpoint was complete"),
    Metric(
        "savant_checkpoint_stall_seconds",
        CheckpointSaved,
        "stall_seconds",
        "Seconds for which training waited for the checkpoint",
    ),
    Metric("savant_failed_checkpoints", CheckpointFailed, "", "Checkpoints that could not be written", is_counter=True),
    Metric("savant_workers", AttemptStarted, "workers", "Workers of this attempt"),
)
MEMORY, DATA_WAIT = "savant_memory_gb", "savant_data_wait_seconds"  # set by every rank


class RunMetrics:
    """Sets the metrics of one worker. An error disables the metrics and does not affect training."""

    def __init__(self, run: str, rank: int) -> None:
        self._meters: dict[str, Gauge | Counter] = {}  # Ray's objects by the metric's name
        self._latest: dict[str, float] = {}  # values of the gauges
        with suppress(Exception):
            labels = {"run": ascii_name(run), "rank": str(rank)}
            self._meters = {metric.name: _meter(metric, labels) for metric in METRICS}
        threading.Thread(target=self._repeat, name="metrics", daemon=True).start()

    def observe(self, event: Event) -> None:
        """Update the metrics of an event; takes a few microseconds and does not block."""
        for metric in METRICS:
            if type(event) is metric.event:
                self._update(metric.name, metric.value(event))

    def observe_rank(self, data_wait_seconds: float, memory_gb: float) -> None:
        """Set the metrics that every rank reports for itself."""
        self._update(DATA_WAIT, data_wait_seconds)
        self._update(MEMORY, memory_gb)

    def _update(self, name: str, value: float | None) -> None:
        meter = self._meters.get(name)
        try:
            if isinstance(meter, Gauge) and value is not None:
                self._latest[name] = value
                meter.set(value)
            elif isinstance(meter, Counter) and value:
                meter.inc(int(value))
        except Exception:  # of any kind, from Ray's metrics
            self._meters = {}

    def _repeat(self) -> None:
        while self._meters:
            time.sleep(REPEAT_SECONDS)
            for name, value in list(self._latest.items()):
                self._update(name, value)


def ascii_name(run: str) -> str:
    """Return the run's name in the form that Ray accepts: at most 100 printable ASCII characters.

    A name that has to be changed ends in a hash of the original, so that different names remain different.
    """
    if run.isascii() and run.isprintable() and len(run) <= MAX_LABEL_CHARACTERS:
        return run
    plain = unicodedata.normalize("NFKD", run).encode("ascii", "ignore").decode()
    plain = "".join(character for character in plain if character.isprintable()).strip()
    digest = hashlib.sha256(run.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{plain[: MAX_LABEL_CHARACTERS - len(digest) - 1]}-{digest}".removeprefix("-")


def _meter(metric: Metric, labels: dict[str, str]) -> Gauge | Counter:
    """Register the metric with Ray and return the object that sets it."""
    meter = (Counter if metric.is_counter else Gauge)(metric.name, metric.description, LABELS)
    meter.set_default_tags(labels)
    return meter
