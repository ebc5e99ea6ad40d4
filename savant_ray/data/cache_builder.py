"""Builds token caches and trains tokenizers from source files; existing ones are reused.

A Ray Data task tokenizes and packs one part of a file: it writes a shard and then its summary. An interrupted build
therefore continues with the parts whose summary is missing. The folder gets its final name when all shards are complete.
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
from savant_ray.data.atomic_files import fingerprint, write_atomically
from savant_ray.data.content import content_hashes, refuse_changed
from savant_ray.data.record_reader import documents, plan_parts
from savant_ray.data.records import MAX_RECORD_BYTES, Part
from savant_ray.data.shard_writer import (
    MAX_NAMED_INVALID_LINES,
    RangeSummary,
    Recipe,
    shard_name,
    tokenizer_of,
    write_shard,
)
from savant_ray.data.sources import SourceFile
from savant_ray.data.token_cache import (
    MANIFEST,
    FileSummary,
    LineProblem,
    Manifest,
    ShardInfo,
    TokenCache,
    damaged_shards,
    invalid_line_report,
)
from savant_ray.data.tokenizer import Tokenizer, train_tokenizer
from savant_ray.errors import DataError, UnexpectedError, describe
from savant_ray.locations import absolute_path

FORMAT_VERSION = 1
PROGRESS_BYTES = 2 << 20  # between two progress reports of a task
MAX_NAMED_EMPTY_FILES = 5  # in `empty_file_report`
MAX_TITLE_BYTES = 200  # of the 255 bytes that a folder name can have; a fingerprint and ".unfinished" follow
MAX_TRAINING_CHARACTERS = 128 << 20  # for training a tokenizer, which barely changes with more text

Progress = Callable[[int, int], None]  # receives bytes done and total bytes


def prepare(
    files: Sequence[SourceFile],
    tokenizer: Tokenizer,
    sequence_length: int,
    cache_dir: str | Path,
    on_bad_line: Literal["skip", "error"] = "skip",
    max_line_bytes: int = MAX_RECORD_BYTES,
    range_bytes: int | None = None,
    progress: Progress | None = None,
    log: Callable[[str], None] = print,
) -> TokenCache:
    """Return the token cache of `files` in `cache_dir`, and build it if it does not exist.

    Building needs an initialized Ray. In a damaged cache only the damaged shards are rebuilt.

    Args:
        files: to tokenize.
        tokenizer: of the documents.
        sequence_length: tokens per row.
        cache_dir: folder of all caches.
        on_bad_line: "skip" skips and counts invalid lines, "error" raises an error that lists them.
        max_line_bytes: longer lines are invalid.
        range_bytes: length of the part that one task reads; None: the default of `plan_parts`.
        progress: receives bytes done and total bytes.
        log: receives a message for each damaged shard.

    Raises:
        DataError: a file cannot be read, the files contain no document, or a line is invalid and `on_bad_line` is
            "error".
    """
    cache_dir = Path(absolute_path(str(cache_dir), setting="data.cache_dir"))
    recipe = Recipe.of(tokenizer, sequence_length, max_line_bytes)
    hashes = content_hashes(files, cache_dir)
    identity = {
        "version": FORMAT_VERSION,
        "files": list(zip(_relative_paths(files), hashes, strict=True)),
        "formats": [file.reading for file in files],
        "recipe": [tokenizer.fingerprint, sequence_length, max_line_bytes, range_bytes],
    }
    plan = partial(plan_parts, files, range_bytes)
    build = _Build(plan, files, hashes, recipe, fingerprint(identity), cache_dir)
    progress = progress or (lambda done, total: None)
    _build_once(build.folder, partial(build.is_complete, progress), partial(build.run, progress, log))
    cache = TokenCache.open(build.folder)
    if on_bad_line == "error" and cache.manifest.bad_lines:
        raise DataError("\n".join(invalid_line_report(cache.manifest, verdict="refused")))
    return cache


def train_or_load_tokenizer(files: Sequence[SourceFile], cache_dir: str | Path, vocab_size: int = 32_000) -> Tokenizer:
    """Load the tokenizer that was trained on these files from `cache_dir`; train it if it is not there.

    At most about `MAX_TRAINING_CHARACTERS` are used, in whole documents.

    Raises:
        DataError: a file cannot be read.
    """
    cache_dir = Path(absolute_path(str(cache_dir), setting="data.cache_dir"))
    hashes = content_hashes(files, cache_dir)
    formats = [file.reading for file in files]
    identity = {"version": FORMAT_VERSION, "files": hashes, "formats": formats, "vocab_size": vocab_size}
    path = cache_dir / f"tokenizer-{fingerprint(identity)[:16]}.json"

    def train() -> None:
        content = train_tokenizer(_training_texts(files), vocab_size).to_json()
        refuse_changed(files, hashes)
        write_atomically(_with_checksum(path, content), content)

    _build_once(path, lambda: _load_cached_tokenizer(path) is not None, train)
    tokenizer = _load_cached_tokenizer(path)
    if tokenizer is None:
        raise DataError(f"{path.parent}: the tokenizer that was just written there cannot be read back")
    tokenizer.name = "the tokenizer trained on the training text"
    return tokenizer


def _load_cached_tokenizer(path: Path) -> Tokenizer | None:
    """Load the tokenizer that `train_or_load_tokenizer` has cached; return None if there is none or it is damaged.

    The name of its file is that of `path` with a checksum added; versions without checksums used `path` itself.
    """
    for candidate in [*path.parent.glob(f"{path.stem}-*.json"), path]:
        try:
            content = candidate.read_text(encoding="utf-8")
            if candidate in (path, _with_checksum(path, content)):
                return Tokenizer.load(candidate)
        except (OSError, ValueError, DataError):
            continue
    return None


def _with_checksum(path: Path, content: str) -> Path:
    """Return `path` with a checksum of the content added to its stem."""
    return path.with_stem(f"{path.stem}-{hashlib.sha256(content.encode()).hexdigest()[:16]}")


class _Build:
    """Build of one token cache, in a folder with the suffix `.unfinished` until it is complete."""

    def __init__(
        self,
        plan: Callable[[], list[Part]],
        files: Sequence[SourceFile],
        hashes: Sequence[str],
        recipe: Recipe,
        identity: str,
        cache_dir: Path,
    ) -> None:
        self._files = files
        self._hashes = hashes
        self._plan = plan  # called only for a build, because it reads the footers of tables
        self._parts: list[Part] = []
        self._recipe = recipe
        self._identity = identity
        self.folder = cache_dir / f"{_title(files)}-{identity[:16]}"
        self._unfinished = self.folder.with_suffix(".unfinished")
        self._damage: list[str] = []

    def is_complete(self, progress: Progress) -> bool:
        """Return whether the cache exists and is intact; a message for each damaged file is kept in `_damage`."""
        self._damage = []
        if not self.folder.exists():
            return False
        try:
            manifest = Manifest.from_json((self.folder / MANIFEST).read_text())
            if manifest.fingerprint != self._identity:
                raise ValueError("it belongs to another cache")
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._damage = [f"{self.folder / MANIFEST}: cannot be used ({error})"]
        else:
            self._damage = damaged_shards(self.folder, manifest, progress)
        return not self._damage

    def run(self, progress: Progress, log: Callable[[str], None]) -> None:
        """Write the missing shards and the manifest, then rename the folder; `log` receives the messages of `_damage`.

        Raises:
            DataError: a file cannot be read or was changed during the build, or no file contains a document.
        """
        for problem in self._damage:
            log(f"{problem}; rebuilding it")
        folder = self.folder if self.folder.exists() else self._unfinished
        folder.mkdir(parents=True, exist_ok=True)
        self._parts = self._plan()
        self._write_missing(folder, progress)
        self._refuse_changed(folder)
        manifest = _merge_summaries(
            self._files,
            self._parts,
            [RangeSummary.read(folder, index) for index in range(len(self._parts))],
            fingerprint=self._identity,
            sequence_length=self._recipe.sequence_length,
        )
        _refuse_empty(manifest)
        _refuse_if_all_dropped(manifest, self._recipe)
        for abandoned in folder.glob("*.tmp"):
            abandoned.unlink(missing_ok=True)
        write_atomically(folder / MANIFEST, manifest.to_json())
        if folder != self.folder:
            folder.rename(self.folder)

    def _refuse_changed(self, folder: Path) -> None:
        try:
            refuse_changed(self._files, self._hashes)
        except DataError:
            shutil.rmtree(folder)  # its shards may contain the new content under the fingerprint of the old one
            raise

    def _write_missing(self, folder: Path, progress: Progress) -> None:
        """Write the shards that are missing, with one Ray Data task per part.

        Raises:
            DataError: a file cannot be read or written.
            UnexpectedError: a task raised any other exception; contains its traceback.
        """
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            complete = list(threads.map(partial(RangeSummary.is_complete, folder), range(len(self._parts))))
        missing = [index for index, is_complete in enumerate(complete) if not is_complete]
        total = sum(file.size for file in self._files)
        done = total - sum(self._parts[index].stored_bytes for index in missing)
        progress(done, total)
        for row in self._run_tasks(folder, missing):
            if error := row["error"].as_py():
                details = row["traceback"].as_py()
                raise UnexpectedError(error, details) if details else DataError(error)
            # Ray retries a task whose worker has died, which then reports the same bytes again.
            done = min(done + row["bytes"].as_py(), total)
            progress(done, total)

    def _run_tasks(self, folder: Path, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
        if not indices:
            return iter(())
        items = [{"index": index, **_as_row(self._parts[index])} for index in indices]
        with ray_data.settings():
            parts = ray.data.from_items(items, override_num_blocks=len(items))
            written = parts.flat_map(_WriteShard(folder, self._recipe), num_cpus=1)
        return ray_data.rows(written)


@dataclass(frozen=True)
class _WriteShard:
    """Ray Data task that writes the shard of one part; yields rows with the bytes read since the last row, or an error."""

    folder: Path
    recipe: Recipe

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        index, path = row.pop("index"), row["path"]
        reported, done = 0, 0
        try:
            for done in write_shard(self.folder, index, _from_row(row), self.recipe):
                if done - reported >= PROGRESS_BYTES:
                    yield _task_row(done - reported)
                    reported = done
            yield _task_row(done - reported)
        except DataError as error:
            yield _task_row(0, str(error))
        except OSError as error:
            yield _task_row(0, f"{self.folder}: cannot be written ({error})")
        except (GeneratorExit, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a Rust panic in `tokenizers` is not an Exception
            yield _task_row(0, describe(error, f"tokenizing {path}"), traceback.format_exc())


def _task_row(n_bytes: int, error: str = "", details: str = "") -> dict[str, Any]:
    return {"bytes": n_bytes, "error": error, "traceback": details}


def _as_row(part: Part) -> dict[str, Any]:
    bounds = {"start": part.start, "stop": part.stop, "stored_bytes": part.stored_bytes}
    return {**dataclasses.asdict(part.file), **bounds}


def _from_row(row: dict[str, Any]) -> Part:
    bounds = {name: row.pop(name) for name in ("start", "stop", "stored_bytes")}
    return Part(SourceFile(**row), **bounds)


def _merge_summaries(
    files: Sequence[SourceFile], parts: Sequence[Part], summaries: Sequence[RangeSummary], **identity: Any
) -> Manifest:
    """Combine the summaries of all parts into a manifest, whose line numbers are counted from the start of each file."""
    names = dict(zip([file.path for file in files], _relative_paths(files), strict=True))
    origins = [names[part.file.path] for part in parts]
    units = {names[file.path]: file.record_name for file in [*files, *(part.file for part in parts)]}
    lines, documents, invalid = (_per_file(origins, summaries, key) for key in ("lines", "documents", "bad_lines"))
    before = _lines_before(origins, summaries)
    counted = list(zip(origins, before, summaries, strict=True))
    first_dropped = (
        LineProblem(name, lines_before + summary.first_dropped[0], summary.first_dropped[1])
        for name, lines_before, summary in counted
        if summary.first_dropped
    )
    invalid_lines = [
        LineProblem(name, lines_before + line, reason)
        for name, lines_before, summary in counted
        for line, reason in summary.first_bad_lines
    ]
    return Manifest(
        files=tuple(
            FileSummary(name, lines[name], documents[name], invalid[name], unit=units[name]) for name in names.values()
        ),
        shards=tuple(
            ShardInfo(shard_name(index), summary.shard_bytes, summary.rows, name, lines_before, summary.shard_crc32)
            for index, (name, lines_before, summary) in enumerate(counted)
            if summary.rows
        ),
        rows=sum(summary.rows for summary in summaries),
        documents=documents.total(),
        tokens=sum(summary.tokens for summary in summaries),
        target_tokens=sum(summary.tokens - summary.pieces for summary in summaries),
        text_bytes=sum(summary.text_bytes for summary in summaries),
        bad_lines=invalid.total(),
        first_bad_lines=tuple(invalid_lines[:MAX_NAMED_INVALID_LINES]),
        characters=sum(summary.characters for summary in summaries),
        dropped_characters=sum(summary.dropped_characters for summary in summaries),
        first_dropped=next(first_dropped, None),
        **identity,
    )


def _per_file(origins: Sequence[str], summaries: Sequence[RangeSummary], key: str) -> Counter[str]:
    """Return the sum of one count over the parts of each file; `origins` are the files of the parts."""
    totals: Counter[str] = Counter()
    for origin, summary in zip(origins, summaries, strict=True):
        totals[origin] += getattr(summary, key)
    return totals


def _lines_before(origins: Sequence[str], summaries: Sequence[RangeSummary]) -> list[int]:
    """Return for each part the number of lines of its file before it."""
    seen: Counter[str] = Counter()
    before = []
    for origin, summary in zip(origins, summaries, strict=True):
        before.append(seen[origin])
        seen[origin] += summary.lines
    return before


def empty_file_report(manifest: Manifest) -> list[str]:
    """Return a message for each of the first files without a document, and one with the number of the others."""
    messages = [
        f"{file.path}: no document in {file.lines:,} {file.unit}s"
        + f", {file.bad_lines:,} of them invalid" * bool(file.bad_lines)
        for file in manifest.files
        if not file.documents
    ]
    unnamed = len(messages) - MAX_NAMED_EMPTY_FILES
    return [
        *messages[:MAX_NAMED_EMPTY_FILES],
        *([f"… and {unnamed:,} more files without a document"] if unnamed > 0 else []),
    ]


def _refuse_empty(manifest: Manifest) -> None:
    """Raise `DataError` if no file contains a document."""
    if not manifest.documents:
        raise DataError(
            "\n".join([*empty_file_report(manifest), *invalid_line_report(manifest, verdict="refused")[:10]])
        )


def _refuse_if_all_dropped(manifest: Manifest, recipe: Recipe) -> None:
    """Raise `DataError` if the tokenizer drops all characters of all documents."""
    first = manifest.first_dropped
    if first is None:
        return
    tokenizer = tokenizer_of(recipe)
    if manifest.tokens == manifest.documents * (len(tokenizer.prefix) + len(tokenizer.suffix)):
        raise DataError(
            f"{tokenizer.name} has no token for any character of {first.file} ({manifest.unit(first.file)} {first.line:,}: "
            f"{' '.join(first.reason)}); set data.tokenizer to one for this text, or to auto to train one on it"
        )


def _relative_paths(files: Sequence[SourceFile]) -> list[str]:
    """Return the paths relative to the deepest common folder, so that moving this folder does not change them."""
    if not files:
        raise DataError("no file to prepare")
    folders = [os.path.dirname(file.path) for file in files]  # noqa: PTH120 - also of URIs
    is_mixed = len({folder.startswith("/") for folder in folders}) > 1  # local files and URIs
    common_length = 0 if is_mixed else len(os.path.commonpath(folders))
    return [file.path[common_length:].lstrip("/") for file in files]


def _title(files: Sequence[SourceFile]) -> str:
    """Return what the cache folder's name begins with: the first file's name, truncated to `MAX_TITLE_BYTES`."""
    name = _relative_paths(files)[0].partition(".")[0].replace("/", "-")
    return name.encode()[:MAX_TITLE_BYTES].decode(errors="ignore")


def _training_texts(files: Sequence[SourceFile]) -> Iterator[str]:
    """Yield documents from the start of each file; their number of characters is proportional to the file's size."""
    total = sum(file.size for file in files)
    for file in files:
        remaining = MAX_TRAINING_CHARACTERS * file.size // max(total, 1)
        for text in documents([file]):
            if remaining <= 0:
                break
            remaining -= len(text)
            yield text


def _build_once(path: Path, is_complete: Callable[[], bool], build: Callable[[], None]) -> None:
    """Call `build` unless `path` is complete; a file lock makes other processes wait for the one that builds it."""
    if is_complete():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_complete():
            build()
