"""Repeats recorded steps and compares them with the record and the checkpoints of the run, bit for bit: `savant verify`.

One process takes the steps again with the loop of `training/loop.py`, from a kept checkpoint or from the initial weights.
Each step is repeated with what its attempt recorded: settings, precision, threads and micro-batch size. The text comes from
the token cache. Ray is started only if a part of the cache is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from savant_ray.cluster.same_code import own_digest
from savant_ray.cluster.session import ray_session
from savant_ray.config import MAX_THREADS, Config
from savant_ray.data.cache_builder import RayRequiredError
from savant_ray.data.stream import StepStream, StreamPlan
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.driver.data_files import find_data_files
from savant_ray.driver.data_preparation import prepare_data
from savant_ray.driver.failures import ray_errors_explained
from savant_ray.driver.tokenizer_choice import refuse_too_large
from savant_ray.errors import CheckpointError, DataError, SavantError, SettingsError, VerificationError
from savant_ray.events import AttemptStarted, Event, StepDone
from savant_ray.locations import is_uri, local_path
from savant_ray.reporting import RunReport
from savant_ray.reporting.console import PlainConsole
from savant_ray.reporting.record import METRICS, parse_event, to_line
from savant_ray.reporting.wording import duration
from savant_ray.training.checkpoint import (
    MANIFEST,
    checkpoints,
    find_checkpoint,
    left_out_file,
    newest_of,
    read_checkpoint,
    read_left_out,
    step_folders,
    step_of,
    tokenizer_files,
)
from savant_ray.training.checkpoint import verify as verify_files
from savant_ray.training.compiler_cache import keep_compiled_code
from savant_ray.training.device import (
    compile_block,
    prepare_device,
    processor_name,
    supported_precision,
    wants_compiled,
)
from savant_ray.training.host_copies import HostCopy
from savant_ray.training.loop import train
from savant_ray.training.state import TrainingState, is_deterministic, new_state
from savant_ray.training.step import MicroBatch
from savant_ray.worker.batch_reader import BatchReader
from savant_ray.worker.resume import load_initial_weights

Line = Mapping[str, Any]  # of metrics.jsonl
# Figures of a step that are compared. Only the first difference is reported, so causes come before their effects.
FIGURES = ("tokens", "learning_rate", "skipped_micro_batches", "train_loss", "grad_norm", "update_skipped")
OLDER_FIGURES = FIGURES[:-1]  # those that all versions have recorded
# Fields of an attempt's line that are used, with their types; older versions did not record the optional ones.
REQUIRED = {"step": int, "workers": int, "device": str, "precision": str, "settings": dict}
OPTIONAL = {"threads": int, "versions": dict, "processor": str, "code": str, "data_fingerprint": str}
# Parts of a checkpoint that are not compared: steps do not use the generator, and the record has their micro-batch sizes.
NOT_COMPARED = ("savant.torch_rng_state", "savant.fit")
LEFT_OUT = "savant.left_out"
NEVER = 1 << 40  # steps
SHOWN_DIGITS = 12  # of a digest


@dataclass(frozen=True)
class TrainingData:
    """Where the sequences of an attempt come from, and the fingerprint of tokenizer and text."""

    plan: StreamPlan
    fingerprint: str


@dataclass(frozen=True)
class RecordedRun:
    """The steps of a run's record, and its checkpoints."""

    folder: Path
    steps: Mapping[int, Line]  # by number
    attempts: Mapping[int, Line]  # the attempt that took the step, by number of the step
    kept: Mapping[int, Path]  # checkpoint folders, by step, oldest first
    damaged: Sequence[int]  # numbers of the lines that cannot be parsed

    @classmethod
    def read(cls, folder: Path) -> RecordedRun:
        """Read the record of a run folder.

        Raises:
            SettingsError: the folder has no record.
        """
        if not (folder / METRICS).is_file():
            raise SettingsError(f"{folder}: no run (it has no {METRICS}); `savant runs` lists the runs in this folder")
        steps: dict[int, Line] = {}
        attempts: dict[int, Line] = {}
        attempt: Line | None = None
        damaged: list[int] = []
        with (folder / METRICS).open("rb") as file:
            for number, text in enumerate(file, 1):
                line = parse_event(text)
                if line is None:
                    damaged += [number] if text.endswith(b"\n") else []  # the last line may still be incomplete
                elif line["event"] == AttemptStarted.kind:
                    attempt = line
                elif line["event"] == StepDone.kind and attempt is not None:
                    steps[line["step"]], attempts[line["step"]] = line, attempt
        return cls(folder, steps, attempts, {step_of(path): path for path in checkpoints(folder)}, damaged)

    @property
    def starts(self) -> list[int]:
        """The steps after which training can be repeated, in ascending order: 0 (initial weights) and checkpoints."""
        is_new = 1 in self.steps and self.attempts[1].get("step") == 0
        return ([0] if is_new else []) + list(self.kept)

    def choose(self, first: int | None, last: int | None) -> range:
        """Return the steps to repeat, so that `first` to `last` are among them.

        If `first` is None, they begin as early as possible. If `last` is None, they end with the newest checkpoint, or with
        the last recorded step if `first` is after that checkpoint.

        Raises:
            CheckpointError: there is no state from which they can be repeated.
            SettingsError: they are not in the record.
        """
        newest = newest_of(self.kept.values())
        if newest is None:
            raise CheckpointError(f"{self.folder}: the run has no checkpoint yet, so its steps cannot be repeated")
        if last is None:
            last = step_of(newest)
            if first is not None and first > last:
                last = max([first, *self.steps])
        starts = [step for step in self.starts if step < (last if first is None else first)]
        if not starts and first is None:
            raise CheckpointError(
                f"{self.folder}: there is no checkpoint before step {last:,}, from which steps could be repeated; keep more "
                "of them with checkpoint.keep"
            )
        if not starts:
            raise CheckpointError(
                f"--steps: step {first:,} cannot be repeated, because no checkpoint before it is kept; the oldest one is "
                f"step_{self.starts[0]}, so begin at {self.starts[0] + 1}"
            )
        if first is None:
            start = next((step for step in starts if self._first_missing(step, last) is None), starts[-1])
        else:
            start = starts[-1]
        if (missing := self._first_missing(start, last)) is not None:
            end = max((step for step in self.steps if step < missing), default=None)
            advice = f"; try --steps ..{end}" if end is not None and self.starts[0] < end else ""
            raise SettingsError(f"{self.folder}: {self.gap(missing)}{advice}")
        return range(start + 1, last + 1)

    def notes(self, steps: range, first: int | None) -> list[str]:
        """Return notes about incomplete checkpoints and earlier steps that are not verified although a user may expect it.

        `first` is the first step of `--steps`, None without one.
        """
        notes = [
            f"{folder.name} is not a complete checkpoint, because it has no {MANIFEST}, and is not compared"
            for folder in step_folders(self.folder)
            if step_of(folder) in steps and step_of(folder) not in self.kept
        ]
        if first is None and (missing := self._first_missing(self.starts[0], steps[0] - 1)) is not None:
            notes.append(f"{self.gap(missing)}, so the repetition begins at step {steps[0]:,}")
        return notes

    def gap(self, step: int) -> str:
        """Return the beginning of a sentence about a step that the record lacks."""
        place = f"{METRICS}; its line {self.damaged[0]} is damaged" if self.damaged else METRICS
        return f"step {step:,} is not in the record ({place})"

    def _first_missing(self, start: int, last: int) -> int | None:
        """Return the first step from `start + 1` to `last` that the record lacks, or None."""
        return next((step for step in range(start + 1, last + 1) if step not in self.steps), None)

    def attempts_of(self, steps: range) -> list[Line]:
        """Return the attempts that took the steps, each once."""
        return list({id(self.attempts[step]): self.attempts[step] for step in steps}.values())

    def seconds(self, steps: range) -> float:
        """Return how many seconds the steps took in the run, estimated from their median duration."""
        seconds = [self.steps[step].get("step_seconds") for step in steps]
        known = [value for value in seconds if isinstance(value, int | float)]
        return len(steps) * median(known) if known else 0.0


