"""Loading a checkpoint into a different model: what fits is loaded, the rest is listed."""

from __future__ import annotations

import io
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from savant_ray.errors import CheckpointError
from savant_ray.events import StepDone
from savant_ray.training.host_copies import HostCopy
from savant_ray.training.loop import train
from savant_ray.training.state import TrainingState
from savant_ray.training.step import take_step
from tests.training.tiny import (
    RecordingHost,
    local_batches,
    never,
    rank_micro_batches,
    tiny_config,
    tiny_state,
    weights,
)

HEAD = "head.weight"
ROOT = Path(__file__).parents[2]


def trained() -> dict[str, Any]:
    config = tiny_config(max_steps=3)
    state, host = tiny_state(config), RecordingHost()
    train(state, config, local_batches(state, config), host)
    return host.checkpoint


def moments(state: TrainingState) -> list[torch.Tensor]:
    return [state.optimizer.state[p]["exp_avg"] for p in state.model.parameters()]


def fresh() -> TrainingState:
    return tiny_state(tiny_config())


def test_a_checkpoint_of_the_same_model_is_restored_completely_without_a_note() -> None:
    state, content = fresh(), trained()
    assert state.load_checkpoint(content) == []
    assert (state.step, state.position) == (3, 36)
    assert all(torch.equal(w, content["model_state_dict"][name]) for name, w in weights(state).items())
    assert all(moment.any() for moment in moments(state))


def test_the_state_of_pytorchs_global_generator_is_restored() -> None:
    content = fresh().to_checkpoint()
    expected = torch.rand(3)
    fresh().load_checkpoint(content)
    assert torch.equal(torch.rand(3), expected)


def without_state(content: dict[str, Any]) -> None:
    content["optimizer_state_dict"]["state"] = {}


def of_another_optimizer(content: dict[str, Any]) -> None:
    states = content["optimizer_state_dict"]["state"]
    for index, state in states.items():
        states[index] = {"momentum_buffer": state["exp_avg"]}


def of_another_shape(content: dict[str, Any]) -> None:
    content["optimizer_state_dict"]["state"][0]["exp_avg"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without_state, "the saved state is for 0 parameters"),
        (of_another_optimizer, "the saved state holds momentum_buffer where AdamW needs exp_avg, exp_avg_sq, step"),
        (of_another_shape, "the saved exp_avg of parameter 0 has another shape"),
    ],
)
def test_an_optimizer_state_that_does_not_fit_is_reported_and_initialized(
    change: Callable[[dict[str, Any]], None], named: str
) -> None:
    state, content = fresh(), trained()
    change(content)
    (note,) = state.load_checkpoint(content)
    assert note.startswith(f"the optimizer starts from its initial state: {named}")
    assert not any(moment.any() for moment in moments(state))
    assert all(torch.equal(w, content["model_state_dict"][name]) for name, w in weights(state).items())
    assert (state.step, state.position) == (3, 36)


def test_a_rewind_to_a_checkpoint_of_another_optimizer_repeats_the_same_steps() -> None:
    config, content = tiny_config(optimizer="muon"), trained()
    state, hosts = tiny_state(config), [RecordingHost(), RecordingHost()]
    for host in hosts:
        state.load_checkpoint(content)
        train(state, config, local_batches(state, config), host)
    first, repeated = ([(e.step, e.train_loss) for e in h.events if isinstance(e, StepDone)] for h in hosts)
    assert first == repeated and first[0][0] == 4


def test_added_and_removed_weights_are_reported_and_the_others_restored() -> None:
    state, content = fresh(), trained()
    before = weights(state)[HEAD]
    content["model_state_dict"]["gone.weight"] = content["model_state_dict"].pop(HEAD)
    notes = state.load_checkpoint(content)
    assert HEAD in notes[0] and "gone.weight" in notes[1] and "optimizer starts" in notes[2]
    now = weights(state)
    assert torch.equal(now.pop(HEAD), before)
    assert all(torch.equal(w, content["model_state_dict"][name]) for name, w in now.items())


def test_weights_of_another_shape_are_refused_unless_changes_are_allowed() -> None:
    state, content = fresh(), trained()
    content["model_state_dict"][HEAD] = content["model_state_dict"][HEAD][:-1]
    with pytest.raises(CheckpointError, match=r"head.weight is \[49, 16\], the model's \[50, 16\]"):
        state.load_checkpoint(content)
    notes = state.load_checkpoint(content, allow_changes=True)
    assert all(fact in notes[0] for fact in ("head.weight", "[49, 16]", "[50, 16]"))


