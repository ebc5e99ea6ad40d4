"""The model agrees with an independent implementation of docs/DESIGN.md, section 4, in plain tensors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from savant_ray.config import ModelConfig
from savant_ray.model.transformer import UniversalTransformer

SMALL = dict(vocab_size=97, dim=32, n_heads=4, n_loops=5, max_seq_len=40, window_size=6, global_every=3, soft_cap=5.0)


def reference_logits(w: dict[str, Tensor], tokens: Tensor, documents: Tensor, c: ModelConfig) -> Tensor:
    """One sequence at a time, one query at a time, nothing shared with the package."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight

    def gate(r: Tensor, name: str) -> Tensor:
        return 1 / (1 + torch.exp(-(r @ w[f"{name}.weight"].T + w[f"{name}.bias"])))

    def attention(x: Tensor, doc: Tensor, is_global: bool) -> Tensor:
        n, head_dim = len(x), c.dim // c.n_heads
        b = "recurrent_block.attn."
        q, k, v = (
            (norm(x, w[b + "ln.weight"]) @ w[f"{b}{p}_proj.weight"].T).reshape(n, c.n_heads, head_dim) for p in "qkv"
        )
        out = torch.zeros(n, c.n_heads, head_dim, dtype=x.dtype)
        for t in range(n):
            first = 0 if is_global else max(0, t - c.window_size)
            keys = [s for s in range(first, t + 1) if doc[s] == doc[t]]
            for h in range(c.n_heads):
                s = torch.stack([(q[t, h] * k[j, h]).sum() / math.sqrt(head_dim) for j in keys])
                p = torch.softmax(c.soft_cap * torch.tanh(s / c.soft_cap), 0)
                out[t, h] = sum(p[i] * v[j, h] for i, j in enumerate(keys))
        return out.reshape(n, c.dim) @ w[b + "o_proj.weight"].T

    def feed_forward(x: Tensor) -> Tensor:
        both = norm(x, w["recurrent_block.ln_ffn.weight"]) @ w["recurrent_block.ffn.0.weight"].T
        half = int(2 * 4 * c.dim / 3)
        value, g = both[:, :half], both[:, half:]
        return (g / (1 + torch.exp(-g)) * value) @ w["recurrent_block.ffn.2.weight"].T

    logits = []
    for row, doc in zip(tokens, documents, strict=True):
        x = w["embed.weight"][row]
        for loop in range(c.n_loops):
            a = gate(x, "recurrent_block.attn.liquid_gate")
            x = (1 - a) * x + a * attention(x, doc, (loop + 1) % c.global_every == 0)
            a = gate(x, "recurrent_block.liquid_gate_ffn")
            x = (1 - a) * x + a * feed_forward(x)
        logits.append(norm(x, w["ln_f.weight"]) @ w["head.weight"].T)
    return torch.stack(logits)


@pytest.mark.parametrize("window_size", [1, 6, 64])
def test_the_model_computes_the_reference_to_1e_5(window_size: int) -> None:
    config = ModelConfig(**(SMALL | {"window_size": window_size}))
    torch.manual_seed(0)
    model = UniversalTransformer(config)
    with torch.no_grad():
        for parameter in model.parameters():  # also norms and biases away from their special values
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    tokens = torch.randint(0, 97, (2, 23))
    documents = torch.tensor([[0] * 23, [0] * 9 + [1] * 10 + [2] * 4])
    expected = reference_logits(
        {n: p.detach().double() for n, p in model.named_parameters()}, tokens, documents, config
    )
    torch.testing.assert_close(model(tokens, documents).double(), expected, rtol=1e-5, atol=1e-5)


def test_parameters_have_the_originals_names_and_shapes() -> None:
    config = ModelConfig()
    with torch.device("meta"):
        model = UniversalTransformer(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    d, h = 1024, 2730
    block = "recurrent_block."
    assert shapes == {
        "embed.weight": (32_000, d),
        block + "attn.q_proj.weight": (d, d),
        block + "attn.k_proj.weight": (d, d),
        block + "attn.v_proj.weight": (d, d),
        block + "attn.o_proj.weight": (d, d),
        block + "attn.ln.weight": (d,),
        block + "attn.liquid_gate.weight": (d, d),
        block + "attn.liquid_gate.bias": (d,),
        block + "ln_ffn.weight": (d,),
        block + "ffn.0.weight": (2 * h, d),
        block + "ffn.2.weight": (d, h),
        block + "liquid_gate_ffn.weight": (d, d),
        block + "liquid_gate_ffn.bias": (d,),
        "ln_f.weight": (d,),
        "head.weight": (32_000, d),
    }
