"""Conversion of a file of the original into a checkpoint at the start of an attempt."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from savant_ray.config import Config
from savant_ray.data.tokenizer import Tokenizer, with_tokenizer_settings
from savant_ray.driver.starting_point import compare_settings, find_start, refuse_other_data
from savant_ray.driver.tokenizer_choice import choose_tokenizer, find_weights_checkpoint
from savant_ray.errors import CheckpointError, DataError, SettingsError
from savant_ray.events import CheckpointSaved, Event
from savant_ray.optim.schedule import learning_rate
from savant_ray.original.conversion import convert_newest
from savant_ray.original.export import export_original
from savant_ray.original.file import read_file
from savant_ray.reporting import RunReport
from savant_ray.reporting.console import PlainConsole
from savant_ray.storage.local import LocalStorage
from savant_ray.storage.object_store import ObjectStorage
from savant_ray.storage.protocol import RunStorage
from savant_ray.training.checkpoint import read_checkpoint, read_manifest, read_settings, verify
from tests.cluster.conftest import environment
from tests.original.fixtures import KINDS, PEAK, batch, expected, file_of, rate
from tests.original.program import AdamW8bit, OriginalProgram
from tests.original.test_file import moments, original_config, trained
from tests.original.word_tokenizer import write_tokenizer
from tests.storage.object_store import ObjectStore
from tests.training.tiny import Code, tiny_state

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Settings that fit the files of `OriginalProgram`."""
    return changed(original_config(), data={"tokenizer": str(write_tokenizer(tmp_path / "tokenizer"))})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    settings = config.to_dict()
    for section, values in sections.items():
        settings[section] |= values
    return Config.from_dict(settings)


def start(run: Path | RunStorage, config: Config, allow_changes: bool = False) -> tuple[Path | None, list[str]]:
    """Return the checkpoint that an attempt continues from, and its messages."""
    storage, messages = LocalStorage(run) if isinstance(run, Path) else run, []

    def emit(event: Event) -> None:
        assert isinstance(event, CheckpointSaved)
        messages.append(f"saved {event.step}: {event.reason}")

    return find_start(storage, config, messages.append, emit, allow_changes), messages


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if path.name.startswith("step"))


def test_a_file_is_converted_into_a_checkpoint_and_is_unchanged(run: Path, config: Config) -> None:
    path = trained(4, rate=rate, optimizer=AdamW8bit).save(run)
    before = path.read_bytes()
    folder, messages = start(run, config)
    assert folder == run / "step_3" and names(run) == ["step_3", "step_3.pt"] and path.read_bytes() == before
    assert len(messages) == 1 and messages[0].startswith("saved 3: converted from step_3.pt of the original")
    assert "continues with model.n_heads 2, model.n_loops 4" in messages[0]
    assert "at sequence 36 of the text, step × effective batch" in messages[0]
    verify(folder)
    tokenizer = Tokenizer.load(config.data.tokenizer)
    assert read_settings(folder) == with_tokenizer_settings(config, tokenizer)
    assert (folder / "tokenizer.json").read_text() == tokenizer.to_json()


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_checkpoint_holds_weights_moments_and_rate_of_the_file(
    kind: str, run: Path, config: Config
) -> None:
    held = expected()[kind]
    (run / file_of(kind).name).write_bytes(file_of(kind).read_bytes())
    folder, _ = start(run, config)
    assert folder is not None
    state = tiny_state(config)
    assert state.load_checkpoint(read_checkpoint(folder)) == []
    assert (state.step, state.position) == (held["step"], held["step"] * 12)
    if kind != "adamw8bit_without_schedule":
        assert learning_rate(state.next_in_schedule, PEAK, 2, 20) == pytest.approx(held["rate"])
    with torch.no_grad():
        torch.testing.assert_close(state.model(batch(0)[:1])[0, -1], torch.tensor(held["logits"]), rtol=1e-5, atol=1e-6)
    for name, entry in moments(state).items():
        assert entry["step"] == held["updates"]
        assert entry["exp_avg"].double().norm().item() == pytest.approx(held["moments"][name]["norm"], rel=1e-6)


def test_the_original_continues_from_an_export_of_a_converted_checkpoint(
    run: Path, config: Config, tmp_path: Path
) -> None:
    program = trained(4, rate=rate, optimizer=AdamW8bit)
    path = program.save(run)
    folder, _ = start(run, config)
    assert folder is not None
    export_original(folder, tmp_path / "out.pt")
    resumed = OriginalProgram(PEAK, rate, AdamW8bit)
    resumed.load(tmp_path / "out.pt")
    torch.testing.assert_close(resumed.moments(), program.moments(), rtol=0, atol=0)
    assert resumed.scheduler.state_dict() == program.scheduler.state_dict()
    resumed.train(batch(4))
    path.unlink()
    export_original(folder, tmp_path / "ordered.pt", "adamw")  # in the documented order, with new masks
    before, after = moments_by_name(tmp_path / "out.pt"), moments_by_name(tmp_path / "ordered.pt")
    assert list(before) != list(after), "the orders have to differ"
    torch.testing.assert_close(dict(sorted(after.items())), dict(sorted(before.items())), rtol=0, atol=0)


