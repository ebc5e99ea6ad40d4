"""UniversalTransformer: embedding, recurrent block, liquid gates, head.

One block is applied `n_loops` times with the same weights (Universal Transformer, arXiv 1807.03819). Its two halves
update the stream by a learned convex mixture, `x = (1 - a) r + a out` with `a = sigmoid(W r + b)`: the liquid gates.
There is no positional encoding; order comes from causality and the windows. (`model.positions: rotary` adds one.)

Shapes: B batch, T time, S keys in reach, D dim, H heads, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from savant_ray.config import ModelConfig
from savant_ray.model.attention import Mask, attend, build_masks, cached_masks
from savant_ray.model.kv_cache import KeyValueCache
from savant_ray.model.rotary import Rotation, rotate, rotation

NORM_EPS = 1e-6
CacheReader = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # takes new keys and values, returns all in reach


def n_parameters(config: ModelConfig) -> int:
    """Of the model that is not built yet."""
    dim, hidden = config.dim, ffn_width(config)
    gates, norms = 2 * (dim**2 + dim), 3 * dim
    return 2 * config.vocab_size * dim + 4 * dim**2 + 3 * dim * hidden + gates + norms


def ffn_width(config: ModelConfig) -> int:
    """Hidden features of the feed-forward half."""
    return int(2 * 4 * config.dim / 3)


class UniversalTransformer(nn.Module):
    """`model(tokens)` -> logits; `hidden` stops before the head; `decode` reads and extends a cache."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute_loops = False  # trade time for memory: keep only each loop's input for the backward pass
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.recurrent_block = RecurrentBlock(config)
        self.ln_f = nn.RMSNorm(config.dim, eps=NORM_EPS)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, tokens_BT: Tensor, document_ids_BT: Tensor | None = None) -> Tensor:
        """Logits `[B, T, V]`; without `document_ids` each row is one document."""
        logits_BTV: Tensor = self.head(self.hidden(tokens_BT, document_ids_BT))
        return logits_BTV

    def hidden(self, tokens_BT: Tensor, document_ids_BT: Tensor | None = None, n_loops: int | None = None) -> Tensor:
        """The normalised stream `[B, T, D]` that the head reads; padding has document id -1."""
        if document_ids_BT is None:
            document_ids_BT = torch.zeros_like(tokens_BT)
        for x_BTD in self.states(tokens_BT, document_ids_BT, n_loops):  # noqa: B007 - the last one is wanted
            pass
        normed_BTD: Tensor = self.ln_f(x_BTD)
        return normed_BTD

    def states(self, tokens_BT: Tensor, document_ids_BT: Tensor, n_loops: int | None = None) -> Iterator[Tensor]:
        """The stream `[B, T, D]` before the first loop and after each."""
        masks = build_masks(document_ids_BT, self.config.window_size, self.config.head_dim)
        by = self.rotation(0, tokens_BT)
        x_BTD = self.embed(tokens_BT)
        yield x_BTD
        for loop in range(n_loops or self.config.n_loops):
            mask = masks.for_loop(self.is_global(loop))
            if self.recompute_loops and torch.is_grad_enabled():
                x_BTD = checkpoint(self.recurrent_block, x_BTD, mask, by, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTD = self.recurrent_block(x_BTD, mask, by)
            yield x_BTD

    def decode(self, tokens_BT: Tensor, cache: KeyValueCache, n_loops: int | None = None) -> Tensor:
        """Logits `[B, V]` after the last of the new tokens, which follow those already in the cache."""
        n_new = tokens_BT.shape[1]
        masks = cached_masks(n_new, cache.length, self.config.window_size, cache.padding_B, tokens_BT.device)
        by = self.rotation(cache.length, tokens_BT)
        x_BTD = self.embed(tokens_BT)
        for loop in range(n_loops or self.config.n_loops):
            # .forward: a compiled block would compile anew for each length of the cache
            reader = functools.partial(cache.append, loop)
            x_BTD = self.recurrent_block.forward(x_BTD, masks.for_loop(self.is_global(loop)), by, reader)
        cache.length += n_new
        logits_BV: Tensor = self.head(self.ln_f(x_BTD[:, -1]))
        return logits_BV

    def new_cache(self, n_loops: int | None = None, padding_B: Tensor | None = None) -> KeyValueCache:
        """An empty cache for `decode`, of rows that begin with so many tokens of padding."""
        return KeyValueCache([self.window(loop) for loop in range(n_loops or self.config.n_loops)], padding_B)

    def rotation(self, first: int, tokens_BT: Tensor) -> Rotation | None:
        """Of tokens from place `first` on, if the model has positions; in packed rows only distances matter."""
        if self.config.positions == "none":
            return None
        return rotation(first, tokens_BT.shape[1], self.config.head_dim, tokens_BT.device)

    def is_global(self, loop: int) -> bool:
        """Every `global_every`-th loop sees the whole document, the others `window_size` tokens back."""
        return (loop + 1) % self.config.global_every == 0

    def window(self, loop: int) -> int | None:
        """How far back the loop looks, None = to the beginning."""
        return None if self.is_global(loop) else self.config.window_size


class RecurrentBlock(nn.Module):
    """Attention and feed-forward, each behind a liquid gate; `[B, T, D]` -> `[B, T, D]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = ffn_width(config)
        self.attn = LiquidAttention(config)
        self.ln_ffn = nn.RMSNorm(config.dim, eps=NORM_EPS)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, 2 * hidden, bias=False), SwiGLU(), nn.Linear(hidden, config.dim, bias=False)
        )
        self.liquid_gate_ffn = nn.Linear(config.dim, config.dim)

    def forward(
        self, x_BTD: Tensor, mask: Mask, by: Rotation | None = None, reader: CacheReader | None = None
    ) -> Tensor:
        """One loop, over whole sequences, or over new tokens whose keys and values a `reader` adds to a cache."""
        x_BTD = self.attn(x_BTD, mask, by, reader)
        return liquid_update(x_BTD, self.ffn(self.ln_ffn(x_BTD)), self.liquid_gate_ffn)


class LiquidAttention(nn.Module):
    """The attention half of the block, with norm, projections and gate."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.soft_cap = config.soft_cap
        self.ln = nn.RMSNorm(config.dim, eps=NORM_EPS)
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.liquid_gate = nn.Linear(config.dim, config.dim)

    def forward(self, x_BTD: Tensor, mask: Mask, by: Rotation | None, reader: CacheReader | None) -> Tensor:
        """The stream after the attention half."""
        normed = self.ln(x_BTD)
        q, k, v = (self._heads(projection(normed)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, by), rotate(k, by)
        if reader is not None:
            k, v = reader(k, v)
        out_BHTD = attend(q, k, v, mask, self.soft_cap)
        return liquid_update(x_BTD, self.o_proj(out_BHTD.transpose(1, 2).flatten(2)), self.liquid_gate)

    def _heads(self, x_BTD: Tensor) -> Tensor:
        heads_BTHD: Tensor = x_BTD.unflatten(2, (self.n_heads, -1))
        return heads_BTHD.transpose(1, 2)


class SwiGLU(nn.Module):
    """`silu(gate) * value` of the two halves (value, gate) of the last dimension (arXiv 2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., 2 h]` -> `[..., h]`."""
        value, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * value


def liquid_update(r_BTD: Tensor, out_BTD: Tensor, gate: nn.Linear) -> Tensor:
    """`(1 - a) r + a out` with `a = sigmoid(gate(r))`."""
    a = torch.sigmoid(gate(r_BTD))
    return (1 - a) * r_BTD + a * out_BTD
