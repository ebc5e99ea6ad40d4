"""Events of a run; most are sent by workers to the driver.

`metrics.jsonl` and `samples.jsonl` contain events only; the console and `training_log.txt` also show messages of the driver.
Fields are plain values, tuples and dicts of them, and dataclasses with such fields, so that events can be converted to JSON.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base class of all events; `kind` is the name of the event in `metrics.jsonl`."""

    kind: ClassVar[str]

    def to_record(self) -> dict[str, Any]:
        """Return the event as a JSON object whose first key is `"event"`."""
        return {"event": self.kind, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class TextCounts:
    """Size of a tokenized and packed text."""

    path: str  # name of the file or pattern
    documents: int
    tokens: int  # without padding
    sequences: int
    padding: int  # tokens
    bad_lines: int  # skipped lines
    filtered: int = 0  # documents left out by `filter` and `sample`
    duplicates: int = 0  # documents left out by `data.deduplicate`
    repeated: int = 0  # documents with the text of an earlier one of this or an earlier source, which are trained on
    trained_tokens: int = 0  # tokens that the loss mask does not exclude
    cut_documents: int = 0  # documents in more than one sequence
    shortest: int = 0  # tokens of a document
    longest: int = 0
    lengths: dict[str, int] = field(default_factory=dict)  # number of documents by length in tokens: "256 to 511"
    first_bad_lines: tuple[str, ...] = ()  # file, line and reason
    examples: tuple[tuple[tuple[str, bool], ...], ...] = ()  # document beginnings: [text, whether it is trained on]
    fraction: float = 0.0  # of the sequences of the training text
    steps_per_epoch: float = 0.0  # optimizer steps in which all of its sequences are read once


@dataclass(frozen=True, kw_only=True)
class DataPrepared(Event):
    """Training and validation text were tokenized and packed."""

    kind = "data"
    sources: tuple[TextCounts, ...]  # of each entry of `data.sources`
    validation: TextCounts  # of `data.validation`


@dataclass(frozen=True, kw_only=True)
class WorkersStarted(Event):
    """The workers were placed in the cluster and are building the model."""

    kind = "workers"


@dataclass(frozen=True, kw_only=True)
class WorkersLost(Event):
    """A worker failed or its node was lost; Ray Train restarts all workers."""

    kind = "workers_lost"
    text: str  # which worker failed, and why


@dataclass(frozen=True, kw_only=True)
class WorkerHung(Event):
    """A worker made no progress for too long (`scaling.hang_seconds`) and was killed, so that Ray Train restarts all."""

    kind = "hang"
    rank: int  # of the worker
    after_step: int  # newest finished step
    seconds: float  # without progress
    activity: str  # of the worker: "computing"
    process: str  # its process id, machine and state: "process 123 on host-1, stopped"
    stack: str  # Python stack of all its threads, as py-spy prints it; "" if it could not be read
    text: str  # for the user


@dataclass(frozen=True, kw_only=True)
class AttemptStarted(Event):
    """The workers of an attempt have started, or were restarted after a failure, and have built the model."""

    kind = "attempt"
    step: int  # optimizer steps done before; 0 = a new run
    workers: int  # number of workers
    device: str  # "cpu" or the GPU's name
    parameters: int  # number of weights of the model
    max_steps: int  # `training.max_steps`
    effective_batch: int  # sequences per step
    validates_first: bool  # whether the validation of `step` is repeated, because it may have been cut short
    notes: tuple[str, ...] = ()  # notices for the user: no compiler, GPU smaller than the cap, …
    precision: str = ""  # of the training steps, such as "bf16"
    threads: int = 0  # per worker
    vram_limit_gb: float | None = None  # GiB; None = no cap
    versions: dict[str, str] = field(default_factory=dict)  # of python, torch and ray
    processor: str = ""  # of rank 0, and the vector instructions that PyTorch uses on it
    code: str = ""  # digest of the Python files of savant_ray
    data_fingerprint: str = ""  # of tokenizer, text and mixture
    settings: dict[str, Any] = field(default_factory=dict)  # section -> setting -> value


@dataclass(frozen=True, kw_only=True)
class AttemptEnded(Event):
    """The workers of an attempt have finished, or were stopped and have saved."""

    kind = "end"
    step: int  # optimizer steps done
    finished: bool  # whether `training.max_steps` is reached
    saved_step: int  # step of the newest checkpoint; 0 = none

    @property
    def is_saved(self) -> bool:
        """Whether the last step is saved."""
        return self.saved_step >= self.step


@dataclass(frozen=True, kw_only=True)
class RunResumed(Event):
    """Training resumed from a checkpoint, or started from the weights of another run (`run.init_from`)."""

    kind = "resume"
    step: int  # of the checkpoint; 0 = weights of another run
    path: str  # of the checkpoint
    note: str = ""  # for the user
    warnings: tuple[str, ...] = ()  # what could not be restored

    def to_record(self) -> dict[str, Any]:
        """Return the event as a JSON object in which the path has the key `from`."""
        record = super().to_record()
        record["from"] = record.pop("path")
        return record


@dataclass(frozen=True, kw_only=True)
class StepDone(Event):
    """An optimizer step over all workers."""

    kind = "step"
    step: int  # number of steps done, from 1
    train_loss: float  # nats per target token over the whole effective batch
    learning_rate: float  # of this step
    grad_norm: float  # before clipping
    tokens: int  # target tokens of this step, all workers; not those that the loss mask excludes
    tokens_per_second: float  # target tokens of all workers per second of the step
    skipped_micro_batches: int  # over all workers, because their loss was not finite
    micro_batch_size: int  # sequences per forward and backward pass
    memory_gb: float  # GiB on rank 0: peak GPU memory since the previous step; on a CPU the resident size
    data_wait_seconds: float  # waiting for the sequences of the step
    compute_seconds: float  # forward and backward passes of rank 0
    reduce_seconds: float  # sums over all workers, including the wait for the slowest
    update_seconds: float  # clipping and optimizer update; on a GPU it ends when the update's kernels are launched
    step_seconds: float  # duration of the step, including the wait for data and excluding checkpoints
    share_of_peak: float | None = None  # useful FLOP/s of rank 0 / peak of its matmuls; None: unknown, or loops doubled
    update_skipped: bool = False  # true: the norm was not finite, all tokens were masked, or a spike was skipped


@dataclass(frozen=True, kw_only=True)
class ValidationDone(Event):
    """The loss on held-out text was computed."""

    kind = "validation"
    step: int
    validation_loss: float  # nats per target token
    bits_per_byte: float  # of the held-out text, without the text that the loss mask excludes
    weights_moved: float | None  # fraction changed since the last validation; embeddings of unused tokens are left out
    seconds: float  # duration
    residuals: tuple[float, ...] = ()  # of each loop: relative change of the residual stream, |s_k+1 - s_k| / |s_k|
    cosines: tuple[float, ...] = ()  # after each loop: mean cosine similarity of two tokens; near 1 = collapsed

    @property
    def last_residual(self) -> float | None:
        """Residual of the last loop; None if there is none."""
        return self.residuals[-1] if self.residuals else None

    @property
    def last_cosine(self) -> float | None:
        """Cosine similarity after the last loop; None if there is none."""
        return self.cosines[-1] if self.cosines else None


@dataclass(frozen=True, kw_only=True)
class LogicScored(Event):
    """The logic problems were answered greedily and scored; with the 95 % confidence interval."""

    kind = "score"
    step: int
    score: float  # fraction of correct answers
    n: int  # number of problems, without those in new wordings
    low: float  # lower end of the interval
    high: float  # upper end of the interval
    templates: dict[str, dict[str, float]]  # name -> {"score": …, "n": …}; problems in new wordings count here only
    final: bool  # whether this is the full suite after the last step
    seconds: float  # duration


@dataclass(frozen=True, kw_only=True)
class SampleGenerated(Event):
    """The model completed `validation.prompt`."""

    kind = "sample"
    step: int
    prompt: str
    text: str  # the answer
    seconds: float  # duration
    logic_score: float | None = None  # score of this validation


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    """A checkpoint was saved completely in the run folder."""

    kind = "checkpoint"
    step: int
    path: str  # of its folder
    reason: str  # such as "periodic", "before the decay of the learning rate", "final", "stop" or "copied from …"
    seconds: float  # from the start of the save until it was complete
    stall_seconds: float = 0.0  # part of it during which training was paused


@dataclass(frozen=True, kw_only=True)
class CheckpointFailed(Event):
    """A checkpoint could not be saved; older checkpoints are not affected."""

    kind = "checkpoint_failure"
    step: int
    text: str  # the reason


@dataclass(frozen=True, kw_only=True)
class MicroBatchSkipped(Event):
    """A micro-batch was skipped because its loss was not finite."""

    kind = "skip"
    step: int
    rank: int  # of the worker
    loss: str  # "nan", "inf" or "-inf"
    positions: tuple[int, ...]  # positions of its sequences in the global order
    documents: tuple[str, ...] = ()  # file and line of each document in them: "train.jsonl:17"


@dataclass(frozen=True, kw_only=True)
class SpikeFound(Event):
    """The loss or the gradient norm of a step was far above those of recent steps."""

    kind = "spike"
    step: int
    train_loss: float  # nats per target token
    loss_limit: float  # a loss above it is a spike
    grad_norm: float  # before clipping
    grad_norm_limit: float  # a gradient norm above it is a spike
    update_skipped: bool  # whether the step did not change the weights
    first_position: int  # of its sequences in the global order
    n_sequences: int  # at this and the following positions
    documents: tuple[str, ...] = ()  # file and line of each document in them: "train.jsonl:17"


@dataclass(frozen=True, kw_only=True)
class Rewound(Event):
    """Training went back to the last checkpoint because of a spike, and leaves out its sequences from now on."""

    kind = "rewind"
    step: int  # of the checkpoint; without one, the last step before the spike; later steps are repeated
    spike: SpikeFound  # in a step that is taken again with other sequences


@dataclass(frozen=True, kw_only=True)
class Notice(Event):
    """A message for the user."""

    kind = "notice"
    text: str


@dataclass(frozen=True, kw_only=True)
class RunFailed(Event):
    """An error of `savant_ray.errors` in a worker ended the attempt; errors of the driver have no event."""

    kind = "failure"
    error: str  # class name
    text: str  # message
    exit_code: int  # of the process
