"""Small files of the original in `fixtures/`, and their expected content.

`python -m tests.original.fixtures` rewrites them with `OriginalProgram`: with bf16 weights, in both layouts of 8-bit
moments, with PyTorch's AdamW, without a schedule, and after several resumes.
"""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from savant_ray.optim.schedule import learning_rate
from tests.original.program import LENGTH, VOCABULARY, AdamW8bit, OriginalProgram, adamw

FOLDER = Path(__file__).with_suffix("")
PEAK, WARMUP_STEPS, MAX_STEPS = 1e-2, 2, 20
KINDS = {  # optimizer, number of resumes
    "adamw8bit": (AdamW8bit, 0),
    "adamw8bit_flat": (functools.partial(AdamW8bit, nested=False), 0),
    "adamw8bit_without_schedule": (AdamW8bit, 0),
    "adamw8bit_resumed": (AdamW8bit, 3),
    "adamw": (adamw, 0),
    "adamw_resumed": (adamw, 2),
}


def rate(update: int) -> float:
    """Return the relative learning rate of an update, counted from 0."""
    return learning_rate(update, 1.0, WARMUP_STEPS, MAX_STEPS)


def batch(step: int) -> torch.Tensor:
    """Return [12, LENGTH] tokens, a function of the step."""
    return torch.randint(1, VOCABULARY, (12, LENGTH), generator=torch.Generator().manual_seed(step))


def file_of(kind: str) -> Path:
    """Return the path of the file of this kind."""
    (path,) = (FOLDER / kind).glob("step_*.pt")
    return path


def expected() -> dict[str, Any]:
    """Return by kind: step, updates done, relative rate of the next one, logits, and sums over the moments."""
    content: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())
    return content


def write() -> None:
    held = {}
    for kind, (optimizer, resumes) in KINDS.items():
        program = OriginalProgram(PEAK, rate, optimizer, torch.bfloat16)
        for update in range(3):
            program.train(batch(update))
        for resume in range(resumes):
            with tempfile.TemporaryDirectory() as folder:
                program.load(program.save(Path(folder)))
            for update in range(2):
                program.train(batch(10 * resume + update))
        (FOLDER / kind).mkdir(parents=True, exist_ok=True)
        content = program.content()
        if kind.endswith("without_schedule"):
            del content["scheduler_state_dict"]
        torch.save(content, FOLDER / kind / f"step_{program.step}.pt")
        held[kind] = {
            "step": program.step,
            "updates": program.scheduler.last_epoch,
            "rate": program.scheduler.get_last_lr()[0],
            "logits": copy.deepcopy(program.model).float()(batch(0)[:1])[0, -1].tolist(),
            "moments": {name: _sums(entry) for name, entry in program.moments().items()},
        }
    (FOLDER / "expected.json").write_text(json.dumps(held, indent=1) + "\n")


def _sums(entry: dict[str, torch.Tensor]) -> dict[str, float]:
    first, second = (entry[name].double() for name in ("exp_avg", "exp_avg_sq"))
    return {"norm": first.norm().item(), "sum": first.sum().item(), "square_sum": second.sum().item()}


if __name__ == "__main__":
    write()
