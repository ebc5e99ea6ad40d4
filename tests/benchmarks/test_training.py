"""The benchmark `train`, measured with a tiny model: what it prints and returns about the steps of its processes."""

from __future__ import annotations

import contextlib
import os
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from savant_ray.benchmarks.registry import table
from savant_ray.benchmarks.training import Case, measure_steps
from savant_ray.config import ModelConfig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MODEL = ModelConfig(vocab_size=60, dim=32, n_heads=2, n_loops=1, max_seq_len=16, window_size=4)
CASE = Case(document_tokens=5, n_documents=4)
ROUNDS = 2
TOO_LOW = 1.0  # FLOP/s

# Python imports this file at its start when its folder is on PYTHONPATH.
ROOM_FOR_SIX_SEQUENCES = """
import torch
embedding = torch.nn.functional.embedding

def limited(tokens, *arguments, **options):
    if len(tokens) > 6:
        raise torch.OutOfMemoryError("Tried to allocate")
    return embedding(tokens, *arguments, **options)

torch.nn.functional.embedding = limited
"""


@dataclass(frozen=True)
class Measurement:
    """The figures of a benchmark, and what it printed to standard error."""

    figures: dict[str, dict[str, Any]]
    printed: str

    @property
    def figure(self) -> dict[str, Any]:
        return self.figures["train_documents"]

    def times(self) -> list[tuple[float, float]]:
        """Return the seconds of baseline and package in each round after the first, which warms up."""
        lines = re.findall(r"round \d of \d: (.+), (.+), (.+)", self.printed)
        assert len(lines) == ROUNDS + 1, self.printed
        return [(float(reference), float(savant)) for _, reference, savant in lines[1:]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measurement:
    """Measure in processes without a compiler; only the deterministic steps and their reference have over 6 sequences."""
    site, errors = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("printed") / "stderr.txt"
    (site / "sitecustomize.py").write_text(ROOM_FOR_SIX_SEQUENCES)
    resource_tracker.ensure_running()  # it would keep the following variables
    variables = {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "PATH": str(site)}
    with mock.patch.dict(os.environ, variables), stderr_written_to(errors):
        figures = measure_steps(MODEL, torch.device("cpu"), {"documents": CASE}, ROUNDS, lambda: TOO_LOW)
    return Measurement(figures, errors.read_text())


@contextlib.contextmanager
def stderr_written_to(path: Path) -> Iterator[None]:
    """Write what this process and its children print to standard error to a file."""
    original = os.dup(2)
    with path.open("w") as file, contextlib.redirect_stderr(file):
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(original, 2)
            os.close(original)


def test_baseline_and_package_train_on_the_same_documents(measured: Measurement) -> None:
    losses = re.search(r"first losses (\d\.\d+) and (\d\.\d+)", measured.figure["detail"])
    assert losses is not None
    assert float(losses[1]) == pytest.approx(float(losses[2]), abs=0.01)


def test_a_step_that_does_not_fit_is_repeated_with_smaller_micro_batches(measured: Measurement) -> None:
    notices = re.findall("did not fit into memory: from now on micro-batches of (.+)", measured.printed)
    assert sorted(notices) == sorted(
        2 * ["12, loops recomputed in the backward pass", "6, loops recomputed in the backward pass"]
    )


def test_the_figures_are_ratios_within_each_round(measured: Measurement) -> None:
    ratios = [reference / savant for reference, savant in measured.times()]
    assert measured.figure["rounds"] == ROUNDS
    assert measured.figure["ratio"] == pytest.approx(statistics.median(ratios), rel=0.01)
    assert measured.figure["spread"] == pytest.approx([min(ratios), max(ratios)], rel=0.01)


def test_the_speeds_are_those_of_the_tokens_of_the_documents(measured: Measurement) -> None:
    savant, reference = re.findall(r"[\d,]+(?= against| useful tokens/s)", measured.figure["detail"])
    expected = [20 / statistics.median(times) for times in zip(*measured.times(), strict=True)]
    assert [float(speed.replace(",", "")) for speed in (reference, savant)] == pytest.approx(expected, rel=0.01, abs=1)


def test_the_share_of_peak_is_at_most_one_even_if_the_peak_was_measured_too_low(measured: Measurement) -> None:
    fastest = min(time for times in measured.times() for time in times)
    shares = [fastest / savant for _, savant in measured.times()]
    assert measured.figure["share_of_peak"] == pytest.approx(statistics.median(shares), rel=0.01) and max(shares) <= 1


def test_each_figure_is_a_row_of_the_printed_table(measured: Measurement) -> None:
    names = {"train_documents", "train_documents_memory", "train_deterministic", "train_deterministic_memory"}
    assert measured.figures.keys() == names and table(measured.figures).row_count == len(names)
