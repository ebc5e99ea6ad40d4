"""Continuous batching: an answer has the same tokens whether it is alone, joins others at any token, or others leave.

The tests run as on a CPU and as on a GPU, where a recorded decoding step is replayed and tokens arrive in groups.
"""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from savant_ray.inference import decoder as decoder_module
from savant_ray.inference.decoder import Decoder
from savant_ray.inference.generate import generate
from savant_ray.inference.sampling import Sampling
from savant_ray.model.transformer import UniversalTransformer
from tests.inference.recorded_graph import RecordedGraph
from tests.inference.test_generate import model_with

Request = tuple[list[int], Sampling]


@pytest.fixture(autouse=True, params=["eager", "replayed"])
def execution(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "replayed":
        monkeypatch.setattr(decoder_module, "StepGraph", RecordedGraph)
    return request.param


def sampling(**changes: Any) -> Sampling:
    defaults = dict(vocab_size=40, end_of_document=1, never_sampled=frozenset({0, 2}), max_new_tokens=40, temperature=0)
    return Sampling(**(defaults | changes))


def prompt(rng: random.Random, longest: int) -> list[int]:
    return [rng.randrange(3, 40) for _ in range(rng.randint(1, longest))]


def random_request(rng: random.Random) -> Request:
    parameters = sampling(
        temperature=rng.choice([0, 0.7, 1.5]),
        seed=rng.randrange(100),
        max_new_tokens=rng.choice([1, 2, 10, 40, 90]),
    )
    return prompt(rng, 30), parameters


def answers_alone(model: UniversalTransformer, requests: list[Request]) -> list[list[int]]:
    return [list(generate(model, prompt_ids, parameters)) for prompt_ids, parameters in requests]


def take(decoder: Decoder, answers: dict[int, list[int]], ended: set[int]) -> bool:
    """Add the next tokens to the answers; return whether there were any."""
    tokens = decoder.next_tokens()
    for number, new in tokens.items():
        assert number not in ended
        answers.setdefault(number, []).extend(new.ids)
        if new.is_last:
            ended.add(number)
    return bool(tokens)


@pytest.mark.parametrize(("positions", "seed"), [("none", 0), ("rotary", 1), ("rotary", 2)])
def test_answers_do_not_depend_on_when_they_join_and_others_leave(positions: str, seed: int) -> None:
    """Windows of 4 tokens wrap around within each answer. Some answers are canceled, and the batch is empty at times."""
    rng = random.Random(seed)
    model = model_with(window_size=4, positions=positions, global_every=2)
    requests = [random_request(rng) for _ in range(12)]
    waiting = list(enumerate(requests))
    decoder, answers, ended, canceled = Decoder(model, sampling()), {}, set(), set()
    while waiting or len(ended | canceled) < len(requests):
        joining = [waiting.pop(0) for _ in range(min(len(waiting), rng.choice([0, 0, 0, 0, 1, 1, 3])))]
        if joining:
            numbers = decoder.add([request[0] for _, request in joining], [request[1] for _, request in joining])
            assert numbers == [number for number, _ in joining]
        in_progress = sorted(set(answers) - ended - canceled)
        if in_progress and rng.random() < 0.03:
            canceled.add(rng.choice(in_progress))
            decoder.remove(max(canceled & set(in_progress)))
        take(decoder, answers, ended)
    assert not decoder.next_tokens()
    for number, expected in enumerate(answers_alone(model, requests)):
        length = len(answers[number]) if number in canceled else len(expected)
        assert answers[number] == expected[:length], f"answer {number} of {requests[number]}"
    assert len(ended) > 5 and len({len(answer) for answer in answers.values()}) > 3


@pytest.mark.parametrize("window_size", [4, 300])
def test_answers_join_while_buffers_grow_and_shrink(window_size: int) -> None:
    """A long answer makes the buffers of 256 slots grow twice. They shrink after it, when windows have wrapped around."""
    rng = random.Random(0)
    model = model_with(window_size=window_size, positions="rotary")
    endless = sampling(end_of_document=-1, temperature=1.0)
    requests = [(prompt(rng, 20), endless) for _ in range(12)]
    requests[1] = ([3 + i % 30 for i in range(230)], sampling(end_of_document=-1, max_new_tokens=420))
    requests[6] = ([5 + i % 30 for i in range(270)], endless)
    decoder, answers, ended = Decoder(model, endless), {}, set()
    for number, (prompt_ids, parameters) in enumerate(requests):
        decoder.add([prompt_ids], [parameters])
        while take(decoder, answers, ended) and not (number > 3 and len(set(answers) - ended) < 3):
            if sum(map(len, answers.values())) > 70 * (number + 1):
                break
    while take(decoder, answers, ended):
        pass
    assert [answers[number] for number in range(len(requests))] == answers_alone(model, requests)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that an operator returns."""

    size = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        sizes = [tensor.numel() for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        self.size = max([self.size, *sizes])
        return result


def test_buffers_do_not_grow_while_the_batch_is_never_empty(execution: str) -> None:
    """Three answers are always in progress, far past the 256 slots of the first buffers.

    Operators are watched in the first ten turns and the last three only, because that is slow.
    """
    model = model_with(positions="rotary")
    short = sampling(end_of_document=-1, max_new_tokens=30 if execution == "eager" else 62)
    decoder, sizes, n_tokens = Decoder(model, short), [], 0
    decoder.add([[5]], [short])
    for turn in range(30):
        with LargestTensor() if turn < 10 or turn >= 27 else nullcontext() as largest:
            decoder.add([[6 + turn % 30]], [short])
            for _ in range(11 if execution == "eager" else 3):
                tokens = decoder.next_tokens()
                n_tokens += max((len(new.ids) for new in tokens.values()), default=0)
        assert tokens, "the batch is not empty"
        if largest is not None:
            sizes.append(largest.size)
    assert n_tokens > 300 and max(sizes[10:]) <= max(sizes[:10])


def test_an_answer_that_is_not_finite_leaves_the_others_alone_also_the_next_one_in_its_row() -> None:
    model = model_with(positions="rotary")
    with torch.no_grad():
        model.embed.weight[45] = float("nan")  # 45 is never sampled
    greedy = sampling(end_of_document=-1)
    requests = [([5, 6], greedy), ([45, 5, 6, 7, 8, 9], greedy), ([7], greedy), ([8, 9], greedy), ([9], greedy)]
    decoder, answers, ended = Decoder(model, greedy), {}, set()
    decoder.add([prompt_ids for prompt_ids, _ in requests[:3]], [greedy] * 3)
    for prompt_ids, parameters in requests[3:]:
        take(decoder, answers, ended)
        take(decoder, answers, ended)
        decoder.add([prompt_ids], [parameters])
    while take(decoder, answers, ended):
        pass
    assert [answers[number] for number in range(5)] == answers_alone(model, requests)
    assert answers[1] == []


def test_rows_of_ended_answers_are_used_again(execution: str) -> None:
    """Otherwise each new answer would copy the cache, and on a GPU need a new CUDA graph."""
    model = model_with()
    endless, short = sampling(end_of_document=-1, max_new_tokens=400), sampling(end_of_document=-1, max_new_tokens=2)
    decoder, rows = Decoder(model, endless), []
    decoder.add([[5], [6], [7]], [endless] * 3)
    model.head.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    RecordedGraph.n_recorded = 0
    for _ in range(5):
        decoder.add([[8]], [short])
        for _ in range(4):
            decoder.next_tokens()
    assert set(rows) == {1, 4}
    assert RecordedGraph.n_recorded == (0 if execution == "eager" else 1)


def test_a_prompt_without_tokens_is_refused_and_others_go_on() -> None:
    model = model_with()
    decoder, answers = Decoder(model, sampling()), {}
    decoder.add([[5, 6]], [sampling(end_of_document=-1)])
    with pytest.raises(ValueError, match="no tokens"):
        decoder.add([[]], [sampling()])
    while take(decoder, answers, set()):
        pass
    assert answers == {0: list(generate(model, [5, 6], sampling()))}
