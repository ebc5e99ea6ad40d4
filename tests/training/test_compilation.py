"""When the block is compiled, and when it runs uncompiled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from savant_ray.model import flex
from savant_ray.model.transformer import UniversalTransformer
from savant_ray.training import device as device_module
from savant_ray.training.device import compile_block, uncompiled
from savant_ray.training.step import take_step
from tests.training.test_fitting import validated
from tests.training.tiny import CPU, never, share, tiny_config, tiny_state

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def limits_stay_as_they_are() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        yield


@pytest.fixture
def model() -> UniversalTransformer:
    return tiny_state(tiny_config()).model


def with_tools(monkeypatch: pytest.MonkeyPatch, compiler: bool, headers: bool) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}" if compiler else None)
    for module in (flex, device_module):
        monkeypatch.setattr(module, "has_python_headers", lambda: headers)


@pytest.mark.parametrize(
    ("setting", "device", "precision", "compiles"),
    [
        (False, CUDA, "bf16", False),
        ("auto", CPU, "fp32", False),
        ("auto", CPU, "bf16", True),
        ("auto", CUDA, "fp32", True),
        ("auto", CUDA, "bf16-mixed", True),
        (True, CPU, "fp32", True),
    ],
)
def test_auto_compiles_where_it_pays(
    setting: bool | str, device: torch.device, precision: str, compiles: bool,
    model: UniversalTransformer, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with_tools(monkeypatch, compiler=True, headers=True)
    note = compile_block(model, setting, device, precision)
    assert (model.recurrent_block._compiled_call_impl is not None) == compiles
    assert (note is not None) == compiles, "the first step takes longer"


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize(("compiler", "headers", "named"), [(False, True, "g++"), (True, False, "Python.h")])
def test_auto_names_the_tool_that_is_missing_and_goes_on_uncompiled(
    device: torch.device, compiler: bool, headers: bool, named: str,
    model: UniversalTransformer, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with_tools(monkeypatch, compiler, headers)
    note = compile_block(model, "auto", device, "bf16") or ""
    assert note.startswith(named) and "not found: training runs uncompiled" in note
    assert model.recurrent_block._compiled_call_impl is None


@pytest.mark.parametrize(
    ("head_dim", "compiler", "headers", "has"),
    [(64, True, True, True), (8, True, True, False), (64, False, True, False), (64, True, False, False)],
)
def test_a_gpu_needs_a_c_compiler_pythons_headers_and_heads_of_16_for_flex_attention(
    head_dim: int, compiler: bool, headers: bool, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_tools(monkeypatch, compiler, headers)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    assert flex.has_flex.__wrapped__(CUDA, head_dim) == has
    assert not flex.has_flex.__wrapped__(CPU, head_dim)


def test_attention_by_itself_may_be_compiled_for_as_many_shapes_as_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.compile", lambda function, **_: function)
    flex._compiled.__wrapped__()
    assert torch._dynamo.config.recompile_limit == flex.MAX_COMPILED_SHAPES == 64


def test_training_runs_the_compiled_block_and_validation_the_one_that_is_written() -> None:
    config, compiled_calls = tiny_config(), []
    state = tiny_state(config)
    block = state.model.recurrent_block

    def compiled(x_BTD: Tensor, *others: object) -> Tensor:
        compiled_calls.append(len(x_BTD))
        return block._call_impl(x_BTD, *others)

    block._compiled_call_impl = compiled
    take_step(state, share(0, 12, 0, 1, 4), 1e-2, 1.0, never)
    n_training = len(compiled_calls)
    assert n_training == 3 * config.model.n_loops
    validated(state, config)
    assert len(compiled_calls) == n_training
    take_step(state, share(12, 12, 0, 1, 4), 1e-2, 1.0, never)
    assert len(compiled_calls) == 2 * n_training, "and then the compiled one again"


def test_a_validation_that_fails_leaves_the_block_compiled(model: UniversalTransformer) -> None:
    model.recurrent_block._compiled_call_impl = compiled = lambda *_: None
    with pytest.raises(RuntimeError), uncompiled(model):
        assert model.recurrent_block._compiled_call_impl is None
        raise RuntimeError
    assert model.recurrent_block._compiled_call_impl is compiled


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_block_is_one_graph_in_training(precision: str, recompute: bool) -> None:
    state = tiny_state(tiny_config(precision=precision, recompute_loops=recompute))
    state.model.recurrent_block.compile(dynamic=False, backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    take_step(state, share(0, 12, 0, 1, 4), 1e-2, 1.0, never)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"], counters["graph_break"]
