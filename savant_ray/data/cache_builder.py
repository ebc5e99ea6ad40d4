"""Builds token caches and trains tokenizers from source files; existing ones are reused.

A Ray Data task tokenizes and packs one part of a file, or several small files: it writes a shard and then its summary. An
interrupted build therefore continues with the shards whose summary is missing. The folder gets its final name when all
shards are complete.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import os
import pickle
import shutil
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import ray
import ray.data

from savant_ray.data import ray_data
from savant_ray.data.atomic_files import fingerprint, write_atomically
from savant_ray.data.content import content_hashes, refuse_changed
from savant_ray.data.conversations import AUTO, SYSTEM_FIELDS
from savant_ray.data.decoded_stream import DecodedStream
from savant_ray.data.deduplication import is_marked, mark_duplicates, scan_path, write_scan
from savant_ray.data.documents import TEXT_RULE, DocumentRule, SourceText
from savant_ray.data.formats import TABLES, data_suffix
from savant_ray.data.overlap import DUPLICATES, OVERLAP, stored_digests
from savant_ray.data.readers.csv_rows import was_split_at_bars
from savant_ray.data.readers.tables import has_nested_items, read_schema
from savant_ray.data.record_reader import (
    RecordReader,
    RuledPart,
    default_part_bytes,
    documents,
    max_records,
    plan_parts,
)
from savant_ray.data.records import MAX_RECORD_BYTES, Part, Record
from savant_ray.data.shard_writer import (
    COUNTS_OF_PARTS,
    MAX_NAMED_INVALID_LINES,
    PartSummary,
    Recipe,
    damaged_digests,
    shard_name,
    sums_by_position,
    tokenizer_of,
    write_shard,
)
from savant_ray.data.sources import LISTING_THREADS, SourceFile, format_by_suffix, relative_paths
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
from savant_ray.errors import DataError, SettingsError, UnexpectedError, describe
from savant_ray.locations import absolute_path, error_text

FORMAT_VERSION = 2  # of token caches; 1 had no loss mask. Those of other versions are built again
DATA_VERSION = 1  # of the rows: two caches with the same data fingerprint have the same rows, whatever their format is
CONVERSATIONS_VERSION = 2  # of the rows of conversations; 1 had answers of weight 0 trained on
SMALL_FILE_BYTES = 1 << 20  # files up to this size are packed together: alone, each would leave a row partly empty
PROGRESS_BYTES = 2 << 20  # between two progress reports of a task
MAX_NAMED_EMPTY_FILES = 5  # in `empty_file_report`
UNFINISHED, LOCK = ".unfinished", ".lock"  # suffixes of a cache that is being built, and of the lock of its build
TRAINED_TOKENIZER = "tokenizer-"  # prefix of the file with a tokenizer that was trained on the text
MAX_TITLE_BYTES = 200  # of the 255 bytes that a folder name can have; a fingerprint and `UNFINISHED` follow
MAX_TRAINING_CHARACTERS = 128 << 20  # for training a tokenizer, which barely changes with more text
# Counts of a shard whose sums over all shards are in the manifest under the same name.
SUMS = (
    *("rows", "documents", "tokens", "target_tokens", "text_bytes", "trained_bytes", "bad_lines", "characters"),
    *("dropped_characters", "filtered", "duplicates", "conversations", "trained_tokens", "cut_documents"),
)

Progress = Callable[[int, int], None]  # receives bytes done and total bytes


class RayRequiredError(RuntimeError):
    """A token cache has to be built, and Ray is not initialized."""


def prepare(
    texts: Sequence[SourceFile] | Sequence[SourceText],
    tokenizer: Tokenizer,
    sequence_length: int,
    cache_dir: str | Path,
    on_bad_line: Literal["skip", "error"] = "skip",
    max_line_bytes: int = MAX_RECORD_BYTES,
    part_bytes: int | None = None,
    deduplicate_after: Sequence[TokenCache] | None = None,
    progress: Progress = lambda done, total: None,
    log: Callable[[str], None] = print,
) -> TokenCache:
    """Return the token cache of `texts` in `cache_dir`, and build it if it does not exist.

    In a damaged cache only the damaged shards are written again. Of the files with the digests of documents the size is
    verified; they have no checksums.

    Args:
        texts: to tokenize: files, or files with rules.
        tokenizer: encodes the documents.
        sequence_length: tokens per row.
        cache_dir: folder of all caches.
        on_bad_line: "skip" skips and counts invalid lines, "error" raises an error that lists them.
        max_line_bytes: longer lines are invalid.
        part_bytes: length of the part that one task reads; None: the default of `plan_parts`.
        deduplicate_after: leave out documents that have occurred before in these texts, or are in these caches; None: keep
            all documents.
        progress: receives bytes done and total bytes.
        log: receives a message for each damaged shard, and for a damaged manifest.

    Raises:
        DataError: a file cannot be read, the files contain no document, or a line is invalid and `on_bad_line` is
            "error".
        RayRequiredError: the cache has to be built, and Ray is not initialized.
        SettingsError: the file system of `cache_dir` has no locks.
    """
    cache_dir = Path(absolute_path(str(cache_dir), setting="data.cache_dir"))
    recipe = Recipe.of(tokenizer, sequence_length, max_line_bytes)
    sources = _with_rules(texts)
    files = [file for source in sources for file in source.files]
    hashes = content_hashes(files, cache_dir)
    common: dict[str, Any] = {
        "version": DATA_VERSION,
        "files": list(zip(_identity_paths(files), hashes, strict=True)),
        "recipe": [tokenizer.fingerprint, sequence_length, max_line_bytes, part_bytes],
        **_corrected_reading(sources),
        **_common_shards(sources, part_bytes),
    }
    if deduplicate_after is not None:
        common["deduplicated"] = [cache.fingerprint for cache in deduplicate_after]
    build = _Build(_Identity(common, sources), files, hashes, recipe, part_bytes, cache_dir, deduplicate_after)
    _build_once(build.lock, partial(build.is_complete, progress), partial(build.run, progress, log))
    cache = TokenCache.open(build.folder)
    if on_bad_line == "error" and cache.manifest.bad_lines:
        raise DataError("\n".join(invalid_line_report(cache.manifest, verdict="refused")))
    return cache


def train_or_load_tokenizer(
    texts: Sequence[SourceFile] | Sequence[SourceText],
    cache_dir: str | Path,
    vocab_size: int = 32_000,
    max_line_bytes: int = MAX_RECORD_BYTES,
) -> Tokenizer:
    """Load the tokenizer that was trained on these texts from `cache_dir`; train it if it is not there.

    At most about `MAX_TRAINING_CHARACTERS` are used, in whole documents; lines of more than `max_line_bytes` are not.

    Raises:
        DataError: a file cannot be read.
        SettingsError: the file system of `cache_dir` has no locks.
    """
    cache_dir = Path(absolute_path(str(cache_dir), setting="data.cache_dir"))
    sources = _with_rules(texts)
    files = [file for source in sources for file in source.files]
    hashes = content_hashes(files, cache_dir)
    identity = {
        "version": DATA_VERSION,
        "files": hashes,
        "vocab_size": vocab_size,
        **({} if max_line_bytes == MAX_RECORD_BYTES else {"max_line_bytes": max_line_bytes}),
        **_corrected_reading(sources),
        **_reading_identity(sources),
    }
    path = cache_dir / f"{TRAINED_TOKENIZER}{fingerprint(identity)[:16]}.json"

    def train() -> None:
        content = train_tokenizer(_training_texts(sources, max_line_bytes), vocab_size).to_json()
        refuse_changed(files, hashes)
        write_atomically(_with_checksum(path, content), content)

    _build_once(path.with_suffix(LOCK), lambda: _load_cached_tokenizer(path) is not None, train)
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


class SourcePart(NamedTuple):
    """A part of a file, the number of its file and of its source, and the rule of the source."""

    part: Part
    file: int
    source: int
    rule: DocumentRule


def _with_rules(texts: Sequence[SourceFile] | Sequence[SourceText]) -> list[SourceText]:
    """Return the texts as sources; files without a rule are one source with the default rule."""
    files = [text for text in texts if isinstance(text, SourceFile)]
    return [*([SourceText(files)] if files else []), *(text for text in texts if isinstance(text, SourceText))]


def _reading_identity(sources: Sequence[SourceText]) -> dict[str, Any]:
    """Return what formats and rules add to an identity: nothing for JSON lines with texts, as in earlier versions."""
    files = [file for source in sources for file in source.files]
    is_default = all(file.format_setting == "auto" and not file.text_blocks and _is_json_lines(file) for file in files)
    identity: dict[str, Any] = {} if is_default else {"formats": [file.reading for file in files]}
    if any(source.rule != TEXT_RULE for source in sources):
        identity["rules"] = [(len(source.files), repr(source.rule)) for source in sources]
    return identity


def _corrected_reading(sources: Sequence[SourceText], of_conversations: bool = False) -> dict[str, Any]:
    """Return what distinguishes an identity from that of earlier versions, for text that they read differently.

    With `of_conversations` it is what has an effect on conversations only.
    """
    checks = {"system_columns": _system_messages_were_ignored, "tabs": _was_split_at_bars}
    if of_conversations:
        checks = {"absent_fields": _absent_fields_were_null}
    with ThreadPoolExecutor(LISTING_THREADS) as threads:
        return {
            name: True
            for name, is_other in checks.items()
            if any(any(threads.map(partial(is_other, rule), files)) for files, rule in sources)
        }


def _system_messages_were_ignored(rule: DocumentRule, file: SourceFile) -> bool:
    """Return whether earlier versions did not read the system messages, which are in a column beside the conversations."""
    if rule.messages in (None, AUTO):
        return False
    columns_read = {rule.messages, *(name for name, _ in rule.equals)}
    names = set(_columns(file).names)
    return columns_read <= names and not names.isdisjoint({*SYSTEM_FIELDS} - columns_read)


def _absent_fields_were_null(rule: DocumentRule, file: SourceFile) -> bool:
    """Return whether earlier versions may have written fields that a message lacks, such as arguments of other tools."""
    if rule.text is not None or rule.template is not None:
        return False
    return has_nested_items(_columns(file), None if rule.messages == AUTO else rule.messages)


def _columns(file: SourceFile) -> pa.Schema:
    """Return the columns of a table; none of other files, and of one that cannot be read, which `plan_parts` reports."""
    with suppress(Exception):
        if (file := file.inspected()).format in TABLES:
            return read_schema(file)
    return pa.schema([])


def _was_split_at_bars(_: DocumentRule, file: SourceFile) -> bool:
    """Return whether `was_split_at_bars`; only files named .tsv are opened, because this runs whenever a run starts."""
    if data_suffix(file.path) != ".tsv":
        return False
    with suppress(Exception):  # as in `_columns`
        if (file := file.inspected()).format == "csv":
            filesystem, path = file.resolve()
            with filesystem.open_input_file(path) as stored:
                return was_split_at_bars(DecodedStream(stored, file).blocks(), file.path)
    return False


def _is_json_lines(file: SourceFile) -> bool:
    """Return whether a file is read as JSON lines; opens it if its suffix does not determine the format, such as `.txt`.

    Raises:
        DataError: the file cannot be read, or its format is not supported.
    """
    suffix_format = file.format or format_by_suffix(file.path) or "jsonl"
    return (file.inspected().format if suffix_format in ("csv", "text") else suffix_format) == "jsonl"


def plan_source_parts(sources: Sequence[SourceText], part_bytes: int | None) -> list[SourcePart]:
    """Divide the files of all sources into parts."""
    parts: list[SourcePart] = []
    n_files = 0
    for number, source in enumerate(sources):
        numbers = {file.path: n_files + index for index, file in enumerate(source.files)}
        planned = plan_parts(source.files, part_bytes)
        parts += [SourcePart(part, numbers[part.file.path], number, source.rule) for part in planned]
        n_files += len(source.files)
    return parts


def group_parts(
    parts: Iterable[SourcePart], sources: Sequence[SourceText], part_bytes: int | None
) -> list[list[SourcePart]]:
    """Return the parts of each shard: one part, or consecutive small files of a source that are not larger than one."""
    limits = [part_bytes or default_part_bytes(source.files) for source in sources]
    shards: list[list[SourcePart]] = []
    has_room = False
    n_bytes = 0
    for part in parts:
        size = part.part.stored_bytes
        is_small = size == part.part.file.size <= SMALL_FILE_BYTES
        is_same_source = bool(shards) and shards[-1][-1].source == part.source
        if has_room and is_small and is_same_source and n_bytes + size <= limits[part.source]:
            shards[-1].append(part)
            n_bytes += size
        else:
            shards.append([part])
            n_bytes, has_room = size, is_small
    return shards


def _common_shards(sources: Sequence[SourceText], part_bytes: int | None) -> dict[str, Any]:
    """Return what distinguishes an identity from that of earlier versions, in which each file had shards of its own."""
    files = [
        SourcePart(Part(file, 0, 1, file.size), 0, number, source.rule)
        for number, source in enumerate(sources)
        for file in source.files
        if file.size
    ]
    return {"common_shards": True} if len(group_parts(files, sources, part_bytes)) < len(files) else {}


@dataclass(frozen=True)
class _Identity:
    """Fingerprints of what a token cache contains.

    Whether there are conversations is known when the records have been read. Without any, the chat template of a tokenizer
    has no effect: the fingerprint does not change if the template cannot be fetched, and is that of earlier versions, which
    read no conversations.
    """

    common: Mapping[str, Any]
    sources: Sequence[SourceText]

    @cached_property
    def of_texts(self) -> str:
        """The fingerprint if no record is a conversation."""
        texts_only = [source._replace(rule=source.rule.for_texts) for source in self.sources]
        return fingerprint({**self.common, **_reading_identity(texts_only)})

    @cached_property
    def of_rules(self) -> str:
        """The fingerprint of everything that may have an effect; opens the tables that may have conversations."""
        corrected = _corrected_reading(self.sources, of_conversations=True)
        return fingerprint({**self.common, **_reading_identity(self.sources), **corrected})

    @property
    def of_conversations(self) -> str:
        """The fingerprint if a record is a conversation."""
        return fingerprint({"data": self.of_rules, "conversations": CONVERSATIONS_VERSION})

    def of(self, manifest: Manifest) -> str:
        """Return the fingerprint of a cache with this manifest."""
        return self.of_conversations if manifest.conversations else self.of_texts


@dataclass
class _Build:
    """Build of one token cache, in a folder with the suffix `.unfinished` until it is complete."""

    identity: _Identity
    files: Sequence[SourceFile]
    hashes: Sequence[str]
    recipe: Recipe
    part_bytes: int | None
    cache_dir: Path
    deduplicate_after: Sequence[TokenCache] | None
    _damage: list[str] = field(default_factory=list, init=False)

    @property
    def lock(self) -> Path:
        """The lock file of the build."""
        return self._folder_of(self.identity.of_texts).with_suffix(LOCK)

    @property
    def folder(self) -> Path:
        """The folder of the cache if it exists, otherwise the unfinished one."""
        if (texts := self._folder_of(self.identity.of_texts)).exists():
            return texts
        conversations = self._folder_of(self.identity.of_conversations)
        unfinished = self._folder_of(self.identity.of_rules).with_suffix(UNFINISHED)
        return conversations if conversations.exists() else unfinished

    def _folder_of(self, data_fingerprint: str) -> Path:
        name = fingerprint({"format": FORMAT_VERSION, "data": data_fingerprint})
        return self.cache_dir / f"{_title(self.files)}-{name[:16]}"

    def is_complete(self, progress: Progress) -> bool:
        """Return whether the cache exists and is intact; a message for each damaged file is kept in `_damage`."""
        self._damage = []
        folder = self.folder
        if folder.suffix == UNFINISHED:
            return False
        try:
            manifest = Manifest.from_json((folder / MANIFEST).read_text())
            if manifest.fingerprint != self.identity.of(manifest):
                raise ValueError("it belongs to another cache")
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._damage = [f"{folder / MANIFEST}: cannot be used ({error})"]
        else:
            self._damage = damaged_shards(folder, manifest, progress) + damaged_digests(folder, manifest)
        return not self._damage

    def run(self, progress: Progress, log: Callable[[str], None]) -> None:
        """Write the missing shards and the manifest, then rename the folder; `log` receives the messages of `_damage`.

        Raises:
            DataError: a file cannot be read or was changed during the build, or no file contains a document.
            RayRequiredError: Ray is not initialized.
        """
        if not ray.is_initialized():
            raise RayRequiredError("a token cache has to be built, and Ray is not initialized")
        for problem in self._damage:
            log(f"{problem}; rebuilding it")
        if self._damage:  # counts that an earlier version has stored may be those of damaged digests
            for counts in [*self.cache_dir.glob(f"{OVERLAP}*.json"), *self.cache_dir.glob(f"{DUPLICATES}*.json")]:
                counts.unlink(missing_ok=True)
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        planned = plan_source_parts(self.identity.sources, self.part_bytes)
        parts = within_limits(planned, self.recipe.max_line_bytes, progress)
        shards = group_parts(parts, self.identity.sources, self.part_bytes)
        if self.deduplicate_after is not None and not is_marked(folder):
            unscanned = {i: shard for i, shard in enumerate(shards) if not scan_path(folder, i).exists()}
            scan = partial(write_scan, folder, max_line_bytes=self.recipe.max_line_bytes)
            _run_tasks(folder, scan, unscanned, progress)
            mark_duplicates(folder, len(shards), stored_digests(*self.deduplicate_after))
        self._write_missing(folder, shards, progress)
        try:
            refuse_changed(self.files, self.hashes)
        except DataError:
            shutil.rmtree(folder)  # its shards may contain the new content under the fingerprint of the old one
            raise
        unread = {part.file for part in planned} - {part.file for part in parts}
        manifest = _merge_summaries(
            {index: name for index, name in enumerate(relative_paths(self.files)) if index not in unread},
            shards,
            [PartSummary.read(folder / shard_name(index)) for index in range(len(shards))],
            self.recipe.sequence_length,
        )
        manifest = dataclasses.replace(manifest, fingerprint=self.identity.of(manifest))
        refuse_without_documents(manifest, [part.rule for part in parts])
        _refuse_if_all_dropped(manifest, self.recipe)
        refuse_if_all_masked(manifest)
        for needless in [*folder.glob("*.tmp"), *folder.glob("duplicates-*")]:
            needless.unlink(missing_ok=True)
        write_atomically(folder / MANIFEST, manifest.to_json())
        if folder.suffix == UNFINISHED:
            folder.rename(self._folder_of(manifest.fingerprint))

    def _write_missing(self, folder: Path, shards: Sequence[Sequence[SourcePart]], progress: Progress) -> None:
        """Write the shards that are missing. Raises errors as `_run_tasks`."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            paths = [folder / shard_name(index) for index in range(len(shards))]
            complete = list(threads.map(PartSummary.is_complete, paths))
        missing = {index: shards[index] for index, is_complete in enumerate(complete) if not is_complete}
        total, remaining = map(_stored_bytes, (shards, missing.values()))
        write = partial(write_shard, folder, recipe=self.recipe)
        _run_tasks(folder, write, missing, lambda done, _: progress(total - remaining + done, total))


