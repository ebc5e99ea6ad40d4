"""An attempt resumes from the newest complete checkpoint of its run, or is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from savant_ray.config import Config, dump_yaml
from savant_ray.data.tokenizer import Tokenizer, train_tokenizer
from savant_ray.driver.checks import finished_message
from savant_ray.driver.starting_point import changed_settings, compare_settings, find_start, refuse_other_data
from savant_ray.errors import CheckpointError
from savant_ray.storage.local import LocalStorage
from savant_ray.storage.lock import locked, move_run_aside
from savant_ray.training.checkpoint import checkpoints, write_checkpoint

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


def changed(**sections: dict[str, Any]) -> Config:
    settings = Config().to_dict()
    for section, values in sections.items():
        settings[section] |= values
    return Config.from_dict(settings)


def test_a_new_folder_has_no_checkpoint_to_resume_from(tmp_path: Path) -> None:
    assert find_start(LocalStorage(tmp_path), print) is None


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
    said: list[str] = []
    assert find_start(LocalStorage(tmp_path), said.append) == tmp_path / "step_9900"
    assert len(said) == 1 and words in said[0] and "set aside as step_10000.damaged" in said[0]
    assert names(tmp_path) == ["step_10000.damaged", "step_9900"]
    write(tmp_path, 10000)
    damage(tmp_path / "step_10000")
    assert find_start(
        LocalStorage(tmp_path), said.append
    ) == tmp_path / "step_9900" and "step_10000.damaged-2" in names(tmp_path)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    for folder in checkpoints(tmp_path):
        cut(folder)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no complete checkpoint of it.*--fresh"):
            find_start(LocalStorage(tmp_path), lambda _: None)


def test_a_run_whose_checkpoints_were_deleted_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"event": "checkpoint", "step": 5}) + "\n")
    with pytest.raises(CheckpointError, match="holds a run"):
        find_start(LocalStorage(tmp_path), print)


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"event": "step", "step": 5}) + "\n")
    (tmp_path / "step_6.tmp").mkdir()
    assert find_start(LocalStorage(tmp_path), print) is None and names(tmp_path) == []


def test_fresh_moves_the_old_run_aside_and_loses_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert move_run_aside(run) is None
    for expected in ("run.old", "run.old-2"):
        write(run, 1)
        assert move_run_aside(run) == tmp_path / expected
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
        said = finished_message(config, LocalStorage(tmp_path / "run"), tmp_path / "run/step_5")
        assert (said is not None) == finished, last
