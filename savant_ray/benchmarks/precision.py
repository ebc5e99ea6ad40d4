"""The effect of precision on learning: the decrease of the validation loss in each precision relative to fp32.

All precisions start from the same weights and are emulated on CPUs without bf16 instructions, which is slow, so the model is
tiny. `plain bf16` is PyTorch's AdamW on bf16 weights. It shows the problem: at the default learning rate it does not learn.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch

from savant_ray.benchmarks.registry import Figures, figure, log_progress
from savant_ray.benchmarks.workload import benchmark_device
from savant_ray.config import Config
from savant_ray.data.packing import pack
from savant_ray.data.quickstart.problems import problems
from savant_ray.data.tokenizer import train_tokenizer
from savant_ray.evaluation.held_out_loss import loss_sums
from savant_ray.model.transformer import UniversalTransformer
from savant_ray.training.device import autocast
from savant_ray.training.state import new_state
from savant_ray.training.step import MicroBatch, loss_and_tokens, take_step

LEARNING_RATES = (2e-5, 1e-3)  # constant: the default, and one at which a small model learns quickly
SEEDS = (0, 1, 2)
STEPS, ROWS = 300, 8
PRECISIONS = ("bf16", "bf16-mixed", "plain bf16")  # against fp32
MODEL = dict(vocab_size=400, dim=32, n_heads=2, n_loops=2, max_seq_len=64, window_size=16, global_every=2)
VALIDATION_ROWS = 64


class Rows(NamedTuple):
    """Packed rows of training and validation text, on the device."""

    training: list[MicroBatch]
    validation: list[MicroBatch]


def run() -> Figures:
    """Measure each precision at each learning rate; rounds are seeds."""
    figures: Figures = {}
    for rate in LEARNING_RATES:
        decreases = {
            precision: [_logged_decrease(precision, rate, seed) for seed in SEEDS]
            for precision in ("fp32", *PRECISIONS)
        }
        for precision in PRECISIONS:
            pairs = zip(decreases[precision], decreases["fp32"], strict=True)
            ratios = [decrease / fp32 for decrease, fp32 in pairs]
            means = (statistics.mean(decreases[name]) for name in (precision, "fp32"))
            detail = "validation loss fell by {:.4f} against {:.4f} nats".format(*means)
            figures[f"{precision.replace(' ', '_')}_at_{rate:g}"] = figure(ratios, detail)
    return figures


def _logged_decrease(precision: str, rate: float, seed: int) -> float:
    decrease = loss_decrease(precision, rate, seed)
    log_progress(f"{precision}, learning rate {rate:g}, seed {seed}: the validation loss fell by {decrease:.4f}")
    return decrease


def loss_decrease(precision: str, rate: float, seed: int, steps: int = STEPS) -> float:
    """Return how much `steps` steps lower the validation loss, in nats per token, evaluated in the same precision."""
    device = benchmark_device()
    settings = {
        "precision": "fp32" if precision == "plain bf16" else precision,
        "learning_rate": rate,
        "batch_size": ROWS,
    }
    config = Config.from_dict({"run": {"seed": seed}, "model": MODEL, "training": {**settings, "accumulation": 1}})
    rows = _rows()
    # Seeds differ in their training rows as well as in their initial weights.
    batches = itertools.islice(itertools.cycle(rows.training), seed * steps, (seed + 1) * steps)
    if precision == "plain bf16":
        model = new_state(config, device, "fp32").model.to(torch.bfloat16)
        before = _loss(model, "bf16", rows)
        _train_plain_bf16(model, batches, rate)
        return before - _loss(model, "bf16", rows)
    state = new_state(config, device, precision)
    before = _loss(state.model, precision, rows)
    for batch in batches:
        take_step(state, [batch], rate, config.training.gradient_clip, lambda: None)
    return before - _loss(state.model, precision, rows)


def _train_plain_bf16(model: UniversalTransformer, batches: Iterator[MicroBatch], rate: float) -> None:
    for parameter in model.parameters():
        parameter.grad_dtype, parameter.grad = torch.bfloat16, None  # instead of the fp32 gradients of `new_state`
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    for batch in batches:
        optimizer.zero_grad()
        loss, tokens = loss_and_tokens(model, batch)
        (loss / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def _loss(model: UniversalTransformer, precision: str, rows: Rows) -> float:
    with autocast(precision, model.head.weight.device):
        loss, tokens = loss_sums(model, rows.validation).tolist()
    return float(loss / tokens)


@cache
def _rows() -> Rows:
    """Return packed rows of worked problems and of held-out ones."""
    device = benchmark_device()
    training, held_out = problems(0, 6000), problems(1, 600, held_out=True)
    tokenizer = train_tokenizer((problem.text for problem in training), MODEL["vocab_size"])
    batches = list(_packed(tokenizer.encode_documents([p.text for p in training]), device).parts(ROWS))[:-1]
    validation = _packed(tokenizer.encode_documents([p.text for p in held_out]), device)
    return Rows(batches, list(validation.parts(VALIDATION_ROWS))[:1])


def _packed(texts: list[list[int]], device: torch.device) -> MicroBatch:
    """Return all documents in shuffled rows; each document is in one row if it fits."""
    packing = pack([len(text) for text in texts], MODEL["max_seq_len"])
    tokens = torch.zeros(len(packing), MODEL["max_seq_len"], dtype=torch.int64)
    documents = torch.full_like(tokens, -1)
    row, column = 0, 0
    for piece, (document, start, length) in enumerate(
        zip(packing.documents, packing.starts, packing.lengths, strict=True)
    ):
        if piece == packing.row_ends[row]:
            row, column = row + 1, 0
        columns = slice(column, column + int(length))
        tokens[row, columns] = torch.tensor(texts[document][start : start + length])
        documents[row, columns] = piece
        column += int(length)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    is_trained = torch.ones_like(tokens, dtype=torch.bool)
    return MicroBatch(tokens[order], documents[order], is_trained, tuple(range(len(tokens)))).to(device)
