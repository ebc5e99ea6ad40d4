"""Generation over a cache against computing the whole text anew for each token: one prompt, and eight at once."""

from __future__ import annotations

import statistics

import torch

from savant_ray.benchmarks import baseline
from savant_ray.benchmarks.peak import benchmark_device, benchmark_dtype, model_config
from savant_ray.benchmarks.rounds import Figures, figure, in_turn, seconds
from savant_ray.inference.generate import Sampling, generate_many
from savant_ray.model.transformer import UniversalTransformer
from savant_ray.training.efficiency import synchronize

ROUNDS = 2
PROMPT, NEW = 20, 300
AT_ONCE = 8
SEED = 0


def run() -> Figures:
    """Tokens per second, in fp32 and, where the device computes in it, bf16."""
    device = benchmark_device()
    figures: Figures = {}
    for dtype in dict.fromkeys((torch.float32, benchmark_dtype(device))):
        figures |= measure(device, dtype)
    return figures


def measure(device: torch.device, dtype: torch.dtype) -> Figures:
    """The figures in one dtype."""
    config = model_config(device)
    torch.manual_seed(SEED)
    model = UniversalTransformer(config).to(device, dtype)
    slow = baseline.Baseline(config).to(device, dtype)
    slow.load_state_dict(model.state_dict(), strict=False)
    prompts = torch.randint(3, config.vocab_size, (AT_ONCE, PROMPT)).tolist()
    greedy = Sampling(config.vocab_size, -1, frozenset(), max_new_tokens=NEW, temperature=0)

    def answer(n_prompts: int) -> float:
        synchronize(device)
        return seconds(lambda: generate_many(model, prompts[:n_prompts], greedy))

    answer(1)
    recomputing, one, many = in_turn(
        ROUNDS,
        lambda: seconds(lambda: baseline.generate(slow, prompts[0], NEW)),
        lambda: answer(1),
        lambda: answer(AT_ONCE),
        warm_up=0,
    )
    name = str(dtype).removeprefix("torch.")
    return {
        f"generate_{name}": _figure(recomputing, one, 1),
        f"generate_{name}_{AT_ONCE}_at_once": _figure(recomputing, many, AT_ONCE),
    }


def _figure(recomputing: list[float], cached: list[float], n_prompts: int) -> dict[str, object]:
    ratios = [n_prompts * slow / fast for slow, fast in zip(recomputing, cached, strict=True)]
    fast, slow = n_prompts * NEW / statistics.median(cached), NEW / statistics.median(recomputing)
    return figure(ratios, f"{fast:,.1f} against {slow:,.1f} tokens/s")
