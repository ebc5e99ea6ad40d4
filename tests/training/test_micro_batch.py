"""Arrays become micro-batches on the device, early where there is room, and a step with those that come late is the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch

from savant_ray.data.token_cache import Sequences
from savant_ray.training.efficiency import document_lengths, useful_flops
from savant_ray.training.micro_batch import MicroBatch, as_far_as_they_fit, micro_batches
from savant_ray.training.step import take_step
from tests.training.tiny import CPU, LENGTH, VOCABULARY, never, share, tiny_config, tiny_state, weights


@dataclass(frozen=True)
class Late(MicroBatch):
    """The device has no room for it until all refusals are used up."""

    refusals: tuple[list[Exception], ...] = ()

    def to(self, device: torch.device) -> MicroBatch:
        if self.refusals[0]:
            raise self.refusals[0].pop()
        return super().to(device)

    def parts(self, rows: int) -> Iterator[MicroBatch]:
        assert rows >= len(self.positions)
        yield self


def late(micro_batch: MicroBatch, *refusals: Exception) -> Late:
    values = {field.name: getattr(micro_batch, field.name) for field in fields(MicroBatch)}
    return Late(**values, refusals=(list(refusals),))


@pytest.mark.parametrize("n", [0, 1, 4, 7])
def test_sequences_become_micro_batches_of_the_batch_size_in_their_order(n: int) -> None:
    config = tiny_config()
    chance = np.random.default_rng(n)
    documents = np.sort(chance.integers(-1, 3, (n, LENGTH)).astype(np.int32))[:, ::-1]
    tokens = chance.integers(1, VOCABULARY, (n, LENGTH)).astype(np.int32)
    positions = np.arange(100, 100 + n)
    parts = micro_batches(Sequences(tokens, documents), positions, config, pinned=False)
    assert [len(part.positions) for part in parts] == [4] * (n // 4) + [n % 4] * (n % 4 > 0)
    assert [position for part in parts for position in part.positions] == positions.tolist()
    if n:
        assert np.array_equal(torch.cat([part.tokens_BT for part in parts]).numpy(), tokens)
        assert np.array_equal(torch.cat([part.document_ids_BT for part in parts]).numpy(), documents)
    useful = useful_flops(config.model, document_lengths(documents)) if n else 0.0
    assert sum(part.useful_flops for part in parts) == pytest.approx(useful)
    tokens[:] = 0
    assert all((part.tokens_BT > 0).all() for part in parts), "copies"


def test_what_has_no_room_before_its_turn_is_fetched_at_its_turn() -> None:
    state, other = tiny_state(tiny_config()), tiny_state(tiny_config())
    crowded = [late(part, torch.OutOfMemoryError("no room yet")) for part in share(0, 12, 0, 1, 4)]
    there = share(0, 12, 0, 1, 4)
    waiting = as_far_as_they_fit([there[0], *crowded[1:]], CPU)
    assert all(mine is theirs for mine, theirs in zip(waiting[1:], crowded[1:], strict=True))
    assert [len(part.refusals[0]) for part in crowded] == [1, 0, 1], "where one has no room, none after it is tried"
    crowded[2].refusals[0].clear()
    assert take_step(state, waiting, 1e-2, 1.0, never).loss == take_step(other, there, 1e-2, 1.0, never).loss
    assert all(torch.equal(w, weights(other)[name]) for name, w in weights(state).items())


def test_no_room_at_its_turn_is_no_room_for_the_step() -> None:
    (part,) = share(0, 4, 0, 1, 4)
    state = tiny_state(tiny_config())
    result = take_step(state, [late(part, torch.OutOfMemoryError("no room"))], 1e-2, 1.0, never)
    assert result.no_room and not result.updated
    with pytest.raises(RuntimeError, match="the driver is gone"):
        as_far_as_they_fit([late(part, RuntimeError("the driver is gone"))], CPU)