def _stored_bytes(shards: Iterable[Sequence[SourcePart]]) -> int:
    return sum(part.part.stored_bytes for parts in shards for part in parts)


def _run_tasks(
    folder: Path, work: Callable[..., Iterator[int]], shards: Mapping[int, Sequence[SourcePart]], progress: Progress
) -> None:
    """Call `work` with number and parts in one Ray Data task per shard; it yields the bytes read so far.

    Raises:
        DataError: a file cannot be read, or one in `folder` cannot be written.
        UnexpectedError: a task raised any other exception; contains its traceback.
    """
    done, total = 0, _stored_bytes(shards.values())
    progress(done, total)
    if not shards:
        return
    rules = {repr(part.rule): part.rule for parts in shards.values() for part in parts}
    items = [
        {"index": index, "parts": pickle.dumps([(part.part, repr(part.rule)) for part in parts])}
        for index, parts in shards.items()
    ]
    with ray_data.settings():
        tasks = ray.data.from_items(items, override_num_blocks=len(items))
        results = tasks.flat_map(_PartTask(folder, work, rules), num_cpus=1)
    for row in ray_data.rows(results):
        if error := row["error"].as_py():
            details = row["traceback"].as_py()
            raise UnexpectedError(error, details) if details else DataError(error)
        # Ray retries a task whose worker has died, which then reports the same bytes again.
        done = min(done + row["bytes"].as_py(), total)
        progress(done, total)


