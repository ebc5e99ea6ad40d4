"""A stand-in for the original script: the same model written anew, with its parameters in another order, and PyTorch's
own AdamW and LambdaLR. Nothing is shared with the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, HEADS, LOOPS, WINDOW, EVERY, CAP = 16, 2, 2, 4, 2, 50.0
LENGTH, VOCABULARY = 16, 50


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class SwiGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * value


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.liquid_gate = nn.Linear(DIM, DIM)
        self.o_proj, self.v_proj, self.k_proj, self.q_proj = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))
        self.register_buffer("mask", torch.ones(LENGTH, LENGTH).tril())
        self.ln = Norm()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            p(self.ln(x)).unflatten(-1, (HEADS, -1)).transpose(-3, -2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = CAP * torch.tanh(q @ k.transpose(-2, -1) / math.sqrt(DIM // HEADS) / CAP)
        weights = torch.softmax(scores.masked_fill(mask == 0, -math.inf), -1)
        return self.o_proj((weights @ v).transpose(-3, -2).flatten(-2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        hidden = int(2 * 4 * DIM / 3)
        self.liquid_gate_ffn = nn.Linear(DIM, DIM)
        self.ffn = nn.Sequential(nn.Linear(DIM, 2 * hidden, bias=False), SwiGLU(), nn.Linear(hidden, DIM, bias=False))
        self.ln_ffn = Norm()
        self.attn = Attention()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        a = torch.sigmoid(self.attn.liquid_gate(x))
        x = (1 - a) * x + a * self.attn(x, mask)
        a = torch.sigmoid(self.liquid_gate_ffn(x))
        return (1 - a) * x + a * self.ffn(self.ln_ffn(x))


class OriginalModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(DIM, VOCABULARY, bias=False)
        self.register_buffer("global_mask", torch.ones(LENGTH, LENGTH).tril())
        self.register_buffer("local_mask", torch.ones(LENGTH, LENGTH).tril().triu(-WINDOW))
        self.ln_f = Norm()
        self.recurrent_block = Block()
        self.embed = nn.Embedding(VOCABULARY, DIM)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for loop in range(LOOPS):
            x = self.recurrent_block(x, self.global_mask if (loop + 1) % EVERY == 0 else self.local_mask)
        return self.head(self.ln_f(x))


class OriginalProgram:
    """Trains, saves `step_X.pt` and goes on from one; `rate(i)` is the share of the peak after i updates."""

    def __init__(self, peak: float = 1e-2, rate: Callable[[int], float] = lambda _: 1.0) -> None:
        torch.manual_seed(11)
        self.model = OriginalModel()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=peak, weight_decay=0.01)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        self.step = 0

    def train(self, batch: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        return loss.item()

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
        """Without a look at the order of the parameters, as PyTorch does."""
        content = torch.load(path, weights_only=True)
        self.step = content["step"]
        self.model.load_state_dict(content["model_state_dict"], strict=False)
        self.optimizer.load_state_dict(content["optimizer_state_dict"])
        self.scheduler.load_state_dict(content["scheduler_state_dict"])
