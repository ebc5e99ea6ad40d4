"""What workers tell the driver: small frozen facts in the past tense.

An event is the one record from which the console, `training_log.txt`, `metrics.jsonl` and `samples.jsonl` derive.
Fields are plain numbers, strings, tuples and dicts of them, so that an event survives JSON.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Event:
    """A fact; `kind` is its name in `metrics.jsonl`."""

    kind: ClassVar[str]

    def to_record(self) -> dict[str, Any]:
        """The event as one JSON object, `"event"` first."""
        return {"event": self.kind, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class TextCounts:
    """What a text came to."""

    path: str
    documents: int
    tokens: int
    sequences: int
    padding: int  # tokens
    bad_lines: int


@dataclass(frozen=True, kw_only=True)
class DataPrepared(Event):
    """Training and validation text are tokenised and packed."""

    kind = "data"
    sources: tuple[TextCounts, ...]
    validation: TextCounts


@dataclass(frozen=True, kw_only=True)
class WorkersStarted(Event):
    """The workers have found room in the cluster and begin to build the model."""

    kind = "workers"


@dataclass(frozen=True, kw_only=True)
class WorkersLost(Event):
    """A worker failed or its node is gone, so that the others ended too; Ray Train starts all of them again."""

    kind = "workers_lost"
    text: str  # whose failure it was


@dataclass(frozen=True, kw_only=True)
class AttemptStarted(Event):
    """The workers of one launch are up and the model is built."""

    kind = "attempt"
    step: int  # updates done before it; 0 = from the beginning
    workers: int
    device: str  # "cpu" or the GPU's name
    parameters: int
    max_steps: int
    effective_batch: int  # sequences per step
    validates_first: bool  # at `step`, which was done before but may have been cut short
    notes: tuple[str, ...] = ()  # what the user should know: no compiler, smaller card than the cap, …
    precision: str = ""  # that is computed in
    threads: int = 0  # of a worker
    vram_limit_gb: float | None = None  # GiB; None = nothing is capped
    versions: dict[str, str] = field(default_factory=dict)  # of python, torch and ray
    settings: dict[str, Any] = field(default_factory=dict)  # section -> setting -> value


@dataclass(frozen=True, kw_only=True)
class AttemptEnded(Event):
    """The workers of one launch are through, or were stopped and have saved."""

    kind = "end"
    step: int
    finished: bool  # trained to `training.max_steps`
    saved_step: int  # of the newest checkpoint; 0 = none


@dataclass(frozen=True, kw_only=True)
class RunResumed(Event):
    """Training goes on from a checkpoint, or from the weights of another run (`run.init_from`)."""

    kind = "resume"
    step: int
    path: str
    note: str = ""
    warnings: tuple[str, ...] = ()  # what could not be taken over

    def to_record(self) -> dict[str, Any]:
        """As every event, but the path is called `from` in the record."""
        record = super().to_record()
        record["from"] = record.pop("path")
        return record


@dataclass(frozen=True, kw_only=True)
class StepDone(Event):
    """One optimizer step over all workers."""

    kind = "step"
    step: int  # 1-based: the number of updates done
    train_loss: float  # nats per target token over the whole effective batch
    learning_rate: float
    grad_norm: float  # before clipping
    tokens: int  # target tokens of this step, all workers
    tokens_per_second: float
    skipped_micro_batches: int
    micro_batch_size: int
    memory_gb: float  # peak since the last step on rank 0, GiB; on the CPU the resident size
    data_wait_seconds: float
    compute_seconds: float  # forward and backward passes of rank 0
    reduce_seconds: float  # adding up gradients, and waiting for the slowest rank
    update_seconds: float
    step_seconds: float  # all of it; what a checkpoint stalls is told with the checkpoint
    share_of_peak: float | None = None  # useful FLOPs of rank 0 / (seconds * its matmul peak); None = unknown
    update_skipped: bool = False  # the gradient norm was not finite


@dataclass(frozen=True, kw_only=True)
class ValidationDone(Event):
    """The loss on held-out text."""

    kind = "validation"
    step: int
    validation_loss: float  # nats per target token
    bits_per_byte: float
    weights_moved: float | None  # share of weights (of rows with a gradient) changed since the last one, or the start
    seconds: float
    residuals: tuple[float, ...] = ()  # of each loop: how much it changes the stream, |s_k+1 - s_k| / |s_k|
    cosines: tuple[float, ...] = ()  # after each loop: mean cosine between two tokens; near 1 they have collapsed

    @property
    def last_residual(self) -> float | None:
        """Of the last loop."""
        return self.residuals[-1] if self.residuals else None

    @property
    def last_cosine(self) -> float | None:
        """After the last loop."""
        return self.cosines[-1] if self.cosines else None


@dataclass(frozen=True, kw_only=True)
class LogicScored(Event):
    """Logic problems answered greedily: the share of exact matches, and within what it lies at 95 % confidence."""

    kind = "score"
    step: int
    score: float
    n: int
    low: float
    high: float
    templates: dict[str, dict[str, float]]  # name -> {"score": …, "n": …}; new wordings apart, not in `score`
    final: bool  # the whole suite, after the last step
    seconds: float


@dataclass(frozen=True, kw_only=True)
class SampleGenerated(Event):
    """An answer to `validation.prompt`."""

    kind = "sample"
    step: int
    prompt: str
    text: str
    seconds: float
    logic_score: float | None = None  # of this validation's problems


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    """A complete checkpoint lies in the run folder."""

    kind = "checkpoint"
    step: int
    path: str
    reason: str  # "periodic", "final", "stop" or "taken over"
    seconds: float  # until it was complete
    stall_seconds: float = 0.0  # of them training stood still


@dataclass(frozen=True, kw_only=True)
class CheckpointFailed(Event):
    """A checkpoint could not be written; the older ones are whole."""

    kind = "checkpoint_failure"
    step: int
    text: str


@dataclass(frozen=True, kw_only=True)
class MicroBatchSkipped(Event):
    """A micro-batch whose loss was not finite touched nothing."""

    kind = "skip"
    step: int
    rank: int
    loss: str  # "nan", "inf" or "-inf"
    positions: tuple[int, ...]  # global positions of its sequences
    documents: tuple[str, ...] = ()  # "train.jsonl:17": file and line of each that lies in them


@dataclass(frozen=True, kw_only=True)
class Notice(Event):
    """Something the user should read once."""

    kind = "notice"
    text: str


@dataclass(frozen=True, kw_only=True)
class RunFailed(Event):
    """A worker ended the run with an error of `savant_ray.errors`."""

    kind = "failure"
    error: str  # class name
    text: str
    exit_code: int