@dataclass(frozen=True)
class _PartTask:
    """Ray Data task that writes one shard, or the scan that finds duplicates.

    It yields rows with the bytes read since the last row, or an error.
    """

    folder: Path
    work: Callable[..., Iterator[int]]
    rules: Mapping[str, DocumentRule]  # by their repr, which a row contains for each part

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        parts = [RuledPart(part, self.rules[rule]) for part, rule in pickle.loads(row["parts"])]  # noqa: S301 - our own
        reported, done = 0, 0
        try:
            for done in self.work(row["index"], parts):
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
            path = f"{parts[0].part.file.path}" + f" and {len(parts) - 1:,} more files" * (len(parts) > 1)
            yield _task_row(0, describe(error, f"tokenizing {path}"), traceback.format_exc())


def _task_row(n_bytes: int, error: str = "", details: str = "") -> dict[str, Any]:
    return {"bytes": n_bytes, "error": error, "traceback": details}


def within_limits(
    parts: Sequence[SourcePart], max_line_bytes: int, progress: Progress = lambda done, total: None
) -> list[SourcePart]:
    """Return the parts up to the limit of each source; the rule of its last one has what is left of the limit.

    The documents are counted in order and without tokenizing them, up to the limit. Tasks, which know their own part only,
    could not stop at the same document, and packed shards cannot be cut. Nothing is counted of a source of Parquet or local
    JSON lines that has no more rows or lines than its limit. `progress` receives the bytes that were counted and the total
    of all sources with a limit.
    """
    limited = [part for part in parts if part.rule.limit is not None]
    total, done = sum(part.part.stored_bytes for part in limited), 0
    complete = {source for source, group in groupby(limited, lambda part: part.source) if _is_within_limit(group)}
    counted: Counter[int] = Counter()
    kept: list[SourcePart] = []
    for part in parts:
        rule, limit = part.rule, part.rule.limit
        if limit is not None and part.source in complete:
            rule = dataclasses.replace(rule, limit=None)
        elif limit is not None:
            remaining = limit - counted[part.source]
            if not remaining:
                continue
            rule = dataclasses.replace(rule, limit=remaining)
            with RecordReader(part.part, max_line_bytes, rule.fields) as records:
                n_documents = rule.count(_with_progress(records, progress, done, total))
            counted[part.source] += n_documents
            done += part.part.stored_bytes
            progress(done, total)
            if n_documents < remaining:
                rule = dataclasses.replace(rule, limit=None)
        kept.append(part._replace(rule=rule))
    return kept