def moments_by_name(path: Path) -> dict[str, Any]:
    content = read_file(path)
    parameters = [name for name in content["model_state_dict"] if "mask" not in name]
    return {name: content["optimizer_state_dict"]["state"][number] for number, name in enumerate(parameters)}


def test_hyperparameters_that_differ_from_those_in_the_file_are_reported(run: Path, config: Config) -> None:
    program = trained(4, rate=rate)
    program.optimizer.param_groups[0]["weight_decay"] = 0.1
    program.save(run)
    other = {"learning_rate": 1e-3, "weight_decay": 0.02}
    folder, messages = start(run, changed(config, training=other))
    assert folder is not None
    first, second, _ = messages
    assert "step_3.pt has a learning rate of 9.698e-03 in the original, but 9.698e-04 with these settings" in first
    assert "peak is 0.01 (training.learning_rate: 0.001)" in first
    assert second == "note: training.weight_decay: 0.02, but step_3.pt was written with 0.1"


@pytest.mark.parametrize("last_epoch", [4, 9, 25])
def test_the_rate_of_a_resumed_or_finished_file_is_not_reported_as_different(
    last_epoch: int, run: Path, config: Config
) -> None:
    content = trained(4, rate=rate).content()
    schedule = {"last_epoch": last_epoch, "_step_count": last_epoch + 1, "_last_lr": [PEAK * rate(last_epoch)]}
    torch.save({**content, "scheduler_state_dict": content["scheduler_state_dict"] | schedule}, run / "step_3.pt")
    _, messages = start(run, config)
    assert len(messages) == 1


def test_a_tokenizer_that_is_too_large_for_the_file_is_refused_before_anything_is_written(
    run: Path, config: Config
) -> None:
    content = trained(2).content()
    weights = dict(content["model_state_dict"])
    for name in ("embed.weight", "head.weight"):
        weights[name] = weights[name][:40]
    torch.save({**content, "model_state_dict": weights}, run / "step_1.pt")
    smaller = changed(config, model={"vocab_size": 40})
    with pytest.raises(SettingsError, match=r"data\.tokenizer: .* has 48 entries, but the file's model has only 40"):
        start(run, smaller)
    assert names(run) == ["step_1.pt"]
    folder, _ = start(run, changed(config, model={"vocab_size": 50}), allow_changes=True)
    assert folder is not None


def test_after_the_conversion_a_run_resumes_like_any_other(run: Path, config: Config) -> None:
    trained(4).save(run)
    folder, _ = start(run, config)
    assert folder is not None
    assert start(run, config) == (folder, []), "converted once"
    automatic = changed(config, data={"tokenizer": "auto"})
    assert start(run, automatic) == (folder, [])
    compare_settings(folder, automatic, False, print)
    refuse_other_data(folder, config, "any text")
    checkpoint = find_weights_checkpoint(folder, automatic)
    chosen = choose_tokenizer(automatic, checkpoint, allow_changes=False)
    assert chosen is not None and chosen.fingerprint == Tokenizer.load(config.data.tokenizer).fingerprint


def test_a_file_is_converted_again_for_other_settings_until_training_continued_from_it(
    run: Path, config: Config
) -> None:
    trained(4, rate=rate).save(run)
    start(run, changed(config, model={"n_loops": 8}))  # a mistake that the file does not show, noticed before training
    folder, messages = start(run, config)
    assert folder is not None and len(messages) == 1
    assert read_settings(folder).model.n_loops == config.model.n_loops


def test_the_newest_of_our_checkpoints_and_the_originals_files_is_used(run: Path, config: Config) -> None:
    trained(2, rate=rate).save(run)
    start(run, config)
    trained(6, rate=rate).save(run)
    folder, _ = start(run, config)
    assert folder == run / "step_5"
    trained(4, rate=rate).save(run)
    assert start(run, config) == (folder, [])
    (run / "step_5.pt").unlink()
    (folder / "step_5.pt").write_bytes(b"damaged")
    taken, messages = start(run, config)
    assert (
        taken == run / "step_3" and "set aside as step_5.damaged" in messages[0] and messages[1].startswith("saved 3")
    )


def test_a_damaged_newer_file_is_reported_and_the_newest_intact_one_used(run: Path, config: Config) -> None:
    trained(2).save(run)
    newest = trained(4).save(run)
    newest.write_bytes(newest.read_bytes()[:3000])
    folder, messages = start(run, config)
    assert folder == run / "step_1" and newest.exists()
    assert "step_3.pt: truncated" in messages[0] and "left in place" in messages[0]


