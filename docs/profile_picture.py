"""Draws `docs/profile.svg` for the guide on profiles: `python -m docs.profile_picture` takes three small steps on a CPU.

The picture shows the last step of the trace that `training.profile` wrote, as a trace viewer does: time to the right, and
below the parts of the step the operations within them.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from savant_ray.config import Config
from savant_ray.training.loop import train
from savant_ray.training.state import new_state
from savant_ray.training.step import MicroBatch
from tests.training.tiny import RecordingHost

PICTURE = Path(__file__).with_name("profile.svg")
SETTINGS: dict[str, dict[str, Any]] = {
    "model": {"vocab_size": 2000, "dim": 256, "n_heads": 4, "n_loops": 4, "max_seq_len": 256, "window_size": 64},
    "training": {
        "max_steps": 3, "batch_size": 2, "accumulation": 2, "precision": "fp32", "profile": {"first_step": 3},
    },
}  # fmt: skip
COLORS = {
    "data wait": "#8d99ae", "forward": "#2a6f97", "backward": "#c8553d", "all-reduce": "#6a994e", "update": "#8e6c8a",
}  # fmt: skip
OPERATIONS = ("#e9c46a", "#f4d58d", "#f8e3b0", "#fbf0d5")  # by how many others contain them
WIDTH, LEFT, ROW = 960, 8, 22  # pixels
MIN_WIDTH = 0.8  # pixels; shorter operations are left out


def main() -> None:
    """Take the steps and write the picture."""
    torch.set_num_threads(1)
    host, config = RecordingHost(), Config.from_dict(SETTINGS)
    train(new_state(config, torch.device("cpu")), config, batches(config), host)
    (trace,) = host.files.values()
    PICTURE.write_text(drawn(json.loads(gzip.decompress(trace))["traceEvents"]), encoding="utf-8")


def batches(config: Config) -> Iterator[list[MicroBatch]]:
    """Yield the micro-batches of each step: random tokens, each row one document."""
    shape = (config.training.batch_size, config.model.max_seq_len)
    for _ in range(config.training.max_steps):
        tokens = [torch.randint(3, config.model.vocab_size, shape) for _ in range(config.training.accumulation)]
        is_trained = torch.ones(shape, dtype=torch.bool)
        yield [MicroBatch(rows, torch.zeros_like(rows), is_trained, (0,) * len(rows)) for rows in tokens]


def drawn(events: Sequence[dict[str, Any]]) -> str:
    """Return the SVG of a trace of one step."""
    spans = [event for event in events if event.get("ph") == "X" and event.get("cat") in ("user_annotation", "cpu_op")]
    parts = sorted((span for span in spans if span["name"] in COLORS), key=lambda span: span["ts"])
    begin, end = parts[0]["ts"], max(span["ts"] + span["dur"] for span in parts)
    scale = (WIDTH - 2 * LEFT) / (end - begin)
    operations = [span for span in spans if span["cat"] == "cpu_op" and begin <= span["ts"] < end]
    shapes = [box(part, 0, COLORS[part["name"]], begin, scale) for part in parts]
    for operation, depth in nested(operations):
        if depth < len(OPERATIONS) and operation["dur"] * scale >= MIN_WIDTH:
            shapes.append(box(operation, depth + 1, OPERATIONS[depth], begin, scale))
    height = ROW * (len(OPERATIONS) + 3) + 8
    interval = next(ms for ms in (10, 20, 50, 100, 200, 500, 1000) if 1000 * ms * scale > WIDTH / 16 or ms == 1000)
    ticks = "".join(
        f'<text x="{LEFT + 1000 * ms * scale:.0f}" y="{height - ROW - 6}" fill="#444">{ms} ms</text>'
        for ms in range(0, int((end - begin) / 1000), interval)
        if 1000 * ms * scale < WIDTH - 60
    )
    legend = "".join(
        f'<rect x="{LEFT + 110 * n}" y="{height - 16}" width="10" height="10" fill="{color}"/>'
        f'<text x="{LEFT + 110 * n + 14}" y="{height - 7}" fill="#222">{name}</text>'
        for n, (name, color) in enumerate([*COLORS.items(), ("operations", OPERATIONS[0])])
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="11"><rect width="{WIDTH}" height="{height}" fill="#fff"/>{"".join(shapes)}{ticks}{legend}</svg>\n'
    )


def nested(operations: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each operation with the number of operations that contain it."""
    ends: list[float] = []
    for operation in sorted(operations, key=lambda span: (span["ts"], -span["dur"])):
        while ends and ends[-1] <= operation["ts"]:
            ends.pop()
        yield operation, len(ends)
        ends.append(operation["ts"] + operation["dur"])


def box(span: dict[str, Any], row: int, color: str, begin: float, scale: float) -> str:
    """Return the rectangle of a span, with its name where there is room for it."""
    x, width, y = LEFT + (span["ts"] - begin) * scale, max(1.0, span["dur"] * scale), 4 + row * ROW
    rectangle = f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 2}" fill="{color}"/>'
    if width < 7 * len(span["name"]):
        return rectangle
    return f'{rectangle}<text x="{x + 3:.1f}" y="{y + 14}" fill="{"#222" if row else "#fff"}">{span["name"]}</text>'


if __name__ == "__main__":
    main()
