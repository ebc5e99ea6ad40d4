"""Events and numbers in words: the one place that formats them, for the terminal and the log alike."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from functools import singledispatch

from savant_ray.events import (
    AttemptStarted,
    CheckpointFailed,
    CheckpointSaved,
    DataPrepared,
    Event,
    LogicScored,
    MicroBatchSkipped,
    Notice,
    RunResumed,
    SampleGenerated,
    StepDone,
    ValidationDone,
    WorkersLost,
)

MIB = 1 << 20
DOCUMENTS_TO_NAME = 3
SHARE_OF_WAITING_TO_MENTION = 0.01


@singledispatch
def describe(event: Event) -> str:
    """The event as lines of text; empty if there is nothing to say about it."""
    return ""


@describe.register
def _(event: AttemptStarted) -> str:
    workers = "1 worker" if event.workers == 1 else f"{event.workers} workers"
    first = (
        f"training {event.parameters:,} parameters on {workers} ({event.device}): "
        f"{event.step:,} of {event.max_steps:,} steps done, {event.effective_batch:,} sequences a step"
    )
    return "\n".join([first, *(f"note: {note}" for note in event.notes)])


@describe.register
def _(event: DataPrepared) -> str:
    tokens = sum(source.tokens for source in event.sources)
    sequences = sum(source.sequences for source in event.sources)
    padding = sum(source.padding for source in event.sources)
    return (
        f"training text: {sum(source.documents for source in event.sources):,} documents, {tokens:,} tokens in "
        f"{sequences:,} sequences ({padding / (tokens + padding):.2%} padding); "
        f"validation text: {event.validation.documents:,} documents, {event.validation.tokens:,} tokens"
    )


@describe.register
def _(event: RunResumed) -> str:
    start = f"resuming from {event.path}" if event.step else f"starting from the weights of {event.path}"
    first = f"{start} ({event.note})" if event.note else start
    return "\n".join([first, *(f"WARNING: {warning}" for warning in event.warnings)])


@describe.register
def _(event: ValidationDone) -> str:
    moved = "" if event.weights_moved is None else f" · {percent(event.weights_moved)} of the weights moved"
    return (
        f"validation at step {event.step:,}: loss {event.validation_loss:.4f} · {event.bits_per_byte:.3f} bits per byte"
        f"{moved} · {duration(event.seconds)}"
    )


@describe.register
def _(event: LogicScored) -> str:
    all_of = "all " if event.final else ""
    first = (
        f"logic at step {event.step:,}: {percent(event.score)} of {all_of}{event.n:,} held-out problems right "
        f"({percent(event.low)} – {percent(event.high)}) · {duration(event.seconds)}"
    )
    if not event.final:
        return first
    rows = (f"  {name}: {percent(each['score'])} of {each['n']:.0f}" for name, each in event.templates.items())
    return "\n".join([first, *rows])


@describe.register
def _(event: SampleGenerated) -> str:
    prompt = "\n".join(f"    {line}" for line in event.prompt.split("\n"))
    answer = "\n".join(f"  > {line}" for line in (event.text or "(nothing)").split("\n"))
    return f"sample at step {event.step:,} · {duration(event.seconds)}\n{prompt}\n{answer}"


@describe.register
def _(event: CheckpointSaved) -> str:
    reason = "" if event.reason == "periodic" else f" ({event.reason})"
    return f"saved step_{event.step}{reason} · {duration(event.seconds)}"


@describe.register
def _(event: CheckpointFailed) -> str:
    return (
        f"WARNING: step {event.step:,} could not be saved: {event.text}. Training goes on and tries again at the next "
        "checkpoint; the older ones are whole. Free some space, or mend the storage."
    )


@describe.register
def _(event: MicroBatchSkipped) -> str:
    return (
        f"step {event.step:,}: a micro-batch of worker {event.rank} had loss {event.loss} and was skipped "
        f"(positions {', '.join(str(position) for position in event.positions)}){_first_of(event.documents)}"
    )


def _first_of(documents: Sequence[str]) -> str:
    """The record has them all."""
    named = ", ".join(documents[:DOCUMENTS_TO_NAME])
    more = len(documents) - DOCUMENTS_TO_NAME
    return (f"; documents: {named}" if named else "") + (f" and {more:,} more, see metrics.jsonl" if more > 0 else "")


@describe.register
def _(event: WorkersLost) -> str:
    return f"WARNING: {event.text}; the steps since the last checkpoint are done again"


@describe.register
def _(event: Notice) -> str:
    return event.text


def step_label(step: int, max_steps: int) -> str:
    """How far training is."""
    return f"step {step:,}/{max_steps:,}"


def step_figures(event: StepDone, seconds_left: float | None) -> str:
    """A step's numbers in one line."""
    parts = [
        f"loss {event.train_loss:.4f}",
        f"rate {event.learning_rate:.2e}",
        f"{event.tokens_per_second:,.0f} tokens/s",
        *_share_of_peak(event),
        f"{event.memory_gb:.1f} GiB",
    ]
    waiting = event.data_wait_seconds / event.step_seconds if event.step_seconds else 0.0
    if waiting > SHARE_OF_WAITING_TO_MENTION:
        parts.append(f"{percent(waiting)} waiting for data")
    if event.skipped_micro_batches:
        parts.append(f"{event.skipped_micro_batches} micro-batches skipped")
    if seconds_left is not None:
        parts.append(f"{duration(seconds_left)} left")
    return " · ".join(parts)