def test_a_file_of_another_name_is_reported_as_not_used(run: Path, config: Config) -> None:
    trained(2).save(run).rename(run / "final.pt")
    folder, messages = start(run, config)
    assert (
        folder is None
        and len(messages) == 1
        and messages[0].startswith("note: final.pt: not used")
        and "step_N.pt" in messages[0]
    )


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(5000))


def unpicklable(path: Path) -> None:
    torch.save({**OriginalProgram().content(), "extra": Code(path.parent / "executed")}, path)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"step": 0}))


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "a disk that is not there")


@pytest.mark.parametrize("damage", [cut, empty, garbage, unpicklable, pickled, a_folder, a_broken_link])
def test_a_folder_with_only_damaged_files_of_the_original_is_refused(
    damage: Callable[[Path], None], run: Path, config: Config
) -> None:
    paths = [trained(updates).save(run) for updates in (2, 4)]
    for path in paths:
        damage(path)
    with pytest.raises(CheckpointError, match=r"none that is intact.*--fresh"):
        start(run, config)
    assert names(run) == ["step_1.pt", "step_3.pt"] and not (run / "executed").exists()


def test_a_file_without_read_permission_is_reported(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = trained(2).save(run)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(CheckpointError, match="Permission denied"):
        read_file(path)


def test_all_contradictions_are_listed_together_and_nothing_is_written(run: Path, config: Config) -> None:
    trained(2).save(run)
    model = dict(vocab_size=60, dim=27, n_heads=3, max_seq_len=32, window_size=9, global_every=2, soft_cap=30.0)
    other = changed(config, model=model, data={"tokenizer": "auto"})
    with pytest.raises(CheckpointError) as refusal:
        start(run, other)
    first, *problems, tokenizer, advice = str(refusal.value).splitlines()
    assert first.startswith("step_1.pt ") and tokenizer.startswith("  data.tokenizer: auto ")
    assert "--allow-changes" in advice and "--fresh" in advice
    assert problems == [
        "  model.n_heads: 3 does not divide the file's model.dim, 16",
        "  model.vocab_size: 60, but the file has 50",
        "  model.dim: 27, but the file has 16",
        "  model.max_seq_len: 32, but the file has 16",
        "  model.window_size: 9, but the file has 4",
        "  model.global_every: 2, but the original has 4",
        "  model.soft_cap: 30.0, but the original has 50.0",
    ]
    assert names(run) == ["step_1.pt"]
    with pytest.raises(CheckpointError, match=r"model\.positions: rotary, but the original has none"):
        start(run, changed(config, model={"positions": "rotary"}))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda w: w.update({"recurrent_block.ffn.0.weight": torch.zeros(64, 16)}), r"ffn\.0\.weight is \[64, 16\]"),
        (lambda w: w.pop("head.weight"), r"head\.weight is missing"),
        (lambda w: w.update({"extra": torch.zeros(3)}), "extra is unknown"),
        (
            lambda w: w.update({"head.weight": torch.zeros(51, 16)}),
            r"head\.weight is \[51, 16\], the model's \[50, 16\]",
        ),
    ],
)
def test_weights_of_another_network_are_refused(
    spoil: Callable[[dict[str, Any]], None], expected: str, run: Path, config: Config
) -> None:
    content = trained(2).content()
    content["model_state_dict"] = dict(content["model_state_dict"])
    spoil(content["model_state_dict"])
    torch.save(content, run / "step_1.pt")
    with pytest.raises(CheckpointError, match=expected):
        start(run, config)


def test_settings_with_the_same_effect_are_not_a_contradiction(run: Path, config: Config) -> None:
    trained(2).save(run)
    folder, _ = start(run, changed(config, model={"n_loops": 3, "global_every": 5}))  # none of the loops is global
    assert folder is not None


def test_a_window_longer_than_the_sequence_is_accepted_with_any_length(run: Path, config: Config) -> None:
    content = trained(2).content()
    content["model_state_dict"] = content["model_state_dict"] | {
        "local_mask": content["model_state_dict"]["global_mask"]
    }
    torch.save(content, run / "step_1.pt")
    with pytest.raises(CheckpointError, match=r"model\.window_size: 9, but the file has 15"):
        start(run, changed(config, model={"window_size": 9}))
    folder, _ = start(run, changed(config, model={"window_size": 256}))
    assert folder is not None and read_settings(folder).model.window_size == 256


def test_sequence_length_and_window_come_from_the_settings_if_a_file_has_no_masks(run: Path, config: Config) -> None:
    content = trained(2).content()
    weights = {name: w for name, w in content["model_state_dict"].items() if "mask" not in name}
    torch.save({**content, "model_state_dict": weights}, run / "step_1.pt")
    folder, _ = start(run, changed(config, model={"max_seq_len": 32, "window_size": 9}))
    assert folder is not None and read_settings(folder).model.window_size == 9


