"""Text of events and numbers for the terminal and the log; the HTML report uses that of numbers."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
import unicodedata
from collections.abc import Collection, Sequence
from functools import singledispatch
from pathlib import Path

from savant_ray.events import (
    AttemptStarted,
    CheckpointFailed,
    CheckpointSaved,
    DataPrepared,
    Event,
    LogicScored,
    MicroBatchSkipped,
    Notice,
    Rewound,
    RunResumed,
    SampleGenerated,
    SpikeFound,
    StepDone,
    ValidationDone,
    WorkerHung,
    WorkersLost,
)
from savant_ray.locations import is_uri

MIB = 1 << 20
MAX_DOCUMENTS = 3  # named in the message about a skipped micro-batch or a spike
MIN_WAITING = 0.01  # of a step's time; a smaller fraction spent waiting for data is not shown


@singledispatch
def describe(event: Event) -> str:
    """Return the event as lines of text; empty if it is not printed."""
    return ""


@describe.register
def _(event: AttemptStarted) -> str:
    workers = "1 worker" if event.workers == 1 else f"{event.workers} workers"
    summary = (
        f"training {event.parameters:,} parameters on {workers} ({event.device}): "
        f"{event.step:,} of {event.max_steps:,} steps done, {event.effective_batch:,} sequences a step"
    )
    return "\n".join([summary, *(f"note: {note}" for note in event.notes)])


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
    summary = f"{start} ({event.note})" if event.note else start
    return "\n".join([summary, *(f"WARNING: {warning}" for warning in event.warnings)])


@describe.register
def _(event: ValidationDone) -> str:
    moved = "" if event.weights_moved is None else f" · {percent(event.weights_moved)} of the weights moved"
    return (
        f"validation at step {event.step:,}: loss {event.validation_loss:.4f} · {event.bits_per_byte:.3f} bits per byte"
        f"{moved} · {duration(event.seconds)}"
    )


@describe.register
def _(event: LogicScored) -> str:
    which = "all " if event.final else ""
    summary = (
        f"logic at step {event.step:,}: {percent(event.score)} of {which}{event.n:,} held-out problems right "
        f"({percent(event.low)} – {percent(event.high)}) · {duration(event.seconds)}"
    )
    if not event.final:
        return summary
    rows = (f"  {name}: {percent(score['score'])} of {score['n']:.0f}" for name, score in event.templates.items())
    return "\n".join([summary, *rows])


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
        f"WARNING: step {event.step:,} could not be saved: {event.text}. Older checkpoints are complete. If training is not "
        "at its end, it continues and saves again at the next checkpoint. Free some space, or repair the storage."
    )


@describe.register
def _(event: MicroBatchSkipped) -> str:
    return (
        f"step {event.step:,}: a micro-batch of worker {event.rank} had loss {event.loss} and was skipped "
        f"(positions {', '.join(str(position) for position in event.positions)}){_named_documents(event.documents)}"
    )


def _named_documents(documents: Sequence[str]) -> str:
    """Return the first documents for a message; the record has all."""
    named = ", ".join(documents[:MAX_DOCUMENTS])
    more = len(documents) - MAX_DOCUMENTS
    return (f"; documents: {named}" if named else "") + (f" and {more:,} more, see metrics.jsonl" if more > 0 else "")


@describe.register
def _(event: SpikeFound) -> str:
    done = "the step did not change the weights" if event.update_skipped else "the weights were updated nevertheless"
    return f"WARNING: {_spike(event)}; {done}{_named_documents(event.documents)}"


@describe.register
def _(event: Rewound) -> str:
    spike = event.spike
    positions = f"{spike.first_position:,} to {spike.first_position + spike.n_sequences - 1:,}"
    return (
        f"WARNING: {_spike(spike)}; training goes back to step {event.step:,}, and from now on the sequences of the spike "
        f"(positions {positions}) are left out{_named_documents(spike.documents)}"
    )


def _spike(event: SpikeFound) -> str:
    """Return which figure of a step is far above those of recent steps."""
    loss, norm = f"loss {event.train_loss:.4f}", f"gradient norm {event.grad_norm:.4g}"
    figures = [f"{loss} is above {event.loss_limit:.4f}"] if event.train_loss > event.loss_limit else []
    if event.grad_norm > event.grad_norm_limit:
        figures.append(f"{norm} is above {event.grad_norm_limit:.4g}")
    return f"step {event.step:,} is a spike: {' and '.join(figures)}, the limit derived from recent steps"


@describe.register
def _(event: WorkerHung) -> str:
    return f"WARNING: {event.text}"


@describe.register
def _(event: WorkersLost) -> str:
    return f"WARNING: {event.text}; the steps since the last checkpoint are repeated"


@describe.register
def _(event: Notice) -> str:
    return event.text


def step_label(step: int, max_steps: int) -> str:
    """Return the progress of training, such as `step 5/1,700`."""
    return f"step {step:,}/{max_steps:,}"


def step_figures(event: StepDone, seconds_left: float | None) -> str:
    """Return a step's figures in one line."""
    parts = [
        f"loss {event.train_loss:.4f}",
        f"rate {event.learning_rate:.2e}",
        f"{event.tokens_per_second:,.0f} tokens/s",
        *_share_of_peak(event),
        f"{event.memory_gb:.1f} GiB",
    ]
    waiting = event.data_wait_seconds / event.step_seconds if event.step_seconds else 0.0
    if waiting > MIN_WAITING:
        parts.append(f"{percent(waiting)} waiting for data")
    if event.skipped_micro_batches:
        parts.append(f"{event.skipped_micro_batches} micro-batches skipped")
    if seconds_left is not None:
        parts.append(f"{duration(seconds_left)} left")
    return " · ".join(parts)


