"""Preparing JSONL against parsing and tokenising it in bare processes, and its memory at growing sizes.

The bare way is what a script does without Ray: each core parses the lines of its slice with orjson and tokenises them
with `encode_batch_fast`; nothing is packed or written. Both ways take turns on the same cores, as the machine may have
other work. The text is the Python standard library's sources, over and over.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import statistics
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import psutil
import ray

from savant_ray.data.preparation import learn_tokenizer, prepare
from savant_ray.data.sources import expand
from savant_ray.data.tokenizer import Tokenizer

Figures = dict[str, dict[str, Any]]

GB, MIB = 10**9, 1 << 20
CORES = os.cpu_count() or 1
SLICE_BYTES = 16_000_000  # for each core, in each turn of the bare way
DOCUMENT_CHARACTERS = 3_000
SEQUENCE_LENGTH, VOCAB_SIZE = 1024, 32_000
TURNS_OF_SMALLEST = 3


def run(sizes_gb: Sequence[float] = (0.1, 1, 3), folder: str | None = None) -> Figures:
    """For each size: tokens per second against the bare way, and the largest process against that of the smallest size.

    `folder` (default: the system's temporary one) needs twice the largest size.
    """
    figures: Figures = {}
    smallest_peak = 0.0
    with _ray_session():
        for size in sorted(sizes_gb):
            with tempfile.TemporaryDirectory(dir=folder) as here:
                rates, peak = measure(Path(here), int(size * GB), TURNS_OF_SMALLEST if not figures else 1)
            smallest_peak = smallest_peak or peak
            figures[f"preparation_{size:g}_gb"] = rates
            figures[f"preparation_memory_{size:g}_gb"] = _figure(
                [peak / smallest_peak], f"largest process {peak:.0f} MiB"
            )
    return figures


def measure(folder: Path, size: int, turns: int) -> tuple[dict[str, Any], float]:
    """The figure for `size` bytes of text, and the peak of the largest process in MiB."""
    text = folder / "text.jsonl"
    _write_text(text, size)
    files = expand(str(text))
    sample = folder / "sample.jsonl"
    _write_text(sample, min(size, SLICE_BYTES))
    tokenizer = learn_tokenizer(expand(str(sample)), folder, VOCAB_SIZE)
    bare, prepared = [_bare_rate(sample, tokenizer)], []
    with _peak_of_largest_process() as peak:
        for turn in range(turns):
            started = time.perf_counter()
            manifest = prepare(files, tokenizer, SEQUENCE_LENGTH, folder / str(turn)).manifest
            prepared.append(manifest.tokens / (time.perf_counter() - started))
            bare.append(_bare_rate(sample, tokenizer))
    ratios = [rate / statistics.mean(bare[turn : turn + 2]) for turn, rate in enumerate(prepared)]
    detail = (
        f"{prepared[-1] / 1e6:.2f} M tokens/s, {size / manifest.tokens * prepared[-1] / 1e6:.2f} MB/s on {CORES} cores; "
        f"bare {statistics.mean(bare) / 1e6:.2f} M tokens/s; padding {manifest.padding / manifest.tokens:.3%}"
    )
    return _figure(ratios, detail), peak[0]


def _write_text(path: Path, size: int) -> None:
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in _documents()]
    with path.open("wb") as file:
        for line in itertools.cycle(lines):
            file.write(line)
            if file.tell() >= size:
                return


def _documents() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts:
            text = path.read_text(encoding="utf-8", errors="replace")
            parts = (text[i : i + DOCUMENT_CHARACTERS] for i in range(0, len(text), DOCUMENT_CHARACTERS))
            yield from filter(str.strip, parts)


def _bare_rate(sample: Path, tokenizer: Tokenizer) -> float:
    """Tokens per second of all cores at once, each with the sample for itself."""
    with multiprocessing.get_context("spawn").Pool(CORES) as pool:
        return sum(pool.starmap(_parse_and_encode, [(str(sample), tokenizer.to_json())] * CORES, chunksize=1))


def _parse_and_encode(sample: str, tokenizer_json: str) -> float:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_json(tokenizer_json)
    started = time.perf_counter()
    tokens = 0
    with open(sample, "rb") as file:
        while lines := file.readlines(MIB // 2):
            tokens += sum(map(len, tokenizer.encode_batch([orjson.loads(line)["text"] for line in lines])))
    return tokens / (time.perf_counter() - started)


@contextmanager
def _peak_of_largest_process() -> Iterator[list[float]]:
    """Watches the resident size of this process and of Ray's workers; the list holds the largest seen, in MiB."""
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            peak[0] = max(peak[0], *map(_resident_mib, _own_processes()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def _own_processes() -> list[psutil.Process]:
    this = psutil.Process()
    return [this, *(each for each in this.children(recursive=True))]


def _resident_mib(process: psutil.Process) -> float:
    try:
        return process.memory_info().rss / MIB if process.pid == os.getpid() or "ray::" in process.name() else 0.0
    except psutil.Error:  # it has just ended
        return 0.0


@contextmanager
def _ray_session() -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def _figure(ratios: Sequence[float], detail: str) -> dict[str, Any]:
    return {
        "ratio": round(statistics.median(ratios), 3),
        "rounds": len(ratios),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "detail": detail,
    }
