"""`savant verify` repeats the steps of a run and finds whatever is not bit for bit that of the run."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from savant_ray.cli import main
from savant_ray.command_line import step_range
from savant_ray.config import Config
from savant_ray.data.documents import Document
from savant_ray.data.stream import StreamPlan
from savant_ray.driver.verification import (
    FIGURES,
    RecordedRun,
    TrainingData,
    refuse_other_text,
    refuse_unrepeatable,
    repeat,
    settings_of,
)
from savant_ray.errors import CheckpointError, DataError, SavantError, SettingsError, VerificationError
from savant_ray.reporting.record import METRICS
from savant_ray.training.checkpoint import read_checkpoint, write_checkpoint
from savant_ray.training.state import TrainingState
from savant_ray.training.step import clip
from tests.data.conftest import byte_tokenizer  # noqa: F401 - a fixture
from tests.data.without_ray import cache_of
from tests.recorded_runs import tiny_plan, tiny_run_config, train_recorded

STEPS = 8
CONFIG = tiny_run_config(max_steps=STEPS)
KINDS = ("weight", "moment", "gradient")


@pytest.fixture(scope="module")
def plan(byte_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> StreamPlan:  # noqa: F811
    return tiny_plan(byte_tokenizer, tmp_path_factory.mktemp("text") / "cache", CONFIG)


@pytest.fixture(scope="module")
def trained_run(plan: StreamPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with `CONFIG`, which tests must not change."""
    run = tmp_path_factory.mktemp("trained") / "run"
    train_recorded(run, CONFIG, plan)
    return run


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of the run, which a test may change."""
    return shutil.copytree(trained_run, tmp_path / "run")


@pytest.fixture
def small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets spikes be found among fewer steps than 64, so that a run with one is short."""
    monkeypatch.setattr("savant_ray.training.spikes.WINDOW", 16)
    monkeypatch.setattr("savant_ray.training.spikes.MIN_STEPS", 8)


def verify(folder: Path, plan: StreamPlan, first: int | None = None, last: int | None = None) -> str:
    """Verify a run whose sequences are those of `plan`, whatever its settings say about the text."""
    run = RecordedRun.read(folder)
    steps = run.choose(first, last)
    refuse_unrepeatable(run, steps)

    def data_of(config: Config) -> TrainingData:
        return TrainingData(replace(plan, effective_batch=config.training.effective_batch), "")

    for attempt in run.attempts_of(steps):
        refuse_other_text(attempt, data_of(settings_of(attempt)))
    return repeat(run, steps, data_of, lambda done: None)


def test_a_run_equals_its_repetition_from_the_initial_weights_and_from_any_checkpoint(
    plan: StreamPlan, run: Path
) -> None:
    everything = (
        "steps 1 to 8 and the checkpoints step_3, step_6, step_8 are equal to the record of the run, bit for bit"
    )
    assert verify(run, plan) == everything
    assert verify(run, plan, 5, 7).startswith("steps 4 to 7 and the checkpoint step_6 are equal")
    assert verify(run, plan, first=8).startswith("steps 7 to 8 and the checkpoint step_8 are equal")
    assert verify(run, plan, last=2).startswith("steps 1 to 2 are equal")
    shutil.rmtree(run / "step_3")
    assert "step_6, step_8 are equal" in verify(run, plan)


def test_a_run_that_was_stopped_and_resumed_with_other_settings_equals_its_repetition(
    plan: StreamPlan, tmp_path: Path
) -> None:
    train_recorded(tmp_path / "run", CONFIG, plan, stop_at=4)
    train_recorded(tmp_path / "run", tiny_run_config(max_steps=10, learning_rate=3e-3), plan, stop_at=7)
    longer = tiny_run_config(max_steps=12, learning_rate=3e-3, batch_size=1, accumulation=6)
    train_recorded(tmp_path / "run", longer, plan)
    shutil.rmtree(tmp_path / "run/step_4")
    result = verify(tmp_path / "run", plan)
    assert result.startswith("steps 1 to 12 and the checkpoints step_3, step_6, step_7, step_9, step_12 are equal")


