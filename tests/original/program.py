"""A stand-in for the original script: an independent implementation of its model, optimizers and files.

Its parameters are in another order than savant_ray's. It trains with PyTorch's AdamW, or with `AdamW8bit`, which behaves
like that of bitsandbytes: 8-bit moments for all but small tensors, and a state dict that is loaded without checks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EVERY, CAP = 4, 50.0
LENGTH, VOCABULARY = 16, 50
PADDING = 0
BLOCK, MIN_8BIT_SIZE = 256, 512  # elements; bitsandbytes quantizes tensors of 4,096 and more
NESTED = "__bnb_optimizer_quant_state__"


@dataclass(frozen=True)
class Shape:
    """Sizes of the model, with the names of savant_ray's settings, so that a `ModelConfig` can be created from them."""

    dim: int = 16
    n_heads: int = 2
    n_loops: int = 4
    window_size: int = 4
    max_seq_len: int = LENGTH
    vocab_size: int = VOCABULARY


TINY = Shape()


class Norm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class SwiGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * value


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        dim, self.n_heads = shape.dim, shape.n_heads
        self.liquid_gate = nn.Linear(dim, dim)
        self.o_proj, self.v_proj, self.k_proj, self.q_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.ln = Norm(dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            p(self.ln(x)).unflatten(-1, (self.n_heads, -1)).transpose(-3, -2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = CAP * torch.tanh(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) / CAP)
        weights = torch.softmax(scores + mask, -1).to(v.dtype)
        return self.o_proj((weights @ v).transpose(-3, -2).flatten(-2))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        dim, hidden = shape.dim, int(2 * 4 * shape.dim / 3)
        self.liquid_gate_ffn = nn.Linear(dim, dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 2 * hidden, bias=False), SwiGLU(), nn.Linear(hidden, dim, bias=False))
        self.ln_ffn = Norm(dim)
        self.attn = Attention(shape)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        a = torch.sigmoid(self.attn.liquid_gate(x))
        x = (1 - a) * x + a * self.attn(x, mask)
        a = torch.sigmoid(self.liquid_gate_ffn(x))
        return (1 - a) * x + a * self.ffn(self.ln_ffn(x))


class OriginalModel(nn.Module):
    def __init__(self, shape: Shape = TINY) -> None:
        super().__init__()
        self.n_loops = shape.n_loops
        seen = torch.ones(shape.max_seq_len, shape.max_seq_len).tril()
        self.head = nn.Linear(shape.dim, shape.vocab_size, bias=False)
        self.register_buffer("global_mask", seen.log())
        self.register_buffer("local_mask", seen.triu(-shape.window_size).log())
        self.ln_f = Norm(shape.dim)
        self.recurrent_block = Block(shape)
        self.embed = nn.Embedding(shape.vocab_size, shape.dim)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for loop in range(self.n_loops):
            x = self.recurrent_block(x, self.global_mask if (loop + 1) % EVERY == 0 else self.local_mask)
        return self.head(self.ln_f(x))