def _is_within_limit(parts: Iterable[SourcePart]) -> bool:
    """Return whether the parts of a source have no more records than its limit, if that is known without parsing them."""
    n_records = 0
    for part in parts:
        most = max_records(part.part)
        if most is None or part.rule.limit is None or (n_records := n_records + most) > part.rule.limit:
            return False
    return True


def _with_progress(records: RecordReader, progress: Progress, done: int, total: int) -> Iterator[Record]:
    """Yield the records; `progress` receives `done` and the bytes of the part that have been read so far, and `total`."""
    reported = 0
    for record in records:
        yield record
        if records.bytes_read - reported >= PROGRESS_BYTES:
            reported = records.bytes_read
            progress(done + reported, total)


def _merge_summaries(
    names: Mapping[int, str],
    parts_of_shards: Sequence[Sequence[SourcePart]],
    summaries: Sequence[PartSummary],
    sequence_length: int,
) -> Manifest:
    """Combine the summaries of all shards into a manifest, whose line numbers are counted from the start of each file.

    `names` are the names of the files by their number. The manifest has no fingerprint yet.
    """
    units = {part.file: part.part.file.record_name for parts in parts_of_shards for part in parts}
    of_file: dict[int, Counter[str]] = {file: Counter() for file in names}
    shards = []
    for index, (parts, summary) in enumerate(zip(parts_of_shards, summaries, strict=True)):
        lines_before = of_file[parts[0].file]["lines"]
        of_parts = summary.of_parts()
        for part, counts in zip(parts, of_parts, strict=True):
            of_file[part.file].update(counts)
        starts = accumulate((counts["lines"] for counts in of_parts), initial=0)
        (first, _), *more_files = ((names[part.file], start) for part, start in zip(parts, starts, strict=False))
        file = (shard_name(index), summary.shard_bytes, summary.rows, first, lines_before, summary.shard_crc32)
        shards.append(ShardInfo(*file, tuple(more_files)))
    first_dropped = (
        LineProblem(*shard.locate(summary.first_dropped[0]), summary.first_dropped[1])
        for shard, summary in zip(shards, summaries, strict=True)
        if summary.first_dropped
    )
    invalid_lines = [
        LineProblem(*shard.locate(line), reason)
        for shard, summary in zip(shards, summaries, strict=True)
        for line, reason in summary.first_bad_lines
    ]
    return Manifest(
        fingerprint="",
        sequence_length=sequence_length,
        files=tuple(
            FileSummary(
                path=name, unit=units.get(file, "line"), **{count: of_file[file][count] for count in COUNTS_OF_PARTS}
            )
            for file, name in names.items()
        ),
        shards=tuple(shard for shard in shards if shard.rows),
        first_bad_lines=tuple(invalid_lines[:MAX_NAMED_INVALID_LINES]),
        first_dropped=next(first_dropped, None),
        shortest=min((summary.shortest for summary in summaries if summary.shortest), default=0),
        longest=max((summary.longest for summary in summaries), default=0),
        lengths=tuple(sums_by_position(summary.lengths for summary in summaries)),
        **{name: sum(getattr(summary, name) for summary in summaries) for name in SUMS},
    )


