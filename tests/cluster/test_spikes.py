"""A run with a document that makes a spike goes back to a checkpoint and leaves its sequences out."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from savant_ray.reporting.record import read_records
from savant_ray.training.spikes import WINDOW
from tests.cluster.conftest import Head, losses, records, run_job, write_text

pytestmark = [pytest.mark.slow, pytest.mark.rare]
STEPS = 235  # three epochs
STRANGE = 201  # line of the strange document
RUN: dict[str, Any] = {
    "training__max_steps": STEPS,
    "training__batch_size": 2,
    "training__accumulation": 1,
    "training__on_spike": "rewind",
    "checkpoint__every_steps": 50,
    "validation__every_steps": 25,
    "scaling__num_workers": 2,
    "scaling__resources_per_worker": "{CPU: 1}",
}


def with_a_strange_document(folder: Path) -> Path:
    """Write ordinary text with one document of random letters, which fills about one sequence."""
    path = folder / "dataset/savant_dataset_train.jsonl"
    write_text(path, 300, seed=1)
    write_text(folder / "dataset/savant_dataset_val.jsonl", 20, seed=2)
    lines = path.read_text().splitlines()
    letters = "".join(random.Random(3).choices("ÄÖÜäöüß§$%&{}[]=?QXYZ", k=64))
    lines.insert(STRANGE - 1, json.dumps({"text": letters}))
    path.write_text("".join(line + "\n" for line in lines))
    return folder


def test_a_run_goes_back_to_its_checkpoint_and_leaves_out_the_sequences_of_a_spike(head: Head, tmp_path: Path) -> None:
    run = with_a_strange_document(tmp_path) / "tiny"
    code, printed = run_job(head, tmp_path, **RUN)
    assert code == 0, printed
    (rewound,) = records(run, "rewind")
    spike = rewound["spike"]
    assert spike["step"] > WINDOW and rewound["step"] == (spike["step"] - 1) // 50 * 50
    assert f"savant_dataset_train.jsonl:{STRANGE}" in spike["documents"]
    assert f"step {spike['step']} is a spike" in printed and f"training goes back to step {rewound['step']}" in printed
    assert len(losses(run)) == STEPS and max(losses(run)[WINDOW:]) < spike["loss_limit"]
    moved = {line["step"]: line["weights_moved"] for line in records(run, "validation")}
    assert list(moved) == [*range(25, STEPS, 25), STEPS], "validations are repeated as well"
    assert min(moved.values()) > 0.9, "relative to the checkpoint, not to the validation that is repeated"
    saved = torch.load(run / f"step_{STEPS}/step_{STEPS}.pt", weights_only=True)["savant"]
    assert saved["left_out"] == [[spike["first_position"], 2]] == [[2 * (spike["step"] - 1), 2]]
    assert [line["step"] for line in records(run, "checkpoint")] == [50, 100, 150, 200, STEPS]
    for before, step in ((100, 150), (150, 200), (200, STEPS)):
        lines = [line for line in read_records(run / f"step_{step}/records.jsonl") if line["event"] == "step"]
        assert [line["step"] for line in lines] == list(range(before + 1, step + 1)), "each step once"