class AdamW8bit(torch.optim.Optimizer):
    """An optimizer that behaves like that of bitsandbytes; `nested` is the layout of its current versions."""

    MOMENTS = ("state1", "state2")
    QUANTIZED = ("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2")
    positive = torch.logspace(-7, 0, 127)
    MAPS = (
        torch.cat([-positive.flip(0), torch.zeros(2), positive]),
        torch.cat([torch.zeros(1), torch.logspace(-7, 0, 255)]),
    )

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.01, nested: bool = True
    ) -> None:
        options = dict(lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay)
        super().__init__(params, options | dict(alpha=0.0, t_alpha=None, t_beta3=None))
        self.nested = nested

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if len(state) == 0:
                    self.begin(parameter)
                state["step"] += 1
                self.update(parameter, state, group)

    def begin(self, parameter: nn.Parameter) -> None:
        state = self.state[parameter]
        state["step"] = 0
        for number, name in enumerate(self.MOMENTS, start=1):
            state[name] = torch.zeros_like(parameter, dtype=torch.float32)
            if parameter.numel() >= MIN_8BIT_SIZE:
                state[f"qmap{number}"] = self.MAPS[number - 1]
                self.put(state, number, state[name])

    def update(self, parameter: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        (beta1, beta2), gradient = group["betas"], parameter.grad.float()
        first = self.get(state, 1).lerp(gradient, 1 - beta1)
        if type(state["step"]) is not int:
            raise TypeError("the step is handed to a C function as an int")
        second = self.get(state, 2).mul(beta2).addcmul(gradient, gradient, value=1 - beta2)
        full = parameter.float() * (1 - group["lr"] * group["weight_decay"])
        rate = group["lr"] / (1 - beta1 ** state["step"])
        parameter.copy_(full - rate * first / ((second / (1 - beta2 ** state["step"])).sqrt() + group["eps"]))
        self.put(state, 1, first)
        self.put(state, 2, second)

    def get(self, state: dict[str, Any], number: int) -> Tensor:
        codes = state[f"state{number}"]
        if codes.dtype == torch.float32:
            return codes
        values = state[f"qmap{number}"][codes.long()]
        scales = state[f"absmax{number}"].repeat_interleave(BLOCK)[: codes.numel()]
        return values * scales.view_as(values)

    def put(self, state: dict[str, Any], number: int, moment: Tensor) -> None:
        if f"qmap{number}" not in state:
            state[f"state{number}"] = moment
            return
        blocks = moment.flatten().split(BLOCK)
        scales = torch.stack([block.abs().max() for block in blocks])
        relative = torch.cat([block / scale.clamp(min=1e-30) for block, scale in zip(blocks, scales, strict=True)])
        values = state[f"qmap{number}"]
        codes = torch.bucketize(relative, (values[:-1] + values[1:]) / 2)  # the nearest value
        state[f"state{number}"] = codes.to(torch.uint8).view_as(moment)
        state[f"absmax{number}"] = scales

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        if self.nested:
            saved["state"] = {number: self.wrapped(entry) for number, entry in saved["state"].items()}
        return saved

    def wrapped(self, entry: dict[str, Any]) -> dict[str, Any]:
        inner = {name: value for name, value in entry.items() if name in self.QUANTIZED}
        return {name: value for name, value in entry.items() if name not in self.QUANTIZED} | {NESTED: inner}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state with any keys; tensors that are not its own are cast to the weight's dtype."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for parameter, number in zip(parameters, numbers, strict=True):
            if number in state_dict["state"]:
                entry = dict(state_dict["state"][number])
                entry |= entry.pop(NESTED, {}) if self.nested else {}
                self.state[parameter] = {name: self.cast(parameter, name, value) for name, value in entry.items()}
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved | {"params": group["params"]})

    def cast(self, parameter: nn.Parameter, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.clone() if name in self.QUANTIZED else value.to(parameter.dtype)


def adamw(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Return the optimizer that the original uses without bitsandbytes."""
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.01)


class OriginalProgram:
    """The original script: trains, saves `step_N.pt`, and resumes from such a file.

    Updates are numbered from 0, and a file is named after the last one. `rate(i)` is the learning rate of update i,
    relative to `peak`. The first update after a resume repeats the number of the file.
    """

    def __init__(
        self,
        peak: float = 1e-2,
        rate: Callable[[int], float] = lambda _: 1.0,
        optimizer: Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer] = adamw,
        dtype: torch.dtype = torch.float32,
        shape: Shape = TINY,
        seed: int = 11,
    ) -> None:
        torch.manual_seed(seed)
        self.model = OriginalModel(shape)
        for parameter in self.model.parameters():  # the masks stay fp32
            parameter.data = parameter.data.to(dtype)
        self.optimizer = optimizer(self.model.parameters(), peak)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, functools.partial(rate))
        self.step = self.next = 0

    def train(self, *micro_batches: Tensor) -> float:
        """Do one update with batches [B, T] of documents, padded with 0; return the mean of their mean losses."""
        self.optimizer.zero_grad()
        losses = []
        for batch in micro_batches:
            logits = self.model(batch)[:, :-1].flatten(0, 1).float()
            loss = F.cross_entropy(logits, batch[:, 1:].flatten(), ignore_index=PADDING)
            (loss / len(micro_batches)).backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.step, self.next = self.next, self.next + 1
        return sum(losses) / len(losses)

    def content(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": self.scheduler.state_dict(),
        }

    def save(self, folder: Path) -> Path:
        path = folder / f"step_{self.step}.pt"
        torch.save(self.content(), path)
        return path

    def load(self, path: Path) -> None:
        """Load a file without comparing parameter orders, as PyTorch does."""
        content = torch.load(path, weights_only=True)
        self.step = self.next = content["step"]
        self.model.load_state_dict(content["model_state_dict"], strict=True)
        self.optimizer.load_state_dict(content["optimizer_state_dict"])
        if "scheduler_state_dict" in content:
            self.scheduler.load_state_dict(content["scheduler_state_dict"])

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Return the dequantized moments by parameter, with AdamW's names."""
        return {name: self.state_of(parameter) for name, parameter in self.model.named_parameters()}

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state, step = self.optimizer.state[parameter], torch.as_tensor(self.optimizer.state[parameter]["step"]).float()
        first, second = ("exp_avg", "exp_avg_sq")
        if isinstance(self.optimizer, AdamW8bit):
            return {"step": step, first: self.optimizer.get(state, 1), second: self.optimizer.get(state, 2)}
        return {"step": step, first: state[first], second: state[second]}
