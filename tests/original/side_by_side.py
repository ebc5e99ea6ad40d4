"""Comparison of the original with savant_ray, update by update: from the same weights, on the same batches.

`python -m tests.original.side_by_side` prints the tables of docs/from_the_original.md. The original is its stand-in
(`program.py`). Batches are padded and weights are fp32, so that both programs compute the same.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from savant_ray.config import Config
from savant_ray.events import Event, StepDone
from savant_ray.original.conversion import to_checkpoint
from savant_ray.original.file import read_file
from savant_ray.training.loop import train
from savant_ray.training.state import TrainingState, new_state
from savant_ray.training.step import MicroBatch
from tests.original.fixtures import MAX_STEPS, PEAK, WARMUP_STEPS, rate
from tests.original.program import EVERY, LENGTH, TINY, VOCABULARY, AdamW8bit, OriginalProgram, Shape, adamw
from tests.training.tiny import CPU, RecordingHost, unmasked

ROWS = 12  # documents in a batch
UPDATES = 8
OptimizerOf = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]


@dataclass(frozen=True)
class Figures:
    """Figures of one update: the loss before it (nats per token), its learning rate, the norms of the moments after it."""

    loss: float
    rate: float
    first_moment: float  # of all parameters together
    second_moment: float


@dataclass(frozen=True)
class Update:
    """One update of both programs, counted from 1 since the start of the run."""

    number: int
    original: Figures
    savant: Figures


def padded_batch(step: int) -> Tensor:
    """Return [ROWS, LENGTH] tokens of documents of unequal length, padded with 0; a function of the step."""
    generator = torch.Generator().manual_seed(1_000 + step)
    tokens = torch.randint(1, VOCABULARY, (ROWS, LENGTH), generator=generator)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (ROWS, 1), generator=generator)
    return tokens.where(torch.arange(LENGTH) < lengths, 0)


def as_documents(batch: Tensor) -> MicroBatch:
    """Return the same rows for savant_ray: each is one document, and padding belongs to none."""
    return unmasked(batch, torch.where(batch == 0, -1, 0), tuple(range(len(batch))))


def settings(shape: Shape = TINY, **training: object) -> Config:
    """Return the settings with which savant_ray trains the stand-in's model in the same way."""
    own = {
        "max_steps": MAX_STEPS,
        "warmup_fraction": WARMUP_STEPS / MAX_STEPS,
        "learning_rate": PEAK,
        "batch_size": ROWS,
        "accumulation": 1,
        "precision": "fp32",
        "compile": False,
    }
    return Config.from_dict({"model": {**asdict(shape), "global_every": EVERY}, "training": own | training})


class _Observer(RecordingHost):
    """Records the figures of each step."""

    def __init__(self, state: TrainingState) -> None:
        super().__init__()
        self.state, self.figures = state, list[Figures]()

    def emit(self, event: Event) -> None:
        super().emit(event)
        if isinstance(event, StepDone):
            moments = self.state.optimizer.state.values()
            norms = (_norm(entry[name] for entry in moments) for name in ("exp_avg", "exp_avg_sq"))
            self.figures.append(Figures(event.train_loss, event.learning_rate, *norms))


def fresh(schedule: Callable[[int], float] = rate) -> list[Update]:
    """Start both with the same weights and without moments; `schedule` is the original's, a function of updates done."""
    program, state = OriginalProgram(PEAK, schedule), new_state(settings(), CPU)
    state.load_weights({name: p.detach().clone() for name, p in program.model.named_parameters()})
    return side_by_side(program, state, first=0)


def taken_over(optimizer: OptimizerOf, updates_before: int = 4) -> list[Update]:
    """Train with the original and write a file; then continue both the original and, from the file, savant_ray."""
    program, state = OriginalProgram(PEAK, rate, optimizer), new_state(settings(), CPU)
    for update in range(updates_before):
        program.train(padded_batch(update))
    with tempfile.TemporaryDirectory() as folder:
        names = [name for name, _ in state.model.named_parameters()]
        notes = state.load_checkpoint(to_checkpoint(read_file(program.save(Path(folder))), names, ROWS))
    if notes:
        raise RuntimeError(f"not everything was taken over: {notes}")
    return side_by_side(program, state, first=updates_before)


def side_by_side(program: OriginalProgram, state: TrainingState, first: int) -> list[Update]:
    """Return the next `UPDATES` updates of both, on the batches of updates from `first` (counted from 0)."""
    batches = [padded_batch(first + update) for update in range(UPDATES)]
    observer = _Observer(state)
    train(state, settings(), ([as_documents(batch)] for batch in batches), observer)
    original_figures = [_figures(program, batch) for batch in batches]
    return [
        Update(first + number, original, savant)
        for number, (original, savant) in enumerate(zip(original_figures, observer.figures, strict=True), start=1)
    ]


def _figures(program: OriginalProgram, batch: Tensor) -> Figures:
    learning_rate = program.optimizer.param_groups[0]["lr"]
    loss = program.train(batch)
    moments = program.moments().values()
    return Figures(
        loss, learning_rate, *(_norm(entry[name] for entry in moments) for name in ("exp_avg", "exp_avg_sq"))
    )


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


def table(updates: list[Update]) -> Iterator[str]:
    """Yield the lines of a Markdown table with a row for each update."""
    names = ("loss", "rate", "first moment", "second moment")
    yield f"| update | {' | '.join(f'{name}, original | savant_ray' for name in names)} |"
    yield "|---" * 9 + "|"
    for update in updates:
        pairs = zip(asdict(update.original).values(), asdict(update.savant).values(), strict=True)
        formats = ("{:.6f}", "{:.3e}", "{:.6f}", "{:.4e}")
        cells = [form.format(value) for form, pair in zip(formats, pairs, strict=True) for value in pair]
        yield f"| {update.number} | {' | '.join(cells)} |"


def main() -> None:
    """Print the tables."""
    runs = {
        "Fresh runs": fresh(),
        "Taken over from a file with AdamW": taken_over(adamw),
        "Taken over from a file with AdamW8bit": taken_over(AdamW8bit),
    }
    for title, updates in runs.items():
        print(f"\n{title}\n", *table(updates), sep="\n")


if __name__ == "__main__":
    main()