def verify_run(run: str, first: int | None, last: int | None, verbose: bool) -> str:
    """Repeat steps of a run and return what is equal; see `savant_ray.driver.verify`."""
    if is_uri(run):
        raise SettingsError(f"{run}: only a run folder on this machine can be verified; copy the run here first")
    recorded = RecordedRun.read(local_path(run, "run"))
    steps = recorded.choose(first, last)
    refuse_unrepeatable(recorded, steps)
    with RunReport(None) as report:
        for note in recorded.notes(steps, first):
            report.notify(note)
        data_of = _DataOfAttempts(recorded, report, verbose)
        for attempt in recorded.attempts_of(steps):
            refuse_other_text(attempt, data_of(settings_of(attempt)))
        start = f"step_{steps[0] - 1}" if steps[0] > 1 else "the initial weights"
        report.begin_stage(
            f"repeating {steps_text(steps[0], steps[-1])} from {start} (they took {duration(recorded.seconds(steps))})"
        )
        return repeat(recorded, steps, data_of, lambda done: report.progress(done, len(steps), "steps"))


def refuse_unrepeatable(run: RecordedRun, steps: range) -> None:
    """Check that one process on this machine can repeat the steps bit for bit.

    Raises:
        SavantError: it cannot; the message names the steps, the reason, and later steps that can be repeated, if any.
    """
    reasons = {id(attempt): reason_not_repeatable(attempt) for attempt in run.attempts_of(steps)}
    refused = [
        (step, reason)
        for step in steps
        if (reason := reason_not_comparable(run.steps[step]) or reasons[id(run.attempts[step])])
    ]
    if not refused:
        return
    first, reason = refused[0]
    last = [step for step, other in refused if other == reason][-1]
    later = [start for start in run.starts if refused[-1][0] <= start < steps[-1]]
    advice = f"; try --steps {later[0] + 1}..{steps[-1]}" if later else ""
    raise SavantError(f"{steps_text(first, last)} cannot be repeated bit for bit: {reason}{advice}")