def empty_file_report(manifest: Manifest, has_other_split: bool = False) -> list[str]:
    """Return a message for each of the first files without a document, and one with the number of the others.

    With `has_other_split`, a line without a document that is neither invalid, filtered nor a duplicate may have its document
    in the other of training and validation text; a file with such lines is not named.
    """
    messages = [
        f"{file.path}: no document in {file.lines:,} {file.unit}{'s' * (file.lines != 1)}"
        + f", {file.bad_lines:,} of them invalid" * bool(file.bad_lines)
        + f", {file.filtered:,} left out by filter or sample" * bool(file.filtered)
        + f", {file.duplicates:,} duplicates" * bool(file.duplicates)
        for file in manifest.files
        if not file.documents
        and not (has_other_split and file.lines > file.bad_lines + file.filtered + file.duplicates)
    ]
    unnamed = len(messages) - MAX_NAMED_EMPTY_FILES
    return [
        *messages[:MAX_NAMED_EMPTY_FILES],
        *([f"… and {unnamed:,} more files without a document"] if unnamed > 0 else []),
    ]


def filter_report(manifest: Manifest) -> list[str]:
    """Return messages about the documents that `filter`, `sample` and `data.deduplicate` leave out, if there are any."""
    total = manifest.filtered + manifest.duplicates + manifest.documents
    reasons = (("by filter or sample", manifest.filtered), ("as duplicates", manifest.duplicates))
    return [
        f"{_first_name(manifest)}: {count:,} of {total:,} documents left out {reason}"
        for reason, count in reasons
        if count
    ]


