"""`data.mix_by: documents`, from files on disk to the sequences that a worker reads."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from savant_ray.config import Config
from savant_ray.data.stream import StreamPlan
from savant_ray.data.tokenizer import Tokenizer, train_tokenizer
from savant_ray.driver.data_files import find_data_files
from savant_ray.driver.data_preparation import prepare_data
from savant_ray.errors import SettingsError
from savant_ray.reporting import RunReport
from tests.data.conftest import real_ray

__all__ = ["real_ray"]

SEQUENCE_LENGTH = 32
# One document of 31 characters and an end token fills a sequence, four of 7 do, and one of 127 fills four.
SIZES = {"stories": (127, 10), "tales": (31, 40), "logic": (7, 160)}  # characters, documents: each 40 sequences


def settings(folder: Path, weights: Sequence[float], **data: Any) -> Config:
    sources = [
        {"path": str(folder / f"{name}.jsonl"), "weight": weight} for name, weight in zip(SIZES, weights, strict=False)
    ]
    own = {"sources": sources, "validation": str(folder / "val.jsonl"), "cache_dir": str(folder / "cache")}
    return Config.from_dict({"model": {"max_seq_len": SEQUENCE_LENGTH, "vocab_size": 258}, "data": own | data})


def plan_of(config: Config, tokenizer: Tokenizer) -> tuple[StreamPlan, str]:
    with RunReport(None) as report:
        data = prepare_data(config, find_data_files(config, report), report, tokenizer)
    return data.plan, data.fingerprint


@pytest.mark.slow
@pytest.mark.rare
def test_weights_are_fractions_of_the_documents(
    real_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (characters, documents) in {**SIZES, "val": (31, 4)}.items():
        texts = [f"{i:03d}{name}".ljust(characters, ".")[:characters] for i in range(documents)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_tokenizer(iter(()), vocab_size=258)
    plan, fingerprint = plan_of(settings(tmp_path, [0.4, 0.4, 0.2], mix_by="documents"), tokenizer)
    assert plan.sizes == (40, 40, 40), "the test is worth nothing otherwise"
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "stories.jsonl 40.00% of the documents, 78.05% of the sequences; tales.jsonl 40.00%" in printed

    epochs = 40 * 41  # after which all three sources have been read whole times
    read = Counter(document for position in range(epochs) for document in set(plan.documents(position)))
    documents: Counter[str] = Counter()
    for (file, _), pieces in read.items():
        documents[file] += pieces // 4 if file == "stories.jsonl" else pieces
    assert documents["stories.jsonl"] == documents["tales.jsonl"] == 2 * documents["logic.jsonl"] > 0

    by_sequences, other = plan_of(settings(tmp_path, [0.4, 0.4, 0.2]), tokenizer)
    assert fingerprint != other and "mixed by documents" not in capsys.readouterr().out
    counts = np.bincount(by_sequences.locate(np.arange(100))[0])
    assert counts.tolist() == [40, 40, 20]

    rare = settings(tmp_path, [1, 1, 1e-4], mix_by="documents")
    with pytest.raises(SettingsError, match=r"weight 0\.0001 of logic\.jsonl .* 1 sequence in 100,000 \(160 documents"):
        plan_of(rare, tokenizer)
    few = settings(tmp_path, [5e-6, 1, 1], mix_by="documents")
    assert plan_of(few, tokenizer)[0].locate(np.arange(100_000))[0].min() == 0, (
        "1 document in 400,000, 1.6 sequences in 100,000"
    )