def steps_text(first: int, last: int) -> str:
    """Return the subject of a sentence about steps."""
    return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"


def reason_not_comparable(step: Line) -> str | None:
    """Return why a line of the record about a step cannot be compared, or None."""
    missing = [name for name in OLDER_FIGURES if name not in step]
    rows = step.get("micro_batch_size")
    if type(rows) is not int or rows < 1:
        missing.append("micro_batch_size")
    return f"the record ({METRICS}) has no valid {missing[0]}" if missing else None


def reason_not_repeatable(attempt: Line) -> str | None:
    """Return why one process on this machine cannot repeat the steps of an attempt bit for bit, or None."""
    types = REQUIRED | {name: kind for name, kind in OPTIONAL.items() if name in attempt}
    for name, kind in types.items():
        value = attempt.get(name)
        if type(value) is not kind or (isinstance(value, int) and value < 0):
            return f"the record ({METRICS}) has no valid {name} of the attempt"
    if attempt.get("threads", 0) > MAX_THREADS:
        return f"the record ({METRICS}) has no valid threads of the attempt"
    device = device_of(attempt)
    if attempt["workers"] > 1 and not is_deterministic(settings_of(attempt), device):
        return f"{attempt['workers']} workers added up their gradients in an order that the record does not contain"
    if device.type == "cuda" and not torch.cuda.is_available():
        return f"they were trained on {attempt['device']}, and PyTorch finds no GPU here"
    if supported_precision(precision := attempt["precision"], device)[0] != precision:
        return f"they were trained in {precision}, for which this CPU has no instructions"
    return None


def device_of(attempt: Line) -> torch.device:
    """Return the CPU, or the first GPU for an attempt that trained on GPUs."""
    return torch.device("cpu") if attempt["device"] == "cpu" else torch.device("cuda", 0)


