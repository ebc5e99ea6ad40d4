"""Optimizers over fp32 or split bf16 weights: what is common to all of them.

A bf16 weight is joined with its lower half before the update and split after it, one parameter at a time. State exists
from the beginning, so that nothing of the first step can fail for want of memory, and `load_state_dict` does not round
fp32 state to the dtype of a bf16 weight as `torch.optim.Optimizer` does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from savant_ray.errors import CheckpointError
from savant_ray.optim.split_bf16 import join, split


class MasterWeightOptimizer(torch.optim.Optimizer):
    """`master` weights are what it really trains; a rule says how (`new_state`, `update`)."""

    # PyTorch's own without their decorator, which imports its compiler: 1.6 s and 100 MB at the start of each worker
    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__  # type: ignore[attr-defined]
    state_dict = torch.optim.Optimizer.state_dict.__wrapped__  # type: ignore[attr-defined]

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        for group in self.param_groups:
            self.state.update({parameter: self.new_state(parameter, group) for parameter in group["params"]})
        self._lower = {p: torch.zeros_like(p, dtype=torch.int16) for p in self._parameters() if _is_split(p)}

    def new_state(self, parameter: nn.Parameter, group: dict[str, Any]) -> dict[str, Tensor]:
        """What the rule remembers of a parameter, before the first step."""
        raise NotImplementedError

    def update(self, full: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Changes an fp32 weight in place."""
        raise NotImplementedError

    def had_gradient(self, parameter: nn.Parameter) -> Tensor:
        """[rows] bool: of the first dimension, which ever had a gradient."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients in `.grad`."""
        for group in self.param_groups:
            for parameter in group["params"]:
                full = self.master(parameter)
                self.update(full, parameter.grad, self.state[parameter], group)
                self.set_master(parameter, full)

    def master(self, parameter: nn.Parameter) -> Tensor:
        """The fp32 weight: the parameter itself, or a new tensor joined from its halves."""
        return join(parameter.data, self._lower[parameter]) if _is_split(parameter) else parameter.data

    def set_master(self, parameter: nn.Parameter, full: Tensor) -> None:
        """Takes over an fp32 weight of the parameter's shape."""
        if not _is_split(parameter):
            parameter.data.copy_(full)
            return
        upper, lower = split(full.contiguous())
        parameter.data.copy_(upper)
        self._lower[parameter].copy_(lower)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """State as it was saved, unrounded; the learning rate is the schedule's business.

        Raises:
            CheckpointError: the state is another optimizer's or another model's; nothing has changed then.
        """
        if problem := self._misfit(state_dict):
            raise CheckpointError(problem)
        for index, parameter in enumerate(self._parameters()):
            for name, tensor in self.state[parameter].items():
                tensor.copy_(torch.as_tensor(state_dict["state"][index][name]))

    def _misfit(self, state_dict: dict[str, Any]) -> str | None:
        """Why a saved state is not one for these parameters."""
        saved, parameters = state_dict["state"], self._parameters()
        if (groups := len(state_dict["param_groups"])) != len(self.param_groups):
            return f"it has {groups} groups of parameters where there is {len(self.param_groups)} here"
        if len(saved) != len(parameters):
            return f"it is for {len(saved)} parameters, the model has {len(parameters)}"
        for index, parameter in enumerate(parameters):
            mine, theirs = self.state[parameter], saved.get(index, {})
            if set(theirs) != set(mine):
                has, wants = (", ".join(sorted(names)) or "nothing" for names in (theirs, mine))
                return f"it holds {has} where {type(self).__name__} has {wants}"
            for name, tensor in mine.items():
                if torch.as_tensor(theirs[name]).shape != tensor.shape:
                    return f"{name} of parameter {index} has another shape"
        return None

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]


def _is_split(parameter: Tensor) -> bool:
    return parameter.dtype == torch.bfloat16