def test_a_saved_schedule_at_another_step_continues_at_the_checkpoints_step() -> None:
    state, content = fresh(), trained()
    content["scheduler_state_dict"]["last_epoch"] = 7
    assert state.load_checkpoint(content) == ["the saved schedule is at 7; it continues at step 3"]


def test_a_copy_of_bf16_weights_joins_one_weight_at_a_time_and_equals_the_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = tiny_state(tiny_config(precision="bf16"))
    take_step(state, rank_micro_batches(0, 12, 0, 1, 4), 1e-2, 1.0, never)
    expected, master = state.to_checkpoint(), state.optimizer.master
    joined: list[weakref.ref[torch.Tensor]] = []

    def watched(parameter: torch.nn.Parameter) -> torch.Tensor:
        assert all(reference() is None for reference in joined), "the one before is freed"
        full = master(parameter)
        joined.append(weakref.ref(full))
        return full

    monkeypatch.setattr(state.optimizer, "master", watched)
    files = [io.BytesIO(), io.BytesIO()]
    for content, file in zip((HostCopy().update(state), expected), files, strict=True):
        torch.save(content, file)
    assert len(joined) == len(list(state.model.parameters()))
    assert files[0].getvalue() == files[1].getvalue()


def test_a_second_copy_reuses_the_memory_of_the_first_and_equals_the_current_state() -> None:
    config = tiny_config()
    state = tiny_state(config)
    copies = HostCopy()
    first = copies.update(state)["model_state_dict"]["embed.weight"]
    before = first.clone()
    take_step(state, rank_micro_batches(0, 12, 0, 1, 4), 1e-2, 1.0, never)
    assert torch.equal(first, before), "a step does not touch it"
    second = copies.update(state)
    assert second["model_state_dict"]["embed.weight"].data_ptr() == first.data_ptr()
    for name, weight in state.master_weights().items():
        assert torch.equal(second["model_state_dict"][name], weight)
    assert second["optimizer_state_dict"]["state"][0]["exp_avg"].any()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_first_copy_into_allocated_memory_equals_the_state(precision: str) -> None:
    state = tiny_state(tiny_config(precision=precision))
    copies = HostCopy()
    copies.allocate(state)
    take_step(state, rank_micro_batches(0, 12, 0, 1, 4), 1e-2, 1.0, never)
    with Allocations() as first:
        content = copies.update(state)
    copied, expected = tensors(content), tensors(state.to_checkpoint())
    assert copied.keys() == expected.keys()
    for name, tensor in copied.items():
        assert torch.equal(tensor, expected[name]) and tensor.dtype == expected[name].dtype, name
    counters = {name: value for name, value in state.to_checkpoint()["savant"].items() if name != "torch_rng_state"}
    assert counters == {name: content["savant"][name] for name in counters}
    with Allocations() as later:
        copies.update(state)
    with Allocations() as without:
        HostCopy().update(state)
    assert first.n == later.n < without.n, "nothing is allocated for the copy"


def test_the_first_step_does_not_import_the_compiler() -> None:
    """PyTorch imports SymPy for some operators on meta tensors, which would delay the first step by a second."""
    script = (
        "import sys\n"
        "from tests.training.tiny import never, rank_micro_batches, tiny_config, tiny_state\n"
        "from savant_ray.training.host_copies import HostCopy\n"
        "from savant_ray.training.step import take_step\n"
        "state = tiny_state(tiny_config())\n"
        "copies = HostCopy()\n"
        "copies.allocate(state)\n"
        "take_step(state, rank_micro_batches(0, 12, 0, 1, 4), 1e-2, 1.0, never)\n"
        "copies.update(state)\n"
        "print({'sympy', 'torch._dynamo', 'torch._inductor'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


class Allocations(TorchDispatchMode):
    """Counts the tensors that are created without being computed."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += function.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_like)
        return function(*args, **(kwargs or {}))


def tensors(content: Any, name: str = "") -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint by path."""
    if isinstance(content, torch.Tensor):
        return {name: content}
    if not isinstance(content, dict):
        return {}
    return {path: tensor for key, item in content.items() for path, tensor in tensors(item, f"{name}/{key}").items()}
