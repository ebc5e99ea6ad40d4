"""The benchmark `ray`: the loop outside of Ray does the work of a worker."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest

import savant_ray
from savant_ray.benchmarks import workload
from savant_ray.benchmarks.under_ray import SETTINGS, local_batches
from savant_ray.benchmarks.workload import as_options, run_command, train_command
from savant_ray.config import load_config
from savant_ray.data.documents import Document
from savant_ray.data.stream import LocalSequences
from savant_ray.data.token_cache import TokenCache
from savant_ray.data.tokenizer import train_tokenizer
from savant_ray.worker.batch_reader import BatchReader
from tests.data.without_ray import cache_of
from tests.training.tiny import CPU

TEXT = " ".join(map(str, range(200)))


class CacheStream:
    """The sequences of a cache in their order, all for one worker."""

    def __init__(self, cache: TokenCache, sequences_per_step: int) -> None:
        self.cache, self.sequences_per_step, self.first_micro_batch = cache, sequences_per_step, 0

    def steps(self, start_position: int, n_steps: int) -> Generator[LocalSequences, None, None]:
        for step in range(n_steps):
            positions = start_position + np.arange(self.sequences_per_step) + step * self.sequences_per_step
            yield LocalSequences(positions, self.cache.take(positions % self.cache.n_sequences))


def test_the_loop_outside_of_ray_has_the_micro_batches_of_a_worker(tmp_path: Path) -> None:
    config = load_config(as_options(SETTINGS | {"training.max_steps": 2}), environment={})
    tokenizer = train_tokenizer(iter([TEXT]), 300)
    cache = cache_of([Document(number, TEXT) for number in range(40)], tokenizer, config.model.max_seq_len, tmp_path)
    stream = CacheStream(cache, config.training.effective_batch)
    of_worker = [[len(part.positions) for part in batch] for batch in BatchReader(stream, 0, 2, config, CPU)]
    assert [[len(part.positions) for part in batch] for batch in local_batches(cache, config, CPU)] == of_worker


def test_benchmarks_train_in_any_folder_also_without_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that was installed from a wheel has no folder `jobs` beside it."""
    shutil.copytree(Path(savant_ray.__file__).parent, tmp_path / "site/savant_ray")
    monkeypatch.setattr(workload, "ROOT", tmp_path / "site")
    (tmp_path / "text").mkdir()
    run_command([*train_command(SETTINGS), "--help"], tmp_path / "text")
    with pytest.raises(RuntimeError, match="no such setting"):
        run_command(train_command({"training.steps": 1}), tmp_path / "text")