def test_a_run_with_a_decay_at_the_end_and_an_average_equals_its_repetition_unless_the_average_was_changed(
    plan: StreamPlan, tmp_path: Path
) -> None:
    config = tiny_run_config(max_steps=STEPS, schedule="wsd", warmup_steps=2, ema_decay=0.9)
    train_recorded(tmp_path / "run", config, plan, stop_at=4)
    train_recorded(tmp_path / "run", config, plan)
    assert verify(tmp_path / "run", plan).startswith(
        "steps 1 to 8 and the checkpoints step_3, step_4, step_6, step_8 are"
    )
    content = read_checkpoint(tmp_path / "run/step_6")
    content["ema_state_dict"]["head.weight"][0, 0] += 1e-6
    write_checkpoint(tmp_path / "run", content, {})
    with pytest.raises(VerificationError, match=r"step_6 differs.*averaged weight head\.weight"):
        verify(tmp_path / "run", plan)


def test_a_run_with_twice_the_loops_in_some_steps_equals_its_repetition(plan: StreamPlan, tmp_path: Path) -> None:
    config = tiny_run_config(max_steps=STEPS, double_loops_fraction=0.5)
    train_recorded(tmp_path / "run", config, plan, stop_at=4)
    train_recorded(tmp_path / "run", config, plan)
    assert verify(tmp_path / "run", plan).startswith(f"steps 1 to {STEPS}")


def test_a_run_that_diverged_equals_its_repetition(plan: StreamPlan, tmp_path: Path) -> None:
    train_recorded(tmp_path / "run", tiny_run_config(max_steps=STEPS, learning_rate=1e38), plan)
    lines = RecordedRun.read(tmp_path / "run").steps.values()
    assert any(line["update_skipped"] and line["skipped_micro_batches"] for line in lines)
    assert verify(tmp_path / "run", plan).startswith("steps 1 to 8")
    only_skipped = verify(tmp_path / "run", plan, first=4)
    assert only_skipped.startswith("steps 4 to 8 and the checkpoints step_6, step_8 are equal")


