"""AdamW over fp32 or split bf16 weights, with fp32 moments that exist from the beginning.

The arithmetic is PyTorch's (`torch.optim.adamw.adamw`, fused); what is ours is that a bf16 weight is joined with its
lower half before the update and split after it, one parameter at a time, and that `load_state_dict` does not round
fp32 moments to the dtype of a bf16 weight as `torch.optim.Optimizer` does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from savant_ray.errors import CheckpointError
from savant_ray.optim.split_bf16 import join, split

BETAS = (0.9, 0.999)
EPS = 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.Optimizer):
    """Decoupled weight decay (arXiv 1711.05101) on every parameter; `master_weights` are what it really trains."""

    # PyTorch's own without their decorator, which imports its compiler: 1.6 s and 100 MB at the start of each worker
    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__  # type: ignore[attr-defined]
    state_dict = torch.optim.Optimizer.state_dict.__wrapped__  # type: ignore[attr-defined]

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": BETAS, "eps": EPS, "weight_decay": weight_decay})
        for parameter in self._parameters():
            self.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                **{name: torch.zeros_like(parameter, dtype=torch.float32) for name in MOMENTS},
            }
        self._lower = {p: torch.zeros_like(p, dtype=torch.int16) for p in self._parameters() if _is_split(p)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients in `.grad`."""
        for group in self.param_groups:
            for parameter in group["params"]:
                full = self.master(parameter)
                self._update(full, parameter.grad, self.state[parameter], group)
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
        """Moments and step counts as they were saved, unrounded; the learning rate is the schedule's business.

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
                return f"it holds {', '.join(sorted(theirs)) or 'nothing'} where AdamW has {', '.join(sorted(mine))}"
            for name, tensor in mine.items():
                if torch.as_tensor(theirs[name]).shape != tensor.shape:
                    return f"{name} of parameter {index} has another shape"
        return None

    @staticmethod
    def _update(full: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        moments = ([state[name]] for name in MOMENTS)
        adamw(
            [full], [gradient], *moments, [], [state["step"]], fused=True, amsgrad=False, beta1=beta1, beta2=beta2,
            lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]


def _is_split(parameter: Tensor) -> bool:
    return parameter.dtype == torch.bfloat16
