"""Preparing JSONL against parsing and tokenising it in bare processes, and its memory at growing sizes.

The bare way is what a script does without Ray: each core parses the lines of its slice with orjson and tokenises them
with `encode_batch_fast`; nothing is packed or written. Both ways take turns on the same cores, as the machine may have
other work. The text is the Python standard library's sources, over and over.
"""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import os
import statistics
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson
import psutil
import ray

from savant_ray.benchmarks.rounds import Figures, figure, tell
from savant_ray.data.preparation import learn_tokenizer, prepare
from savant_ray.data.sources import expand
from savant_ray.data.token_cache import Manifest
from savant_ray.data.tokenizer import Tokenizer

GB, MIB = 10**9, 1 << 20
CORES = os.cpu_count() or 1
RAY_NICENESS = 15  # of Ray's workers; the bare processes must wait for other work as they do
SLICE_BYTES = 16_000_000  # for each core, in each turn of the bare way
DOCUMENT_CHARACTERS = 3_000
SEQUENCE_LENGTH, VOCAB_SIZE = 1024, 32_000
TURNS_OF_SMALLEST = 3


@dataclass(frozen=True)
class Rate:
    """Tokens per second of the clock, all cores together, and per second of one core's work."""

    clock: float
    core: float


def run(sizes_gb: Sequence[float] = (0.1, 1, 3), folder: str | None = None) -> Figures:
    """For each size: both rates against the bare way, and the largest process against that of the smallest size.

    `folder` (default: the system's temporary one) needs twice the largest size.
    """
    figures: Figures = {}
    smallest_peak = 0.0
    with _ray_session():
        for size in sorted(sizes_gb):
            with tempfile.TemporaryDirectory(dir=folder) as here:
                rates, peak = measure(Path(here), int(size * GB), 1 if figures else TURNS_OF_SMALLEST)
            smallest_peak = smallest_peak or peak
            memory = figure([peak / smallest_peak], f"largest process {peak:.0f} MiB")
            of_size = {f"preparation_{name}_{size:g}_gb": each for name, each in (rates | {"memory": memory}).items()}
            _tell(of_size)
            figures |= of_size
    return figures


def _tell(figures: Figures) -> None:
    """A size takes minutes, so each is told when it is through."""
    for name, of_size in figures.items():
        tell(f"{name}: {of_size['ratio']:.2f} · {of_size['detail']}")


def measure(folder: Path, size: int, turns: int) -> tuple[Figures, float]:
    """The figures `clock` and `core` for `size` bytes of text, and the peak of the largest process in MiB."""
    text, sample = folder / "text.jsonl", folder / "sample.jsonl"
    _write_text(text, size)
    _write_text(sample, SLICE_BYTES)
    tokenizer = learn_tokenizer(expand(str(sample)), folder, VOCAB_SIZE)
    bare, turned = [_bare_rate(sample, tokenizer)], []
    with _peak_of_largest_process() as peak:
        for turn in range(turns):
            turned.append(_prepared_rate(text, tokenizer, folder / str(turn)))
            bare.append(_bare_rate(sample, tokenizer))
    prepared, manifest = [rate for rate, _ in turned], turned[-1][1]
    padding = f"padding {manifest.padding / (manifest.tokens + manifest.padding):.3%}"
    figures = {}
    for key in ("clock", "core"):
        words = _in_words(prepared, bare, key, size / manifest.tokens)
        figures[key] = figure(_ratios(prepared, bare, key), f"{words}; {padding}")
    return figures, peak[0]


def _ratios(prepared: Sequence[Rate], bare: Sequence[Rate], key: str) -> list[float]:
    """Each preparation against the mean of the bare turns before and after it."""
    around = [statistics.mean(getattr(rate, key) for rate in bare[turn : turn + 2]) for turn in range(len(prepared))]
    return [getattr(rate, key) / other for rate, other in zip(prepared, around, strict=True)]


def _in_words(prepared: Sequence[Rate], bare: Sequence[Rate], key: str, bytes_per_token: float) -> str:
    mine, other = (statistics.median(getattr(rate, key) for rate in rates) / 1e6 for rates in (prepared, bare))
    return f"{mine:.2f} M tokens/s = {mine * bytes_per_token:.2f} MB/s, bare {other:.2f} M tokens/s, {CORES} cores"


def _prepared_rate(text: Path, tokenizer: Tokenizer, cache_dir: Path) -> tuple[Rate, Manifest]:
    files = expand(str(text))
    worked, started = _core_seconds(), time.perf_counter()
    manifest = prepare(files, tokenizer, SEQUENCE_LENGTH, cache_dir).manifest
    seconds, worked = time.perf_counter() - started, _core_seconds() - worked
    return Rate(manifest.tokens / seconds, manifest.tokens / worked), manifest


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


def _bare_rate(sample: Path, tokenizer: Tokenizer) -> Rate:
    """All cores at once, each with the sample for itself."""
    with multiprocessing.get_context("spawn").Pool(CORES) as pool:
        rates = pool.starmap(_parse_and_encode, [(str(sample), tokenizer.to_json())] * CORES, chunksize=1)
    return Rate(sum(rate.clock for rate in rates), statistics.mean(rate.core for rate in rates))


def _parse_and_encode(sample: str, tokenizer_json: str) -> Rate:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.nice(RAY_NICENESS)
    tokenizer = Tokenizer.from_json(tokenizer_json)
    worked, started = time.process_time(), time.perf_counter()
    tokens = 0
    with Path(sample).open("rb") as file:
        while lines := file.readlines(MIB // 4):
            tokens += sum(map(len, tokenizer.encode_batch([orjson.loads(line)["text"] for line in lines])))
    return Rate(tokens / (time.perf_counter() - started), tokens / (time.process_time() - worked))


def _core_seconds() -> float:
    """What this process, Ray and its workers have worked."""
    return sum(_unless_ended(lambda each: sum(each.cpu_times()[:2]), each) for each in _own_processes())


@contextmanager
def _peak_of_largest_process() -> Iterator[list[float]]:
    """Watches the resident size of this process and of Ray's workers; the list holds the largest seen, in MiB."""
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(1):
            peak[0] = max(peak[0], *(_unless_ended(_resident_mib, each) for each in _own_processes()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def _own_processes() -> list[psutil.Process]:
    this = psutil.Process()
    return [this, *this.children(recursive=True)]


def _resident_mib(process: psutil.Process) -> float:
    is_ours = process.pid == os.getpid() or process.name().startswith("ray::")
    return process.memory_info().rss / MIB if is_ours else 0.0


def _unless_ended(ask: Callable[[psutil.Process], float], process: psutil.Process) -> float:
    try:
        return ask(process)
    except psutil.Error:
        return 0.0


@contextmanager
def _ray_session() -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()
