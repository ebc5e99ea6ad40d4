"""Validation during training, also when a stop request interrupts it between two batches or two tokens."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from savant_ray.config import Config
from savant_ray.data.record_reader import RuledPart, plan_parts
from savant_ray.data.shard_writer import Recipe, shard_name, write_shard
from savant_ray.data.sources import expand
from savant_ray.data.token_cache import Sequences
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.evaluation.validator import Validator
from savant_ray.events import Event, SampleGenerated, ValidationDone
from savant_ray.model.loss import IGNORED, next_token_targets
from savant_ray.training.host_copies import WeightChanges
from savant_ray.training.loop import train
from savant_ray.training.state import TrainingState
from savant_ray.training.step import micro_batches
from tests.data.albert_like import CLS, FOLDER, SEP
from tests.original.program import OriginalModel
from tests.original.test_file import original_config
from tests.training.tiny import (
    LENGTH,
    RecordingHost,
    local_batches,
    rank_micro_batches,
    tiny_config,
    tiny_state,
    tiny_tokenizer,
)

BATCHES, NEW_TOKENS = 3, 4


def config_of(max_steps: int = 6) -> Config:
    settings = tiny_config(max_steps=max_steps).to_dict()
    settings["validation"] |= {"every_steps": 3, "max_new_tokens": NEW_TOKENS}
    settings["checkpoint"]["every_steps"] = 3
    return Config.from_dict(settings)


def after(questions: int) -> Callable[[], bool]:
    """Return a stop request that appears after `questions` checks."""
    left = iter(range(questions))
    return lambda: next(left, None) is None


def validator(config: Config, emit: Callable[[Event], None], stop_requested: Callable[[], bool]) -> Validator:
    batches = rank_micro_batches(0, 4 * BATCHES, 0, 1, 4)
    return Validator(
        config,
        tiny_tokenizer(),
        batches,
        target_tokens=9,
        trained_bytes=9,
        rank=0,
        emit=emit,
        stop_requested=stop_requested,
    )


def test_the_loss_is_the_mean_over_the_tokens_that_are_trained_on() -> None:
    config, events = config_of(), list[Event]()
    state, evaluated = tiny_state(config), validator(config, events.append, lambda: False)
    evaluated.micro_batches = [
        replace(batch, is_trained_BT=batch.tokens_BT % 3 > 0) for batch in evaluated.micro_batches
    ]
    evaluated(state)
    sums = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for batch in evaluated.micro_batches:
            logits = state.model(batch.tokens_BT, batch.document_ids_BT).flatten(0, 1)
            targets = next_token_targets(batch.tokens_BT, batch.document_ids_BT).flatten()
            targets[targets % 3 == 0] = IGNORED
            loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
            sums += torch.stack([loss, (targets != IGNORED).sum()])
    assert validation_of(events).validation_loss == pytest.approx((sums[0] / sums[1]).item(), rel=1e-6)


def test_a_validation_without_a_token_that_is_trained_on_has_no_loss() -> None:
    config, events = config_of(), list[Event]()
    evaluated = validator(config, events.append, lambda: False)
    evaluated.micro_batches = [
        replace(batch, is_trained_BT=torch.zeros_like(batch.is_trained_BT)) for batch in evaluated.micro_batches
    ]
    assert not evaluated(tiny_state(config))
    assert math.isnan(validation_of(events).validation_loss) and math.isnan(validation_of(events).bits_per_byte)


def validation_of(events: list[Event]) -> ValidationDone:
    (event,) = (event for event in events if isinstance(event, ValidationDone))
    return event


def test_with_an_average_of_the_weights_validation_and_sample_are_those_of_the_average() -> None:
    config = config_of()
    config = config.model_copy(update={"training": config.training.model_copy(update={"ema_decay": 0.9})})
    state = tiny_state(config)
    train(state, config, local_batches(state, config), RecordingHost())
    averaged = tiny_state(config_of())
    averaged.load_weights(state.to_checkpoint()["ema_state_dict"])
    averaged.step = state.step
    changes, events, expected = WeightChanges(), list[Event](), list[Event]()
    changes.measure(state)
    evaluated = validator(config, events.append, lambda: False)
    evaluated.weight_changes = changes
    evaluated(state)
    validator(config, expected.append, lambda: False)(averaged)
    assert results(events) == results(expected)
    assert validation_of(events).weights_moved == 0, "the weights are compared, not their average"
    raw = list[Event]()
    validator(config, raw.append, lambda: False)(tiny_state_of(state))
    assert validation_of(raw).validation_loss != validation_of(events).validation_loss


def tiny_state_of(state: TrainingState) -> TrainingState:
    """Return a state with the weights of another one and without an average."""
    copy = tiny_state(config_of())
    copy.load_weights(state.master_weights())
    return copy


def test_with_special_tokens_the_loss_is_that_of_the_original_on_the_same_text(tmp_path: Path) -> None:
    """The original pads each text to the length with id 0, and averages over the tokens that are not padding."""
    tokenizer = Tokenizer.load(FOLDER)
    chance = random.Random(0)
    words = "the cat is on a red mat and one hen ran in".split()
    texts = [" ".join(chance.choices(words, k=n)) for n in (1, 2, 2, 3, 3, 4) * 3]
    documents = [[CLS, *tokenizer.encode(text), SEP] for text in texts]
    assert max(map(len, documents)) <= LENGTH, "the original would cut it"
    original = OriginalModel().eval()
    rows = torch.tensor([ids + [0] * (LENGTH - len(ids)) for ids in documents])
    with torch.no_grad():
        expected = F.cross_entropy(original(rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), ignore_index=0).item()

    config = original_config()
    state = tiny_state(config)
    masks = ("global_mask", "local_mask")
    state.model.load_state_dict({k: v for k, v in original.state_dict().items() if k not in masks})

    def loss(tokenizer: Tokenizer) -> float:
        events: list[Event] = []
        sequences = packed(texts, tokenizer, tmp_path)
        batches = micro_batches(sequences, np.arange(len(sequences.tokens)), config)
        counts = dict(target_tokens=1, trained_bytes=1)
        Validator(config, tokenizer, batches, **counts, rank=0, emit=events.append, stop_requested=lambda: False)(state)
        return next(event.validation_loss for event in events if isinstance(event, ValidationDone))

    assert loss(tokenizer) == pytest.approx(expected, abs=1e-5)
    assert abs(loss(tokenizer.with_settings(add_special_tokens=False)) - expected) > 1e-3


def packed(texts: list[str], tokenizer: Tokenizer, folder: Path) -> Sequences:
    """Return the sequences that training reads from a file with these texts."""
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (part,) = plan_parts(expand(str(path)))
    list(write_shard(folder, 0, [RuledPart(part)], Recipe.of(tokenizer, LENGTH, 1 << 20)))
    rows = pa.ipc.open_file(folder / shard_name(0)).read_all().to_pydict()
    sequences = Sequences.empty(len(rows["tokens"]), LENGTH)
    for row, lengths in enumerate(rows["lengths"]):
        sequences.tokens[row] = rows["tokens"][row]
        sequences.document_ids[row, : sum(lengths)] = np.repeat(np.arange(len(lengths)), lengths)
    return sequences


def results(events: list[Event]) -> dict[tuple[str, int], Any]:
    figures = {ValidationDone: "validation_loss", SampleGenerated: "text"}
    return {(e.kind, e.step): getattr(e, figures[type(e)]) for e in events if type(e) in figures}


def test_an_interrupted_part_emits_nothing_and_the_other_parts_are_unchanged() -> None:
    config, state = config_of(), tiny_state(config_of())
    complete: list[Event] = []
    assert not validator(config, complete.append, lambda: False)(state)
    seen: list[list[str]] = []
    for questions in range(100):
        events: list[Event] = []
        stopped = validator(config, events.append, after(questions))(state)
        assert results(events).items() <= results(complete).items()
        if not stopped:
            break
        seen.append([event.kind for event in events])
    assert seen == sorted(seen, key=len) and results(events) == results(complete)
    assert seen.count([]) > BATCHES, "a stop before, between and after the batches"
    assert seen.count(["validation"]) > NEW_TOKENS, "a stop before, between and after the tokens"


def test_a_prompt_without_tokens_is_reported_and_has_no_sample() -> None:
    config, state = config_of(), tiny_state(config_of())
    events: list[Event] = []
    without_tokens = validator(config, events.append, lambda: False)
    without_tokens.tokenizer.encode_prompts = lambda texts: [[] for _ in texts]
    assert not without_tokens(state)
    assert [event.kind for event in events] == ["validation", "notice"]
    assert events[1].text.startswith("validation.prompt has no tokens")


class ValidatingHost(RecordingHost):
    """Runs the real validation; in that of `stop_at` a stop is requested after `questions` checks."""

    def __init__(self, config: Config, stop_at: int | None = None, questions: int = 0) -> None:
        super().__init__(stop_at=stop_at, in_validation=True)
        self._config, self._questions = config, questions
        self._weight_changes = WeightChanges()

    def validate(self, state: TrainingState) -> bool:
        stop_requested = after(self._questions) if state.step == self.stop_at else lambda: False
        evaluated = validator(self._config, self.emit, stop_requested)
        evaluated.weight_changes = self._weight_changes
        return evaluated(state)

    def remember_weights(self, state: TrainingState) -> None:
        at_start = validator(self._config, self.emit, lambda: False)
        at_start.weight_changes = self._weight_changes
        at_start.remember_weights(state)


@pytest.mark.parametrize("stop_at", [3, 6])
@pytest.mark.parametrize("questions", [1, BATCHES + 3], ids=["between batches", "between tokens"])
def test_an_interrupted_validation_is_repeated_after_the_resume(stop_at: int, questions: int) -> None:
    config = config_of()
    straight = ValidatingHost(config)
    state = tiny_state(config)
    assert train(state, config, local_batches(state, config), straight)

    first, state = ValidatingHost(config, stop_at, questions), tiny_state(config)
    assert not train(state, config, local_batches(state, config), first)
    assert ("sample", stop_at) not in results(first.events)
    second, resumed = ValidatingHost(config), tiny_state(config)
    resumed.load_checkpoint(first.checkpoint)
    assert train(resumed, config, local_batches(resumed, config), second)
    assert results(first.events) | results(second.events) == results(straight.events)
    assert ("validation", stop_at) in results(second.events) and ("sample", stop_at) in results(second.events)


def test_the_first_validation_of_an_attempt_reports_the_weights_moved_since_its_start() -> None:
    config = config_of()
    first, state = ValidatingHost(config), tiny_state(config)
    first.remember_weights(state)
    train(state, config, local_batches(state, config), first)
    moved = [event.weights_moved for event in first.events if isinstance(event, ValidationDone)]
    assert len(moved) == 2 and all(fraction is not None and fraction > 0.9 for fraction in moved)


def test_a_rank_without_held_out_sequences_reports_the_loss_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    config, state = config_of(), tiny_state(config_of())
    events: list[Event] = []
    empty = validator(config, events.append, lambda: False)
    empty.micro_batches = []
    others = torch.tensor([12.0, 4.0, 0.0], dtype=torch.float64)  # loss, tokens, stops
    monkeypatch.setattr("savant_ray.evaluation.validator.all_reduce_sum", lambda sums: sums + others)
    assert not empty(state)
    (done,) = (event for event in events if isinstance(event, ValidationDone))
    assert done.validation_loss == 3.0 and done.residuals == done.cosines == () and done.last_cosine is None
