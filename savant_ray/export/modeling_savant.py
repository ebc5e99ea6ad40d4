"""Savant for Hugging Face `transformers` (4.56 or newer): configuration and causal language model.

One recurrent block is applied `num_loops` times with the same weights. Each loop has soft-capped attention, over all
earlier tokens in every `global_every`-th loop and over the previous `window_size` tokens in the others, and a SwiGLU
network. Both update the residual stream through a learned gate. `savant export --format hf` writes this file beside the
weights. License: Apache-2.0.

Shapes: B batch, H heads, T new tokens, S keys, D hidden_size, F = head_dim / 2, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

NORM_EPS = 1e-6
CHUNK = 128  # queries whose scores are computed at a time
ROPE_BASE = 10_000.0
# Name of the cache in arguments and outputs of models; versions of transformers differ.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
Rope = tuple[Tensor, Tensor]  # cosines and sines of rotation angles, [B, 1, T, F]


class SavantConfig(PretrainedConfig):
    """Shape of the model.

    Args:
        vocab_size: number of token ids; may be larger than the tokenizer's.
        hidden_size: width of the residual stream.
        num_attention_heads: attention heads; must divide `hidden_size`, with rotary positions into an even `head_dim`.
        num_loops: number of times the block is applied, at least 1; can be changed later (`model.config.num_loops = 8`).
        max_position_embeddings: tokens of a training sequence. Generation may continue past it.
        window_size: how many tokens back a windowed loop attends.
        global_every: every n-th loop attends to all earlier tokens.
        positions: `none` (order follows from the causal mask and the windows) or `rotary` (RoFormer, arXiv 2104.09864).
        soft_cap: attention scores are `soft_cap * tanh(score / soft_cap)`.
    """

    model_type = "savant"
    attribute_map = {"num_hidden_layers": "num_loops"}  # noqa: RUF012 - these are the types that transformers expects
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 32_000,
        hidden_size: int = 1024,
        num_attention_heads: int = 16,
        num_loops: int = 12,
        max_position_embeddings: int = 1024,
        window_size: int = 256,
        global_every: int = 4,
        positions: str = "none",
        soft_cap: float = 50.0,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.num_attention_heads = vocab_size, hidden_size, num_attention_heads
        self.num_loops, self.max_position_embeddings, self.window_size = num_loops, max_position_embeddings, window_size
        self.global_every, self.positions, self.soft_cap, self.use_cache = global_every, positions, soft_cap, use_cache
        super().__init__(**{"tie_word_embeddings": False, **kwargs})

    def refuse_invalid(self) -> None:
        """Raise ValueError if a value is invalid; the model calls this, because values are also set after `__init__`."""
        multiple = self.num_attention_heads * (2 if self.positions == "rotary" else 1)
        is_valid = {name: getattr(self, name) >= 1 for name in ("num_loops", "window_size", "global_every")} | {
            "num_attention_heads": multiple >= 1 and self.hidden_size % multiple == 0,
            "positions": self.positions in ("none", "rotary"),
            "soft_cap": self.soft_cap > 0,
            "tie_word_embeddings": not self.tie_word_embeddings,  # the head has weights of its own
        }
        for name in (name for name, valid in is_valid.items() if not valid):
            raise ValueError(f"{name}={getattr(self, name)!r} is invalid; SavantConfig describes its arguments")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def sliding_window(self) -> int:
        """Number of tokens in the window, with the current one; the caches of transformers read it."""
        return self.window_size + 1

    @property
    def layer_types(self) -> list[str]:
        """Kind of attention of each loop; the caches of transformers have a layer for each loop."""
        is_global = ((loop + 1) % self.global_every == 0 for loop in range(self.num_loops))
        return ["full_attention" if full else "sliding_attention" for full in is_global]


class LiquidAttention(nn.Module):
    """Causal attention with norm, projections and gate; `[B, T, D]` -> `[B, T, D]`."""

    def __init__(self, config: SavantConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.head_dim, self.soft_cap = config.head_dim, config.soft_cap
        self.ln = nn.RMSNorm(dim, eps=NORM_EPS)
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.liquid_gate = nn.Linear(dim, dim)

    def forward(self, x: Tensor, loop: int, window: int | None, mask_of: Any, rope: Rope | None, cache: Any) -> Tensor:
        """Return the residual stream after attention; `mask_of(S, window)` returns the mask over S keys."""
        normed = self.ln(x)
        products = (projection(normed) for projection in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (product.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for product in products)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(k, v, loop)
        out = attend(q, k, v, mask_of(k.shape[2], window), window, self.soft_cap)
        return gated(x, self.o_proj(out.transpose(1, 2).flatten(2)), self.liquid_gate)


class SwiGLU(nn.Module):
    """`silu(gate) * value` of the halves value and gate; `[…, 2 h]` -> `[…, h]`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the product."""
        value, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * value


class RecurrentBlock(nn.Module):
    """Attention and feed-forward network, each with a gate; all loops use the same block."""

    def __init__(self, config: SavantConfig) -> None:
        super().__init__()
        dim, ffn_dim = config.hidden_size, int(2 * 4 * config.hidden_size / 3)
        self.attn = LiquidAttention(config)
        self.ln_ffn = nn.RMSNorm(dim, eps=NORM_EPS)
        self.ffn = nn.Sequential(nn.Linear(dim, 2 * ffn_dim, bias=False), SwiGLU(), nn.Linear(ffn_dim, dim, bias=False))
        self.liquid_gate_ffn = nn.Linear(dim, dim)

    def forward(self, x: Tensor, loop: int, window: int | None, mask_of: Any, rope: Rope | None, cache: Any) -> Tensor:
        """Apply one loop to the residual stream `[B, T, D]`."""
        x = self.attn(x, loop, window, mask_of, rope, cache)
        return gated(x, self.ffn(self.ln_ffn(x)), self.liquid_gate_ffn)


class SavantForCausalLM(PreTrainedModel, GenerationMixin):
    """Savant with its language modeling head."""

    config_class = SavantConfig
    base_model_prefix = "savant"  # no module has this name, so `base_model` is this model itself
    _no_split_modules = ["RecurrentBlock"]  # noqa: RUF012
    _input_embed_layer = "embed"

    def __init__(self, config: SavantConfig) -> None:
        config.refuse_invalid()
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.recurrent_block = RecurrentBlock(config)
        self.ln_f = nn.RMSNorm(config.hidden_size, eps=NORM_EPS)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """Return the head."""
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head."""
        self.head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits `[B, T, V]`, and the mean loss if there are labels.

        Args:
            input_ids: tokens `[B, T]`, which follow those in the cache.
            attention_mask: `[B, cached + T]`, 0 for padding.
            position_ids: positions `[B, T]` for rotary embeddings.
            cache: keys and values of earlier tokens; `past_key_values` in older versions of transformers.
            inputs_embeds: `[B, T, D]` instead of `input_ids`.
            labels: `[B, T]`, the input ids; shifted here. -100 is ignored.
            use_cache: whether to return keys and values.
            output_hidden_states: whether to return the residual stream before, between and after the loops.
            logits_to_keep: number of last positions, or indices, to compute logits for; 0 means all.
            past_key_values: the same as `cache`.
            kwargs: arguments of the loss, such as `num_items_in_batch`.
        """
        self.config.refuse_invalid()  # `num_loops` can be changed
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if x.shape[1] == 0:
            raise ValueError("the input has no tokens")
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        n_cached = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None] + n_cached
        rope = rotary_angles(position_ids, self.config.head_dim) if self.config.positions == "rotary" else None
        if isinstance(attention_mask, dict) or getattr(cache, "is_compileable", False):
            raise ValueError("static caches are not supported; use a DynamicCache")

        @functools.cache
        def mask_of(n_keys: int, window: int | None) -> Tensor:
            """Return a mask; cached, because all loops with the same window use the same one."""
            return causal_mask(x.shape[1], n_keys, n_cached, window, attention_mask, x.device)

        returns_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = [x]
        for loop, kind in enumerate(self.config.layer_types):
            window = None if kind == "full_attention" else self.config.window_size
            x = self.recurrent_block(x, loop, window, mask_of, rope, cache)
            states = [*states, x] if returns_states else [x]
        states[-1] = x = self.ln_f(x)
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(x[:, positions])
        loss = None if labels is None else self.loss_function(logits, labels, logits.shape[-1], **kwargs)
        hidden_states = tuple(states) if returns_states else None
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=hidden_states, **{CACHE: cache})


def causal_mask(
    n_new: int, n_keys: int, n_cached: int, window: int | None, attention_mask: Tensor | None, device: torch.device
) -> Tensor:
    """Return the additive mask, 0 or -inf, of the new tokens over the last `n_keys` tokens: `[B or 1, 1, T, S]` in fp32.

    Padding attends to padding, so that no row is masked entirely.
    """
    end = n_cached + n_new
    query = torch.arange(n_cached, end, device=device)[:, None]
    key = torch.arange(end - n_keys, end, device=device)
    visible = (key <= query)[None, None]
    if window is not None:
        visible = visible & (key >= query - window)
    if attention_mask is not None:
        if attention_mask.shape != (attention_mask.shape[0], end):
            raise ValueError(f"attention_mask has the shape {tuple(attention_mask.shape)}, expected (batch, {end})")
        is_text = attention_mask.to(device).bool()
        visible = visible & (is_text[:, None, n_cached:, None] == is_text[:, None, None, end - n_keys :])
    return torch.zeros(visible.shape, device=device).masked_fill(~visible, -math.inf)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, window: int | None, soft_cap: float) -> Tensor:
    """Return soft-capped attention `[B, H, T, head_dim]`; scores are fp32 in every precision.

    Queries are processed in chunks, each with the keys that it can attend to, because this needs less memory. The chunks are
    those of savant_ray's own model on a CPU.
    """
    scale, n_before, parts = 1.0 / (math.sqrt(q.shape[-1]) * soft_cap), k.shape[2] - q.shape[2], []
    for start in range(0, q.shape[2], CHUNK):
        rows = slice(start, min(start + CHUNK, q.shape[2]))
        keys = slice(0 if window is None else max(0, n_before + start - window), n_before + rows.stop)
        with torch.autocast(q.device.type, enabled=False):
            capped = soft_cap * torch.tanh(q[:, :, rows].float() @ k[:, :, keys].float().mT * scale)
            scores = capped + mask[:, :, rows, keys]
            weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
        out = weights.to(v.dtype) @ v[:, :, keys] / weights.sum(dim=-1, keepdim=True)
        parts.append(out.to(v.dtype))
    return torch.cat(parts, dim=2)


def gated(x: Tensor, out: Tensor, gate: nn.Linear) -> Tensor:
    """Return `(1 - a) x + a out` with `a = sigmoid(gate(x))`, `[B, T, D]`."""
    a = torch.sigmoid(gate(x))
    return (1 - a) * x + a * out


def rotary_angles(position_ids: Tensor, head_dim: int) -> Rope:
    """Return cosine and sine of the rotation angles at positions `[B, T]`, in fp32."""
    n = head_dim // 2
    frequencies = ROPE_BASE ** -(torch.arange(n, device=position_ids.device, dtype=torch.float32) / n)
    angles = position_ids[:, None, :, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys `[B, H, T, head_dim]` in fp32."""
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1).to(x.dtype)
