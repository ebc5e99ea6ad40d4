"""Data preparation against plain processes that only parse and tokenize, and its memory for growing text sizes.

The plain processes do what a script without Ray would do: one process per core parses lines with orjson and tokenizes them
with `encode_batch_fast`; nothing is packed or written. Both alternate on the same cores, because other programs may use them
too. The text is the Python standard library's source code, repeated.
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

from savant_ray.benchmarks.registry import Figures, figure, log_progress
from savant_ray.data.cache_builder import prepare, train_or_load_tokenizer
from savant_ray.data.sources import expand
from savant_ray.data.token_cache import Manifest
from savant_ray.data.tokenizer import Tokenizer

GB, MIB = 10**9, 1 << 20
CORES = os.cpu_count() or 1
RAY_NICENESS = 15  # of Ray's workers; the plain processes use the same priority
SAMPLE_BYTES = 16_000_000  # of text that each plain process tokenizes in a measurement
DOCUMENT_CHARACTERS = 3_000
SEQUENCE_LENGTH, VOCAB_SIZE = 1024, 32_000
ROUNDS_OF_SMALLEST = 3


@dataclass(frozen=True)
class Rate:
    """Tokens per second."""

    clock: float  # per second of wall-clock time, on all cores together
    core: float  # per second of CPU time


def run(sizes_gb: Sequence[float] = (0.1, 1, 3), folder: str | None = None) -> Figures:
    """Measure for each size both rates relative to the plain processes, and the memory of the largest process.

    Memory is relative to that of the smallest size. `folder` (default: the system's temporary folder) needs room for twice
    the largest size.
    """
    figures: Figures = {}
    smallest_peak = 0.0
    with _ray_with_all_cores():
        for size in sorted(sizes_gb):
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                rates, peak = measure(Path(temporary), int(size * GB), 1 if figures else ROUNDS_OF_SMALLEST)
            smallest_peak = smallest_peak or peak
            memory = figure([peak / smallest_peak], f"largest process {peak:.0f} MiB")
            size_figures = {
                f"preparation_{name}_{size:g}_gb": measured for name, measured in (rates | {"memory": memory}).items()
            }
            _log_figures(size_figures)
            figures |= size_figures
    return figures


def _log_figures(figures: Figures) -> None:
    """Print the figures of a size when it is done, because each size takes minutes."""
    for name, measured in figures.items():
        log_progress(f"{name}: {measured['ratio']:.2f} · {measured['detail']}")


def measure(folder: Path, size: int, rounds: int) -> tuple[Figures, float]:
    """Return the figures `clock` and `core` for `size` bytes of text, and the peak of the largest process in MiB."""
    text, sample = folder / "text.jsonl", folder / "sample.jsonl"
    _write_jsonl(text, size)
    _write_jsonl(sample, SAMPLE_BYTES)
    tokenizer = train_or_load_tokenizer(expand(str(sample)), folder, VOCAB_SIZE)
    plain, prepared = [_plain_rate(sample, tokenizer)], []
    with _peak_of_largest_process() as peak:
        for number in range(rounds):
            prepared.append(_prepared_rate(text, tokenizer, folder / str(number)))
            plain.append(_plain_rate(sample, tokenizer))
    rates, manifest = [rate for rate, _ in prepared], prepared[-1][1]
    padding = f"padding {manifest.padding / (manifest.tokens + manifest.padding):.3%}"
    figures = {}
    for key in ("clock", "core"):
        speeds = _describe_speeds(rates, plain, key, size / manifest.tokens)
        figures[key] = figure(_ratios(rates, plain, key), f"{speeds}; {padding}")
    return figures, peak[0]


def _ratios(prepared: Sequence[Rate], plain: Sequence[Rate], key: str) -> list[float]:
    """Return each preparation's rate relative to the mean of the plain measurements before and after it."""
    plain_means = [statistics.mean(getattr(rate, key) for rate in plain[n : n + 2]) for n in range(len(prepared))]
    return [getattr(rate, key) / mean for rate, mean in zip(prepared, plain_means, strict=True)]


def _describe_speeds(prepared: Sequence[Rate], plain: Sequence[Rate], key: str, bytes_per_token: float) -> str:
    medians = (statistics.median(getattr(rate, key) for rate in rates) / 1e6 for rates in (prepared, plain))
    prepared_rate, plain_rate = medians
    return (
        f"{prepared_rate:.2f} M tokens/s = {prepared_rate * bytes_per_token:.2f} MB/s, plain {plain_rate:.2f} M tokens/s, "
        f"{CORES} cores"
    )


def _prepared_rate(text: Path, tokenizer: Tokenizer, cache_dir: Path) -> tuple[Rate, Manifest]:
    files = expand(str(text))
    cpu_before, started = _cpu_seconds(), time.perf_counter()
    manifest = prepare(files, tokenizer, SEQUENCE_LENGTH, cache_dir).manifest
    seconds, cpu_seconds = time.perf_counter() - started, _cpu_seconds() - cpu_before
    return Rate(manifest.tokens / seconds, manifest.tokens / cpu_seconds), manifest


def _write_jsonl(path: Path, size: int) -> None:
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


def _plain_rate(sample: Path, tokenizer: Tokenizer) -> Rate:
    """Measure plain processes on all cores, each with the whole sample."""
    with multiprocessing.get_context("spawn").Pool(CORES) as pool:
        rates = pool.starmap(_parse_and_encode, [(str(sample), tokenizer.to_json())] * CORES, chunksize=1)
    return Rate(sum(rate.clock for rate in rates), statistics.mean(rate.core for rate in rates))


def _parse_and_encode(sample: str, tokenizer_json: str) -> Rate:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.nice(RAY_NICENESS)
    tokenizer = Tokenizer.from_json(tokenizer_json)
    cpu_before, started = time.process_time(), time.perf_counter()
    tokens = 0
    with Path(sample).open("rb") as file:
        while lines := file.readlines(MIB // 4):
            tokens += sum(map(len, tokenizer.encode_batch([orjson.loads(line)["text"] for line in lines])))
    return Rate(tokens / (time.perf_counter() - started), tokens / (time.process_time() - cpu_before))


def _cpu_seconds() -> float:
    """Return the CPU time of this process, Ray and its workers."""
    return sum(_zero_if_ended(lambda process: sum(process.cpu_times()[:2]), process) for process in _own_processes())


@contextmanager
def _peak_of_largest_process() -> Iterator[list[float]]:
    """Sample the resident size of this process and of Ray's workers; yield a list with the largest so far, in MiB."""
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(1):
            peak[0] = max(peak[0], *(_zero_if_ended(_resident_mib, process) for process in _own_processes()))

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


def _zero_if_ended(read: Callable[[psutil.Process], float], process: psutil.Process) -> float:
    try:
        return read(process)
    except psutil.Error:
        return 0.0


@contextmanager
def _ray_with_all_cores() -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()
