"""Masked tokens are input of the model, and the loss and its gradients are exactly those without their prediction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from savant_ray.config import Config
from savant_ray.data.documents import Document
from savant_ray.data.token_cache import Sequences
from savant_ray.data.tokenizer import Tokenizer, train_tokenizer
from savant_ray.errors import TrainingError
from savant_ray.events import StepDone
from savant_ray.model.loss import IGNORED, cross_entropy_sum, next_token_targets
from savant_ray.reporting.wording import skipped_update
from savant_ray.training.loop import train
from savant_ray.training.state import TrainingState
from savant_ray.training.step import MicroBatch, StepResult, add_gradients, micro_batches, take_step
from tests.data.without_ray import cache_of
from tests.training.tiny import (
    LENGTH,
    RecordingHost,
    micro_batch,
    never,
    rank_micro_batches,
    tiny_config,
    tiny_state,
    weights,
)

TURNS = [("2 + 2?", "4"), ("Say a word.", "hen"), ("And a longer one?", "antidisestablish"), ("", "ok"), ("Hm", "")]


def conversations() -> list[Document]:
    """Return documents of one to three questions and answers, of which the answers are trained on."""
    documents = []
    for number in range(12):
        text, ranges = "", []
        for question, answer in [TURNS[(number + turn) % len(TURNS)] for turn in range(1 + number % 3)]:
            text += f"Q: {question} A: "
            ranges.append((len(text), len(text) + len(answer)))
            text += answer
        documents.append(Document(number + 1, text, "", tuple(ranges)))
    return documents


def settings(length: int, **model: object) -> Config:
    config = tiny_config().to_dict()
    return Config.from_dict(config | {"model": config["model"] | {"vocab_size": 258, "max_seq_len": length} | model})


def byte_tokenizer() -> Tokenizer:
    return train_tokenizer(iter(()), 258)


def loss_and_gradients(state: TrainingState, batches: Sequence[MicroBatch]) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses and of the gradients of all parameters."""
    state.gradients.flat.zero_()
    loss = torch.stack([add_gradients(state, batch) for batch in batches]).sum()
    return loss, state.gradients.flat.clone()


def targets_of(batch: MicroBatch) -> Tensor:
    return next_token_targets(batch.tokens_BT, batch.document_ids_BT, batch.is_trained_BT)


def masked(batch: MicroBatch, is_trained: Tensor | bool) -> MicroBatch:
    return replace(batch, is_trained_BT=torch.as_tensor(is_trained).expand_as(batch.tokens_BT).clone())


def random_mask(batch: MicroBatch, seed: int = 0) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    return masked(batch, torch.rand(batch.tokens_BT.shape, generator=generator) < 0.4)


def step(state: TrainingState, batches: Sequence[MicroBatch]) -> StepResult:
    return take_step(state, batches, learning_rate=1e-2, gradient_clip=1.0, grace_left=never)


@pytest.mark.parametrize("positions", ["none", "rotary"])
def test_packed_conversations_give_loss_and_gradients_of_one_conversation_at_a_time(
    positions: str, tmp_path: Path
) -> None:
    length = 96
    config, tokenizer, documents = settings(length, positions=positions), byte_tokenizer(), conversations()
    cached = cache_of(documents, tokenizer, length, tmp_path)
    assert cached.n_sequences < len(documents) / 1.5, "several in a row"
    packed = micro_batches(cached.take(np.arange(cached.n_sequences)), np.arange(cached.n_sequences), config)
    assert sum(len(cached.documents(row)) for row in range(cached.n_sequences)) == len(documents), "none is cut"

    alone = []
    for document in documents:
        # Written without the encoder of masks: a byte is a token, and each predicts the next one.
        ids = [*tokenizer.encode(document.text), tokenizer.end_of_document]
        is_trained = torch.zeros(1, len(ids), dtype=torch.bool)
        for start, stop in document.trained or ():
            is_trained[0, start:stop] = True
        is_trained[0, -1] = document.text[(document.trained or ())[-1][1] :] == ""
        alone.append(MicroBatch(torch.tensor([ids]), torch.zeros(1, len(ids), dtype=torch.int64), is_trained, ()))

    state = tiny_state(config)
    (loss, gradients), (expected_loss, expected) = (loss_and_gradients(state, each) for each in (packed, alone))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert gradients.norm() > 1
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-5)
    assert sum((targets_of(batch) != IGNORED).sum() for batch in packed) == cached.manifest.target_tokens


def test_the_loss_is_the_cross_entropy_of_the_trained_tokens_only() -> None:
    state, batch = tiny_state(tiny_config()), random_mask(micro_batch(np.arange(4)))
    logits = state.model(batch.tokens_BT, batch.document_ids_BT).log_softmax(-1)
    losses = [
        -logits[row, at, batch.tokens_BT[row, at + 1]]
        for row in range(4)
        for at in range(LENGTH - 1)
        if batch.document_ids_BT[row, at] == batch.document_ids_BT[row, at + 1] >= 0
        and batch.is_trained_BT[row, at + 1]
    ]
    assert 0 < len(losses) < 30
    expected = torch.autograd.grad(torch.stack(losses).sum(), list(state.model.parameters()))
    result = step(state, [batch])
    assert result.tokens == len(losses)
    assert result.loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)
    assert result.grad_norm == pytest.approx(
        math.sqrt(sum(float(each.square().sum()) for each in expected)) / len(losses), rel=1e-5
    )