def skipped_update(event: StepDone) -> str:
    """Return a warning about a step without an update."""
    if not event.tokens and not event.skipped_micro_batches:
        return f"WARNING: step {event.step:,} did not change the weights: all of its tokens are masked"
    return f"WARNING: step {event.step:,} did not change the weights: its gradient norm was {event.grad_norm}"


def step_panel(
    event: StepDone, sparkline: str, skipped: int, limit_gb: float | None, seconds_left: float | None
) -> str:
    """Return a step's figures in two lines for a live display.

    `skipped` is the number of micro-batches that were skipped since the workers have started.
    """
    learning = [
        f"loss {event.train_loss:.4f}" + (f" {sparkline}" if sparkline else ""),
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
    """Return the progress of data preparation; bytes are shown in MiB."""
    scale, name, digits = (MIB, "MiB", 1) if unit == "bytes" else (1, unit, 0)
    fraction = f"{percent(done / total)}, " if total else ""
    return f"{fraction}{done / scale:,.{digits}f} of {total / scale:,.{digits}f} {name}"


def percent(fraction: float) -> str:
    """Return `12 %`, with a decimal below 10 % and above 90 %."""
    return f"{100 * fraction:.1f} %" if 0 < fraction < 0.1 or 0.9 < fraction < 1 else f"{100 * fraction:.0f} %"


def figure(value: float | None, digits: int = 4) -> str:
    """Return a number of the record, in which NaN and infinity are None."""
    return "not finite" if value is None else f"{value:.{digits}f}"


def byte_size(n_bytes: float) -> str:
    """Return `812 bytes`, `45.1 KB` or `1.23 GB`: powers of 1,000, three digits."""
    for unit, factor in _BYTE_UNITS:
        if n_bytes >= factor:
            amount = n_bytes / factor
            return f"{amount:,.{2 if amount < 10 else 1 if amount < 100 else 0}f} {unit}"
    return f"{n_bytes:.0f} bytes"


_BYTE_UNITS = [("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)]


def duration(seconds: float) -> str:
    """Return a duration in at most two units: `3.2 s`, `12 min 5 s`, `3 h 20 min`, `2 d 4 h`."""
    if not math.isfinite(seconds):
        return "unknown time"
    if seconds < 10:
        return f"{seconds:.1f} s"
    total = round(seconds)
    for large, small, large_name, small_name in _UNITS:
        if total >= large:
            rest = f" {total % large // small} {small_name}" if total % large >= small else ""
            return f"{total // large} {large_name}{rest}"
    return f"{total} s"


_UNITS = [(86_400, 3_600, "d", "h"), (3_600, 60, "h", "min"), (60, 1, "min", "s")]


def generate_command(run: str) -> str:
    """Return the shell command that generates text with a run, given its folder or URI."""
    return f'{own_command("generate")} --checkpoint {shlex.quote(run)} --prompt "…"'


def own_command(name: str, script: Path = Path(sys.argv[0]), python: Path = Path(sys.executable)) -> str:
    """Return the shell command for a command of this program, such as `savant generate`.

    If the program was started by a script of `jobs/`, the command is the script beside it, if there is one. `savant` is
    written with its path if the shell would not find that of this Python.
    """
    sibling = script.with_name(f"{name}.py")
    if script.parent.name == "jobs" and sibling.is_file():
        return f"{shlex.quote(_shortest_path(python, 'python'))} {shlex.quote(str(sibling))}"
    savant = python.with_name("savant")
    if savant.is_file():
        return f"{shlex.quote(_shortest_path(savant, 'savant'))} {name}"
    return f"{shlex.quote(_shortest_path(python, 'python'))} -m savant_ray.cli {name}"


def next_commands(run: str, folder: Path, known: Collection[str]) -> str:
    """Return what can be done with the trained quickstart: for each `known` command a line and its meaning.

    `run` is the path or URI of the run, `folder` its folder on this machine, which contains its record.
    """
    quoted = shlex.quote(run if is_uri(run) else relative_path(Path(run)))
    question = '"Question: If X = 7 and Y = 12, what is X + Y?\nAnswer: Let\'s think step by step:"'
    rows = [
        ("generate", f"--checkpoint {quoted} --prompt {question}", "answers a question"),
        ("chat", f"{quoted} --conversation", "answers one question after another"),
        ("evaluate", quoted, "asks the 720 problems again"),
        ("report", shlex.quote(relative_path(folder)), "writes a page with curves, samples and settings"),
        ("train", f"--config chat --run.init_from {quoted}", "teaches the model the form of a conversation (1 min)"),
        ("init", "TEXT.jsonl", "writes a settings file for your own text"),
    ]
    return "".join(f"\n  {own_command(name)} {rest}\n      {meaning}" for name, rest, meaning in rows if name in known)


def _shortest_path(program: Path, name: str) -> str:
    """Return how a shell in the working directory starts `program`: by its name, relative path or path.

    The shell's `name` may be missing or another one if the program was started by `make`.
    """
    found = shutil.which(name)
    return name if found is not None and Path(found).parent == program.parent else relative_path(program)


def relative_path(path: Path) -> str:
    """Return a path relative to the working directory, or unchanged if it is not below it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):  # not below the working directory, or that was deleted
        return str(path)


def escape_controls(text: str) -> str:
    """Escape control characters, so that generated text cannot control the terminal."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in _ESCAPED_CATEGORIES else _escaped(c) for c in text
    )


# Of Unicode: control and format characters (such as right-to-left overrides), surrogates, line and paragraph separators.
_ESCAPED_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
