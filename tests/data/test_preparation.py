"""Prepared once, by content; a killed preparation goes on; bad input is named."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import permutations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from bad_lines import CONTENT, GOOD, LINES, MAX_LINE_BYTES, PROBLEMS

from savant_ray.data import preparation
from savant_ray.data.preparation import learn_tokenizer, prepare
from savant_ray.data.sources import expand
from savant_ray.data.token_cache import TokenCache, bad_line_report
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.errors import DataError, UnexpectedError

WriteJsonl = Callable[[str, Iterable[str]], Path]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("real_ray")]


def pieces_of(cache: TokenCache) -> dict[tuple[str, int], list[list[int]]]:
    """The token pieces of each document, by file and line."""
    sequences = cache.take(np.arange(cache.n_sequences))
    pieces = defaultdict(list)
    for row, (tokens, ids) in enumerate(zip(sequences.tokens, sequences.document_ids, strict=True)):
        assert (tokens[ids == -1] == 0).all()
        for document, origin in enumerate(cache.documents(row)):
            pieces[origin].append(tokens[ids == document].tolist())
    return pieces


def assert_holds(cache: TokenCache, tokenizer: Tokenizer, texts: dict[tuple[str, int], str]) -> None:
    """Every document is there whole, under its own file and line, and nothing else."""
    pieces = pieces_of(cache)
    assert pieces.keys() == texts.keys()
    for origin, text in texts.items():
        whole = [*tokenizer.encode(text), tokenizer.end_of_document]
        assert whole in [sum(order, []) for order in permutations(pieces[origin])]


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """What would change if a file was written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_documents_come_back_and_a_second_run_starts_at_once(
    tmp_path: Path, write_jsonl: WriteJsonl, byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{'déjà 漢字 ' * (i % 5)}document {i}" for i in range(300)]
    for part in range(3):
        write_jsonl(f"src/part-{part}.jsonl", texts[part::3])
    told: list[tuple[int, int]] = []
    files = expand(str(tmp_path / "src"))
    cache = prepare(
        files, byte_tokenizer, 128, tmp_path / "cache", range_bytes=2_000, progress=lambda *now: told.append(now)
    )
    total = sum(file.size for file in files)
    assert_holds(cache, byte_tokenizer, {(f"part-{i % 3}.jsonl", i // 3 + 1): text for i, text in enumerate(texts)})
    assert told[0] == (0, total)
    assert told[-1] == (total, total)
    assert told == sorted(told)

    monkeypatch.setattr(preparation.ray.data, "from_items", None)
    again = prepare(expand(str(tmp_path / "src")), byte_tokenizer, 128, tmp_path / "cache", range_bytes=2_000)
    assert again.fingerprint == cache.fingerprint


def test_an_error_that_nobody_foresaw_in_a_task_keeps_its_cause_file_and_traceback(
    tmp_path: Path, write_jsonl: WriteJsonl, byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl("train.jsonl", ["a text"])
    unloadable = copy.copy(byte_tokenizer)  # in a task, which knows another version of tokenizers
    monkeypatch.setattr(unloadable, "to_json", lambda: json.dumps({"version": "of another age"}))
    with pytest.raises(UnexpectedError) as caught:
        prepare(expand(str(path)), unloadable, 32, tmp_path / "cache")
    assert str(caught.value).startswith(f"while tokenising {path}: ") and "\n" not in str(caught.value)
    assert caught.value.details.startswith("Traceback (most recent call last)")


def test_the_manifest_counts_what_there_is(tmp_path: Path, write_jsonl: WriteJsonl, byte_tokenizer: Tokenizer) -> None:
    path = write_jsonl("train.jsonl", ["é" * 10, "a" * 40, "b" * 20])
    manifest = prepare(expand(str(path)), byte_tokenizer, 32, tmp_path / "cache").manifest
    assert (manifest.documents, manifest.text_bytes, manifest.tokens) == (3, 80, 83)
    assert (manifest.rows, manifest.padding) == (3, 13)
    assert manifest.target_tokens == 83 - 4  # the document of 41 tokens is two pieces
    assert [(each.path, each.lines, each.documents) for each in manifest.files] == [("train.jsonl", 3, 3)]


@pytest.mark.parametrize(
    ("name", "range_bytes"),
    [("all.jsonl", None), ("all.jsonl", 64), ("all.jsonl.gz", None), ("all.jsonl.zst", None)],
    ids=["plain", "many ranges", "gz", "zst"],
)
def test_every_kind_of_bad_line_is_reported_with_its_line(
    tmp_path: Path, byte_tokenizer: Tokenizer, name: str, range_bytes: int | None
) -> None:
    with pa.output_stream(str(tmp_path / name), compression="detect") as stream:
        stream.write(CONTENT)

    def run(on_bad_line: str) -> TokenCache:
        files = expand(str(tmp_path / name))
        return prepare(files, byte_tokenizer, 64, tmp_path, on_bad_line, MAX_LINE_BYTES, range_bytes)

    cache = run("skip")
    good_lines = [line for line, (raw, reason) in enumerate(LINES, 1) if not reason and raw.strip()]
    assert_holds(cache, byte_tokenizer, {(name, line): text for line, text in zip(good_lines, GOOD, strict=True)})
    assert bad_line_report(cache.manifest) == [
        f"{name} line {line}: {reason}; skipped, {len(PROBLEMS)} of {len(LINES)} lines"
        for line, reason in PROBLEMS.items()
    ]
    with pytest.raises(DataError) as refused:
        run("error")
    assert str(refused.value) == "\n".join(bad_line_report(cache.manifest, verdict="refused"))
    assert run("skip").n_sequences == cache.n_sequences


def test_the_folder_is_named_by_content(tmp_path: Path, write_jsonl: WriteJsonl, byte_tokenizer: Tokenizer) -> None:
    def folder(length: int = 32, tokenizer: Tokenizer = byte_tokenizer) -> str:
        return prepare(expand(str(path)), tokenizer, length, tmp_path / "cache").folder.name

    path = write_jsonl("one/train.jsonl", ["a" * 20] * 9)
    first = folder()
    os.utime(path, (1, 1))
    assert folder() == first
    path = write_jsonl("two/train.jsonl", ["a" * 20] * 9)
    assert folder() == first
    assert first.startswith("train-")
    other = learn_tokenizer(expand(str(path)), tmp_path / "cache", vocab_size=260)
    names = {first, folder(33), folder(tokenizer=other)}
    path = write_jsonl("two/train.jsonl", ["a" * 20] * 8 + ["b" * 20])
    assert len(names | {folder()}) == 4


def test_what_is_there_of_a_killed_preparation_is_kept(
    tmp_path: Path, write_jsonl: WriteJsonl, byte_tokenizer: Tokenizer
) -> None:
    path = write_jsonl("train.jsonl", [f"document {i} {'x' * (i % 50)}" for i in range(400)])

    def run() -> TokenCache:
        return prepare(expand(str(path)), byte_tokenizer, 64, tmp_path / "cache", range_bytes=4_000)

    whole = run()
    before, expected = snapshot(whole.folder), whole.take(np.arange(whole.n_sequences))
    unfinished = whole.folder.rename(whole.folder.with_suffix(".unfinished"))
    (unfinished / "manifest.json").unlink()
    (unfinished / "shard-00001.json").unlink()  # killed between shard and summary
    (unfinished / "shard-00002.arrow").write_bytes(b"half")  # the disk lost the rest
    (unfinished / "shard-00003.json").write_text("{")
    (unfinished / "shard-00004.arrow.1.tmp").write_bytes(b"half")
    again = run()
    changed = {name for name, state in snapshot(again.folder).items() if before.get(name) != state}
    assert not list(again.folder.glob("*.tmp"))
    redone = {f"shard-0000{i}.{suffix}" for i in (1, 2, 3) for suffix in ("arrow", "json")}
    assert changed == {"manifest.json", *redone}
    assert np.array_equal(again.take(np.arange(again.n_sequences)).tokens, expected.tokens)
    assert again.manifest == whole.manifest


KILLED = """
import sys, ray
from savant_ray.data.preparation import prepare
from savant_ray.data.sources import expand
from savant_ray.data.tokenizer import Tokenizer
ray.init(address=sys.argv[1], log_to_driver=False)
prepare(expand(sys.argv[2]), Tokenizer.load(sys.argv[3]), 64, sys.argv[4], range_bytes=400_000)
"""


def test_a_preparation_that_was_killed_goes_on(
    tmp_path: Path, write_jsonl: WriteJsonl, byte_tokenizer: Tokenizer
) -> None:
    import ray

    path = write_jsonl("train.jsonl", [f"document {i} {'some words ' * 30}" for i in range(12_000)])
    byte_tokenizer.save(tmp_path / "tokenizer.json")
    address = ray.get_runtime_context().gcs_address
    arguments = [address, str(path), str(tmp_path / "tokenizer.json"), str(tmp_path / "cache")]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], start_new_session=True)
    deadline = time.monotonic() + 60
    while not (done := sorted((tmp_path / "cache").glob("*.unfinished/shard-*.json"))):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "cache").glob("train-*/manifest.json"))
    before = {each.name: each.stat().st_mtime_ns for each in done}
    cache = prepare(expand(str(path)), byte_tokenizer, 64, tmp_path / "cache", range_bytes=400_000)
    after = {name: (cache.folder / name).stat().st_mtime_ns for name in before}
    assert after == before
    assert cache.manifest.documents == 12_000


def test_a_file_that_yields_nothing_is_named(
    tmp_path: Path, write_jsonl: WriteJsonl, byte_tokenizer: Tokenizer
) -> None:
    write_jsonl("src/good.jsonl", ["fine"])
    (tmp_path / "src/bad.jsonl").write_text('{"body": 1}\n\n')
    (tmp_path / "src/empty.jsonl").touch()
    with pytest.raises(DataError) as error:
        prepare(expand(str(tmp_path / "src")), byte_tokenizer, 32, tmp_path / "cache")
    assert str(error.value).splitlines() == [
        "bad.jsonl: no document in 2 lines, 1 of them bad",
        "empty.jsonl: no document in 0 lines",
        'bad.jsonl line 1: no "text" field (found: body); refused, 1 of 2 lines',
    ]


def test_a_damaged_archive_is_named(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    (tmp_path / "broken.jsonl.gz").write_bytes(b"\x1f\x8b\x08no archive")
    with pytest.raises(DataError, match=r"broken\.jsonl\.gz: cannot be read"):
        prepare(expand(str(tmp_path / "broken.jsonl.gz")), byte_tokenizer, 32, tmp_path / "cache")


def test_a_damaged_cache_is_named(tmp_path: Path, write_jsonl: WriteJsonl, byte_tokenizer: Tokenizer) -> None:
    folder = prepare(expand(str(write_jsonl("a.jsonl", ["x" * 99] * 9))), byte_tokenizer, 32, tmp_path / "cache").folder
    with (folder / "shard-00000.arrow").open("ab") as shard:
        shard.truncate(100)
    with pytest.raises(DataError, match=r"shard-00000\.arrow: has 100 of [\d,]+ bytes; delete the folder"):
        TokenCache.open(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="no complete token cache"):
        TokenCache.open(folder)


def test_only_the_first_bad_lines_are_named(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("{}\n" * 1_234 + json.dumps({"text": "good"}))
    report = bad_line_report(prepare(expand(str(path)), byte_tokenizer, 32, tmp_path, range_bytes=500).manifest)
    assert len(report) == 101
    assert report[99].startswith("many.jsonl line 100: ")
    assert report[100] == "… and 1,134 more bad lines"


def test_a_tokenizer_is_learnt_once(tmp_path: Path, write_jsonl: WriteJsonl, monkeypatch: pytest.MonkeyPatch) -> None:
    files = expand(str(write_jsonl("a.jsonl", ["one two three four"] * 50)))
    first = learn_tokenizer(files, tmp_path / "cache", vocab_size=270)
    monkeypatch.setattr(preparation, "train_tokenizer", None)
    assert learn_tokenizer(files, tmp_path / "cache", vocab_size=270).fingerprint == first.fingerprint
