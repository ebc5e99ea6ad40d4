"""When the block is compiled, where compiled code is kept, and that a validation reuses the graph of training."""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from savant_ray.config import Config
from savant_ray.evaluation.validator import LogicEvaluator, Validator
from savant_ray.events import Event, ValidationDone
from savant_ray.model import flex
from savant_ray.model.transformer import UniversalTransformer
from savant_ray.training import device as device_module
from savant_ray.training.compiler_cache import VARIABLE, keep_compiled_code
from savant_ray.training.device import compile_block, runs_compiled, use_deterministic_kernels
from savant_ray.training.state import TrainingState
from savant_ray.training.step import take_step
from tests.training.test_fitting import validated, validator
from tests.training.tiny import CPU, micro_batch, never, rank_micro_batches, tiny_config, tiny_state, tiny_tokenizer

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def limits_stay_as_they_are() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        yield


@pytest.fixture
def model() -> UniversalTransformer:
    return tiny_state(tiny_config()).model


def with_tools(
    monkeypatch: pytest.MonkeyPatch,
    compiler: bool,
    headers: bool,
    capability: tuple[int, int] = (9, 0),
    triton: bool = True,
) -> None:
    """Simulate a machine with these tools and a GPU of this compute capability."""
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}" if compiler else None)
    for module in (flex, device_module):
        monkeypatch.setattr(module, "has_python_headers", lambda: headers)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if triton else None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)


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
    assert runs_compiled(model, CPU) == compiles
    assert (note is not None) == compiles, "the first step takes longer"


@pytest.fixture
def no_compiler_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a user who has chosen no folder; restored afterwards."""
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)


@pytest.mark.usefixtures("no_compiler_cache")
def test_compiled_code_is_kept_beside_the_tokenized_text(tmp_path: Path) -> None:
    for _ in range(2):
        assert keep_compiled_code(tmp_path) == tmp_path / "compiled"
        assert os.environ.pop(VARIABLE) == str(tmp_path / "compiled")


def test_a_folder_for_compiled_code_that_the_user_has_set_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "/mine")
    assert keep_compiled_code(tmp_path) is None
    assert os.environ[VARIABLE] == "/mine" and not any(tmp_path.iterdir())


@pytest.mark.usefixtures("no_compiler_cache")
@pytest.mark.parametrize("problem", ["missing", "a file", "writable by others", "of another user", "remote"])
def test_pytorchs_own_folder_for_compiled_code_is_used_where_that_of_the_text_is_unsuitable(
    problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_dir = tmp_path / "cache"
    if problem != "missing":
        cache_dir.mkdir()
    if problem == "a file":
        (cache_dir / "compiled").touch()
    elif problem == "writable by others":
        (cache_dir / "compiled").mkdir()
        (cache_dir / "compiled").chmod(0o777)
    elif problem == "of another user":
        monkeypatch.setattr("os.geteuid", lambda: -1)
    elif problem == "remote":
        mounts = [
            SimpleNamespace(mountpoint=str(path), fstype=kind) for path, kind in (("/", "ext4"), (tmp_path, "nfs4"))
        ]
        monkeypatch.setattr("psutil.disk_partitions", lambda all: mounts)
    assert keep_compiled_code(cache_dir) is None and VARIABLE not in os.environ


ATTEMPT = """
import sys, torch
from pathlib import Path
from savant_ray.training.compiler_cache import keep_compiled_code
assert keep_compiled_code(Path(sys.argv[1]))
from savant_ray.training.compiler_cache import VARIABLE, keep_compiled_code
from savant_ray.training.device import compile_block
from savant_ray.training.step import take_step
from tests.training.tiny import CPU, never, rank_micro_batches, tiny_config, tiny_state
state = tiny_state(tiny_config())
compile_block(state.model, True, CPU, state.settings.precision)
print(take_step(state, rank_micro_batches(0, 4, 0, 1, 4), 1e-2, 1.0, never).loss)
counters = torch._dynamo.utils.counters["inductor"]
print(counters["fxgraph_cache_hit"], counters["fxgraph_cache_miss"])
"""


@pytest.mark.rare
@pytest.mark.slow
def test_a_second_attempt_compiles_nothing_anew(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    first, second = (
        subprocess.run([sys.executable, "-c", ATTEMPT, str(tmp_path)], env=environment, capture_output=True, text=True)
        for _ in range(2)
    )
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    (loss, first_counters), (same_loss, second_counters) = (run.stdout.splitlines() for run in (first, second))
    assert loss == same_loss
    assert first_counters == "0 2" and second_counters == "2 0", "forward and backward pass: hits and misses"


@pytest.fixture
def deterministic_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # restored afterwards
    settings = importlib.import_module("torch._functorch.config")
    with settings.patch(force_non_lazy_backward_lowering=settings.force_non_lazy_backward_lowering):
        use_deterministic_kernels()
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic_kernels")
def test_deterministic_backward_passes_are_compiled_as_such_although_a_gpus_run_in_another_thread() -> None:
    found: list[bool] = []

    def record_setting(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        found.append(torch._inductor.config.deterministic)
        return graph

    backend = aot_autograd(fw_compiler=record_setting, bw_compiler=record_setting)
    loss = torch.compile(torch.sin, backend=backend)(torch.zeros((), requires_grad=True))
    backward_pass = threading.Thread(target=loss.backward)
    backward_pass.start()
    backward_pass.join()
    assert found == [True, True], "forward and backward pass"


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize(("compiler", "headers", "named"), [(False, True, "g++"), (True, False, "Python.h")])
def test_auto_names_the_tool_that_is_missing_and_continues_uncompiled(
    device: torch.device, compiler: bool, headers: bool, named: str,
    model: UniversalTransformer, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with_tools(monkeypatch, compiler, headers)
    note = compile_block(model, "auto", device, "bf16") or ""
    assert note.startswith(named) and "not found: training runs uncompiled" in note
    assert not runs_compiled(model, CPU)


@pytest.mark.parametrize(("capability", "triton"), [((6, 1), True), ((9, 0), False)])
def test_auto_continues_uncompiled_on_a_gpu_that_pytorchs_compiler_refuses(
    capability: tuple[int, int], triton: bool, model: UniversalTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises an error for a GPU before compute capability 7.0 (a GeForce GTX 1080 Ti has 6.1), or without Triton."""
    with_tools(monkeypatch, compiler=True, headers=True, capability=capability, triton=triton)
    note = compile_block(model, "auto", CUDA, "bf16") or ""
    assert note.startswith("Triton for this GPU not found: training runs uncompiled")
    assert not runs_compiled(model, CPU)


