"""Utilization: FLOPs equal to those counted by a loop over queries, peak measured on this machine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from savant_ray.config import ModelConfig
from savant_ray.training.efficiency import Peak, document_lengths, useful_flops, visible_pairs

CONFIG = ModelConfig(dim=64, n_heads=2, n_loops=4, vocab_size=50, max_seq_len=32, window_size=4, global_every=2)


def test_documents_of_packed_rows_are_counted_without_padding() -> None:
    ids = np.array([[0, 0, 0, 1, -1, -1], [1, 1, 2, 2, 2, 2], [-1, -1, -1, -1, -1, -1]])
    assert document_lengths(ids).tolist() == [3, 1, 2, 4]


@pytest.mark.parametrize("window_size", [3, 10, 40])
def test_visible_pairs_are_counted_query_by_query(window_size: int) -> None:
    assert visible_pairs(10, window_size) == sum(min(query, window_size) + 1 for query in range(10))


def test_flops_depend_on_the_lengths_of_documents_only() -> None:
    one, two = useful_flops(CONFIG, [10]), useful_flops(CONFIG, [10, 10])
    assert two == 2 * one < useful_flops(CONFIG, [20])


def test_utilization_is_unknown_without_a_measured_peak_or_counted_flops() -> None:
    peak = Peak("fp32", torch.device("cpu"))
    assert peak.utilization(1e6, 1.0) is None, "not measured yet"
    peak.measure()
    assert peak.utilization(0.0, 1.0) is None
    assert peak.utilization(1e6, 1.0) == pytest.approx(1e6 / peak.flops_per_second)
    before = peak.flops_per_second
    peak.measure()
    assert peak.flops_per_second >= before > 1e8


def test_a_step_faster_than_the_peak_raises_the_peak() -> None:
    peak = Peak("fp32", torch.device("cpu"))
    peak.flops_per_second = 1e9
    assert peak.utilization(1.31e9, 1.0) == 1.0
    assert peak.utilization(0.655e9, 1.0) == pytest.approx(0.5), "the peak is at least the speed of the fastest step"
