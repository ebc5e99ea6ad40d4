"""Attention and loss by themselves, forward and backward, against whole score matrices and whole logits."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from savant_ray.benchmarks.peak import benchmark_device, benchmark_dtype, model_config
from savant_ray.benchmarks.rounds import Figures, figure, in_turn, seconds
from savant_ray.model.attention import Mask, attend, build_masks, causal_mask
from savant_ray.model.loss import cross_entropy_sum
from savant_ray.training.efficiency import synchronize

ROUNDS = 9
DOCUMENT = 250  # tokens, side by side in a row
SEED = 0


def run_attention() -> Figures:
    """A windowed and a global loop, over one long document and over packed ones."""
    return dict(_attention_figures())


def _attention_figures() -> Iterator[tuple[str, dict[str, object]]]:
    device = benchmark_device()
    config, dtype = model_config(device), benchmark_dtype(device)
    torch.manual_seed(SEED)
    T, shape = config.max_seq_len, (1, config.n_heads, config.max_seq_len, config.head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))

    def there_and_back(mask: Mask) -> None:
        attend(q, k, v, mask, config.soft_cap).square().sum().backward()

    for text, length in (("one_document", T), ("packed", DOCUMENT)):
        documents = (torch.arange(T, device=device) // length)[None]
        masks = build_masks(documents, config.window_size, config.head_dim)
        same_document = documents[:, None, :, None] == documents[:, None, None, :]
        for loop, mask, window in (
            ("windowed", masks.of_windowed, config.window_size),
            ("global", masks.of_global, None),
        ):
            dense = Mask(~(same_document & causal_mask(T, T, window, device)))
            slow, fast = partial(there_and_back, dense), partial(there_and_back, mask)
            yield f"attention_{loop}_{text}", _against(slow, fast, device)


def run_loss() -> Figures:
    """The head and cross entropy over a row of targets."""
    device = benchmark_device()
    config, dtype = model_config(device), benchmark_dtype(device)
    torch.manual_seed(SEED)
    x_BTD = torch.randn(4, config.max_seq_len, config.dim, device=device, dtype=dtype, requires_grad=True)
    head = torch.randn(config.vocab_size, config.dim, device=device).mul_(0.02).to(dtype).requires_grad_()
    targets_BT = torch.randint(0, config.vocab_size, x_BTD.shape[:2], device=device)

    def whole() -> Tensor:
        return F.cross_entropy((x_BTD @ head.mT).float().flatten(0, 1), targets_BT.flatten(), reduction="sum")

    ways = (lambda: whole().backward(), lambda: cross_entropy_sum(x_BTD, head, targets_BT).backward())
    return {"loss": _against(*ways, device=device)}


def _against(slow: Callable[[], object], fast: Callable[[], object], device: torch.device) -> dict[str, object]:
    def timed(act: Callable[[], object]) -> float:
        def whole() -> None:
            act()
            synchronize(device)

        return seconds(whole)

    theirs, ours = in_turn(ROUNDS, lambda: timed(slow), lambda: timed(fast))
    detail = f"{1000 * statistics.median(ours):.1f} against {1000 * statistics.median(theirs):.1f} ms"
    return figure([a / b for a, b in zip(theirs, ours, strict=True)], detail)