def skipped_update(event: StepDone) -> str:
    """A step that changed nothing."""
    return f"WARNING: step {event.step:,} changed nothing: its gradient norm was {event.grad_norm}"


def step_panel(event: StepDone, trend: str, skipped: int, limit_gb: float | None, seconds_left: float | None) -> str:
    """A step's numbers in two lines, for a display that is looked at; `skipped` micro-batches in this launch."""
    learning = [
        f"loss {event.train_loss:.4f}" + (f" {trend}" if trend else ""),
        f"rate {event.learning_rate:.2e}",
        f"gradient norm {event.grad_norm:.2f}",
    ]
    memory = f"{event.memory_gb:.1f} GiB" if limit_gb is None else f"{event.memory_gb:.1f} of {limit_gb:g} GiB"
    speed = [f"{event.tokens_per_second:,.0f} tokens/s", *_share_of_peak(event), memory]
    if skipped:
        speed.append(f"{skipped:,} skipped")
    if seconds_left is not None:
        speed.append(f"{duration(seconds_left)} left")
    return " · ".join(learning) + "\n" + " · ".join(speed)


def _share_of_peak(event: StepDone) -> list[str]:
    return [] if event.share_of_peak is None else [f"{percent(event.share_of_peak)} of peak"]


def progress_figures(done: float, total: float, unit: str) -> str:
    """How much of a preparation is done; bytes are shown in MiB."""
    scale, name, digits = (MIB, "MiB", 1) if unit == "bytes" else (1, unit, 0)
    share = f"{percent(done / total)}, " if total else ""
    return f"{share}{done / scale:,.{digits}f} of {total / scale:,.{digits}f} {name}"


def percent(share: float) -> str:
    """`12 %`, with a decimal where it matters."""
    return f"{100 * share:.1f} %" if 0 < share < 0.1 or 0.9 < share < 1 else f"{100 * share:.0f} %"


def byte_size(n_bytes: float) -> str:
    """`812 bytes`, `45.1 KB`, `1.23 GB`: powers of 1,000, three digits."""
    for unit, factor in _BYTE_UNITS:
        if n_bytes >= factor:
            amount = n_bytes / factor
            return f"{amount:,.{2 if amount < 10 else 1 if amount < 100 else 0}f} {unit}"
    return f"{n_bytes:.0f} bytes"


_BYTE_UNITS = [("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)]


def duration(seconds: float) -> str:
    """Two units at most: `3.2 s`, `12 min 5 s`, `3 h 20 min`, `2 d 4 h`."""
    if not math.isfinite(seconds):
        return "unknown time"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for large, small, large_name, small_name in _UNITS:
        if whole >= large:
            rest = f" {whole % large // small} {small_name}" if whole % large >= small else ""
            return f"{whole // large} {large_name}{rest}"
    return f"{whole} s"


_UNITS = [(86_400, 3_600, "d", "h"), (3_600, 60, "h", "min"), (60, 1, "min", "s")]


def printable(text: str) -> str:
    """The text with its control characters spelt out: a model's answer must not steer the reader's terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in _UNSEEN else _spelt(c) for c in text)


_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format (also right-to-left overrides), surrogate, line breaks


def _spelt(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
