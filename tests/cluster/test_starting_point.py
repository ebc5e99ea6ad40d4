"""An attempt resumes from the newest complete checkpoint of its run, or is refused with the reason."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from savant_ray.config import Config, dump_yaml
from savant_ray.data.tokenizer import Tokenizer, train_tokenizer
from savant_ray.driver.attempt import Inputs, find_inputs, open_attempt
from savant_ray.driver.checks import finished_message
from savant_ray.driver.phases import AttemptPhase
from savant_ray.driver.starting_point import (
    changed_settings,
    compare_settings,
    copy_start,
    find_start,
    records_of,
    refuse_other_data,
    shortest_length,
)
from savant_ray.errors import CheckpointError, SavantError, SettingsError
from savant_ray.storage.local import LocalStorage
from savant_ray.storage.lock import locked
from savant_ray.storage.protocol import RunStorage
from savant_ray.storage.ray_snapshot import SNAPSHOT
from savant_ray.storage.run_storage import run_storage
from savant_ray.storage.tolerant_file_system import tolerant_file_system
from savant_ray.training.checkpoint import checkpoints, read_checkpoint, write_checkpoint
from tests.cluster.conftest import with_text

TEXTS = ["red green blue one two three", "blue two", "three four red"]


def tokenizer(size: int = 280) -> Tokenizer:
    return train_tokenizer(iter(TEXTS), size)


def write(run: Path, *steps: int, config: Config = Config(), data: str = "abc") -> None:
    for step in steps:
        content = {"step": step, "weights": torch.ones(50), "savant": {"data_fingerprint": data, "format_version": 1}}
        texts = {"config.yaml": dump_yaml(config), "tokenizer.json": tokenizer().to_json(), "records.jsonl": ""}
        write_checkpoint(run, content, texts)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if path.name.startswith("step"))


def start_of(storage: RunStorage, notify: Callable[[str], None] = print) -> Path | None:
    """Return the checkpoint that an attempt with the default settings resumes from."""
    return find_start(storage, Config(), notify, lambda event: pytest.fail(str(event)), allow_changes=False)


def changed(**sections: dict[str, Any]) -> Config:
    settings = Config().to_dict()
    for section, values in sections.items():
        settings[section] |= values
    return Config.from_dict(settings)


def test_a_new_folder_has_no_checkpoint_to_resume_from(tmp_path: Path) -> None:
    assert start_of(LocalStorage(tmp_path)) is None


def cut(folder: Path) -> None:
    file = folder / f"{folder.name}.pt"
    file.write_bytes(file.read_bytes()[:200])


def flip(folder: Path) -> None:
    file = folder / f"{folder.name}.pt"
    content = bytearray(file.read_bytes())
    content[300] ^= 4
    file.write_bytes(content)


def unmanifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(("damage", "words"), [(cut, "has 200 of"), (flip, "SHA-256"), (unmanifest, "never completed")])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_is_used(
    damage: Any, words: str, tmp_path: Path
) -> None:
    write(tmp_path, 9900, 10000)
    damage(tmp_path / "step_10000")
    messages: list[str] = []
    assert start_of(LocalStorage(tmp_path), messages.append) == tmp_path / "step_9900"
    assert len(messages) == 1 and words in messages[0] and "set aside as step_10000.damaged" in messages[0]
    assert names(tmp_path) == ["step_10000.damaged", "step_9900"]
    write(tmp_path, 10000)
    damage(tmp_path / "step_10000")
    assert start_of(
        LocalStorage(tmp_path), messages.append
    ) == tmp_path / "step_9900" and "step_10000.damaged-2" in names(tmp_path)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    for folder in checkpoints(tmp_path):
        cut(folder)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no complete checkpoint of it.*--fresh"):
            start_of(LocalStorage(tmp_path), lambda _: None)


def test_a_run_whose_checkpoints_were_deleted_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"event": "checkpoint", "step": 5}) + "\n")
    with pytest.raises(CheckpointError, match="holds a run"):
        start_of(LocalStorage(tmp_path))


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"event": "step", "step": 5}) + "\n")
    (tmp_path / "step_6.tmp").mkdir()
    assert start_of(LocalStorage(tmp_path)) is None and names(tmp_path) == []


def test_fresh_moves_the_old_run_aside_and_loses_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert LocalStorage(run).move_aside() is None
    for expected in ("run.old", "run.old-2"):
        write(run, 1)
        assert LocalStorage(run).move_aside() == str(tmp_path / expected)
        assert names(tmp_path / expected) == ["step_1"] and not run.exists()
    with locked(tmp_path / "run"):
        pass


def test_another_model_or_seed_is_refused_with_every_difference(tmp_path: Path) -> None:
    write(tmp_path, 5)
    compare_settings(tmp_path / "step_5", changed(training={"batch_size": 6, "learning_rate": 1e-3}), False, print)
    other = changed(model={"n_loops": 6, "soft_cap": 30.0}, run={"seed": 1})
    with pytest.raises(CheckpointError) as refusal:
        compare_settings(tmp_path / "step_5", other, False, print)
    expected = (
        "model.n_loops: 12, now 6",
        "model.soft_cap: 50.0, now 30.0",
        "run.seed: 1337, now 1",
        "--allow-changes",
    )
    assert all(text in str(refusal.value) for text in expected)


def test_another_value_of_mix_by_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 5)
    with pytest.raises(CheckpointError, match=r"data\.mix_by: sequences, now documents"):
        compare_settings(tmp_path / "step_5", changed(data={"mix_by": "documents"}), False, print)


def test_other_text_is_refused_and_the_message_names_the_tokenizer_that_is_kept(tmp_path: Path) -> None:
    write(tmp_path, 5, data="abc")
    start = tmp_path / "step_5"
    refuse_other_data(start, Config(), "abc")
    with pytest.raises(CheckpointError, match=r"data\.sources: a file was added, changed or removed") as refusal:
        refuse_other_data(start, Config(), "xyz")
    assert f"data.tokenizer: {start}/tokenizer.json" in str(refusal.value) and "--allow-changes" in str(refusal.value)
    reweighted = changed(data={"sources": [{"path": "a.jsonl", "weight": 1.0}]})
    with pytest.raises(CheckpointError, match=r"data\.sources: .* now .*a\.jsonl"):
        refuse_other_data(start, reweighted, "xyz")


def test_changed_settings_are_named_by_their_dotted_names() -> None:
    old = {"a": {"b": 1, "c": {"d": 2}}, "gone": 3}
    assert changed_settings(old, {"a": {"b": 1, "c": {"d": 5}}, "new": True}) == {
        "a.c.d": "a.c.d: 2, now 5",
        "gone": "gone: 3, now None",
        "new": "new: None, now True",
    }


def test_a_run_is_finished_when_its_last_sample_is_written(tmp_path: Path) -> None:
    config = changed(run={"storage_path": str(tmp_path), "name": "run"}, training={"max_steps": 5})
    write(tmp_path / "run", 5)
    assert finished_message(config, LocalStorage(tmp_path / "run"), tmp_path / "run/step_5") is None, (
        "a stop cut the last validation short"
    )
    (tmp_path / "run/samples.jsonl").write_text(json.dumps({"event": "sample", "step": 5}) + "\n")
    assert "has done its 5 steps" in (
        finished_message(config, LocalStorage(tmp_path / "run"), tmp_path / "run/step_5") or ""
    )
    longer = changed(run={"storage_path": str(tmp_path), "name": "run"}, training={"max_steps": 6})
    assert finished_message(longer, LocalStorage(tmp_path / "run"), tmp_path / "run/step_5") is None


def test_a_finished_wsd_run_names_the_checkpoint_to_continue_from_for_a_longer_one(tmp_path: Path) -> None:
    config = wsd(100)
    write(tmp_path, 80, 100, config=config)
    (tmp_path / "samples.jsonl").write_text(json.dumps({"event": "sample", "step": 100}) + "\n")
    settings = config.to_dict()
    settings["run"] |= {"storage_path": str(tmp_path.parent), "name": tmp_path.name}
    message = finished_message(config, run_storage(Config.from_dict(settings)), tmp_path / "step_100") or ""
    assert (
        f"has done its 100 steps; to train longer, begin a new run with run.continue_from: {tmp_path}/step_80"
        in message
    )


def test_a_run_whose_learning_rate_falls_from_its_first_step_on_has_no_checkpoint_for_a_longer_one(
    tmp_path: Path,
) -> None:
    config = wsd(100, decay_fraction=1.0)
    write(tmp_path, 100, config=config)
    (tmp_path / "samples.jsonl").write_text(json.dumps({"event": "sample", "step": 100}) + "\n")
    message = finished_message(config, LocalStorage(tmp_path), tmp_path / "step_100") or ""
    assert "to train longer, begin a new run, or: " in message
    with pytest.raises(CheckpointError, match="to train longer, begin a new run\n"):
        compare_settings(tmp_path / "step_100", wsd(200, decay_fraction=1.0), False, print)


def test_a_run_without_room_for_a_last_sample_is_finished_when_its_end_is_recorded(tmp_path: Path) -> None:
    config = changed(run={"storage_path": str(tmp_path), "name": "run"}, training={"max_steps": 5})
    write(tmp_path / "run", 5)
    lines = [{"event": "attempt", "step": 0}, {"event": "validation", "step": 5}]
    for last, finished in [
        ({"event": "end", "step": 5, "finished": False, "saved_step": 5}, False),
        ({"event": "end", "step": 5, "finished": True, "saved_step": 5}, True),
        ({"event": "attempt", "step": 3}, False),
    ]:
        lines.append(last)
        (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        message = finished_message(config, LocalStorage(tmp_path / "run"), tmp_path / "run/step_5")
        assert (message is not None) == finished, last


def wsd(max_steps: int, **training: Any) -> Config:
    return changed(training={"schedule": "wsd", "max_steps": max_steps, "warmup_steps": 10, **training})


@pytest.mark.parametrize(
    ("step", "new"),
    [
        (70, wsd(200)),  # longer, before the decay after step 80
        (80, wsd(100_000)),
        (70, wsd(88)),  # shorter, with a decay after step 70
        (70, wsd(71, decay_fraction=0.01)),
        (90, wsd(100, learning_rate=1e-3)),
        (90, wsd(100, double_loops_fraction=0.25)),
    ],
)
def test_the_length_of_a_wsd_run_may_change_if_its_steps_keep_their_learning_rates(
    step: int, new: Config, tmp_path: Path
) -> None:
    write(tmp_path, step, config=wsd(100))
    messages: list[str] = []
    compare_settings(tmp_path / f"step_{step}", new, False, messages.append)
    assert any(message.startswith(f"changed since step_{step}: training.") for message in messages)


@pytest.mark.parametrize(
    ("step", "new", "words"),
    [
        (
            90,
            wsd(200),
            "the learning rate fell from step 80 to 100, now from 160 to 200; to train longer, begin a new run with "
            "run.continue_from: …/step_80, or earlier",
        ),
        (
            70,
            wsd(80),
            "the learning rate fell from step 80 to 100, now from 64 to 80; with training.max_steps: 87 it falls from step "
            "70 on",
        ),
        (70, wsd(100, decay_fraction=1.0), "with a training.decay_fraction below 1 it falls from step 70 on"),
        (70, wsd(200, warmup_steps=20), "the warm-up had 10 steps, now 20; training.warmup_steps: 10 keeps it"),
        (70, changed(training={"max_steps": 100, "warmup_steps": 10}), "training.schedule: wsd, now cosine"),
    ],
)
def test_other_learning_rates_of_the_steps_of_a_wsd_run_are_refused(
    step: int, new: Config, words: str, tmp_path: Path
) -> None:
    write(tmp_path, step, config=wsd(100))
    with pytest.raises(CheckpointError) as refusal:
        compare_settings(tmp_path / f"step_{step}", new, False, print)
    assert words in str(refusal.value) and "--allow-changes" in str(refusal.value)
    compare_settings(tmp_path / f"step_{step}", new, True, print)


def test_the_advised_length_is_the_shortest_one_that_is_accepted(tmp_path: Path) -> None:
    for step in range(11, 60):
        for fraction in (0.05, 0.2, 0.33, 0.5, 0.9):
            advised = int(shortest_length(step, fraction).rpartition(" ")[2])
            settings = [wsd(n, decay_fraction=fraction).training for n in (advised - 1, advised)]
            assert [(each.last_stable_step or 0) >= step for each in settings] == [False, True]


def other_run(folder: Path, *steps: int) -> LocalStorage:
    """Return the storage of a new run, beside a run with checkpoints in which schedule wsd decays after step 80."""
    write(folder / "base", *steps, config=wsd(100))
    (folder / "new").mkdir()
    return LocalStorage(folder / "new")


def test_a_new_run_continues_from_a_copy_of_a_checkpoint_without_its_records(tmp_path: Path) -> None:
    storage = other_run(tmp_path, 70, 80)
    base = tmp_path / "base/step_70"
    events: list[Any] = []
    start = copy_start(storage, wsd(200), str(base), events.append, allow_changes=False)
    assert start == tmp_path / "new/step_70" and start_of(storage) == start
    assert torch.equal(read_checkpoint(start)["weights"], read_checkpoint(base)["weights"])
    assert all((start / name).read_bytes() == (base / name).read_bytes() for name in ("config.yaml", "tokenizer.json"))
    assert list(records_of(tmp_path / "new")) == []
    assert "step_70" in (tmp_path / "new" / SNAPSHOT).read_text(), "so that Ray deletes it when it is old"
    assert [event.reason for event in events] == [f"copied from {base}"]


@pytest.mark.parametrize(
    ("source", "config", "words"),
    [
        ("nothing", wsd(200), "there is no such file or folder"),
        ("step_70", wsd(50), "has already done training.max_steps = 50 steps"),
        ("step_90", wsd(200), "to train longer, begin a new run with run.continue_from: …/step_80"),
        ("step_70", changed(model={"n_loops": 6}, training=wsd(200).training.model_dump()), "model.n_loops: 12, now 6"),
    ],
)
def test_a_checkpoint_that_a_new_run_cannot_continue_from_is_refused_and_nothing_is_copied(
    source: str, config: Config, words: str, tmp_path: Path
) -> None:
    storage = other_run(tmp_path, 70, 90)
    with pytest.raises(SavantError, match=r"run\.continue_from: ") as refusal:
        copy_start(storage, config, str(tmp_path / "base" / source), print, allow_changes=False)
    assert words in str(refusal.value) and names(tmp_path / "new") == []


def test_a_run_is_not_moved_aside_for_one_that_cannot_continue_from_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "base", 90, config=wsd(100))
    write(tmp_path / "new", 1)
    settings = wsd(200).to_dict()
    settings["run"] |= {"storage_path": str(tmp_path), "name": "new", "continue_from": str(tmp_path / "base")}
    with (
        pytest.raises(
            CheckpointError, match=r"(?s)run\.continue_from: .*begin a new run with run\.continue_from: …/step_80"
        ) as refusal,
        open_attempt(Config.from_dict(settings), fresh=True, allow_changes=False, verbose=False, phase=AttemptPhase()),
    ):
        pass
    assert "--allow-changes" in str(refusal.value) and "--fresh" not in str(refusal.value), "it was given"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "new"] and names(tmp_path / "new") == ["step_1"]


def inputs_of(folder: Path, name: str, **start: str) -> Inputs | None:
    """Return what an attempt at the run starts from; its text is in the folder, and `start` are settings of `run`."""
    settings = wsd(200).to_dict()
    settings["run"] |= {"storage_path": str(folder), "name": name, **start}
    text = with_text(folder) / "dataset"
    settings["data"] |= {
        "sources": [{"path": str(text / "savant_dataset_train.jsonl"), "weight": 1}],
        "validation": str(text / "savant_dataset_val.jsonl"),
    }
    config = Config.from_dict(settings)
    with open_attempt(config, fresh=False, allow_changes=False, verbose=False, phase=AttemptPhase()) as attempt:
        return find_inputs(attempt)


@pytest.mark.parametrize("setting", ["init_from", "continue_from"])
def test_a_run_resumes_although_the_checkpoint_that_it_once_started_from_is_gone(setting: str, tmp_path: Path) -> None:
    write(tmp_path / "new", 5, config=wsd(200))
    inputs = inputs_of(tmp_path, "new", **{setting: str(tmp_path / "deleted/step_3")})
    assert inputs is not None and inputs.resume_checkpoint == tmp_path / "new/step_5"


@pytest.mark.parametrize("setting", ["init_from", "continue_from"])
def test_a_run_that_would_ignore_which_of_its_own_checkpoints_it_is_to_start_from_is_refused(
    setting: str, tmp_path: Path
) -> None:
    write(tmp_path / "base", 3, 5, config=wsd(200))
    with pytest.raises(
        SettingsError, match=rf"^run\.{setting}: .*/base/step_3 lies in the run itself.*step_5.*run\.name"
    ):
        inputs_of(tmp_path, "base", **{setting: str(tmp_path / "base/step_3")})


@pytest.mark.parametrize("setting", ["init_from", "continue_from"])
def test_a_run_resumes_that_has_started_from_a_checkpoint_in_another_folder_of_its_own(
    setting: str, tmp_path: Path
) -> None:
    write(tmp_path / "new/base", 3, config=wsd(200))
    for step in (3, 5):
        inputs = inputs_of(tmp_path, "new", **{setting: str(tmp_path / "new/base/step_3")})
        if setting == "init_from" and step == 3:
            assert inputs is not None and inputs.resume_checkpoint is None
        else:
            assert inputs is not None and inputs.resume_checkpoint == tmp_path / f"new/step_{step}"
        write(tmp_path / "new", 5, config=wsd(200))


def test_a_run_is_not_moved_aside_for_one_whose_tracker_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    write(tmp_path / "run", 1)
    text = with_text(tmp_path) / "dataset/savant_dataset_train.jsonl"
    config = changed(
        run={"storage_path": str(tmp_path), "name": "run"},
        data={"sources": [{"path": str(text), "weight": 1}], "validation": {"fraction": 0.1}},
        reporting={"wandb": "project"},
    )
    with (
        pytest.raises(SettingsError, match="the package wandb is not installed"),
        open_attempt(config, fresh=True, allow_changes=False, verbose=False, phase=AttemptPhase()),
    ):
        pass
    assert names(tmp_path / "run") == ["step_1"] and not (tmp_path / "run.old").exists()


def test_the_last_checkpoint_before_the_decay_is_never_deleted(tmp_path: Path) -> None:
    write(tmp_path / "run", 40, 80)
    settings = wsd(100).to_dict()
    settings["run"] |= {"storage_path": str(tmp_path), "name": "run"}
    file_system = tolerant_file_system(None, run_storage(Config.from_dict(settings)))
    for step in (40, 80):
        file_system.delete_dir(f"{tmp_path}/run/step_{step}")
    assert names(tmp_path / "run") == ["step_80"]


def test_a_run_starts_from_weights_or_from_a_complete_state() -> None:
    with pytest.raises(SettingsError, match=r"run\.init_from and run\.continue_from exclude each other"):
        changed(run={"init_from": "a", "continue_from": "b"})
