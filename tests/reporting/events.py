"""Events with plausible numbers, and a record made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from savant_ray.events import (
    AttemptStarted,
    CheckpointSaved,
    DataPrepared,
    Event,
    LogicScored,
    SampleGenerated,
    SpikeFound,
    StepDone,
    TextCounts,
    ValidationDone,
)
from savant_ray.reporting.record import Record


def prepared(**changes: Any) -> DataPrepared:
    """Return the event of prepared text; `changes` are those of the counts of the training text."""
    fields: dict[str, Any] = {"documents": 1234, "tokens": 99_000, "sequences": 99, "padding": 1000, "bad_lines": 7}
    fields |= {"filtered": 5, "duplicates": 3, "repeated": 4, "trained_tokens": 33_000, "cut_documents": 12}
    fields |= {"shortest": 9, "longest": 4321, "lengths": {"8 to 15": 3, "16 to 31": 1231}}
    fields["first_bad_lines"] = ("train.jsonl line 17: not JSON: <b>",)
    fields["examples"] = ((("Question: 1 + 1?\nAnswer:", False), (" <2>", True)), (("text " * 99, True),))
    fields |= {"fraction": 0.8, "steps_per_epoch": 0.64}
    validation = TextCounts("val.jsonl", documents=12, tokens=990, sequences=1, padding=10, bad_lines=0)
    return DataPrepared(sources=(TextCounts("train.jsonl", **(fields | changes)),), validation=validation)


def attempt(step: int = 0, max_steps: int = 1000, **changes: Any) -> AttemptStarted:
    fields: dict[str, Any] = {"workers": 1, "device": "cpu", "parameters": 1_234_567, "effective_batch": 192}
    fields["validates_first"] = False
    return AttemptStarted(step=step, max_steps=max_steps, **(fields | changes))


def step_done(step: int, **changes: Any) -> StepDone:
    fields: dict[str, Any] = {
        "train_loss": 6.3915,
        "learning_rate": 2e-5,
        "grad_norm": 0.91,
        "tokens": 190_000,
        "tokens_per_second": 12_345.6,
        "skipped_micro_batches": 0,
        "micro_batch_size": 12,
        "memory_gb": 3.21,
        "data_wait_seconds": 0.0,
        "compute_seconds": 1.8,
        "reduce_seconds": 0.1,
        "update_seconds": 0.1,
        "step_seconds": 2.0,
    }
    return StepDone(step=step, **(fields | changes))


def spike(step: int, **changes: Any) -> SpikeFound:
    fields: dict[str, Any] = {"train_loss": 9.5, "loss_limit": 6.75, "grad_norm": 0.9, "grad_norm_limit": 2.5}
    fields |= {"update_skipped": False, "first_position": 192 * (step - 1), "n_sequences": 192}
    fields["documents"] = tuple(f"train.jsonl:{line}" for line in range(1, 6))
    return SpikeFound(step=step, **(fields | changes))


def validation(step: int, **changes: Any) -> ValidationDone:
    fields: dict[str, Any] = {"validation_loss": 5.1234, "bits_per_byte": 2.1, "weights_moved": 0.971, "seconds": 3.2}
    return ValidationDone(step=step, **(fields | changes))


def score(step: int) -> LogicScored:
    each = {"sum": {"score": 0.5, "n": 30}, "product": {"score": 0.25, "n": 30}}
    return LogicScored(step=step, score=0.375, n=60, low=0.26, high=0.5, templates=each, final=False, seconds=2.0)


def sample(step: int, text: str = " five\nplus ten", prompt: str = "Question: X?\nAnswer:") -> SampleGenerated:
    return SampleGenerated(step=step, prompt=prompt, text=text, seconds=1.5)


def checkpoint(step: int, reason: str = "periodic") -> CheckpointSaved:
    return CheckpointSaved(step=step, path=f"/runs/x/step_{step}", reason=reason, seconds=0.4)


def write(folder: Path, *events: Event) -> Path:
    """Write a run folder with the record of these events and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    record = Record(folder)
    for event in events:
        record.append(event)
    record.close()
    return folder


def idle(_: Path) -> bool:
    """Return False: no run is being trained."""
    return False