def test_with_allow_changes_the_checkpoint_has_the_settings_of_the_file(run: Path, config: Config) -> None:
    trained(2).save(run)
    other = changed(config, model={"dim": 32, "window_size": 9}, data={"tokenizer": "auto"})
    folder, _ = start(run, other, allow_changes=True)
    assert folder is not None
    model = read_settings(folder).model
    assert (model.dim, model.window_size) == (16, 4)
    assert "tokenizer.json" not in read_manifest(folder)["files"] and find_weights_checkpoint(folder, other) is None
    with pytest.raises(
        CheckpointError, match=r"(?s)model\.dim: 16, now 32.*data\.tokenizer: auto would train a new tokenizer"
    ):
        compare_settings(folder, other, False, print)
    again, _ = start(run, config)
    assert again is not None and "tokenizer.json" in read_manifest(again)["files"], "named before training"


def test_a_missing_tokenizer_is_refused_before_anything_is_written(run: Path, config: Config) -> None:
    trained(2).save(run)
    with pytest.raises(DataError, match=r"^data\.tokenizer: tokenizer /nowhere/t\.json"):
        start(run, changed(config, data={"tokenizer": "/nowhere/t.json"}))
    assert names(run) == ["step_1.pt"]


KILLED = """
import os, signal, sys
from pathlib import Path
from savant_ray.storage.local import LocalStorage
from savant_ray.config import load_config
from savant_ray.original.conversion import convert_newest

class Dying(LocalStorage):
    def check_owner(self):
        if list(self.folder.glob("step_*.tmp/manifest.json")):
            os.kill(os.getpid(), signal.SIGKILL)

config = load_config(file=Path(sys.argv[2]), environment={})
convert_newest(Dying(Path(sys.argv[1])), config, None, print, print)
"""


def test_a_killed_conversion_leaves_no_checkpoint_and_is_repeated(run: Path, config: Config, tmp_path: Path) -> None:
    from savant_ray.config import dump_yaml

    trained(2).save(run)
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    command = [sys.executable, "-c", KILLED, str(run), str(tmp_path / "config.yaml")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (run / "step_1").exists()
    folder, messages = start(run, config)
    assert folder is not None and len(messages) == 1 and names(run) == ["step_1", "step_1.pt"]
    verify(folder)


def test_a_file_in_object_storage_is_converted(
    store: ObjectStore,
    config: Config,
    tmp_path: Path,
) -> None:
    path = trained(2).save(tmp_path)
    store.write("runs/run/step_1.pt", path.read_bytes())
    storage_a = ObjectStorage(store.uri("runs/run"), tmp_path / "here")
    folder, messages = start(storage_a, config)
    assert folder is not None and len(messages) == 1
    verify(folder)
    storage_b = ObjectStorage(store.uri("runs/run"), tmp_path / "elsewhere")
    assert start(storage_b, config) == (tmp_path / "elsewhere/step_1", [])
    assert store.read("runs/run/step_1.pt") == path.read_bytes()
    assert "step_1/manifest.json" in store.names("runs/run")


def test_the_record_has_the_converted_checkpoint(run: Path, config: Config) -> None:
    trained(2).save(run)
    with RunReport(run, console=PlainConsole(None)) as report:
        convert_newest(LocalStorage(run), config, None, report.notify, report.add_event)
    assert '"event": "checkpoint"' in (run / "metrics.jsonl").read_text()


# --- run.init_from


def test_a_new_run_can_start_from_the_weights_of_a_file_with_the_tokenizer_of_the_settings(
    config: Config, tmp_path: Path
) -> None:
    path = trained(2).save(tmp_path)
    config = changed(config, run={"init_from": str(path)})
    checkpoint = find_weights_checkpoint(None, config)
    assert checkpoint is not None and not checkpoint.is_resumed
    assert choose_tokenizer(config, checkpoint, allow_changes=False) is not None


def test_settings_of_a_new_run_are_compared_with_its_initial_file(config: Config, tmp_path: Path) -> None:
    trained(2).save(tmp_path)
    new = {"init_from": str(tmp_path)}  # a folder that contains only such files
    other = changed(config, run=new, model={"dim": 32, "window_size": 9}, data={"tokenizer": "train"})
    with pytest.raises(SettingsError) as refusal:
        find_weights_checkpoint(None, other)
    message = str(refusal.value)
    assert message.startswith("run.init_from: ") and "model.dim: 32, but the file has 16" in message
    assert "model.window_size: 9, but the file has 4" in message and "data.tokenizer: " in message
    assert (
        find_weights_checkpoint(None, changed(config, run=new, data={"tokenizer": "auto"}), allow_changes=True) is None
    )