def _first_name(manifest: Manifest) -> str:
    """Return the name of the first file, and the number of the others."""
    return manifest.files[0].path + f" and {len(manifest.files) - 1:,} more" * (len(manifest.files) > 1)


def refuse_without_documents(manifest: Manifest, rules: Sequence[DocumentRule]) -> None:
    """Check that a file contains a document.

    Raises:
        DataError: none does, or `data.validation` holds out all of them or none.
    """
    if manifest.documents:
        return
    reasons = [*empty_file_report(manifest), *invalid_line_report(manifest, verdict="refused")[:10]]
    fraction = max((rule.held_out for rule in rules), default=0.0)
    # Other lines are blank, or their documents belong to the other of training and validation text.
    if fraction and any(file.lines > file.bad_lines + file.filtered + file.duplicates for file in manifest.files):
        is_validation = any(rule.split == "validation" for rule in rules)
        side, change = ("in", "raise") if is_validation else ("outside", "lower")
        advice = f"{change} it, or name a file"
        if any(file.unit == "document" for file in manifest.files):
            advice += "; text_blocks: true makes a document of each block of lines of a text file"
        reasons = [
            f"data.validation: {_first_name(manifest)}: no document is {side} the fraction {fraction:g}; {advice}"
        ]
    raise DataError("\n".join(reasons))


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