class _DataOfAttempts:
    """Finds the training data of each attempt; attempts whose data, sequence length, seed and batch are equal share it.

    Raises:
        CheckpointError: the run's newest checkpoint has no tokenizer, or one that was altered.
    """

    def __init__(self, run: RecordedRun, report: RunReport, verbose: bool) -> None:
        folder = find_checkpoint(run.folder)
        files = tokenizer_files(folder)
        verify_files(folder, *(file.name for file in files))
        self._tokenizer_file, self._report, self._verbose = files[0], report, verbose
        self._found: dict[str, TrainingData] = {}

    def __call__(self, config: Config) -> TrainingData:
        settings = config.to_dict()
        key = json.dumps([settings["data"], config.model.max_seq_len, config.run.seed, config.training.effective_batch])
        if key not in self._found:
            self._found[key] = self._prepare(config)
        return self._found[key]

    def _prepare(self, config: Config) -> TrainingData:
        """Open the token caches of the settings, or build what is missing of them.

        Raises:
            DataError: the text is missing or cannot be read.
            SettingsError: the tokenizer has more tokens than the model, or the cache folder cannot be created.
        """
        tokenizer = Tokenizer.load(self._tokenizer_file, config.data.end_of_document, config.data.add_special_tokens)
        refuse_too_large(tokenizer, config)
        try:
            with RunReport(None, console=PlainConsole(None)) as silent_report:
                files = find_data_files(config, silent_report)
                data = prepare_data(config, files, silent_report, tokenizer)
        except RayRequiredError:
            self._report.begin_stage("starting Ray, to tokenize the text again")
            with ray_session(self._verbose, self._report.notify), ray_errors_explained():
                data = prepare_data(config, find_data_files(config, self._report), self._report, tokenizer)
        return TrainingData(data.plan, data.fingerprint)


def repeat(
    run: RecordedRun, steps: range, data_of: Callable[[Config], TrainingData], progress: Callable[[int], None]
) -> str:
    """Take the steps again and return what is equal; `progress` receives the number of repeated steps.

    The first attempt is repeated from a checkpoint or the initial weights, each later one from the state in which the
    repetition of the one before it has ended.

    Raises:
        VerificationError: a figure of a step or a part of a checkpoint is not that of the run.
        CheckpointError: a checkpoint is damaged, or that of the first step has been deleted.
        SettingsError: this version does not know a setting of the run.
    """
    start = steps[0] - 1
    content = read_unless_deleted(run.kept[start]) if start else None
    if start and content is None:
        raise CheckpointError(
            f"{run.folder}: the run has deleted step_{start} meanwhile (checkpoint.keep); repeat later steps"
        )
    start_position = content["savant"]["position"] if content else 0
    compared: list[int] = []
    for attempt in run.attempts_of(steps):
        last = max(step for step in steps if run.attempts[step] is attempt)
        content = repeat_attempt(run, attempt, last, content, data_of, compared, lambda step: progress(step - start))
    left_out = left_out_before(content["savant"]["position"], content["savant"]["left_out"]) if content else []
    return equal_text(steps, compared, sum(first >= start_position for first, _ in left_out))


