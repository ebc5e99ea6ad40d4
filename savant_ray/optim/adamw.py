"""AdamW over fp32 or bf16 weights, and the base class of optimizers that keep fp32 precision for bf16 weights.

At learning rate 2e-5 an AdamW update of most weights is smaller than half the distance between neighbouring bf16 numbers,
so plain bf16 weights round it away. Kahan compensation and stochastic rounding correct this approximately. Here each bf16
weight is the upper half of an fp32 number whose lower half the optimizer keeps as int16 (Split-SGD-BF16, arXiv 2005.04680).
That costs the same memory as Kahan compensation (2 + 2 bytes) and is exact: the optimizer joins the halves, updates in
fp32, and splits again, one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from savant_ray.errors import CheckpointError

BETAS = (0.9, 0.999)
EPS = 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq")


class UpdateRule(Protocol):
    """How one parameter group is updated."""

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the optimizer state of a parameter before its first update."""

    def update(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Update an fp32 weight and its state in place."""

    def had_gradient(self, state: dict[str, Tensor]) -> Tensor:
        """Return which rows (first dimension) of a parameter have had a gradient so far, `[rows]` bool."""


class MasterWeightOptimizer(torch.optim.Optimizer):
    """Optimizer of fp32 master weights, each stored as an fp32 parameter or as a bf16 parameter and its lower half.

    State is allocated before the first step, so that the first update needs no more memory than later ones.
    `load_state_dict` keeps fp32 state in fp32; `torch.optim.Optimizer` would round it to the dtype of a bf16 weight.
    """

    # PyTorch's own methods without their decorator, which imports the compiler: 1.6 s and 100 MB at each worker's start.
    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__  # type: ignore[attr-defined]
    state_dict = torch.optim.Optimizer.state_dict.__wrapped__  # type: ignore[attr-defined]

    def __init__(self, groups: Sequence[dict[str, Any]], rules: Sequence[UpdateRule]) -> None:
        """Take one update rule for each parameter group."""
        super().__init__(groups, {})
        self._rules = {
            parameter: rule
            for group, rule in zip(self.param_groups, rules, strict=True)
            for parameter in group["params"]
        }
        self.state.update({parameter: rule.new_state(parameter) for parameter, rule in self._rules.items()})
        self._lower = {p: torch.zeros_like(p, dtype=torch.int16) for p in self._rules if _is_split(p)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all weights once from the gradients in `.grad`."""
        for group in self.param_groups:
            for parameter in group["params"]:
                weight = self.master(parameter)
                self._rules[parameter].update(weight, parameter.grad, self.state[parameter], group)
                self.set_master(parameter, weight)

    def master(self, parameter: nn.Parameter) -> Tensor:
        """Return the fp32 weight: the parameter's own data, or a new tensor joined from its halves."""
        return join(parameter.data, self._lower[parameter]) if _is_split(parameter) else parameter.data

    def set_master(self, parameter: nn.Parameter, weight: Tensor) -> None:
        """Set an fp32 weight of the parameter's shape."""
        if not _is_split(parameter):
            parameter.data.copy_(weight)
            return
        upper, lower = split(weight.contiguous())
        parameter.data.copy_(upper)
        self._lower[parameter].copy_(lower)

    def tensors(self) -> Iterator[Tensor]:
        """Yield all weights, the lower halves of bf16 weights, and the state."""
        for parameter, state in self.state.items():
            yield parameter.data
            if _is_split(parameter):
                yield self._lower[parameter]
            yield from state.values()

    def had_gradient(self, parameter: nn.Parameter) -> Tensor:
        """Return which rows (first dimension) of the parameter have had a gradient so far, `[rows]` bool."""
        return self._rules[parameter].had_gradient(self.state[parameter])

    def restart(self) -> None:
        """Set the state to that before the first update; weights and hyperparameters stay as they are."""
        for parameter, rule in self._rules.items():
            for name, initial in rule.new_state(parameter).items():
                self.state[parameter][name].copy_(initial)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load saved state without rounding. Hyperparameters of the groups are not loaded: they follow the settings.

        Raises:
            CheckpointError: the state belongs to another optimizer or another model; nothing has been changed.
        """
        if problem := self._mismatch(state_dict):
            raise CheckpointError(problem)
        for index, parameter in enumerate(self._rules):
            for name, tensor in self.state[parameter].items():
                tensor.copy_(torch.as_tensor(state_dict["state"][index][name]))

    def _mismatch(self, state_dict: dict[str, Any]) -> str | None:
        """Describe why saved state cannot be loaded, or return None."""
        saved = state_dict["state"]
        if (n_groups := len(state_dict["param_groups"])) != len(self.param_groups):
            return f"the saved state has {n_groups} parameter groups, this optimizer has {len(self.param_groups)}"
        if len(saved) != len(self._rules):
            return f"the saved state is for {len(saved)} parameters, the model has {len(self._rules)}"
        for index, parameter in enumerate(self._rules):
            current, loaded = self.state[parameter], saved.get(index, {})
            if set(loaded) != set(current):
                has, needs = (", ".join(sorted(names)) or "nothing" for names in (loaded, current))
                return f"the saved state holds {has} where {type(self).__name__} needs {needs}"
            for name, tensor in current.items():
                if torch.as_tensor(loaded[name]).shape != tensor.shape:
                    return f"the saved {name} of parameter {index} has another shape"
        return None


class AdamWRule:
    """Decoupled weight decay (arXiv 1711.05101) with fp32 moments; the arithmetic is PyTorch's fused `adamw`."""

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the step count and two zero moments."""
        return {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            **{name: torch.zeros_like(parameter, dtype=torch.float32) for name in MOMENTS},
        }

    def update(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Update one weight."""
        beta1, beta2 = group["betas"]
        average, average_square = ([state[name]] for name in MOMENTS)
        adamw(
            [weight], [gradient], average, average_square, [], [state["step"]], fused=True, amsgrad=False,
            maximize=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"],
        )  # fmt: skip

    def had_gradient(self, state: dict[str, Tensor]) -> Tensor:
        """Return the rows whose second moment is not zero."""
        average_square = state[MOMENTS[1]]
        return average_square.reshape(len(average_square), -1).any(dim=1)


class AdamW(MasterWeightOptimizer):
    """AdamW for all parameters."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__([adamw_group(params, lr, weight_decay)], [AdamWRule()])


def adamw_group(params: Iterable[nn.Parameter], lr: float, weight_decay: float) -> dict[str, Any]:
    """Return a parameter group with AdamW's hyperparameters."""
    return {"params": list(params), "lr": lr, "betas": BETAS, "eps": EPS, "weight_decay": weight_decay}


def split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Split an fp32 tensor into the nearest bf16 tensor (ties away from zero) and the int16 remainder, both of its shape.

    The upper half is rounded to nearest, so the lower half is signed.
    """
    bits = weight.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def join(upper: Tensor, lower: Tensor) -> Tensor:
    """Return the fp32 tensor that `split` took apart, bit for bit; the result is the only memory allocated."""
    bits = upper.view(torch.int16).to(torch.int32)
    return bits.bitwise_left_shift_(16).add_(lower).view(torch.float32)


def _is_split(parameter: Tensor) -> bool:
    return parameter.dtype == torch.bfloat16
