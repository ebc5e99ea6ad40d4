"""UniversalTransformer: embedding, recurrent block with liquid gates, head.

One block is applied `n_loops` times with the same weights (Universal Transformer, arXiv 1807.03819). Its attention and its
feed-forward network each update the residual stream r with their output by a learned convex combination,
`(1 - a) r + a output` with `a = sigmoid(W r + b)` (liquid gates). By default there is no positional encoding, and the model
infers order from the causal mask and the attention windows; `model.positions: rotary` adds rotary embeddings.

Shapes: B batch, T time, S visible keys, D dim, H heads, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from savant_ray.config import ModelConfig
from savant_ray.model.attention import Mask, attend, build_masks
from savant_ray.model.kv_cache import KeyValueCache
from savant_ray.model.rotary import RotaryEmbedding, apply_rotary, rotary_embedding
from savant_ray.model.shared_weights import (
    Layout,
    SharedWeight,
    linear,
    plain_layout,
    shared_weights,
    with_summed_gradients,
)

NORM_EPS = 1e-6


class WeightPacking(NamedTuple):
    """How the weights of the block are joined and padded for its matrix products."""

    ffn_multiple: int = 1  # the hidden dimension of the feed-forward network is padded to a multiple of it
    one_qkv: bool = False  # one product for queries, keys and values


# On an H100 products with 2,730 columns, the hidden dimension at dim 1024, take twice as long as with 2,752. A CPU gains
# nothing from either.
WEIGHT_PACKING = {"cuda": WeightPacking(ffn_multiple=64, one_qkv=True)}
CacheUpdate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (new keys, new values) -> (all visible keys, values)


def n_parameters(config: ModelConfig) -> int:
    """Return the number of parameters without building the model."""
    dim, hidden_dim = config.dim, ffn_dim(config)
    gates, norms = 2 * (dim**2 + dim), 3 * dim
    return 2 * config.vocab_size * dim + 4 * dim**2 + 3 * dim * hidden_dim + gates + norms


def ffn_dim(config: ModelConfig) -> int:
    """Return the hidden dimension of the feed-forward network."""
    return int(2 * 4 * config.dim / 3)


class UniversalTransformer(nn.Module):
    """The model: `model(tokens)` returns logits, `hidden_states` the input of the head, `decode` uses a key-value cache."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute_loops = False  # in the backward pass; saves memory: only each loop's input is kept
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.recurrent_block = RecurrentBlock(config)
        self.ln_f = nn.RMSNorm(config.dim, eps=NORM_EPS)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, tokens_BT: Tensor, document_ids_BT: Tensor | None = None) -> Tensor:
        """Return logits `[B, T, V]`; without `document_ids` each row is one document."""
        logits_BTV: Tensor = self.head(self.hidden_states(tokens_BT, document_ids_BT))
        return logits_BTV

    def hidden_states(
        self,
        tokens_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        n_loops: int | None = None,
        training_graph: bool = False,
    ) -> Tensor:
        """Return the normalized hidden states `[B, T, D]` that the head reads; padding has document id -1.

        `training_graph` is that of `loop_states`.
        """
        if document_ids_BT is None:
            document_ids_BT = torch.zeros_like(tokens_BT)
        for x_BTD in self.loop_states(tokens_BT, document_ids_BT, n_loops, training_graph):  # noqa: B007 - used below
            pass
        normed_BTD: Tensor = self.ln_f(x_BTD)
        return normed_BTD

    def loop_states(
        self, tokens_BT: Tensor, document_ids_BT: Tensor, n_loops: int | None = None, training_graph: bool = False
    ) -> Iterator[Tensor]:
        """Yield the residual stream `[B, T, D]` before the first loop and after each loop.

        With `training_graph` a forward pass without gradients runs through the graph that is compiled for training, because
        for loops without gradients the compiler would compile another one, in 14 s for the default model (H100). Each loop
        then runs as in a training step, and its activations are freed when it returns. Nothing is compiled if inputs have
        the shape of a training step's, autocast is as in training, and gradients are detached (`GradientBuffer.detached`).
        """
        grad_mode = torch.enable_grad if training_graph else nullcontext
        with grad_mode():
            weights = self.recurrent_block.prepare_weights()
            x_BTD = self.recurrent_block.with_summed_gradients(self.embed(tokens_BT), weights)
        masks = build_masks(document_ids_BT, self.config.window_size, self.config.head_dim)
        rope = self.rope(0, tokens_BT)
        yield x_BTD
        for loop in range(n_loops or self.config.n_loops):
            inputs = (x_BTD, masks.for_loop(self.is_global(loop)), rope, None, weights.for_loop())
            with grad_mode():
                if self.recompute_loops and torch.is_grad_enabled():
                    x_BTD = checkpoint(self.recurrent_block, *inputs, use_reentrant=False, preserve_rng_state=False)
                else:
                    x_BTD = self.recurrent_block(*inputs)
            if training_graph:
                x_BTD = x_BTD.detach().requires_grad_()
            yield x_BTD

    def decode(
        self,
        tokens_BT: Tensor,
        cache: KeyValueCache,
        n_loops: int | None = None,
        weights: BlockWeights | None = None,
    ) -> Tensor:
        """Return logits `[B, V]` after the last of the new tokens `[B, T]`, which follow those in the cache.

        The tokens are those of the prompts, padded on the right, in parts of any size, and then one for each row. The
        logits of a prompt that has ended in an earlier part are meaningless.

        For one new token and a cache of static shapes, a CUDA graph of this call can be replayed at the next positions.
        `weights` are those of `RecurrentBlock.prepare_weights`; without them they are prepared for this call only.
        """
        n_new = tokens_BT.shape[1]
        masks = cache.begin(n_new)
        rope = self.rope(cache.length if cache.reads_prompts else cache.position_B[:, None, None], tokens_BT)
        weights = weights or self.recurrent_block.prepare_weights()
        x_BTD = self.embed(tokens_BT)
        for loop in range(n_loops or self.config.n_loops):
            # `.forward` bypasses a compiled block, which would recompile for each length of the cache.
            update_cache = functools.partial(cache.append, loop)
            x_BTD = self.recurrent_block.forward(
                x_BTD, masks.for_loop(self.is_global(loop)), rope, update_cache, weights
            )
        logits_BV: Tensor = self.head(self.ln_f(cache.last_tokens(x_BTD)))
        cache.advance(n_new)
        return logits_BV

    def new_cache(
        self, prompt_lengths: Sequence[int], n_loops: int | None = None, static_shapes: bool = False
    ) -> KeyValueCache:
        """Return an empty cache for `decode`, for prompts of these numbers of tokens."""
        is_global = [self.is_global(loop) for loop in range(n_loops or self.config.n_loops)]
        device = self.head.weight.device
        return KeyValueCache(is_global, self.config.window_size, prompt_lengths, device, static_shapes)

    def rope(self, first: int | Tensor, tokens_BT: Tensor) -> RotaryEmbedding | None:
        """Return the rotary embedding of tokens at positions from `first`, or None for `model.positions: none`.

        A tensor `[B, 1, 1]` has the first position of each row.

        In packed rows positions count through all documents, since attention depends on distances only.
        """
        if self.config.positions == "none":
            return None
        return rotary_embedding(first, tokens_BT.shape[1], self.config.head_dim, tokens_BT.device)

    def is_global(self, loop: int) -> bool:
        """Return whether the loop attends to the whole document: every `global_every`-th does, others to a window."""
        return (loop + 1) % self.config.global_every == 0