def test_changed_code_is_found_and_named(plan: StreamPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def clip_to_half(gradients: Tensor, tokens: float, max_norm: float) -> float:
        return clip(gradients, tokens, max_norm / 2)

    with monkeypatch.context() as other_code:
        other_code.setattr("savant_ray.training.step.clip", clip_to_half)
        train_recorded(tmp_path / "run", CONFIG, plan, code="1234567890abcdef")
    with pytest.raises(VerificationError, match=r"^step 2 differs: train_loss is .* in the record") as difference:
        verify(tmp_path / "run", plan)
    assert "possible causes: the code of savant_ray, 1234567890ab in the run" in str(difference.value)


def test_another_torch_and_another_processor_are_named(plan: StreamPlan, tmp_path: Path) -> None:
    other = {"versions": {"torch": "1.0"}, "processor": "Z80"}
    train_recorded(tmp_path / "run", CONFIG, plan, Flip("weight", random.Random(0)), **other)
    with pytest.raises(
        VerificationError, match=r"torch 1\.0 in the run, .* now; Z80 in the run, .* now; or a fault of"
    ):
        verify(tmp_path / "run", plan)


def test_other_text_is_found_by_its_fingerprint_or_by_the_first_figures(plan: StreamPlan, tmp_path: Path) -> None:
    train_recorded(tmp_path / "run", CONFIG, replace(plan, seed=plan.seed + 1))
    with pytest.raises(VerificationError, match="^step 1 differs: tokens is"):
        verify(tmp_path / "run", plan)
    train_recorded(tmp_path / "fingerprint", CONFIG, plan, data_fingerprint="of another text")
    with pytest.raises(DataError, match="is not that of the attempt that began after step 0"):
        verify(tmp_path / "fingerprint", plan)


def test_a_changed_record_and_a_damaged_checkpoint_are_found(plan: StreamPlan, run: Path) -> None:
    weights = run / "step_6/step_6.pt"
    intact = weights.read_bytes()
    weights.write_bytes(intact[:-100] + bytes([intact[-100] ^ 1]) + intact[-99:])
    with pytest.raises(CheckpointError, match="step_6.pt was altered"):
        verify(run, plan)
    weights.write_bytes(intact)
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    (step,) = (line for line in lines if line.get("step") == 7 and line["event"] == "step")
    step["grad_norm"] = math.nextafter(step["grad_norm"], math.inf)
    (run / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(VerificationError, match="^step 7 differs: grad_norm is"):
        verify(run, plan)
    assert verify(run, plan, last=6).startswith("steps 1 to 6")


def test_what_cannot_be_repeated_is_refused_with_the_reason_and_what_can_be(plan: StreamPlan, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny_run_config(max_steps=STEPS, deterministic=False)
    train_recorded(run, config, plan, stop_at=3, workers=2)
    train_recorded(run, config, plan)
    with pytest.raises(SavantError, match=r"^steps 1 to 3 cannot be .*: 2 workers added .*; try --steps 4\.\.8$"):
        verify(run, plan)
    assert verify(run, plan, first=4).startswith("steps 4 to 8")
    with pytest.raises(SettingsError, match="step 9 is not in the record"):
        verify(run, plan, last=9)
    for folder in ("step_3", "step_8"):
        shutil.rmtree(run / folder)
    lines = (run / METRICS).read_text().splitlines(keepends=True)
    without_first = [line for line in lines if json.loads(line)["event"] != "step" or json.loads(line)["step"] > 1]
    (run / METRICS).write_text("".join(without_first))
    with pytest.raises(CheckpointError, match="no checkpoint before step 6"):
        verify(run, plan)
    with pytest.raises(
        CheckpointError, match="no checkpoint before it is kept; the oldest one is step_6, so begin at 7"
    ):
        verify(run, plan, first=5)
    assert verify(run, plan, 7, 8).startswith("steps 7 to 8 are equal")


def change_record(run: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Replace each line of a record by what `change` returns; None removes it."""
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    changed = [line for line in map(change, lines) if line is not None]
    (run / METRICS).write_text("".join(json.dumps(line) + "\n" for line in changed))


def test_steps_after_the_newest_checkpoint_are_verified_if_they_are_recorded(plan: StreamPlan, run: Path) -> None:
    shutil.rmtree(run / "step_8")
    assert verify(run, plan, first=7) == "steps 7 to 8 are equal to the record of the run, bit for bit"
    assert verify(run, plan, first=8).startswith("steps 7 to 8")
    assert verify(run, plan).startswith("steps 1 to 6 and the checkpoints step_3, step_6 are equal")
    with pytest.raises(SettingsError, match=r"step 9 is not in the record \(metrics\.jsonl\); try --steps \.\.8$"):
        verify(run, plan, first=9)
    change_record(run, lambda line: line if line["event"] == "attempt" else None)
    with pytest.raises(SettingsError, match="step 7 is not in the record"):
        verify(run, plan, first=7)


def test_a_run_without_a_checkpoint_is_refused(plan: StreamPlan, run: Path) -> None:
    for folder in run.glob("step_*"):
        shutil.rmtree(folder)
    for first, last in [(None, None), (1, 2), (None, 5)]:
        with pytest.raises(CheckpointError, match="the run has no checkpoint yet"):
            verify(run, plan, first, last)


def test_a_gap_in_the_record_is_named_with_the_damaged_line_and_the_steps_that_remain(
    plan: StreamPlan, run: Path
) -> None:
    lines = (run / METRICS).read_bytes().splitlines(keepends=True)
    assert json.loads(lines[2])["step"] == 2
    (run / METRICS).write_bytes(b"".join([*lines[:2], b"\0" + lines[2][1:], *lines[3:]]))
    recorded = RecordedRun.read(run)
    steps = recorded.choose(None, None)
    assert steps == range(4, 9)
    (note,) = recorded.notes(steps, None)
    assert note == (
        "step 2 is not in the record (metrics.jsonl; its line 3 is damaged), so the repetition begins at step 4"
    )
    (run / METRICS).write_bytes(b"".join(lines[:6]))
    with pytest.raises(SettingsError, match=r"step 7 is not in the record .*; try --steps \.\.5$"):
        verify(run, plan)
    assert verify(run, plan, last=5).startswith("steps 1 to 5 and the checkpoint step_3 are equal")


def test_the_steps_that_are_advised_if_the_record_has_a_gap_can_be_verified(plan: StreamPlan, run: Path) -> None:
    change_record(run, lambda line: None if line["event"] == "step" and line["step"] == 7 else line)
    with pytest.raises(SettingsError, match=r"step 7 is not in the record .*; try --steps \.\.6$"):
        verify(run, plan)
    assert verify(run, plan, last=6).startswith("steps 1 to 6")


def test_a_folder_that_is_no_complete_checkpoint_is_named(plan: StreamPlan, run: Path) -> None:
    (run / "step_6/manifest.json").unlink()
    recorded = RecordedRun.read(run)
    (note,) = recorded.notes(recorded.choose(None, None), None)
    assert note.startswith("step_6 is not a complete checkpoint")


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("step", "train_loss", ...),
        ("step", "grad_norm", ...),
        ("step", "micro_batch_size", ...),
        ("step", "micro_batch_size", 0),
        ("step", "micro_batch_size", "2"),
        ("attempt", "step", ...),
        ("attempt", "settings", ...),
        ("attempt", "settings", []),
        ("attempt", "workers", None),
        ("attempt", "threads", -1),
        ("attempt", "threads", 1 << 40),
        ("attempt", "versions", []),
        ("attempt", "data_fingerprint", 1),
    ],
)
def test_lines_of_the_record_that_lack_what_a_repetition_needs_are_refused(
    kind: str, field: str, value: Any, plan: StreamPlan, run: Path
) -> None:

    def change(line: dict[str, Any]) -> dict[str, Any]:
        if line["event"] != kind:
            return line
        return {name: old for name, old in line.items() if name != field} | ({} if value is ... else {field: value})

    change_record(run, change)
    with pytest.raises(SavantError, match=rf"cannot be repeated .* no valid {field}"):
        verify(run, plan)


@pytest.mark.parametrize("trials", [40, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.rare])])
def test_a_record_with_a_flipped_bit_is_never_reported_as_another_error(
    trials: int, plan: StreamPlan, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train_recorded(run, tiny_run_config(max_steps=3), plan)
    intact, chance, found = (run / METRICS).read_bytes(), random.Random(trials), 0
    for _ in range(trials):
        position, bit = chance.randrange(len(intact)), chance.randrange(8)
        changed = bytearray(intact)
        changed[position] ^= 1 << bit
        (run / METRICS).write_bytes(changed)
        try:
            assert "equal" in verify(run, plan)
        except SavantError as error:
            found += 1
            assert str(error)
    assert found


def test_a_checkpoint_that_the_run_deletes_meanwhile_is_not_compared(
    plan: StreamPlan, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = RecordedRun.read(run)
    shutil.rmtree(run / "step_6")
    with monkeypatch.context() as late:
        late.setattr(RecordedRun, "read", lambda folder: recorded)
        assert "the checkpoints step_3, step_8 are equal" in verify(run, plan)
        with pytest.raises(CheckpointError, match="the run has deleted step_6 meanwhile"):
            verify(run, plan, first=7)


def test_other_weights_of_the_run_that_a_run_began_with_are_named_as_a_cause(
    plan: StreamPlan, trained_run: Path, run: Path
) -> None:

    def change(line: dict[str, Any]) -> dict[str, Any]:
        if line["event"] == "attempt":
            line["settings"]["run"]["init_from"] = str(trained_run)
        return line

    change_record(run, change)
    with pytest.raises(
        VerificationError, match=r"step 1 differs.*\n.*other weights in .*/trained.*/run \(run.init_from\)"
    ):
        verify(run, plan)


def test_attempts_of_versions_without_deterministic_steps_are_repeated_as_they_were(
    plan: StreamPlan, tmp_path: Path
) -> None:
    config = tiny_run_config(max_steps=STEPS, batch_size=1, accumulation=7, deterministic=False)
    train_recorded(tmp_path / "run", config, plan)
    lines = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    del lines[0]["settings"]["training"]["deterministic"]
    (tmp_path / "run" / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert verify(tmp_path / "run", plan).startswith("steps 1 to 8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["s3://bucket/run"], "only a run folder on this machine can be verified"),
        (["file:///no/run"], "/no/run: no run"),
        (["nothing_here"], "no run"),
        (["run", "--steps", "8-9"], "neither a step nor a range such as 100..200"),
        (["run", "--steps", ""], "neither a step nor a range"),
        (["run", "--steps", "0"], "'0' is not a whole number from 1"),
        (["run", "--steps", "8..4"], "ends before it begins"),
    ],
)
def test_an_argument_that_names_no_steps_of_a_run_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "steps"), [("8", (8, 8)), ("8..9", (8, 9)), ("8..", (8, None)), ("..9", (None, 9)), ("..", (None, None))]
)
def test_steps_to_verify_are_a_range_or_a_single_one(text: str, steps: tuple[int | None, int | None]) -> None:
    assert step_range(text) == steps


@pytest.mark.usefixtures("small_window")
@pytest.mark.parametrize("on_spike", ["warn", "skip", "rewind"])
def test_a_run_with_a_spike_equals_its_repetition(
    on_spike: str,
    byte_tokenizer: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    n_steps, spike_step = 35, 31
    config = tiny_run_config(max_steps=n_steps, on_spike=on_spike)
    quiet = [Document(number, "a" * 15) for number in range(200)]

    def plan_of(documents: list[Document], name: str) -> StreamPlan:
        cache = cache_of(documents, byte_tokenizer, config.model.max_seq_len, tmp_path / name)
        return StreamPlan((str(cache.folder),), (1.0,), config.run.seed, config.training.effective_batch)

    in_order = plan_of(quiet, "quiet")
    positions = range(4 * (spike_step - 1), 4 * spike_step)
    bad = {number for position in positions for _, number in in_order.documents(position)}
    plan = plan_of([doc._replace(text="q!7Z#b~0K?w^9X%") if doc.number in bad else doc for doc in quiet], "spiky")
    train_recorded(tmp_path / "run", config, plan)
    events = [line["event"] for line in map(json.loads, (tmp_path / "run" / METRICS).read_text().splitlines())]
    assert ("rewind" if on_spike == "rewind" else "spike") in events
    assert verify(tmp_path / "run", plan).startswith("steps 1 to 35 and the checkpoints step_3,")
    for file in (tmp_path / "run").glob("left_out_*"):  # which older versions did not write
        file.unlink()
        assert verify(tmp_path / "run", plan).startswith("steps 1 to 35 and the checkpoints step_3,")
    shutil.rmtree(tmp_path / "run/step_30")
    assert "step_35 are equal" in verify(tmp_path / "run", plan, first=28)
    assert verify(tmp_path / "run", plan, first=34).startswith("steps 34 to 35 and the checkpoint step_35")


class KilledError(Exception):
    """Ends a run as a kill does: without a save."""


class Fault:
    """Makes a spike of step 19 by changed weights or gradients, once; then raises `KilledError` before it, if asked to."""

    def __init__(self, of: str, kills: bool = False) -> None:
        self._of, self._kills, self._has_occurred = of, kills, False

    def __call__(self, state: TrainingState, step: int) -> None:
        if step != 19:
            return
        if self._has_occurred and self._kills:
            self._kills = False
            raise KilledError
        if not self._has_occurred:
            weight = state.model.head.weight
            if self._of == "weights":
                weight.data.mul_(-1e3)
            else:
                handle = weight.register_hook(lambda gradient: (handle.remove(), gradient * 1e6)[1])
        self._has_occurred = True


def spiky_plan(tokenizer: Any, folder: Path, config: Config) -> StreamPlan:
    documents = [Document(n, "".join("ab"[(n * 7 + i * i) % 2] for i in range(15))) for n in range(200)]
    cache = cache_of(documents, tokenizer, config.model.max_seq_len, folder)
    return StreamPlan((str(cache.folder),), (1.0,), config.run.seed, config.training.effective_batch)


@pytest.mark.usefixtures("small_window")
@pytest.mark.parametrize(("of", "every_steps"), [("weights", 3), ("gradients", 1_000)])
def test_a_run_that_went_back_because_of_a_fault_equals_its_repetition_also_if_it_was_killed_after_that(
    of: str,
    every_steps: int,
    byte_tokenizer: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    settings = tiny_run_config(max_steps=23, on_spike="rewind").to_dict()
    settings["checkpoint"]["every_steps"] = every_steps  # without a checkpoint only the step itself is repeated
    config = Config.from_dict(settings)
    plan = spiky_plan(byte_tokenizer, tmp_path / "cache", config)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train_recorded(straight, config, plan, Fault(of))
    fault = Fault(of, kills=True)
    with pytest.raises(KilledError):
        train_recorded(killed, config, plan, fault)
    change_record(killed, lambda line: line if line["event"] != "rewind" else None)  # the driver was killed as well
    train_recorded(killed, config, plan, fault)
    assert content(straight)[0] == content(killed)[0]
    weights, other_weights = (read_checkpoint(run / "step_23")["model_state_dict"] for run in (straight, killed))
    assert all(torch.equal(weight, other_weights[name]) for name, weight in weights.items())
    note = "bit for bit; the sequences of a spike, which the run left out, were left out again"
    assert verify(straight, plan).startswith("steps 1 to 23") and verify(straight, plan).endswith(note)
    assert verify(killed, plan, first=16).startswith("steps 16" if every_steps == 3 else "steps 1 to 23")
    if every_steps == 3:
        assert verify(straight, plan, first=22).endswith("record of the run, bit for bit")


@pytest.mark.usefixtures("small_window")
def test_a_spike_that_a_fault_has_caused_is_found_if_the_run_only_skipped_its_step(
    byte_tokenizer: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    config = tiny_run_config(max_steps=23, on_spike="skip")
    plan = spiky_plan(byte_tokenizer, tmp_path / "cache", config)
    train_recorded(tmp_path / "run", config, plan, Fault("gradients"))
    with pytest.raises(VerificationError, match="step 19 differs: grad_norm is"):
        verify(tmp_path / "run", plan, first=19)
    assert verify(tmp_path / "run", plan, first=22).startswith("steps 22 to 23 and the checkpoint step_23 are equal")


def test_a_damaged_file_of_what_was_left_out_is_named(plan: StreamPlan, run: Path) -> None:
    for damaged in ("", "[[1]]", "[[1, 2.5]]", "7", "{}x"):
        (run / "left_out_.json").write_text(damaged)
        with pytest.raises(CheckpointError, match=r"left_out_\.json is damaged"):
            verify(run, plan)
        with pytest.raises(CheckpointError, match=r"left_out_\.json is damaged: .* or delete it"):
            train_recorded(run, CONFIG, plan)


class Flip:
    """Flips one random bit of a random number of a state before, or in, one random step."""

    def __init__(self, kind: str, chance: random.Random) -> None:
        self._kind, self._chance, self._step = kind, chance, chance.randint(1, STEPS)
        self.text = ""

    def __call__(self, state: TrainingState, step: int) -> None:
        if step != self._step:
            return
        name, parameter = self._chance.choice(list(state.model.named_parameters()))
        self.text = f"{self._kind} of {name} before step {step}"
        if self._kind == "weight":
            self._flip(parameter.data)
        elif self._kind == "moment":
            self._flip(state.optimizer.state[parameter][self._chance.choice(["exp_avg", "exp_avg_sq"])])
        else:
            handle = parameter.register_hook(lambda gradient: (handle.remove(), self._flip(gradient.clone()))[1])

    def _flip(self, tensor: Tensor) -> Tensor:
        index, bit = self._chance.randrange(tensor.numel()), self._chance.randrange(32)
        bits = tensor.view(-1).view(torch.int32)
        bits[index] ^= -(1 << 31) if bit == 31 else 1 << bit
        return tensor


def content(folder: Path) -> Any:
    """Return figures and weights of a run, for a comparison."""
    run = RecordedRun.read(folder)
    figures = [[line.get(name) for name in FIGURES] for line in run.steps.values()]
    files = [(path / f"{path.name}.pt").read_bytes() for path in run.kept.values()]
    return figures, files


@pytest.mark.parametrize("trials", [3, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.rare])])
def test_a_flipped_bit_in_weights_moments_or_a_gradient_is_found(
    trials: int, plan: StreamPlan, trained_run: Path, tmp_path: Path
) -> None:
    intact, chance, without_effect = content(trained_run), random.Random(trials), 0
    for trial in range(trials):
        folder = tmp_path / f"run{trial}"
        while True:
            flip = Flip(KINDS[trial % len(KINDS)], chance)
            train_recorded(folder, CONFIG, plan, flip)
            if content(folder) != intact:
                break
            without_effect += 1  # such as the last bit of a gradient that is rounded away: the run is the same
            assert "are equal" in verify(folder, plan)
            shutil.rmtree(folder)
        with pytest.raises(VerificationError) as difference:
            verify(folder, plan)
        print(flip.text, "→", difference.value)
        shutil.rmtree(folder)
    print(f"{trials} of {trials} flipped bits were found; {without_effect} others had no effect on the run")
