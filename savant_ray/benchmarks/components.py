"""Attention, loss and generation measured separately, each against the straightforward way to compute it.

Attention and loss: forward and backward pass against full score matrices and full logits. Generation: a key-value cache
against recomputing the whole text for each token, for one prompt and for a batch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from savant_ray.benchmarks import baseline
from savant_ray.benchmarks.registry import Figures, alternate, figure, seconds
from savant_ray.benchmarks.workload import benchmark_device, benchmark_dtype, model_config
from savant_ray.config import Config
from savant_ray.inference.generate import generate_many
from savant_ray.inference.sampling import Sampling
from savant_ray.model.attention import Mask, attend, build_masks, causal_mask
from savant_ray.model.loss import cross_entropy_sum
from savant_ray.model.transformer import UniversalTransformer
from savant_ray.training.device import GIB, peak_memory_gb, synchronize

ROUNDS = 9
LOSS_ROWS = 4  # sequences of targets
DOCUMENT_TOKENS = 250  # of each document in a packed row
GENERATION_ROUNDS = 2
PROMPT_TOKENS, NEW_TOKENS = 20, 300
BATCH_SIZE = 8
SEED = 0


def run_attention() -> Figures:
    """Measure windowed and global attention, over one long document and over packed documents.

    With a single row a GPU mostly waits for kernels to be launched, so on a GPU the rows of a micro-batch are measured too.
    """
    return _with_micro_batches(lambda n_rows: dict(_attention_figures(n_rows)), 1)


def _with_micro_batches(measure: Callable[[int], Figures], n_rows: int) -> Figures:
    """Return the figures of `n_rows` and, on a GPU, those of a micro-batch's rows, whose names have a suffix."""
    figures = measure(n_rows)
    if benchmark_device().type == "cuda":
        of_micro_batch = measure(Config().training.batch_size)
        figures |= {f"{name}_micro_batch": values for name, values in of_micro_batch.items()}
    return figures


def _attention_figures(n_rows: int) -> Iterator[tuple[str, dict[str, object]]]:
    device = benchmark_device()
    config, dtype = model_config(device), benchmark_dtype(device)
    torch.manual_seed(SEED)
    T, shape = config.max_seq_len, (n_rows, config.n_heads, config.max_seq_len, config.head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))

    def forward_and_backward(mask: Mask) -> None:
        attend(q, k, v, mask, config.soft_cap).square().sum().backward()

    for text, length in (("one_document", T), ("packed", DOCUMENT_TOKENS)):
        documents = (torch.arange(T, device=device) // length).repeat(n_rows, 1)
        masks = build_masks(documents, config.window_size, config.head_dim)
        same_document = documents[:, None, :, None] == documents[:, None, None, :]
        for loop, mask, window in (
            ("windowed", masks.windowed, config.window_size),
            ("global", masks.full, None),
        ):
            dense = Mask(~(same_document & causal_mask(T, T, window, device)))
            savant, reference = partial(forward_and_backward, mask), partial(forward_and_backward, dense)
            yield f"attention_{loop}_{text}", _compare(reference, savant, device)


def run_loss() -> Figures:
    """Measure time and, on a GPU, memory of head and cross entropy over rows of targets."""
    return _with_micro_batches(_loss_figures, LOSS_ROWS)


def _loss_figures(n_rows: int) -> Figures:
    device = benchmark_device()
    config, dtype = model_config(device), benchmark_dtype(device)
    torch.manual_seed(SEED)
    x_BTD = torch.randn(n_rows, config.max_seq_len, config.dim, device=device, dtype=dtype, requires_grad=True)
    head = torch.randn(config.vocab_size, config.dim, device=device).mul_(0.02).to(dtype).requires_grad_()
    targets_BT = torch.randint(0, config.vocab_size, x_BTD.shape[:2], device=device)

    def reference() -> None:
        def loss() -> torch.Tensor:  # a function, so that the logits are freed before the backward pass
            return F.cross_entropy((x_BTD @ head.mT).float().flatten(0, 1), targets_BT.flatten(), reduction="sum")

        loss().backward()

    def savant() -> None:
        cross_entropy_sum(x_BTD, head, targets_BT).backward()

    figures: Figures = {"loss": _compare(reference, savant, device)}
    if device.type == "cuda":
        savant_gb, reference_gb = (_added_gb(function, device) for function in (savant, reference))
        detail = f"{savant_gb:.2f} against {reference_gb:.2f} GiB"
        figures["loss_memory"] = figure([savant_gb / reference_gb], detail)
    return figures


def _added_gb(function: Callable[[], object], device: torch.device) -> float:
    """Return the peak of what `function` allocates on a GPU, GiB."""
    before = torch.cuda.memory_allocated(device) / GIB
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return peak_memory_gb(device) - before


def _compare(reference: Callable[[], object], savant: Callable[[], object], device: torch.device) -> dict[str, object]:
    def timed(function: Callable[[], object]) -> float:
        def call_and_synchronize() -> None:
            function()
            synchronize(device)

        return seconds(call_and_synchronize)

    reference_times, savant_times = alternate(ROUNDS, lambda: timed(reference), lambda: timed(savant))
    detail = f"{1000 * statistics.median(savant_times):.1f} against {1000 * statistics.median(reference_times):.1f} ms"
    return figure([a / b for a, b in zip(reference_times, savant_times, strict=True)], detail)


def run_generation() -> Figures:
    """Measure generated tokens per second in fp32 and, if the device supports it, in bf16."""
    device = benchmark_device()
    figures: Figures = {}
    for dtype in dict.fromkeys((torch.float32, benchmark_dtype(device))):
        figures |= measure_generation(device, dtype)
    return figures


def measure_generation(device: torch.device, dtype: torch.dtype) -> Figures:
    """Measure generation in one dtype, for one prompt and for a batch of them."""
    config = model_config(device)
    torch.manual_seed(SEED)
    model = UniversalTransformer(config).to(device, dtype)
    reference = baseline.Baseline(config).to(device, dtype)
    reference.load_state_dict(model.state_dict(), strict=False)
    prompts = torch.randint(3, config.vocab_size, (BATCH_SIZE, PROMPT_TOKENS)).tolist()
    greedy = Sampling(
        vocab_size=config.vocab_size,
        end_of_document=-1,  # no token, so that every answer has `NEW_TOKENS` tokens
        never_sampled=frozenset(),
        max_new_tokens=NEW_TOKENS,
        temperature=0,
    )

    def generate(n_prompts: int) -> float:
        synchronize(device)
        return seconds(lambda: generate_many(model, prompts[:n_prompts], greedy))

    generate(1)
    recomputed, single, batched = alternate(
        GENERATION_ROUNDS,
        lambda: seconds(lambda: baseline.generate(reference, prompts[0], NEW_TOKENS)),
        lambda: generate(1),
        lambda: generate(BATCH_SIZE),
        warm_up=0,
    )
    name = str(dtype).removeprefix("torch.")
    return {
        f"generate_{name}": _generation_figure(recomputed, single, 1),
        f"generate_{name}_{BATCH_SIZE}_at_once": _generation_figure(recomputed, batched, BATCH_SIZE),
    }


def _generation_figure(recomputed: list[float], cached: list[float], n_prompts: int) -> dict[str, object]:
    ratios = [n_prompts * slow / fast for slow, fast in zip(recomputed, cached, strict=True)]
    fast, slow = n_prompts * NEW_TOKENS / statistics.median(cached), NEW_TOKENS / statistics.median(recomputed)
    return figure(ratios, f"{fast:,.1f} against {slow:,.1f} tokens/s")