class BlockWeights(NamedTuple):
    """Matrices and biases of the recurrent block as its products use them; norms are used as they are."""

    qkv: tuple[SharedWeight, ...]  # one matrix [3 D, D] or three [D, D]
    attn_out: SharedWeight
    attn_gate: SharedWeight
    attn_gate_bias: SharedWeight
    ffn_in: SharedWeight  # values above gates; each half may end with rows of zeros
    ffn_out: SharedWeight  # may end with columns of zeros
    ffn_gate: SharedWeight
    ffn_gate_bias: SharedWeight

    def for_loop(self) -> BlockWeights:
        """Return the weights for one loop (`SharedWeight.for_loop`)."""
        qkv, *others = self
        return BlockWeights(tuple(weight.for_loop() for weight in qkv), *(weight.for_loop() for weight in others))


class RecurrentBlock(nn.Module):
    """Attention and feed-forward network, each with a liquid gate; `[B, T, D]` -> `[B, T, D]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden_dim = ffn_dim(config)
        self.attn = LiquidAttention(config)
        self.ln_ffn = nn.RMSNorm(config.dim, eps=NORM_EPS)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, 2 * hidden_dim, bias=False), SwiGLU(), nn.Linear(hidden_dim, config.dim, bias=False)
        )
        self.liquid_gate_ffn = nn.Linear(config.dim, config.dim)

    def forward(
        self,
        x_BTD: Tensor,
        mask: Mask,
        rope: RotaryEmbedding | None,
        update_cache: CacheUpdate | None,
        weights: BlockWeights,
    ) -> Tensor:
        """Apply one loop to whole sequences, or to new tokens whose keys and values `update_cache` stores.

        `weights` are those of `prepare_weights`.
        """
        x_BTD = self.attn(x_BTD, mask, rope, update_cache, weights)
        hidden = swiglu(linear(self.ln_ffn(x_BTD), weights.ffn_in))
        out_BTD = linear(hidden, weights.ffn_out)
        return liquid_update(x_BTD, out_BTD, weights.ffn_gate, weights.ffn_gate_bias, update_cache is not None)

    def prepare_weights(self) -> BlockWeights:
        """Return the weights in the dtype of the matrix products, laid out for the device; for any number of loops.

        If autograd is on, they have sums for gradients, which `with_summed_gradients` passes to the parameters. On a CPU
        weights in the dtype of the products are not copied. On a GPU the copies of the default model take 22 MiB in bf16,
        28 MiB if its parameters are fp32, and 44 MiB in fp32.
        """
        weight = self.attn.q_proj.weight
        device, dtype = weight.device.type, weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        qkv, others = self.layouts()
        return BlockWeights(tuple(shared_weights(qkv, dtype)), *shared_weights(others, dtype))

    def with_summed_gradients(self, x_BTD: Tensor, weights: BlockWeights) -> Tensor:
        """Return the embedded tokens as the input of the first loop.

        When the backward pass has reached it, the parameters get the sums of gradients in `weights`.
        """
        qkv, others = self.layouts()
        return with_summed_gradients(x_BTD, qkv + others, [*weights.qkv, *weights[1:]])

    def layouts(self) -> tuple[list[Layout], list[Layout]]:
        """Return the layouts of `BlockWeights.qkv` and of the other weights in their order."""
        packing = WEIGHT_PACKING.get(self.attn.q_proj.weight.device.type, WeightPacking())
        attn, (ffn_in, ffn_out) = self.attn, self.ffn.parameters()
        dim, hidden_dim = ffn_out.shape
        padded_dim = math.ceil(hidden_dim / packing.ffn_multiple) * packing.ffn_multiple
        halves = (2, padded_dim)
        qkv_weights = (attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight)
        if packing.one_qkv:
            qkv = [Layout(qkv_weights, (3 * dim, dim), lambda m: m.split(dim))]
        else:
            qkv = [plain_layout(weight) for weight in qkv_weights]
        others = [
            plain_layout(attn.o_proj.weight),
            plain_layout(attn.liquid_gate.weight),
            plain_layout(attn.liquid_gate.bias),
            Layout((ffn_in,), (2 * padded_dim, dim), lambda m: (m.unflatten(0, halves)[:, :hidden_dim],)),
            Layout((ffn_out,), (dim, padded_dim), lambda m: (m[:, :hidden_dim],)),
            plain_layout(self.liquid_gate_ffn.weight),
            plain_layout(self.liquid_gate_ffn.bias),
        ]
        return qkv, others


class LiquidAttention(nn.Module):
    """Attention with norm, projections and liquid gate."""

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

    def forward(
        self,
        x_BTD: Tensor,
        mask: Mask,
        rope: RotaryEmbedding | None,
        update_cache: CacheUpdate | None,
        weights: BlockWeights,
    ) -> Tensor:
        """Return the residual stream `[B, T, D]` after attention."""
        normed, dim = self.ln(x_BTD), x_BTD.shape[2]
        q, k, v = (self._heads(out) for matrix in weights.qkv for out in linear(normed, matrix).split(dim, dim=2))
        if rope is not None:
            q, k = apply_rotary(q, rope), apply_rotary(k, rope)
        if update_cache is not None:
            k, v = update_cache(k, v)
        out_BTD = linear(attend(q, k, v, mask, self.soft_cap).transpose(1, 2).flatten(2), weights.attn_out)
        return liquid_update(x_BTD, out_BTD, weights.attn_gate, weights.attn_gate_bias, update_cache is not None)

    def _heads(self, x_BTD: Tensor) -> Tensor:
        heads_BTHD: Tensor = x_BTD.unflatten(2, (self.n_heads, -1))
        return heads_BTHD.transpose(1, 2)


class SwiGLU(nn.Module):
    """`swiglu` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., 2 h]` to `[..., h]`."""
        return swiglu(x)


def swiglu(x: Tensor) -> Tensor:
    """Return `silu(gate) * value`, `[..., h]`, of the halves value and gate of `[..., 2 h]` (arXiv 2002.05202)."""
    value, gate = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def liquid_update(
    r_BTD: Tensor, out_BTD: Tensor, gate: SharedWeight, bias: SharedWeight, decoding: bool = False
) -> Tensor:
    """Return `(1 - a) r + a out` with `a = sigmoid(gate(r))`, `[B, T, D]`.

    Decoding computes the combination with one kernel instead of four, since launching kernels takes most of the time of
    decoding. The two results differ by rounding.
    """
    a = torch.sigmoid(linear(r_BTD, gate, bias))
    if decoding:
        return torch.lerp(r_BTD, out_BTD.to(r_BTD.dtype), a.to(r_BTD.dtype))
    return (1 - a) * r_BTD + a * out_BTD