def refuse_if_all_masked(manifest: Manifest) -> None:
    """Check that the loss mask leaves tokens to train on.

    Raises:
        DataError: all tokens are masked.
    """
    if not manifest.target_tokens and manifest.trained_bytes < manifest.text_bytes:
        names = manifest.files[0].path + f" and {len(manifest.files) - 1:,} more files" * (len(manifest.files) > 1)
        raise DataError(
            f"{names}: none of the {manifest.documents:,} documents has a token that is trained on; the loss mask excludes "
            "all of them"
        )


def _identity_paths(files: Sequence[SourceFile]) -> list[str]:
    """Return the paths relative to the deepest common folder, so that moving a local folder does not change them.

    Those of URIs begin with the last character of the folder, as in earlier versions, whose caches stay valid.
    """
    if not files:
        raise DataError("no file to prepare")
    folders = [os.path.dirname(file.path) for file in files]  # noqa: PTH120 - also of URIs
    is_mixed = len({folder.startswith("/") for folder in folders}) > 1  # local files and URIs
    common_length = 0 if is_mixed else len(os.path.commonpath(folders))
    return [file.path[common_length:].lstrip("/") for file in files]


def _title(files: Sequence[SourceFile]) -> str:
    """Return what the cache folder's name begins with: the first file's name, truncated to `MAX_TITLE_BYTES`."""
    name = _identity_paths(files)[0].partition(".")[0].replace("/", "-")
    return name.encode()[:MAX_TITLE_BYTES].decode(errors="ignore")


def _training_texts(sources: Sequence[SourceText], max_line_bytes: int) -> Iterator[str]:
    """Yield documents from the start of each file, or of each source with a limit, which is counted over all of its files.

    Their number of characters is proportional to the size of the file or source.
    """
    total = sum(file.size for source in sources for file in source.files)
    for source in sources:
        for files in [[file] for file in source.files] if source.rule.limit is None else [source.files]:
            remaining = MAX_TRAINING_CHARACTERS * sum(file.size for file in files) // max(total, 1)
            for document in documents(files, max_line_bytes, source.rule):
                if remaining <= 0:
                    break
                remaining -= len(document.text)
                yield document.text


def _build_once(lock_path: Path, is_complete: Callable[[], bool], build: Callable[[], None]) -> None:
    """Call `build` unless it is complete; the lock makes other processes wait for the one that builds it.

    Raises:
        SettingsError: the file system has no locks.
    """
    if is_complete():
        return
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    with lock_path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise SettingsError(
                f"data.cache_dir: {lock_path} cannot be locked ({error_text(error)}); mount its file system with locks "
                "(NFS: a running lockd, without nolock; Lustre: -o flock), or choose a folder on another one"
            ) from error
        if not is_complete():
            build()
