"""JSONL files → a token cache: the Ray Data job that tokenises and packs once.

Every byte range of the files is a task that writes a shard and then, renamed last, what it found. A killed
preparation therefore goes on with the ranges that are missing, and the folder gets its name when all are there.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import os
import shutil
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import ray.data

from savant_ray.data import ray_data
from savant_ray.data.content import content_hashes, fingerprint, refuse_changed, write_aside
from savant_ray.data.jsonl import MAX_LINE_BYTES, ByteRange, documents, plan_ranges
from savant_ray.data.shard_writer import NAMED_BAD_LINES, RangeSummary, Recipe, shard_name, tokenizer_of, write_shard
from savant_ray.data.sources import SourceFile
from savant_ray.data.token_cache import (
    MANIFEST,
    BadLine,
    FileSummary,
    Manifest,
    ShardInfo,
    TokenCache,
    bad_line_report,
    damaged_shards,
)
from savant_ray.data.tokenizer import Tokenizer, train_tokenizer
from savant_ray.errors import DataError, UnexpectedError, describe
from savant_ray.locations import absolute_path

FORMAT_VERSION = 1
PROGRESS_BYTES = 2 << 20  # between two signs of life of a task
NAMED_EMPTY_FILES = 5
TITLE_BYTES = 200  # a name has 255 at most, and a fingerprint and ".unfinished" follow
TRAINING_CHARACTERS = 128 << 20  # a tokenizer learns little from more

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def prepare(
    files: Sequence[SourceFile],
    tokenizer: Tokenizer,
    sequence_length: int,
    cache_dir: str | Path,
    on_bad_line: Literal["skip", "error"] = "skip",
    max_line_bytes: int = MAX_LINE_BYTES,
    range_bytes: int | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> TokenCache:
    """The token cache of `files` below `cache_dir`, made if it is not there. Ray must be initialised to make it.

    A task reads `range_bytes` of a file (default: see `plan_ranges`). Of a cache that is damaged only the damaged shards
    are made again; `say` gets a sentence for each.

    Raises:
        DataError: a file cannot be read or yields nothing, or a line is bad and `on_bad_line` is "error".
    """
    cache_dir = Path(absolute_path(str(cache_dir), setting="data.cache_dir"))
    recipe = Recipe.of(tokenizer, sequence_length, max_line_bytes)
    hashes = content_hashes(files, cache_dir)
    identity = {
        "version": FORMAT_VERSION,
        "files": list(zip(_names(files), hashes, strict=True)),
        "recipe": [tokenizer.fingerprint, sequence_length, max_line_bytes, range_bytes],
    }
    job = _Job(plan_ranges(files, range_bytes), files, hashes, recipe, fingerprint(identity), cache_dir)
    progress = progress or (lambda done, total: None)
    _make_once(job.folder, partial(job.is_whole, progress), partial(job.run, progress, say))
    cache = TokenCache.open(job.folder)
    if on_bad_line == "error" and cache.manifest.bad_lines:
        raise DataError("\n".join(bad_line_report(cache.manifest, verdict="refused")))
    return cache


def learn_tokenizer(files: Sequence[SourceFile], cache_dir: str | Path, vocab_size: int = 32_000) -> Tokenizer:
    """A tokenizer learnt from the files (from 128 M characters, where there are more), kept below `cache_dir`.

    Raises:
        DataError: a file cannot be read.
    """
    cache_dir = Path(absolute_path(str(cache_dir), setting="data.cache_dir"))
    hashes = content_hashes(files, cache_dir)
    identity = {"version": FORMAT_VERSION, "files": hashes, "vocab_size": vocab_size}
    path = cache_dir / f"tokenizer-{fingerprint(identity)[:16]}.json"

    def learn() -> None:
        content = train_tokenizer(_texts_to_learn_from(files), vocab_size).to_json()
        refuse_changed(files, hashes)
        write_aside(_with_checksum(path, content), content)

    _make_once(path, lambda: _read_learnt(path) is not None, learn)
    learnt = _read_learnt(path)
    if learnt is None:
        raise DataError(f"{path.parent}: the tokenizer that was just written there cannot be read back")
    learnt.name = "the tokenizer learnt from the training text"
    return learnt


def _read_learnt(path: Path) -> Tokenizer | None:
    """Return the tokenizer that was learnt and is kept as `path`, whose checksum is in its name; None if it is damaged."""
    for kept in [*path.parent.glob(f"{path.stem}-*.json"), path]:  # the last: of versions without checksums
        try:
            content = kept.read_text(encoding="utf-8")
            if kept in (path, _with_checksum(path, content)):
                return Tokenizer.load(kept)
        except (OSError, ValueError, DataError):
            continue
    return None


def _with_checksum(path: Path, content: str) -> Path:
    return path.with_stem(f"{path.stem}-{hashlib.sha256(content.encode()).hexdigest()[:16]}")


class _Job:
    """One preparation: its ranges, and the folder where it grows until it gets its name."""

    def __init__(
        self,
        ranges: Sequence[ByteRange],
        files: Sequence[SourceFile],
        hashes: Sequence[str],
        recipe: Recipe,
        identity: str,
        cache_dir: Path,
    ) -> None:
        self._files = files
        self._hashes = hashes
        self._ranges = ranges
        self._recipe = recipe
        self._identity = identity
        self.folder = cache_dir / f"{_title(files)}-{identity[:16]}"
        self._unfinished = self.folder.with_suffix(".unfinished")
        self._damage: list[str] = []

    def is_whole(self, progress: Progress) -> bool:
        """Whether the folder is there and holds what was written; notes in `_damage` what does not."""
        self._damage = []
        if not self.folder.exists():
            return False
        try:
            manifest = Manifest.from_json((self.folder / MANIFEST).read_text())
            if manifest.fingerprint != self._identity:
                raise ValueError("it is of another cache")
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._damage = [f"{self.folder / MANIFEST}: cannot be used ({error})"]
        else:
            self._damage = damaged_shards(self.folder, manifest, progress)
        return not self._damage

    def run(self, progress: Progress, say: Callable[[str], None]) -> None:
        """Makes the missing shards, then the manifest, then the folder's name; `say` gets what was damaged.

        Raises:
            DataError: a file cannot be read or was changed meanwhile, or all files yield nothing.
        """
        for problem in self._damage:
            say(f"{problem}; made again")
        folder = self.folder if self.folder.exists() else self._unfinished
        folder.mkdir(parents=True, exist_ok=True)
        self._write_missing(folder, progress)
        self._refuse_changed(folder)
        manifest = _sum_up(
            self._files,
            self._ranges,
            [RangeSummary.read(folder, index) for index in range(len(self._ranges))],
            fingerprint=self._identity,
            sequence_length=self._recipe.sequence_length,
        )
        _refuse_empty(manifest)
        _refuse_dropped(manifest, self._recipe)
        for left_behind in folder.glob("*.tmp"):
            left_behind.unlink(missing_ok=True)
        write_aside(folder / MANIFEST, manifest.to_json())
        if folder != self.folder:
            folder.rename(self.folder)

    def _refuse_changed(self, folder: Path) -> None:
        try:
            refuse_changed(self._files, self._hashes)
        except DataError:
            shutil.rmtree(folder)  # it may hold what the new content is, under the name of the old
            raise

    def _write_missing(self, folder: Path, progress: Progress) -> None:
        """Run one Ray Data task per range, which yields the bytes it has done, or what is wrong.

        Raises:
            DataError: a file cannot be read or written.
            UnexpectedError: anything else that a task raised, with its traceback.
        """
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            complete = list(threads.map(partial(RangeSummary.is_complete, folder), range(len(self._ranges))))
        missing = [index for index, is_complete in enumerate(complete) if not is_complete]
        total = sum(file.size for file in self._files)
        done = total - sum(_stored_bytes(self._ranges[index]) for index in missing)
        progress(done, total)
        for row in self._run_tasks(folder, missing):
            if error := row["error"].as_py():
                details = row["traceback"].as_py()
                raise UnexpectedError(error, details) if details else DataError(error)
            done = min(done + row["bytes"].as_py(), total)  # Ray repeats a task whose worker died
            progress(done, total)

    def _run_tasks(self, folder: Path, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
        if not indices:
            return iter(())
        items = [{"index": index, **_as_row(self._ranges[index])} for index in indices]
        with ray_data.settings():
            ranges = ray.data.from_items(items, override_num_blocks=len(items))
            written = ranges.flat_map(_WriteShard(folder, self._recipe), num_cpus=1)
        return ray_data.rows(written)


@dataclass(frozen=True)
class _WriteShard:
    """The task: a row that names a range → rows that tell the bytes done since the row before, or an error."""

    folder: Path
    recipe: Recipe

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        index, told, now = row.pop("index"), 0, 0
        path = row["path"]
        try:
            for now in write_shard(self.folder, index, _from_row(row), self.recipe):
                if now - told >= PROGRESS_BYTES:
                    yield _task_row(now - told)
                    told = now
            yield _task_row(now - told)
        except DataError as error:
            yield _task_row(0, str(error))
        except OSError as error:
            yield _task_row(0, f"{self.folder}: cannot be written ({error})")
        except (GeneratorExit, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the tokenizers' Rust code is no Exception
            yield _task_row(0, describe(error, f"tokenising {path}"), traceback.format_exc())


def _task_row(n_bytes: int, error: str = "", details: str = "") -> dict[str, Any]:
    return {"bytes": n_bytes, "error": error, "traceback": details}


def _as_row(part: ByteRange) -> dict[str, Any]:
    return {**dataclasses.asdict(part.file), "start": part.start, "stop": part.stop}


def _from_row(row: dict[str, Any]) -> ByteRange:
    start, stop = row.pop("start"), row.pop("stop")
    return ByteRange(SourceFile(**row), start, stop)


def _sum_up(
    files: Sequence[SourceFile], ranges: Sequence[ByteRange], summaries: Sequence[RangeSummary], **identity: Any
) -> Manifest:
    """What all ranges yielded together; line numbers now count from the start of the file."""
    names = dict(zip([file.path for file in files], _names(files), strict=True))
    origins = [names[part.file.path] for part in ranges]
    lines, documents, bad = (_per_file(origins, summaries, key) for key in ("lines", "documents", "bad_lines"))
    before = _lines_before(origins, summaries)
    parts = list(zip(origins, before, summaries, strict=True))
    dropped = (BadLine(name, first + x[0], x[1]) for name, first, each in parts if (x := each.first_dropped))
    named = [BadLine(name, first + line, why) for name, first, each in parts for line, why in each.first_bad_lines]
    return Manifest(
        files=tuple(FileSummary(name, lines[name], documents[name], bad[name]) for name in names.values()),
        shards=tuple(
            ShardInfo(shard_name(index), each.shard_bytes, each.rows, name, first, each.shard_crc32)
            for index, (name, first, each) in enumerate(parts)
            if each.rows
        ),
        rows=sum(each.rows for each in summaries),
        documents=documents.total(),
        tokens=sum(each.tokens for each in summaries),
        target_tokens=sum(each.tokens - each.pieces for each in summaries),
        text_bytes=sum(each.text_bytes for each in summaries),
        bad_lines=bad.total(),
        first_bad_lines=tuple(named[:NAMED_BAD_LINES]),
        characters=sum(each.characters for each in summaries),
        dropped_characters=sum(each.dropped_characters for each in summaries),
        first_dropped=next(dropped, None),
        **identity,
    )


def _per_file(origins: Sequence[str], summaries: Sequence[RangeSummary], key: str) -> Counter[str]:
    totals: Counter[str] = Counter()
    for origin, summary in zip(origins, summaries, strict=True):
        totals[origin] += getattr(summary, key)
    return totals


def _lines_before(origins: Sequence[str], summaries: Sequence[RangeSummary]) -> list[int]:
    """How many lines of its file lie before each range."""
    seen: Counter[str] = Counter()
    before = []
    for origin, summary in zip(origins, summaries, strict=True):
        before.append(seen[origin])
        seen[origin] += summary.lines
    return before


def empty_file_report(manifest: Manifest) -> list[str]:
    """A sentence for each file that has no document, and one for those beyond the first five."""
    sentences = [
        f"{each.path}: no document in {each.lines:,} lines" + f", {each.bad_lines:,} of them bad" * bool(each.bad_lines)
        for each in manifest.files
        if not each.documents
    ]
    unnamed = len(sentences) - NAMED_EMPTY_FILES
    return [
        *sentences[:NAMED_EMPTY_FILES],
        *([f"… and {unnamed:,} more files without a document"] if unnamed > 0 else []),
    ]


def _refuse_empty(manifest: Manifest) -> None:
    if not manifest.documents:
        raise DataError("\n".join([*empty_file_report(manifest), *bad_line_report(manifest, verdict="refused")[:10]]))


def _refuse_dropped(manifest: Manifest, recipe: Recipe) -> None:
    """Refuse a cache whose documents all have no token of their text."""
    first = manifest.first_dropped
    if first is None:
        return
    tokenizer = tokenizer_of(recipe)
    if manifest.tokens == manifest.documents * (len(tokenizer.prefix) + len(tokenizer.suffix)):
        raise DataError(
            f"{tokenizer.name} has no token for any character of {first.file} (line {first.line:,}: "
            f"{' '.join(first.reason)}); give data.tokenizer one that knows this text, or leave it at auto to learn one "
            "from it"
        )


def _names(files: Sequence[SourceFile]) -> list[str]:
    """The paths from the folder on that all files share: the same wherever that folder lies."""
    if not files:
        raise DataError("no file to prepare")
    folders = [os.path.dirname(file.path) for file in files]  # noqa: PTH120 - URIs, too
    is_mixed = len({folder.startswith("/") for folder in folders}) > 1  # local files and URIs
    shared = 0 if is_mixed else len(os.path.commonpath(folders))
    return [file.path[shared:].lstrip("/") for file in files]


def _title(files: Sequence[SourceFile]) -> str:
    """The first file's name as the beginning of a folder's name, cut to `TITLE_BYTES`."""
    name = _names(files)[0].partition(".")[0].replace("/", "-")
    return name.encode()[:TITLE_BYTES].decode(errors="ignore")


def _stored_bytes(part: ByteRange) -> int:
    return min(part.stop, part.file.size) - part.start


def _texts_to_learn_from(files: Sequence[SourceFile]) -> Iterator[str]:
    """Documents from the start of each file, as many characters as its part of all bytes allows."""
    total = sum(file.size for file in files)
    for file in files:
        left = TRAINING_CHARACTERS * file.size // max(total, 1)
        for text in documents([file]):
            if left <= 0:
                break
            left -= len(text)
            yield text


def _make_once(path: Path, is_made: Callable[[], bool], make: Callable[[], None]) -> None:
    """Makes what is not there; of several processes one makes it, the others wait for it."""
    if is_made():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_made():
            make()