def test_the_prediction_of_a_masked_token_has_exactly_zero_gradient() -> None:
    state, batch = tiny_state(tiny_config()), random_mask(micro_batch(np.arange(4)))
    hidden_BTD = torch.randn(4, LENGTH, 16, requires_grad=True)
    head_VD = state.model.head.weight.detach().requires_grad_()
    results = []
    for tokens_BT in (batch.tokens_BT, torch.where(batch.is_trained_BT, batch.tokens_BT, 7)):
        loss = cross_entropy_sum(hidden_BTD, head_VD, targets_of(replace(batch, tokens_BT=tokens_BT)))
        results.append((loss, *torch.autograd.grad(loss, (hidden_BTD, head_VD))))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True)), "whatever the masked tokens are"
    has_no_target = targets_of(batch) == IGNORED
    assert not results[0][1][has_no_target].any() and results[0][1][~has_no_target].any(dim=-1).all()


def test_masked_tokens_after_the_last_trained_one_do_not_change_a_bit_of_the_gradients() -> None:
    batch = micro_batch(np.arange(4))
    end = torch.arange(LENGTH) >= 10
    other = replace(batch, tokens_BT=torch.where(end & (batch.document_ids_BT >= 0), 7, batch.tokens_BT))
    assert not torch.equal(batch.tokens_BT, other.tokens_BT)
    first, second = (loss_and_gradients(tiny_state(tiny_config()), [masked(each, ~end)]) for each in (batch, other))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(*(loss_and_gradients(tiny_state(tiny_config()), [each])[1] for each in (batch, other)))


def test_a_mask_that_excludes_nothing_gives_the_same_bits_as_targets_without_a_mask() -> None:
    batch = micro_batch(np.arange(4))
    beyond_targets = torch.ones_like(batch.is_trained_BT)
    beyond_targets[:, 0] = False  # the first token of a row is no target
    results = [loss_and_gradients(tiny_state(tiny_config()), [each]) for each in (batch, masked(batch, beyond_targets))]
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_a_step_with_a_fully_masked_micro_batch_is_bit_for_bit_the_step_without_it() -> None:
    batches = [random_mask(batch) for batch in rank_micro_batches(0, 12, 0, 1, 4)]
    first, second = tiny_state(tiny_config()), tiny_state(tiny_config())
    result = step(first, [masked(micro_batch(np.arange(90, 94)), False), *batches])
    expected = step(second, batches)
    assert result.updated and not result.skipped
    assert (result.loss, result.tokens, result.grad_norm) == (expected.loss, expected.tokens, expected.grad_norm)
    assert all(torch.equal(weight, weights(second)[name]) for name, weight in weights(first).items())


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_smaller_micro_batches_after_running_out_of_memory_keep_the_mask(rows: int) -> None:
    batches = [random_mask(batch, seed) for seed, batch in enumerate(rank_micro_batches(0, 12, 0, 1, 4))]
    states = [tiny_state(tiny_config()) for _ in range(2)]
    states[1].set_batch_fit(replace(states[1].batch_fit, rows=rows))
    whole, parts = (step(state, batches) for state in states)
    assert parts.tokens == whole.tokens == sum(int((targets_of(batch) != IGNORED).sum()) for batch in batches)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    for a, b in zip(weights(states[0]).values(), weights(states[1]).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_a_step_without_a_token_to_train_on_changes_nothing_and_is_reported() -> None:
    config, host = tiny_config(), RecordingHost()
    state = tiny_state(config)
    before = weights(state)
    local_batches = [
        [masked(batch, step != 1) for batch in rank_micro_batches(12 * step, 12, 0, 1, 4)] for step in range(3)
    ]
    assert train(state, config, local_batches[1:2], host)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(state).items())
    (event,) = (event for event in host.events if isinstance(event, StepDone))
    assert (event.tokens, event.tokens_per_second, event.update_skipped, event.skipped_micro_batches) == (0, 0, True, 0)
    assert math.isnan(event.train_loss) and "all of its tokens are masked" in skipped_update(event)

    assert train(state, config, local_batches[2:], host)
    last = host.events[-1]
    assert isinstance(last, StepDone) and math.isfinite(last.train_loss) and not last.update_skipped
    assert all(weight.isfinite().all() for weight in weights(state).values())


def test_a_run_whose_steps_have_no_token_to_train_on_ends_with_an_error_that_says_so() -> None:
    config = tiny_config(max_skipped_steps=2)
    state = tiny_state(config)
    local_batches = (
        [masked(batch, False) for batch in rank_micro_batches(12 * step, 12, 0, 1, 4)] for step in range(6)
    )
    with pytest.raises(TrainingError, match=r"^2 steps in a row \(up to step 2\) did not change .* all were masked"):
        train(state, config, local_batches, RecordingHost())


def test_the_head_is_useful_for_trained_tokens_only() -> None:
    config = tiny_config()
    tokens = np.ones((1, LENGTH), dtype=np.int32)
    documents, all_trained, half = np.zeros_like(tokens), np.ones((1, LENGTH), bool), np.arange(LENGTH)[None] % 2 == 0
    (plain,), (chat,) = (
        micro_batches(Sequences(tokens, documents, mask), np.arange(1), config) for mask in (all_trained, half)
    )
    model = config.model
    assert plain.useful_flops - chat.useful_flops == 3 * 2 * (LENGTH // 2) * model.dim * model.vocab_size