def repeat_attempt(
    run: RecordedRun,
    attempt: Line,
    last_step: int,
    content: dict[str, Any] | None,
    data_of: Callable[[Config], TrainingData],
    compared: list[int],
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Take the steps of an attempt up to `last_step` again and return the checkpoint of the state after them.

    `content` is the checkpoint to begin with, None for the initial weights. The steps of the run's checkpoints that were
    compared are appended to `compared`; `progress` receives each finished step.
    """
    config = settings_of(attempt)
    data = data_of(config)
    state = state_of(attempt, config, data.fingerprint, content)
    # Whatever the run left out at any time is left out from the first step on, which does not change earlier sequences. The
    # repetition cannot find these spikes itself, because one that a hardware error has caused does not recur.
    if (file := run.folder / left_out_file(data.fingerprint)).is_file():
        state.left_out = read_left_out(file)
    host = _ComparingHost(run, state, config, data.plan, last_step, compared, progress)
    train(state, config, host.local_batches(state), host)
    return HostCopy().update(state)


def left_out_before(position: int, left_out: Iterable[Sequence[int]]) -> list[list[int]]:
    """Return the pairs (first position, number of sequences) that begin before `position`; later ones have no effect yet."""
    return [[first, n_sequences] for first, n_sequences in left_out if first < position]


def equal_text(steps: range, compared: list[int], n_rewinds: int) -> str:
    """Return the result of a verification that found no difference.

    `compared` are the steps of checkpoints. The sequences of `n_rewinds` steps with spikes were left out.
    """
    names = ", ".join(f"step_{step}" for step in compared)
    kinds = f"and the checkpoint{'s' if len(compared) > 1 else ''} {names} " if compared else ""
    verb = "is" if len(steps) == 1 and not compared else "are"
    spikes = "a spike" if n_rewinds == 1 else f"{n_rewinds} spikes"
    note = f"; the sequences of {spikes}, which the run left out, were left out again" if n_rewinds else ""
    return f"{steps_text(steps[0], steps[-1])} {kinds}{verb} equal to the record of the run, bit for bit{note}"


def settings_of(attempt: Line) -> Config:
    """Return the settings with which an attempt trained, but without profile, validations and limit of skipped steps.

    If the settings are of an older version and lack `training.deterministic`, it is false.

    Raises:
        SettingsError: this version does not know one of them.
    """
    settings = attempt["settings"]
    if isinstance(training := settings.get("training"), dict):
        settings = {**settings, "training": {"deterministic": False, **training}}
    try:
        config = Config.from_dict(settings)
    except SettingsError as error:
        raise SettingsError(
            f"the attempt that began after step {attempt['step']:,} has settings that this version does not know: {error}"
        ) from error
    changes = {
        "training": config.training.model_copy(update={"profile": None, "max_skipped_steps": NEVER}),
        "validation": config.validation.model_copy(update={"every_steps": NEVER}),
    }
    return config.model_copy(update=changes)


def refuse_other_text(attempt: Line, data: TrainingData) -> None:
    """Check that the text is the one that an attempt trained on; older versions did not record it.

    Raises:
        DataError: it is not.
    """
    if attempt.get("data_fingerprint", "") in ("", data.fingerprint):
        return
    raise DataError(
        f"the text, its mixture or the tokenizer is not that of the attempt that began after step {attempt['step']:,}, so "
        "its steps cannot be repeated. Restore the files of data.sources; `savant data` shows what is in them now"
    )


def state_of(attempt: Line, config: Config, data_fingerprint: str, content: dict[str, Any] | None) -> TrainingState:
    """Return the state from which an attempt trains: that of `content`, a checkpoint, or the initial one (None)."""
    device = device_of(attempt)
    torch.manual_seed(config.run.seed)
    if threads := attempt.get("threads"):
        torch.set_num_threads(threads)
    prepare_device(device, config.training.vram_limit_gb, is_deterministic(config, device))
    precision = attempt["precision"]
    state = new_state(config, device, precision)
    state.data_fingerprint = data_fingerprint
    if device.type == "cuda" or wants_compiled(config.training.compile, device, precision):
        keep_compiled_code(Path(config.data.cache_dir))
    compile_block(state.model, config.training.compile, device, precision)
    if content is None:
        load_initial_weights(state, config)
    else:
        state.load_checkpoint(content, allow_changes=True)
    return state


class _ComparingHost:
    """The `Host` of repeated steps: compares each of them with the record, and the state with a checkpoint of the step."""

    rank = 0

    def __init__(
        self,
        run: RecordedRun,
        state: TrainingState,
        config: Config,
        plan: StreamPlan,
        last_step: int,
        compared: list[int],
        progress: Callable[[int], None],
    ) -> None:
        self._run, self._state, self._config, self._plan, self._last_step = run, state, config, plan, last_step
        self._compared, self._progress = compared, progress

    def local_batches(self, state: TrainingState) -> Iterator[list[MicroBatch]]:
        """Yield all micro-batches of each step up to the last one of the attempt.

        Before each step the micro-batch size is set to the one that the run used for this step.
        """
        steps = range(state.step + 1, self._last_step + 1)
        plan = replace(self._plan, left_out=state.left_out)
        stream = StepStream(plan, rank=0, world_size=1, in_process=True)
        batches = BatchReader(stream, state.position, len(steps), self._config, state.device)
        for step, local_batch in zip(steps, batches, strict=True):
            state.set_batch_fit(replace(state.batch_fit, rows=self._run.steps[step]["micro_batch_size"]))
            # Without `useful_flops` the loop does not measure the peak of the device.
            yield [replace(micro_batch, useful_flops=0.0) for micro_batch in local_batch]

    def emit(self, event: Event) -> None:
        """Compare a finished step with the record, and the state after it with the checkpoint of this step, if it is kept.

        Raises:
            VerificationError: the step or the checkpoint differs.
            CheckpointError: the checkpoint of the step is damaged.
        """
        if not isinstance(event, StepDone):
            return
        attempt = self._run.attempts[event.step]
        if difference := step_difference(self._run.steps[event.step], to_line(event)):
            raise VerificationError(f"step {event.step:,} differs: {difference}\n{causes(attempt)}")
        folder = self._run.kept.get(event.step)
        if folder is not None and (saved := read_unless_deleted(folder)) is not None:
            if difference := checkpoint_difference(saved, self._state):
                raise VerificationError(
                    f"the checkpoint {folder.name} differs, though the figures of all steps up to it are equal: "
                    f"{difference}\n{causes(attempt)}"
                )
            self._compared.append(event.step)
        self._progress(event.step)

    def observe_rank(self, data_wait_seconds: float, memory_gb: float) -> None:
        """Do nothing."""

    def grace_left(self) -> float | None:
        """Return None: no stop is requested."""
        return None

    def save(self, state: TrainingState, reason: str) -> None:
        """Do nothing: nothing is written."""

    def restore(self, state: TrainingState) -> None:
        """Do nothing: when the run went back, it repeated its steps up to the spike and reached the present state again.

        This is called only if the run folder lacks the file that lists the sequences that were left out.
        """

    def store_file(self, file: Path, name: str) -> str:
        """Return the path as it is: nothing is written."""
        return str(file)

    def finish_saving(self) -> bool:
        """Return True: nothing is written."""
        return True

    def validate(self, state: TrainingState) -> bool:
        """Return False: a validation changes no weights, so it is not repeated."""
        return False


def read_unless_deleted(folder: Path) -> dict[str, Any] | None:
    """Return the content of a checkpoint; None if it does not exist any more, because the run goes on and deletes old ones.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        return read_checkpoint(folder)
    except (CheckpointError, FileNotFoundError):
        if folder.is_dir():
            raise
        return None


def step_difference(recorded: Line, repeated: Line) -> str | None:
    """Return the first figure of a step that differs from the record, and by how much, or None."""
    for name in FIGURES:
        old, new = recorded.get(name), repeated[name]
        if name not in recorded or old == new:
            continue
        numbers = type(old) is not bool and isinstance(old, int | float) and isinstance(new, int | float)
        amount = f" (a difference of {abs(new - old):.2g})" if numbers else ""
        return f"{name} is {old} in the record, and {new} when the step is repeated{amount}"
    return None


def checkpoint_difference(saved: Mapping[str, Any], state: TrainingState) -> str | None:
    """Return what of a checkpoint differs from the repeated state, and by how much, or None."""
    names = _parameter_names(state)
    saved_parts, repeated_parts = (dict(_leaves(content, names)) for content in (saved, state.to_checkpoint()))
    for leaves in (saved_parts, repeated_parts):  # a checkpoint written before a rewind lacks what the rewind left out
        leaves[LEFT_OUT] = left_out_before(state.position, leaves.get(LEFT_OUT, ()))
    only_in_one = saved_parts.keys() ^ repeated_parts.keys()
    if unexpected := sorted(name for name in only_in_one if not name.startswith("savant.")):
        return f"{unexpected[0]} is in only one of them"
    differences = [
        f"{name} {text}"
        for name in saved_parts
        if name not in only_in_one  # fields that only one version of this program has
        and (text := _leaf_difference(saved_parts[name], repeated_parts[name]))
    ]
    if len(differences) < 2:
        return differences[0] if differences else None
    n_parts = len(saved_parts.keys() & repeated_parts.keys())
    return f"{len(differences)} of {n_parts} parts, the first of them {differences[0]}"


def _parameter_names(state: TrainingState) -> list[str]:
    """Return the names of the weights in the order in which the optimizer numbers them."""
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    return [names[id(parameter)] for group in state.optimizer.param_groups for parameter in group["params"]]


def _leaves(value: Any, parameters: list[str], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the tensors and plain values of a checkpoint by names such as `exp_avg of head.weight`."""
    if path in NOT_COMPARED:
        return
    if path == "optimizer_state_dict.param_groups":
        # A group's rate is that of its last update, which may be before the first repeated step. Steps compare their rates.
        yield path, [{key: item for key, item in group.items() if key != "lr"} for group in value]
        return
    if not isinstance(value, Mapping):
        yield path, value
        return
    for key, item in value.items():
        match path:
            case "model_state_dict":
                name = f"weight {key}"
            case "ema_state_dict":
                name = f"averaged weight {key}"
            case "optimizer_state_dict.state":
                yield from ((f"{part} of {parameters[key]}", tensor) for part, tensor in item.items())
                continue
            case _:
                name = f"{path}.{key}" if path else str(key)
        yield from _leaves(item, parameters, name)


def _leaf_difference(saved: Any, repeated: Any) -> str | None:
    """Return how two tensors or plain values differ, or None if they have the same bits."""
    if not isinstance(saved, Tensor) or not isinstance(repeated, Tensor):
        return None if saved == repeated else f"({saved} in the checkpoint, {repeated} when repeated)"
    saved, repeated = (tensor.detach().cpu().contiguous().reshape(-1) for tensor in (saved, repeated))
    if saved.dtype != repeated.dtype or saved.shape != repeated.shape:
        was, now = (f"{tensor.numel():,} numbers of {tensor.dtype}" for tensor in (saved, repeated))
        return f"({was} in the checkpoint, {now} when repeated)"
    differs = (saved.view(torch.uint8) != repeated.view(torch.uint8)).view(-1, saved.element_size()).any(dim=1)
    if not differs.any():
        return None
    distance = (saved.double() - repeated.double())[differs].abs().max().item()
    return f"({int(differs.sum()):,} of {len(saved):,} numbers, by up to {distance:.2g})"


def causes(attempt: Line) -> str:
    """Return one line with possible causes of a difference: what is known to differ between an attempt and this process."""
    versions, code = attempt.get("versions", {}), attempt.get("code", "")
    is_cuda = device_of(attempt).type == "cuda"
    processor = torch.cuda.get_device_name() if is_cuda else processor_name()
    recorded_processor = attempt["device"] if is_cuda else attempt.get("processor", "")
    differences = []
    if versions.get("torch") not in (None, str(torch.__version__)):
        differences.append(f"torch {versions['torch']} in the run, {torch.__version__} now")
    if recorded_processor not in ("", processor):
        differences.append(f"{recorded_processor} in the run, {processor} now")
    if code not in ("", own_digest()):
        differences.append(
            f"the code of savant_ray, {code[:SHOWN_DIGITS]} in the run, {own_digest()[:SHOWN_DIGITS]} now"
        )
    if is_cuda and not is_deterministic(settings_of(attempt), device_of(attempt)):
        differences.append("a GPU without training.deterministic, whose sums vary")
    if attempt["step"] == 0 and (source := settings_of(attempt).run.init_from):
        differences.append(f"other weights in {source} (run.init_from) than when the run began")
    if differences:
        return f"possible causes: {'; '.join(differences)}; or a fault of memory or processor, in the run or now"
    return (
        "no difference of torch, processor, code or text is recorded; possible causes: a fault of memory or processor, in "
        "the run or now; a record or checkpoint that was changed afterwards"
    )