@pytest.mark.parametrize(("precision", "compiles"), [("bf16", False), ("bf16-mixed", False), ("fp32", True)])
def test_auto_compiles_fp32_only_on_a_gpu_without_bf16_instructions(
    precision: str, compiles: bool, model: UniversalTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's compiler leaves out functions with bf16 inputs on a T4 (compute capability 7.5)."""
    with_tools(monkeypatch, compiler=True, headers=True, capability=(7, 5))
    note = compile_block(model, "auto", CUDA, precision) or ""
    assert ("no bf16 instructions" in note) != compiles
    assert runs_compiled(model, CPU) == compiles


@pytest.fixture
def nothing_known_of_the_device() -> Iterator[None]:
    flex.has_flex.cache_clear()
    yield
    flex.has_flex.cache_clear()


@pytest.mark.parametrize(
    ("head_dim", "compiler", "headers", "has"),
    [(64, True, True, True), (8, True, True, False), (64, False, True, False), (64, True, False, False)],
)
@pytest.mark.usefixtures("nothing_known_of_the_device")
def test_a_gpu_needs_a_c_compiler_pythons_headers_and_heads_of_16_for_flex_attention(
    head_dim: int, compiler: bool, headers: bool, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_tools(monkeypatch, compiler, headers)
    assert flex.has_flex(CUDA, head_dim) == has
    assert not flex.has_flex(CPU, head_dim)


@pytest.mark.parametrize(
    ("head_dim", "shared_bytes", "has"),
    [(128, 101_376, True), (192, 101_376, False), (192, 166_912, True), (256, 232_448, True), (512, 232_448, False)],
)
@pytest.mark.usefixtures("nothing_known_of_the_device")
def test_wide_heads_use_flex_attention_only_on_gpus_with_enough_shared_memory(
    head_dim: int, shared_bytes: int, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels fail to compile on an RTX 3080 with heads wider than 128, and on an H100 with heads wider than 256."""
    with_tools(monkeypatch, compiler=True, headers=True, capability=(8, 6))
    properties = SimpleNamespace(shared_memory_per_block_optin=shared_bytes)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    assert flex.has_flex(CUDA, head_dim) == has


ATTENTION = """
import torch
from types import SimpleNamespace
from savant_ray.model.flex import flex
torch.compile = lambda function, **options: lambda *inputs, **named: None
flex(SimpleNamespace(is_cuda=True), None, None, mask=None, soft_cap=50.0)
print(torch._dynamo.config.recompile_limit)
"""


def test_attention_by_itself_may_be_compiled_for_as_many_shapes_as_the_block() -> None:
    done = subprocess.run([sys.executable, "-c", ATTENTION], capture_output=True, text=True, check=True)
    assert int(done.stdout) == flex.MAX_COMPILED_SHAPES == 64


def compiled_state(config: Config, backend: Any = "aot_eager") -> TrainingState:
    """Return a new state whose block is compiled, with the compiler's counters at zero."""
    state = tiny_state(config)
    state.model.recurrent_block.compile(dynamic=False, backend=backend)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return state


def short_validation(config: Config) -> Config:
    settings = config.to_dict()
    settings["validation"] |= {"logic_problems": 4, "max_new_tokens": 3}
    return Config.from_dict(settings)


def n_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def validation(state: TrainingState, config: Config) -> ValidationDone:
    """Return the result of a validation of 4 + 4 + 3 sequences."""
    events: list[Event] = []
    Validator(
        config, tiny_tokenizer(), rank_micro_batches(0, 11, 0, 1, 4), target_tokens=9, trained_bytes=9, rank=0,
        emit=events.append, stop_requested=lambda: False,
        logic_evaluator=LogicEvaluator(config, LogicTokenizer(), 0, 1, lambda: False),
    )(state)  # fmt: skip
    return next(event for event in events if isinstance(event, ValidationDone))


class LogicTokenizer:
    """Encodes each prompt as its length, so that prompts of different lengths are answered."""

    vocab_size, end_of_document, never_sampled = 50, 1, frozenset({0})

    def encode_prompts(self, texts: list[str]) -> list[list[int]]:
        return [[3] * (1 + len(text) % 5) for text in texts]

    def decode_continuation(self, prompt: list[int], ids: list[int]) -> str:
        return str(ids)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16-mixed", marks=pytest.mark.rare), "bf16"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("validates_first", [False, True])
def test_a_validation_compiles_nothing_that_training_does_not(
    validates_first: bool, recompute: bool, precision: str
) -> None:
    config = short_validation(tiny_config(precision=precision, recompute_loops=recompute))
    state = compiled_state(config)
    if validates_first:  # as in a run that resumes at a step with a due validation
        validation(state, config)
    take_step(state, rank_micro_batches(0, 12, 0, 1, 4), 1e-2, 1.0, never)
    in_training = n_graphs()
    assert in_training >= 1
    compiled = validation(state, config)
    take_step(state, rank_micro_batches(12, 12, 0, 1, 4), 1e-2, 1.0, never)
    assert n_graphs() == in_training
    other = tiny_state(config)
    take_step(other, rank_micro_batches(0, 12, 0, 1, 4), 1e-2, 1.0, never)
    uncompiled = validation(other, config)
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    assert compiled.validation_loss == pytest.approx(uncompiled.validation_loss, rel=tolerance)
    assert compiled.residuals == pytest.approx(uncompiled.residuals, rel=10 * tolerance)
    assert compiled.cosines == pytest.approx(uncompiled.cosines, rel=10 * tolerance)


@pytest.mark.parametrize(("fit_rows", "step_sequences"), [(2, 12), (4, 3)])
def test_a_validation_has_the_micro_batches_of_training(fit_rows: int, step_sequences: int) -> None:
    """They are smaller than `training.batch_size` if memory is short, or if a rank has fewer sequences of a step."""
    runs: list[int] = []

    def counting(graph: torch.fx.GraphModule, _: object) -> Any:
        def run(*inputs: Any) -> Any:
            runs.append(1)
            return graph(*inputs)

        return run

    config = tiny_config(deterministic=False)  # otherwise a rank has whole micro-batches
    state, expected = compiled_state(config, counting), tiny_state(config)
    state.set_batch_fit(dataclasses.replace(state.batch_fit, rows=fit_rows))
    for each in (state, expected):
        take_step(each, rank_micro_batches(0, step_sequences, 0, 1, 4), 1e-2, 1.0, never)
    in_training = n_graphs()
    runs.clear()
    events: list[Event] = []
    validator(config, events, step_sequences)(state)
    assert n_graphs() == in_training
    n_micro_batches = 3 * math.ceil(4 / min(fit_rows, step_sequences))
    assert len(runs) == config.model.n_loops * (n_micro_batches + 1), "and one for the statistics of the loops"
    events += validated(expected, config)
    losses = [event.validation_loss for event in events if isinstance(event, ValidationDone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_uncompiled_validation_keeps_nothing_for_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    config, rows = tiny_config(), []
    state = tiny_state(config)
    forward = state.model.recurrent_block.forward

    def recorded(x_BTD: Tensor, *others: Any) -> Tensor:
        rows.append(len(x_BTD))
        assert not torch.is_grad_enabled()
        return forward(x_BTD, *others)

    monkeypatch.setattr(state.model.recurrent_block, "forward", recorded)
    events: list[Event] = []
    Validator(
        config, tiny_tokenizer(), rank_micro_batches(0, 11, 0, 1, 4), target_tokens=9, trained_bytes=9, rank=0,
        emit=events.append, stop_requested=lambda: len(events) > 0,
    )(state)  # fmt: skip
    assert rows == [4] * 4 + [3] * 2 + [2] * 2, "no padding either: two loops of each micro-batch and of the statistics"


def test_activations_of_a_validation_are_freed_after_each_loop(model: UniversalTransformer) -> None:
    saved: list[weakref.ref[Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and not isinstance(tensor, torch.nn.Parameter):
            saved.append(weakref.ref(kept := tensor.detach()))
            return kept
        return tensor

    tokens_BT, document_ids_BT = (getattr(micro_batch([0, 1]), name) for name in ("tokens_BT", "document_ids_BT"))
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for _ in model.loop_states(tokens_BT, document_ids_BT, training_graph=True):
            assert not any(tensor() is not None for tensor in saved)
    assert len(saved) > 10


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_block_is_one_graph_in_training(precision: str, recompute: bool) -> None:
    state = compiled_state(tiny_config(precision=precision, recompute_loops=recompute))
    take_step(state, rank_micro_batches(0, 12, 0, 1, 4), 1e-2, 1.0, never)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"], counters["graph_break"]
