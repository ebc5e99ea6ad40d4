"""Weights keep the tokenizer that they were trained with, unless the settings name another one and changes are allowed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import models, processors

from savant_ray.config import Config, dump_yaml
from savant_ray.data.sources import expand
from savant_ray.data.tokenizer import Tokenizer, train_tokenizer, with_tokenizer_settings
from savant_ray.driver.attempt import open_attempt
from savant_ray.driver.data_files import DataFiles, refuse_unencodable
from savant_ray.driver.phases import AttemptPhase
from savant_ray.driver.tokenizer_choice import (
    WeightsCheckpoint,
    choose_tokenizer,
    find_weights_checkpoint,
    find_weights_checkpoint_without_lock,
    tokenizer_change,
)
from savant_ray.errors import CheckpointError, DataError, SettingsError
from savant_ray.storage.object_store import ObjectStorage
from savant_ray.training.checkpoint import write_checkpoint
from tests.cluster.test_starting_point import changed
from tests.data.albert_like import FOLDER, with_chat_template
from tests.storage.object_store import BUCKET, ObjectStore

BASE = train_tokenizer(iter(["red green blue one two three"] * 9), 280)
OTHER = train_tokenizer(iter(["zebra quartz vexed jumbling waltz nymph"] * 9), 280)
EXTENDED = tokenizers.Tokenizer.from_str(BASE.to_json())
EXTENDED.add_special_tokens(["<|user|>"])
ALBERT = Tokenizer.load(FOLDER)
AGREE, KNOWN = BASE.count_same_ids(OTHER)


def run_of(tmp_path: Path, step: int = 6, kept: Tokenizer = BASE, **data: Any) -> Path:
    """Return a run folder with one checkpoint, trained with these settings of `data`."""
    content = {"step": step, "weights": torch.ones(5), "savant": {"data_fingerprint": "abc", "format_version": 1}}
    texts = {"config.yaml": dump_yaml(changed(data=data)), **kept.files(), "records.jsonl": ""}
    write_checkpoint(tmp_path / "A", content, texts)
    return tmp_path / "A"


def resumed(run: Path, config: Config = Config()) -> WeightsCheckpoint | None:
    return find_weights_checkpoint(run / "step_6", config)


def started_from(path: Path | str, **data: Any) -> tuple[Config, WeightsCheckpoint | None]:
    config = changed(run={"init_from": str(path)}, data=data)
    return config, find_weights_checkpoint(None, config)


def saved(tokenizer: Tokenizer, path: Path) -> str:
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    return str(path)


def test_without_a_checkpoint_a_tokenizer_is_trained() -> None:
    assert find_weights_checkpoint(None, Config()) is None
    for name in ("auto", "train"):
        assert choose_tokenizer(changed(data={"tokenizer": name}), None, allow_changes=False) is None


@pytest.mark.parametrize("path", ["A", "A/step_6"])
def test_a_new_run_uses_the_tokenizer_of_its_initial_weights(path: str, tmp_path: Path) -> None:
    run_of(tmp_path)
    config, checkpoint = started_from(tmp_path / path)
    chosen = choose_tokenizer(config, checkpoint, allow_changes=False)
    assert chosen is not None and chosen.fingerprint == BASE.fingerprint


@pytest.mark.parametrize("path", ["runs/run", "runs/run/step_6"])
def test_the_tokenizer_of_initial_weights_in_object_storage_is_fetched_without_the_weights(
    path: str,
    storage_a: ObjectStorage,
    store: ObjectStore,
    tmp_path: Path,
) -> None:
    shutil.copytree(run_of(tmp_path), storage_a.folder)
    storage_a.commit(storage_a.folder / "step_6")
    store.filesystem.delete_file(f"{BUCKET}/runs/run/step_6/step_6.pt")
    config, checkpoint = started_from(store.uri(path))
    chosen = choose_tokenizer(config, checkpoint, allow_changes=False)
    assert chosen is not None and chosen.fingerprint == BASE.fingerprint
    store.write("runs/run/step_6/tokenizer.json", b"{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        started_from(store.uri(path))
    store.filesystem.delete_file(f"{BUCKET}/runs/run/step_6/tokenizer.json")
    with pytest.raises(CheckpointError, match="cannot be fetched"):
        started_from(store.uri(path))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
def test_the_chat_template_of_the_weights_is_used_when_resuming_and_by_a_new_run(name: str, tmp_path: Path) -> None:
    tokenizer = with_chat_template(tmp_path / "tokenizer", name)
    run = run_of(tmp_path, kept=tokenizer)
    shutil.rmtree(tmp_path / "tokenizer")
    named = str(run / "step_6/tokenizer.json")
    for config, checkpoint in [(Config(), resumed(run)), started_from(run), started_from(run, tokenizer=named)]:
        chosen = choose_tokenizer(config, checkpoint, allow_changes=False)
        assert chosen is not None and chosen.chat_template is not None
        assert chosen.chat_template == tokenizer.chat_template
        assert repr(chosen.chat_template) == repr(tokenizer.chat_template), "it is part of the identity of token caches"
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        content = (run / "step_6" / file).read_bytes()
        for altered in (None, content[:-1]):
            (run / "step_6" / file).unlink() if altered is None else (run / "step_6" / file).write_bytes(altered)
            with pytest.raises(CheckpointError, match=file):
                started_from(run)
        (run / "step_6" / file).write_bytes(content)


def test_the_chat_template_of_initial_weights_in_object_storage_is_fetched(
    storage_a: ObjectStorage,
    store: ObjectStore,
    tmp_path: Path,
) -> None:
    tokenizer = with_chat_template(tmp_path / "tokenizer")
    shutil.copytree(run_of(tmp_path, kept=tokenizer), storage_a.folder)
    storage_a.commit(storage_a.folder / "step_6")
    store.filesystem.delete_file(f"{BUCKET}/runs/run/step_6/step_6.pt")
    _, checkpoint = started_from(store.uri("runs/run"))
    assert checkpoint is not None and checkpoint.tokenizer.chat_template == tokenizer.chat_template


def test_another_chat_template_than_that_of_the_weights_is_reported(tmp_path: Path) -> None:
    tokenizer = with_chat_template(tmp_path / "tokenizer")
    _, checkpoint = started_from(run_of(tmp_path, kept=tokenizer))
    assert checkpoint is not None and tokenizer_change(checkpoint, tokenizer) is None
    (tmp_path / "tokenizer/chat_template.jinja").write_text("{{ messages[0].content }}")
    assert "has another chat template than run.init_from" in (
        tokenizer_change(checkpoint, Tokenizer.load(tmp_path / "tokenizer")) or ""
    )
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        (tmp_path / "tokenizer" / file).unlink(missing_ok=True)
    without = Tokenizer.load(tmp_path / "tokenizer")
    assert "has no chat template, unlike run.init_from" in (tokenizer_change(checkpoint, without) or "")


def test_training_a_new_tokenizer_for_initial_weights_requires_allow_changes(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    config, checkpoint = started_from(run, tokenizer="train")
    with pytest.raises(SettingsError, match=r"data\.tokenizer: train would train a new tokenizer") as refusal:
        choose_tokenizer(config, checkpoint, allow_changes=False)
    for advice in ("leave data.tokenizer at auto", f"{run}/step_6/tokenizer.json", "--allow-changes"):
        assert advice in str(refusal.value)
    assert choose_tokenizer(config, checkpoint, allow_changes=True) is None
    assert checkpoint is not None
    warning = tokenizer_change(checkpoint, OTHER)
    assert warning is not None and f"{AGREE} of {KNOWN} token ids of run.init_from" in warning
    assert tokenizer_change(checkpoint, BASE) is None


def test_a_named_tokenizer_for_initial_weights_must_have_the_same_token_for_every_id(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    extended = saved(Tokenizer(EXTENDED), tmp_path / "extended.json")
    config, checkpoint = started_from(run, tokenizer=extended)
    chosen = choose_tokenizer(config, checkpoint, allow_changes=False)
    assert chosen is not None and chosen.vocab_size == BASE.vocab_size + 1
    config, checkpoint = started_from(run, tokenizer=saved(OTHER, tmp_path / "other.json"))
    with pytest.raises(SettingsError, match=rf"{AGREE} of {KNOWN} token ids .* in the tokenizer .*other\.json"):
        choose_tokenizer(config, checkpoint, allow_changes=False)
    chosen = choose_tokenizer(config, checkpoint, allow_changes=True)
    assert chosen is not None and chosen.fingerprint == OTHER.fingerprint


@pytest.mark.parametrize("before", ["auto", "train"])
@pytest.mark.parametrize("now", ["auto", "train"])
@pytest.mark.parametrize("allow_changes", [False, True])
def test_a_resumed_run_keeps_the_tokenizer_that_it_trained(
    before: str, now: str, allow_changes: bool, tmp_path: Path
) -> None:
    config = changed(data={"tokenizer": now})
    checkpoint = resumed(run_of(tmp_path, tokenizer=before), config)
    chosen = choose_tokenizer(config, checkpoint, allow_changes)
    assert chosen is not None and chosen.fingerprint == BASE.fingerprint


def test_resuming_with_another_tokenizer_requires_allow_changes(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    checkpoint = resumed(run)
    for tokenizer, agree in [(OTHER, AGREE), (Tokenizer(EXTENDED), KNOWN)]:
        config = changed(data={"tokenizer": saved(tokenizer, tmp_path / "mine.json")})
        with pytest.raises(CheckpointError, match=f"{agree} of {KNOWN} token ids of step_6") as refusal:
            choose_tokenizer(config, checkpoint, allow_changes=False)
        assert f"set it to {run}/step_6/tokenizer.json" in str(refusal.value)
        chosen = choose_tokenizer(config, checkpoint, allow_changes=True)
        assert chosen is not None and chosen.fingerprint == tokenizer.fingerprint
    same = changed(data={"tokenizer": str(run / "step_6/tokenizer.json")})
    assert choose_tokenizer(same, checkpoint, allow_changes=False) is not None


def test_a_resumed_run_with_a_named_tokenizer_does_not_train_one(tmp_path: Path) -> None:
    checkpoint = resumed(run_of(tmp_path, tokenizer="albert-base-v2"))
    chosen = choose_tokenizer(Config(), checkpoint, allow_changes=False)
    assert chosen is not None and chosen.fingerprint == BASE.fingerprint
    with pytest.raises(CheckpointError, match="train would train a new tokenizer"):
        choose_tokenizer(changed(data={"tokenizer": "train"}), checkpoint, allow_changes=False)


def test_a_resumed_run_does_not_need_the_file_that_its_tokenizer_was_loaded_from(tmp_path: Path) -> None:
    gone = str(tmp_path / "run/step_3/tokenizer.json")
    checkpoint = resumed(run_of(tmp_path, tokenizer=gone))
    chosen = choose_tokenizer(changed(data={"tokenizer": gone}), checkpoint, allow_changes=False)
    assert chosen is not None and chosen.fingerprint == BASE.fingerprint
    with pytest.raises(DataError, match=r"^data\.tokenizer: .*no such tokenizer"):
        choose_tokenizer(changed(data={"tokenizer": f"{gone}.json"}), checkpoint, allow_changes=False)


def test_the_end_of_document_token_is_kept_with_the_tokenizer(tmp_path: Path) -> None:
    run = run_of(tmp_path, kept=Tokenizer(EXTENDED), end_of_document="<|user|>")
    for config, checkpoint in [(Config(), resumed(run)), started_from(run)]:
        chosen = choose_tokenizer(config, checkpoint, allow_changes=False)
        assert chosen is not None and chosen.end_of_document == BASE.vocab_size
        assert with_tokenizer_settings(config, chosen).data.end_of_document == "<|user|>"
    config, checkpoint = started_from(run, end_of_document="<|pad|>")
    with pytest.raises(
        SettingsError, match=r"(?s)data\.end_of_document: another token.* leave data\.end_of_document out"
    ):
        choose_tokenizer(config, checkpoint, allow_changes=False)


def test_a_trained_tokenizer_ends_documents_only_with_its_own_token() -> None:
    with pytest.raises(SettingsError, match=r"data\.end_of_document: .* not with </s>"):
        choose_tokenizer(changed(data={"end_of_document": "</s>"}), None, allow_changes=False)


def test_prepare_and_train_choose_the_same_tokenizer(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    for settings in (
        {"storage_path": str(tmp_path), "name": "A"},
        {"storage_path": str(tmp_path), "init_from": str(run)},
        {"storage_path": str(tmp_path), "name": "new", "continue_from": str(run)},
    ):
        checkpoint = find_weights_checkpoint_without_lock(changed(run=settings))
        assert checkpoint is not None and checkpoint.tokenizer.fingerprint == BASE.fingerprint
    assert find_weights_checkpoint_without_lock(changed(run={"storage_path": str(tmp_path), "name": "new"})) is None


def test_a_run_is_moved_aside_only_for_one_that_can_continue_with_the_tokenizer_of_a_checkpoint(tmp_path: Path) -> None:
    run = run_of(tmp_path, kept=Tokenizer(EXTENDED), end_of_document="<|user|>")
    (tmp_path / "text.jsonl").write_text('{"text": "red green"}\n{"text": "blue one"}\n')
    (tmp_path / "new").mkdir()

    def start(**data: Any) -> None:
        data |= {"sources": [{"path": str(tmp_path / "text.jsonl"), "weight": 1}], "validation": {"fraction": 0.5}}
        settings = {"storage_path": str(tmp_path), "name": "new", "continue_from": str(run)}
        config = changed(run=settings, data=data | {"cache_dir": str(tmp_path / "cache")})
        with open_attempt(config, fresh=True, allow_changes=False, verbose=False, phase=AttemptPhase()):
            pass

    with pytest.raises(CheckpointError, match=r"^data\.tokenizer: .* of step_6 are the same tokens"):
        start(tokenizer=saved(OTHER, tmp_path / "other.json"))
    assert not (tmp_path / "new.old").exists()
    start(end_of_document="<|user|>")
    assert (tmp_path / "new.old").exists()


def test_an_altered_tokenizer_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    saved(OTHER, run / "step_6/tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        started_from(run)


def test_a_tokenizer_that_cannot_be_used_is_refused_before_ray_starts(tmp_path: Path) -> None:
    letters = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate("abc")} | {"</s>": 3}, []))
    unigram = tokenizers.Tokenizer(models.Unigram([("</s>", 0.0), ("a", -1.0)]))
    paths = [saved(Tokenizer(inner), tmp_path / name) for inner, name in [(letters, "bpe.json"), (unigram, "uni.json")]]
    (tmp_path / "good.jsonl").write_text('{"text": "aa"}\n')
    (tmp_path / "bad.jsonl").write_text('\n{"text": "aa"}\n{"text": "a b"}\n')
    for path, file, validation, error, words in [
        (
            paths[0],
            "good",
            {"prompt": "123"},
            SettingsError,
            r"validation\.prompt: .*bpe\.json has no token for it; .*; or give",
        ),
        (paths[1], "good", {}, SettingsError, r"validation\.prompt: .*uni\.json cannot encode the text"),
        (
            paths[1],
            "good",
            {"prompt": "a"},
            SettingsError,
            r"validation\.logic_problems: .*uni\.json cannot .*set it to 0",
        ),
        (paths[1], "bad", {}, DataError, r"bad\.jsonl line 3: the tokenizer .*uni\.json cannot encode the text"),
    ]:
        files = expand(str(tmp_path / f"{file}.jsonl"))
        config = changed(data={"tokenizer": path}, validation=validation)
        text = DataFiles(sources=[(config.data.sources[0], files)], held_out=config.data.held_out, validation=files)
        with pytest.raises(error, match=words):
            refuse_unencodable(config, text, choose_tokenizer(config, None, allow_changes=False))
    config = changed(data={"tokenizer": saved(OTHER, tmp_path / "other.json")}, model={"vocab_size": 100})
    with pytest.raises(SettingsError, match=r"model\.vocab_size: 100 is less than the \d+ entries of .*other\.json"):
        choose_tokenizer(config, None, allow_changes=False)


def albert_run(tmp_path: Path, adds_special_tokens: bool | None) -> Path:
    """Return a run that was trained with this setting; None: by a version that did not have the setting."""
    run = run_of(tmp_path, kept=ALBERT, tokenizer=str(FOLDER), add_special_tokens=bool(adds_special_tokens))
    if adds_special_tokens is None:
        config = run / "step_6/config.yaml"
        texts = {"config.yaml": re.sub(r"\n +add_special_tokens: .*", "", config.read_text())}
        texts |= {name: (run / "step_6" / name).read_text() for name in ("tokenizer.json", "records.jsonl")}
        write_checkpoint(run, torch.load(run / "step_6/step_6.pt"), texts)
    return run


@pytest.mark.parametrize("spec", ["auto", str(FOLDER)])
@pytest.mark.parametrize("trained", [True, False, None])
def test_weights_keep_the_special_tokens_that_they_were_trained_with(
    trained: bool | None, spec: str, tmp_path: Path
) -> None:
    run = albert_run(tmp_path, trained)
    resumed_config = changed(data={"tokenizer": spec})
    for config, checkpoint in [
        (resumed_config, resumed(run, resumed_config)),
        started_from(run, tokenizer=spec),
    ]:
        chosen = choose_tokenizer(config, checkpoint, allow_changes=False)
        assert chosen is not None and chosen.adds_special_tokens == bool(trained)
        assert with_tokenizer_settings(config, chosen).data.add_special_tokens is bool(trained)
        assert checkpoint is not None and tokenizer_change(checkpoint, chosen) is None


@pytest.mark.parametrize("spec", ["auto", str(FOLDER)])
@pytest.mark.parametrize("trained", [True, False, None])
def test_changing_the_special_tokens_of_weights_requires_allow_changes(
    trained: bool | None, spec: str, tmp_path: Path
) -> None:
    run = albert_run(tmp_path, trained)
    now, before = ("false", "true") if trained else ("true", "false")
    data = {"tokenizer": spec, "add_special_tokens": not trained}
    resumed_config = changed(data=data)
    for kind, name, config, checkpoint in [
        (CheckpointError, "step_6", resumed_config, resumed(run, resumed_config)),
        (SettingsError, "run.init_from", *started_from(run, **data)),
    ]:
        with pytest.raises(kind, match=rf"^data\.add_special_tokens: {now}, but {name}.* with {before}:") as refusal:
            choose_tokenizer(config, checkpoint, allow_changes=False)
        assert "leave data.add_special_tokens and data.tokenizer at auto" in str(refusal.value)
        assert "--allow-changes" in str(refusal.value)
        chosen = choose_tokenizer(config, checkpoint, allow_changes=True)
        assert chosen is not None and chosen.adds_special_tokens == (not trained)
        assert with_tokenizer_settings(config, chosen).data.add_special_tokens is (not trained)
        assert checkpoint is not None
        warning = tokenizer_change(checkpoint, chosen)
        assert warning is not None and warning.startswith(f"warning: data.add_special_tokens: {now}, but {name}")


def test_a_new_run_uses_the_template_of_its_tokenizer_if_it_has_one(tmp_path: Path) -> None:
    plain = saved(BASE, tmp_path / "plain.json")
    for spec, choice, adds in [
        (FOLDER, "auto", True),
        (FOLDER, True, True),
        (FOLDER, False, False),
        (plain, "auto", False),
    ]:
        config = changed(data={"tokenizer": str(spec), "add_special_tokens": choice})
        chosen = choose_tokenizer(config, None, allow_changes=False)
        assert chosen is not None and chosen.adds_special_tokens == adds
        assert with_tokenizer_settings(config, chosen).data.add_special_tokens is adds
    assert with_tokenizer_settings(Config(), None).data.add_special_tokens is False, "one to be learnt has none"


@pytest.mark.parametrize("spec", ["auto", "train", "plain.json"])
def test_special_tokens_that_a_tokenizer_does_not_have_are_refused(spec: str, tmp_path: Path) -> None:
    spec = saved(BASE, tmp_path / spec) if spec.endswith(".json") else spec
    config = changed(data={"tokenizer": spec, "add_special_tokens": True})
    with pytest.raises(SettingsError, match=r"data\.add_special_tokens: true, but .* has no template"):
        choose_tokenizer(config, None, allow_changes=False)
    with pytest.raises(SettingsError, match=r"data\.add_special_tokens: true, but .* has no template"):
        choose_tokenizer(config, resumed(run_of(tmp_path), config), allow_changes=True)


def test_replacing_a_tokenizer_by_one_without_a_template_requires_allow_changes(
    tmp_path: Path,
) -> None:
    run = albert_run(tmp_path, True)
    without = tokenizers.Tokenizer.from_str(ALBERT.to_json())
    without.post_processor = processors.Sequence([])
    data = {"tokenizer": saved(Tokenizer(without), tmp_path / "without.json")}
    for kind, config, checkpoint in [
        (CheckpointError, changed(data=data), resumed(run, changed(data=data))),
        (SettingsError, *started_from(run, **data)),
    ]:
        with pytest.raises(kind, match=r"data\.add_special_tokens: false, but .* with true"):
            choose_tokenizer(config, checkpoint, allow_changes=False)
        chosen = choose_tokenizer(config, checkpoint, allow_changes=True)
        assert chosen is not None and not chosen.adds_special_tokens
