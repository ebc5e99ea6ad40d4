"""Straightforward implementation of the model and the step, the reference that benchmark ratios compare with.

Each document is a row padded to `max_seq_len`. Attention computes all T x T scores under an additive mask, each loop is
checkpointed, the loss uses the logits of all rows, and generation recomputes the whole text for each token. The baseline is
not optimized and must not change, so that ratios stay comparable.

Shapes: B documents, T time, D dim, H heads, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from savant_ray.config import ModelConfig

PADDING = 0  # token id, as in the original script


class Baseline(nn.Module):
    """The model; its parameters have the same names as those of `UniversalTransformer`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.recurrent_block = Block(config)
        self.ln_f = nn.RMSNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        T = config.max_seq_len
        query, key = torch.arange(T)[:, None], torch.arange(T)[None, :]
        masked = torch.full((T, T), float("-inf"))
        self.register_buffer("global_mask", masked.where(key > query, 0.0))
        self.register_buffer("local_mask", masked.where((key > query) | (key < query - config.window_size), 0.0))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return logits `[B, T, V]`."""
        T = tokens_BT.shape[1]
        x_BTD = self.embed(tokens_BT)
        for loop in range(self.config.n_loops):
            mask = self.global_mask if (loop + 1) % self.config.global_every == 0 else self.local_mask
            x_BTD = checkpoint(self.recurrent_block, x_BTD, mask[:T, :T], use_reentrant=False)
        return self.head(self.ln_f(x_BTD))


class Block(nn.Module):
    """Attention and feed-forward network with their gates."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        ffn_dim = int(2 * 4 * config.dim / 3)
        self.attn = Attention(config)
        self.ln_ffn = nn.RMSNorm(config.dim, eps=1e-6)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, 2 * ffn_dim, bias=False), SwiGLU(), nn.Linear(ffn_dim, config.dim, bias=False)
        )
        self.liquid_gate_ffn = nn.Linear(config.dim, config.dim)

    def forward(self, x_BTD: Tensor, mask_TT: Tensor) -> Tensor:
        """Apply one loop, `[B, T, D]` -> `[B, T, D]`."""
        r = self.attn(x_BTD, mask_TT)
        a = torch.sigmoid(self.liquid_gate_ffn(r))
        return (1 - a) * r + a * self.ffn(self.ln_ffn(r))


class Attention(nn.Module):
    """Attention with its gate."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.soft_cap = config.n_heads, config.soft_cap
        self.ln = nn.RMSNorm(config.dim, eps=1e-6)
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.liquid_gate = nn.Linear(config.dim, config.dim)

    def forward(self, x_BTD: Tensor, mask_TT: Tensor) -> Tensor:
        """Return the residual stream after attention, `[B, T, D]`."""
        B, T, D = x_BTD.shape
        normed = self.ln(x_BTD)
        q, k, v = (
            projection(normed).view(B, T, self.n_heads, -1).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(D // self.n_heads)
        scores = self.soft_cap * torch.tanh(scores / self.soft_cap) + mask_TT
        out = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).reshape(B, T, D)
        a = torch.sigmoid(self.liquid_gate(x_BTD))
        return (1 - a) * x_BTD + a * self.o_proj(out)


class SwiGLU(nn.Module):
    """`silu(gate) * value` of the halves of the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., 2 h]` to `[..., h]`."""
        value, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * value


def loss_sum(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    """Return the sum of the token losses in nats, without padding targets."""
    logits = model(tokens_BT)[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, tokens_BT[:, 1:].flatten(), ignore_index=PADDING, reduction="sum")


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: Sequence[Tensor]) -> float:
    """Accumulate `[B, T]` micro-batches, clip at 1.0, update, and return the loss in nats per token."""
    total, tokens = 0.0, 0
    for tokens_BT in micro_batches:
        loss = loss_sum(model, tokens_BT)
        if not torch.isfinite(loss):
            continue
        loss.backward()
        total += loss.item()
        tokens += int((tokens_BT[:, 1:] != PADDING).sum())
    for parameter in model.parameters():
        parameter.grad /= tokens
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total / tokens


def padded(documents: Sequence[Tensor], length: int) -> Tensor:
    """Pad each document to a row, `[B, length]`."""
    return torch.stack([F.pad(document, (0, length - len(document)), value=PADDING) for document in documents])


@torch.no_grad()
def generate(model: nn.Module, prompt: Sequence[int], n_tokens: int) -> list[int]:
    """Return the greedy continuation; recomputes the whole text for each token."""
    tokens = list(prompt)
    for _ in range(n_tokens):
        tokens.append(int(model(torch.tensor([tokens], device=model.head.weight.device))[0, -1].argmax()))
    return tokens[len(prompt) :]
