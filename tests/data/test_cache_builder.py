"""Building token caches: identified by content, resumed after a kill, repaired after damage; invalid input is reported."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import tokenizers
from invalid_lines import CONTENT, GOOD, LINES, MAX_LINE_BYTES, PROBLEMS
from tokenizers import models, processors

from savant_ray.data import cache_builder, content
from savant_ray.data.atomic_files import fingerprint
from savant_ray.data.cache_builder import empty_file_report, prepare, train_or_load_tokenizer
from savant_ray.data.conversations import ChatTemplate
from savant_ray.data.documents import DocumentRule, SourceText
from savant_ray.data.overlap import count_duplicates, count_overlapping_documents, stored_digests
from savant_ray.data.sources import expand
from savant_ray.data.token_cache import TokenCache, dropped_report, invalid_line_report
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.errors import DataError, UnexpectedError

WriteJsonl = Callable[[str, Iterable[str]], Path]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("real_ray")]


def pieces_of(cache: TokenCache) -> dict[tuple[str, int], list[list[int]]]:
    """Return the token pieces of each document by file and line."""
    sequences = cache.take(np.arange(cache.n_sequences))
    pieces = defaultdict(list)
    for row, (tokens, ids) in enumerate(zip(sequences.tokens, sequences.document_ids, strict=True)):
        assert (tokens[ids == -1] == 0).all()
        for document, origin in enumerate(cache.documents(row)):
            pieces[origin].append(tokens[ids == document].tolist())
    return pieces


def assert_holds(cache: TokenCache, tokenizer: Tokenizer, texts: dict[tuple[str, int], str]) -> None:
    """Assert that the cache contains exactly these documents, each completely and with its file and line."""
    pieces = pieces_of(cache)
    assert pieces.keys() == texts.keys()
    for origin, text in texts.items():
        whole = [*tokenizer.encode(text), tokenizer.end_of_document]
        assert whole in [sum(order, []) for order in permutations(pieces[origin])]


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Return inode and modification time of each file, which change if the file is rewritten."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_documents_are_read_back_and_a_second_call_reuses_the_cache(
    tmp_path: Path, write_jsonl: WriteJsonl, byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{'déjà 漢字 ' * (i % 5)}document {i}" for i in range(300)]
    for part in range(3):
        write_jsonl(f"src/part-{part}.jsonl", texts[part::3])
    calls: list[tuple[int, int]] = []
    files = expand(str(tmp_path / "src"))
    cache = prepare(
        files, byte_tokenizer, 128, tmp_path / "cache", part_bytes=2_000, progress=lambda *now: calls.append(now)
    )
    total = sum(file.size for file in files)
    assert_holds(cache, byte_tokenizer, {(f"part-{i % 3}.jsonl", i // 3 + 1): text for i, text in enumerate(texts)})
    assert calls[0] == (0, total)
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)

    monkeypatch.setattr(cache_builder.ray.data, "from_items", None)
    again = prepare(expand(str(tmp_path / "src")), byte_tokenizer, 128, tmp_path / "cache", part_bytes=2_000)
    assert again.fingerprint == cache.fingerprint


def test_an_unexpected_error_in_a_task_has_file_cause_and_traceback(
    tmp_path: Path, write_jsonl: WriteJsonl, byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl("train.jsonl", ["a text"])
    unloadable = copy.copy(byte_tokenizer)  # in a task, which knows another version of tokenizers
    monkeypatch.setattr(unloadable, "to_json", lambda: json.dumps({"version": "of another age"}))
    with pytest.raises(UnexpectedError) as caught:
        prepare(expand(str(path)), unloadable, 32, tmp_path / "cache")
    assert str(caught.value).startswith(f"while tokenizing {path}: ") and "\n" not in str(caught.value)
    assert caught.value.details.startswith("Traceback (most recent call last)")


def test_the_manifest_has_the_counts_of_documents_bytes_tokens_and_rows(
    tmp_path: Path, write_jsonl: WriteJsonl, byte_tokenizer: Tokenizer
) -> None:
    path = write_jsonl("train.jsonl", ["é" * 10, "a" * 40, "b" * 20])
    manifest = prepare(expand(str(path)), byte_tokenizer, 32, tmp_path / "cache").manifest
    assert (manifest.documents, manifest.text_bytes, manifest.tokens) == (3, 80, 83)
    assert (manifest.rows, manifest.padding) == (3, 13)
    assert manifest.target_tokens == 83 - 4  # the document of 41 tokens is two pieces
    assert [(each.path, each.lines, each.documents) for each in manifest.files] == [("train.jsonl", 3, 3)]


@pytest.mark.parametrize(
    ("name", "part_bytes"),
    [("all.jsonl", None), ("all.jsonl", 64), ("all.jsonl.gz", None), ("all.jsonl.zst", None)],
    ids=["plain", "many ranges", "gz", "zst"],
)
def test_every_kind_of_invalid_line_is_reported_with_its_line_number(
    tmp_path: Path, byte_tokenizer: Tokenizer, name: str, part_bytes: int | None
) -> None:
    with pa.output_stream(str(tmp_path / name), compression="detect") as stream:
        stream.write(CONTENT)

    def run(on_bad_line: str) -> TokenCache:
        files = expand(str(tmp_path / name))
        return prepare(files, byte_tokenizer, 64, tmp_path, on_bad_line, MAX_LINE_BYTES, part_bytes)

    cache = run("skip")
    good_lines = [line for line, (raw, reason) in enumerate(LINES, 1) if not reason and raw.strip()]
    assert_holds(cache, byte_tokenizer, {(name, line): text for line, text in zip(good_lines, GOOD, strict=True)})
    assert invalid_line_report(cache.manifest) == [
        f"{name} line {line}: {reason}; skipped, {len(PROBLEMS)} of {len(LINES)} lines"
        for line, reason in PROBLEMS.items()
    ]
    with pytest.raises(DataError) as refused:
        run("error")
    assert str(refused.value) == "\n".join(invalid_line_report(cache.manifest, verdict="refused"))
    assert run("skip").n_sequences == cache.n_sequences


def test_the_name_of_a_cache_folder_depends_on_the_content_of_the_files(
    tmp_path: Path, write_jsonl: WriteJsonl, byte_tokenizer: Tokenizer
) -> None:
    def folder(length: int = 32, tokenizer: Tokenizer = byte_tokenizer) -> str:
        return prepare(expand(str(path)), tokenizer, length, tmp_path / "cache").folder.name

    path = write_jsonl("one/train.jsonl", ["a" * 20] * 9)
    first = folder()
    os.utime(path, (1, 1))
    assert folder() == first
    path = write_jsonl("two/train.jsonl", ["a" * 20] * 9)
    assert folder() == first
    assert first.startswith("train-")
    other = train_or_load_tokenizer(expand(str(path)), tmp_path / "cache", vocab_size=260)
    names = {first, folder(33), folder(tokenizer=other)}
    path = write_jsonl("two/train.jsonl", ["a" * 20] * 8 + ["b" * 20])
    assert len(names | {folder()}) == 4


def test_intact_shards_of_an_unfinished_build_are_kept_and_damaged_ones_rebuilt(
    tmp_path: Path, write_jsonl: WriteJsonl, byte_tokenizer: Tokenizer
) -> None:
    path = write_jsonl("train.jsonl", [f"document {i} {'x' * (i % 50)}" for i in range(400)])

    def run() -> TokenCache:
        return prepare(expand(str(path)), byte_tokenizer, 64, tmp_path / "cache", part_bytes=4_000)

    whole = run()
    before, expected = snapshot(whole.folder), whole.take(np.arange(whole.n_sequences))
    unfinished = whole.folder.rename(whole.folder.with_suffix(".unfinished"))
    (unfinished / "manifest.json").unlink()
    (unfinished / "shard-00001.json").unlink()  # killed between shard and summary
    (unfinished / "shard-00002.arrow").write_bytes(b"half")  # the disk lost the rest
    (unfinished / "shard-00003.json").write_text("{")
    (unfinished / "shard-00004.arrow.1.tmp").write_bytes(b"half")
    flip_a_bit(unfinished / "shard-00004.arrow")
    again = run()
    changed = {name for name, state in snapshot(again.folder).items() if before.get(name) != state}
    assert not list(again.folder.glob("*.tmp"))
    redone = {f"shard-0000{i}.{suffix}" for i in (1, 2, 3, 4) for suffix in ("arrow", "documents", "json")}
    assert changed == {"manifest.json", *redone}
    assert np.array_equal(again.take(np.arange(again.n_sequences)).tokens, expected.tokens)
    assert again.manifest == whole.manifest


KILLED = """
import sys, ray
from savant_ray.data.cache_builder import prepare
from savant_ray.data.sources import expand
from savant_ray.data.tokenizer import Tokenizer
ray.init(address=sys.argv[1], log_to_driver=False)
after = [] if sys.argv[5] else None
prepare(
    expand(sys.argv[2]), Tokenizer.load(sys.argv[3]), 64, sys.argv[4], part_bytes=200_000, deduplicate_after=after
)
"""


@pytest.mark.parametrize("after", [None, []], ids=["all documents", "without duplicates"])
def test_a_killed_preparation_resumes_with_its_complete_shards(
    tmp_path: Path, write_jsonl: WriteJsonl, byte_tokenizer: Tokenizer, after: list[TokenCache] | None
) -> None:
    import ray

    path = write_jsonl("train.jsonl", [f"document {i} {'some words ' * 30}" for i in range(6_000)])
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer.to_json(), encoding="utf-8")
    address = ray.get_runtime_context().gcs_address
    arguments = [address, str(path), str(tmp_path / "tokenizer.json"), str(tmp_path / "cache")]
    arguments.append("" if after is None else "deduplicate")
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
    reported: list[int] = []
    cache = prepare(
        expand(str(path)),
        byte_tokenizer,
        64,
        tmp_path / "cache",
        part_bytes=200_000,
        deduplicate_after=after,
        progress=lambda done, total: reported.append(done),
    )
    assert {name: (cache.folder / name).stat().st_mtime_ns for name in before} == before
    assert cache.manifest.documents == 6_000
    assert reported == sorted(reported) and reported[0] > 0, "duplicates are not searched again"
    assert not list(cache.folder.glob("duplicates*"))


def test_files_without_a_document_are_named_and_refused_only_if_no_file_has_one(
    tmp_path: Path, write_jsonl: WriteJsonl, byte_tokenizer: Tokenizer
) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src/bad.jsonl").write_text('{"body": 1}\n\n')
    (tmp_path / "src/empty.jsonl").touch()
    with pytest.raises(DataError) as error:
        prepare(expand(str(tmp_path / "src")), byte_tokenizer, 32, tmp_path / "cache")
    without_document = ["bad.jsonl: no document in 2 lines, 1 of them invalid", "empty.jsonl: no document in 0 lines"]
    assert str(error.value).splitlines() == [
        *without_document,
        'bad.jsonl line 1: no "text" field (found: body); refused, 1 of 2 lines',
    ]
    write_jsonl("src/good.jsonl", ["fine"])
    manifest = prepare(expand(str(tmp_path / "src")), byte_tokenizer, 32, tmp_path / "cache").manifest
    assert manifest.documents == 1 and empty_file_report(manifest) == without_document


@pytest.mark.parametrize("is_deleted", [False, True])
def test_a_cache_whose_digests_are_damaged_is_repaired_and_counted_again(
    tmp_path: Path, write_jsonl: WriteJsonl, byte_tokenizer: Tokenizer, is_deleted: bool
) -> None:
    files = expand(str(write_jsonl("a.jsonl", ["a", "b", "c", "a"])))
    cache = prepare(files, byte_tokenizer, 32, tmp_path / "cache")
    (digests,) = cache.folder.glob("*.documents")
    if is_deleted:
        digests.unlink()
    else:
        digests.write_bytes(digests.read_bytes()[:8])
    assert count_duplicates([cache]) != [1], "what an earlier version counted, and kept"
    messages: list[str] = []
    cache = prepare(files, byte_tokenizer, 32, tmp_path / "cache", log=messages.append)
    assert len(messages) == 1 and str(digests) in messages[0] and messages[0].endswith("rebuilding it")
    assert count_duplicates([cache]) == [1]


def test_a_file_that_changes_while_it_is_read_leaves_no_cache_under_the_name_of_its_old_content(
    tmp_path: Path, write_jsonl: WriteJsonl, byte_tokenizer: Tokenizer
) -> None:
    path = write_jsonl("train.jsonl", ["first"] * 9)

    def prepare_while(change: Callable[[], None]) -> TokenCache:
        return prepare(
            expand(str(path)),
            byte_tokenizer,
            32,
            tmp_path / "cache",
            progress=lambda done, total: change() if done == total else None,
        )

    def rewrite() -> None:
        path.write_text(path.read_text().replace("first", "other"))

    def grow() -> None:
        with path.open("a") as file:
            file.write('{"text": "more"}\n')

    with pytest.raises(DataError, match=r"train\.jsonl: was changed while it was read"):
        prepare_while(rewrite)
    assert [each.name for each in (tmp_path / "cache").iterdir() if each.is_dir()] == []
    assert prepare_while(grow).manifest.documents == 9, "what was listed; the rest belongs to the next launch"
    assert prepare_while(lambda: None).manifest.documents == 10


def test_validation_documents_in_the_training_text_are_counted_and_the_count_is_cached(
    tmp_path: Path, write_jsonl: WriteJsonl, byte_tokenizer: Tokenizer
) -> None:
    def cache(name: str, texts: list[str], part_bytes: int | None = None) -> TokenCache:
        files = expand(str(write_jsonl(name, texts)))
        return prepare(files, byte_tokenizer, 32, tmp_path / "cache", part_bytes=part_bytes)

    sources = [cache("a.jsonl", [f"text {i}" for i in range(200)], 500), cache("b.jsonl", ["böse", "gut"])]
    validation = cache("val.jsonl", ["text 7", "text 7", "new", "böse", "text", "text 199"])
    assert count_overlapping_documents(validation, sources) == 4
    assert count_overlapping_documents(cache("new.jsonl", ["new"]), sources) == 0
    for digests in (tmp_path / "cache").glob("*/*.documents"):
        digests.unlink()
    assert count_overlapping_documents(validation, sources) == 4, "remembered"
    for remembered in (tmp_path / "cache").glob("overlap-*.json"):
        remembered.write_text(remembered.read_text().replace("4", "3"))
    assert count_overlapping_documents(validation, sources) is None, "what was altered is not believed"
    assert count_overlapping_documents(validation, sources[:1]) is None, "a cache of an older version"


def test_a_file_of_any_name_can_be_prepared(tmp_path: Path, write_jsonl: WriteJsonl, byte_tokenizer: Tokenizer) -> None:
    deep = "/".join(["folder with a long name"] * 12)
    (tmp_path / deep).mkdir(parents=True)
    for name in ("n" * 249 + ".jsonl", "é" * 124 + ".jsonl", f"{deep}/x.jsonl", ".jsonl"):
        files = [*expand(str(write_jsonl(name, [name]))), *expand(str(write_jsonl("z.jsonl", ["z"])))]
        assert prepare(files, byte_tokenizer, 32, tmp_path / "cache").manifest.documents == 2


def test_a_damaged_compressed_file_is_reported_by_name(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    (tmp_path / "broken.jsonl.gz").write_bytes(b"\x1f\x8b\x08no archive")
    with pytest.raises(DataError, match=r"broken\.jsonl\.gz: cannot be read"):
        prepare(expand(str(tmp_path / "broken.jsonl.gz")), byte_tokenizer, 32, tmp_path / "cache")


def flip_a_bit(path: Path) -> None:
    """Damage a file without changing its size or modification time."""
    content, status = bytearray(path.read_bytes()), path.stat()
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def alter_a_number(path: Path) -> None:
    path.write_text(path.read_text().replace('"rows": ', '"rows": 1'))


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("shard-00001.arrow", flip_a_bit, "its checksum differs"),
        ("shard-00001.arrow", cut_in_half, r"has [\d,]+ of [\d,]+ bytes"),
        ("shard-00001.arrow", Path.unlink, "cannot be read"),
        ("manifest.json", cut_in_half, "cannot be used"),
        ("manifest.json", alter_a_number, "its checksum differs"),
        ("manifest.json", Path.unlink, "cannot be used"),
    ],
)
def test_only_the_damaged_files_of_a_cache_are_rebuilt(
    name: str,
    damage: Callable[[Path], None],
    words: str,
    tmp_path: Path,
    write_jsonl: WriteJsonl,
    byte_tokenizer: Tokenizer,
) -> None:
    path = write_jsonl("train.jsonl", [f"document {i} {'x' * (i % 50)}" for i in range(300)])
    messages: list[str] = []

    def run() -> TokenCache:
        return prepare(expand(str(path)), byte_tokenizer, 64, tmp_path / "cache", part_bytes=4_000, log=messages.append)

    whole = run()
    run()  # has compared every shard with its checksum
    before, expected = snapshot(whole.folder), whole.take(np.arange(whole.n_sequences))
    damage(whole.folder / name)
    again = run()
    assert len(messages) == 1 and re.search(f"{name}: .*{words}.*; rebuilding it", messages[0])
    assert np.array_equal(again.take(np.arange(again.n_sequences)).tokens, expected.tokens)
    changed = {name for name, state in snapshot(again.folder).items() if before.get(name) != state}
    assert changed <= {"manifest.json", "shard-00001.arrow", "shard-00001.json", "shard-00001.documents"}
    run()
    assert len(messages) == 1


@pytest.mark.parametrize("damage", [cut_in_half, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("pattern", ["content-hashes.json", "tokenizer-*.json"])
def test_damaged_hash_and_tokenizer_files_in_the_cache_folder_are_rebuilt(
    pattern: str,
    damage: Callable[[Path], None],
    tmp_path: Path,
    write_jsonl: WriteJsonl,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(content, "SETTLED_SECONDS", -60)  # remembers the hash of a file that was written just now
    files = expand(str(write_jsonl("a.jsonl", ["one two three four"] * 50)))
    first = train_or_load_tokenizer(files, tmp_path / "cache", vocab_size=270)
    (path,) = (tmp_path / "cache").glob(pattern)
    written = path.read_bytes()
    damage(path)
    assert train_or_load_tokenizer(files, tmp_path / "cache", vocab_size=270).fingerprint == first.fingerprint
    assert path.read_bytes() == written


def test_opening_a_damaged_cache_reports_the_damaged_file(
    tmp_path: Path, write_jsonl: WriteJsonl, byte_tokenizer: Tokenizer
) -> None:
    folder = prepare(expand(str(write_jsonl("a.jsonl", ["x" * 99] * 9))), byte_tokenizer, 32, tmp_path / "cache").folder
    with (folder / "shard-00000.arrow").open("ab") as shard:
        shard.truncate(100)
    with pytest.raises(
        DataError, match=r"shard-00000\.arrow: has 100 of [\d,]+ bytes; run the same command again to repair it"
    ):
        TokenCache.open(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="not a complete token cache"):
        TokenCache.open(folder)


def test_a_text_that_the_tokenizer_cannot_encode_is_reported_with_file_and_line(
    tmp_path: Path, write_jsonl: WriteJsonl
) -> None:
    inner = tokenizers.Tokenizer(models.Unigram([("</s>", 0.0), *((letter, -5.0) for letter in "abc ")]))
    inner.save(str(tmp_path / "unigram.json"))
    path = write_jsonl("train.jsonl", ["abc " * (1 + i % 7) for i in range(600)] + ["", "abc 1"])
    with pytest.raises(DataError) as refused:
        prepare(expand(str(path)), Tokenizer.load(tmp_path / "unigram.json"), 32, tmp_path / "cache", part_bytes=1_500)
    assert str(refused.value).startswith(f"{path} line 602: the tokenizer {tmp_path / 'unigram.json'} cannot encode")
    assert "set data.tokenizer to one with an unknown token" in str(refused.value)


def test_characters_that_a_tokenizer_drops_are_counted(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    vocabulary = {letter: i for i, letter in enumerate("abc")} | {"</s>": 3}
    tokenizer = Tokenizer(tokenizers.Tokenizer(models.BPE(vocabulary, [])), "the tokenizer bpe.json")
    path = write_jsonl("train.jsonl", ["abc"] * 300 + ["a漢b é é", "é"] + ["cab"] * 300)
    manifest = prepare(expand(str(path)), tokenizer, 32, tmp_path / "cache", part_bytes=2_000).manifest
    (report,) = dropped_report(manifest, tokenizer.name)
    assert all(fact in report for fact in ("bpe.json", "4 of 1,808 characters", "train.jsonl line 301", "é 漢"))
    path = write_jsonl("other.jsonl", ["漢字", "é"])
    with pytest.raises(DataError, match=r"bpe\.json has no token for any character of other\.jsonl \(line 1: 字 漢\)"):
        prepare(expand(str(path)), tokenizer, 32, tmp_path / "cache")


def test_a_cache_of_an_earlier_format_is_built_again_and_its_runs_can_be_resumed(
    tmp_path: Path, write_jsonl: WriteJsonl, byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = expand(str(write_jsonl("a.jsonl", ["ab", "cd"])))
    with monkeypatch.context() as patch:
        patch.setattr(cache_builder, "FORMAT_VERSION", cache_builder.FORMAT_VERSION - 1)
        earlier = prepare(files, byte_tokenizer, 8, tmp_path / "cache")
    before = snapshot(earlier.folder)
    cache = prepare(files, byte_tokenizer, 8, tmp_path / "cache")
    assert cache.folder != earlier.folder and snapshot(earlier.folder) == before
    assert cache.fingerprint == earlier.fingerprint, "the same data, which a checkpoint is compared with"


def test_a_chat_template_is_part_of_the_identity_of_conversations_only(
    tmp_path: Path, byte_tokenizer: Tokenizer
) -> None:
    path, folder = tmp_path / "a.jsonl", tmp_path / "cache"

    def built(template: ChatTemplate | None) -> TokenCache:
        text = SourceText(expand(str(path)), DocumentRule(chat_template=template))
        return prepare([text], byte_tokenizer, 32, folder, max_line_bytes=1_000)

    content = '{"text": "ab"}\n{"text": "cd", "messages": []}\n'
    path.write_text(content)
    templates = [None, ChatTemplate("{{ messages[0].content }}"), ChatTemplate("", problem="no network")]
    texts = [built(template) for template in templates]
    assert len({cache.folder for cache in texts}) == 1, "built once"
    digest = hashlib.sha256(content.encode()).hexdigest()
    earlier = {"version": 1, "files": [["a.jsonl", digest]], "recipe": [byte_tokenizer.fingerprint, 32, 1_000, None]}
    assert texts[0].fingerprint == fingerprint(earlier), "of versions that read no conversations"
    path.write_text(content + '{"messages": [{"role": "assistant", "content": "e"}]}\n')
    mixed = [built(template) for template in (*templates, ChatTemplate("", problem="no access"))]
    assert [cache.manifest.documents for cache in mixed] == [3, 3, 2, 2]
    assert len({cache.fingerprint for cache in mixed}) == len({cache.folder for cache in mixed}) == 3


@pytest.mark.parametrize(
    ("field", "message", "changed"),
    [
        ("messages", {"role": "assistant", "content": "b"}, False),
        ("messages", {"role": "assistant", "content": "b", "tags": ["x"]}, True),
        ("messages", {"role": "assistant", "content": "b", "tool_calls": [{"function": {"name": "f"}}]}, True),
        (None, {"role": "assistant", "content": "b", "tool_calls": [{"function": {"name": "f"}}]}, True),
        ("meta.messages", {"role": "assistant", "content": "b", "tool_calls": [{"function": {"name": "f"}}]}, True),
    ],
)
def test_only_tables_that_earlier_versions_may_have_read_otherwise_have_another_identity(
    field: str | None,
    message: dict[str, Any],
    changed: bool,
    tmp_path: Path,
    byte_tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "a.parquet"
    record = {"messages": [{"role": "user", "content": "a"}, message]}
    pq.write_table(pa.Table.from_pylist([{"meta": record} if field == "meta.messages" else record]), path)
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")

    def built() -> str:
        texts = [SourceText(expand(str(path)), DocumentRule(messages=field, chat_template=template))]
        return prepare(texts, byte_tokenizer, 32, tmp_path / "cache").fingerprint

    now = built()
    monkeypatch.setattr("savant_ray.data.cache_builder.has_nested_items", lambda *_: False)  # as before
    assert (built() != now) == changed


def test_a_table_with_a_column_name_that_is_not_utf_8_is_reported_by_name(
    tmp_path: Path, byte_tokenizer: Tokenizer
) -> None:
    columns = pa.schema([pa.field("messages", pa.string()), pa.field(b"\xe9t\xe9", pa.string())])
    pa.feather.write_feather(pa.Table.from_arrays([["a"], ["b"]], schema=columns), tmp_path / "a.arrow", "uncompressed")
    texts = [SourceText(expand(str(tmp_path / "a.arrow")), DocumentRule(messages="messages"))]
    with pytest.raises(DataError, match=r"a\.arrow.*UTF-8"):
        prepare(texts, byte_tokenizer, 32, tmp_path / "cache")


def test_texts_in_a_table_with_nested_lists_keep_their_identity(
    tmp_path: Path, byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.Table.from_pylist([{"text": "ab", "links": [{"tags": ["x"]}]}]), tmp_path / "a.parquet")
    texts = [SourceText(expand(str(tmp_path / "a.parquet")))]
    now = prepare(texts, byte_tokenizer, 32, tmp_path / "cache").fingerprint
    monkeypatch.setattr("savant_ray.data.cache_builder.has_nested_items", lambda *_: False)  # as before
    assert prepare(texts, byte_tokenizer, 32, tmp_path / "cache").fingerprint == now


def test_another_end_of_document_token_gives_another_cache(
    tmp_path: Path, write_jsonl: WriteJsonl, byte_tokenizer: Tokenizer
) -> None:
    files = expand(str(write_jsonl("a.jsonl", ["ab"])))
    cache = prepare(files, byte_tokenizer, 8, tmp_path / "cache")
    named = byte_tokenizer.with_settings("<|end_of_document|>")
    assert prepare(files, named, 8, tmp_path / "cache").folder == cache.folder, "the same token, named"
    other = byte_tokenizer.with_settings("<|pad|>")
    again = prepare(files, other, 8, tmp_path / "cache")
    assert again.folder != cache.folder
    assert again.take(np.array([0])).tokens[0].tolist() == [*byte_tokenizer.encode("ab"), 0, *[0] * 5]
    assert again.take(np.array([0])).document_ids[0].tolist() == [0, 0, 0, *[-1] * 5]


def test_special_tokens_give_another_cache_and_do_not_count_as_text(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    inner = tokenizers.Tokenizer(models.BPE({"[CLS]": 0, "[SEP]": 1, "a": 2, "b": 3}, []))
    inner.post_processor = processors.BertProcessing(("[SEP]", 1), ("[CLS]", 0))
    tokenizer = Tokenizer(inner, "the tokenizer mine.json")
    files = expand(str(write_jsonl("a.jsonl", ["ab"])))
    cache = prepare(files, tokenizer, 8, tmp_path / "cache")
    assert cache.take(np.array([0])).tokens[0].tolist() == [0, 2, 3, 1, 0, 0, 0, 0]
    assert cache.take(np.array([0])).document_ids[0].tolist() == [0] * 4 + [-1] * 4
    assert (cache.manifest.target_tokens, cache.manifest.text_bytes) == (3, 2)
    without = prepare(files, tokenizer.with_settings(add_special_tokens=False), 8, tmp_path / "cache")
    assert without.folder != cache.folder
    assert without.take(np.array([0])).tokens[0].tolist() == [2, 3, 1, *[0] * 5]
    path = write_jsonl("other.jsonl", ["漢字", "é"])
    with pytest.raises(DataError, match=r"mine\.json has no token for any character of other\.jsonl"):
        prepare(expand(str(path)), tokenizer, 32, tmp_path / "cache")


def test_only_the_first_invalid_lines_are_named(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("{}\n" * 1_234 + json.dumps({"text": "good"}))
    report = invalid_line_report(prepare(expand(str(path)), byte_tokenizer, 32, tmp_path, part_bytes=500).manifest)
    assert len(report) == 101
    assert report[99].startswith("many.jsonl line 100: ")
    assert "1,134 more" in report[100]


def test_a_tokenizer_is_trained_once(tmp_path: Path, write_jsonl: WriteJsonl, monkeypatch: pytest.MonkeyPatch) -> None:
    files = expand(str(write_jsonl("a.jsonl", ["one two three four"] * 50)))
    first = train_or_load_tokenizer(files, tmp_path / "cache", vocab_size=270)
    monkeypatch.setattr(cache_builder, "train_tokenizer", None)
    assert train_or_load_tokenizer(files, tmp_path / "cache", vocab_size=270).fingerprint == first.fingerprint
    (path,) = (tmp_path / "cache").glob("tokenizer-*.json")
    path.rename(path.with_name(path.name.rpartition("-")[0] + ".json"))  # as versions without checksums named it
    assert train_or_load_tokenizer(files, tmp_path / "cache", vocab_size=270).fingerprint == first.fingerprint


def test_json_lines_named_txt_have_one_identity_whether_the_listing_knows_their_format_or_not(
    tmp_path: Path, write_jsonl: WriteJsonl, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl("a.txt", ["one two three four"] * 50)
    files = expand(str(path))
    first = train_or_load_tokenizer(files, tmp_path / "cache", vocab_size=270)
    monkeypatch.setattr(cache_builder, "train_tokenizer", None)
    as_in_object_storage = [dataclasses.replace(file, format="", encoding="") for file in files]
    again = train_or_load_tokenizer(as_in_object_storage, tmp_path / "cache", vocab_size=270)
    assert again.fingerprint == first.fingerprint


def test_a_cache_has_the_documents_that_the_rules_of_its_sources_take(
    tmp_path: Path, byte_tokenizer: Tokenizer
) -> None:
    for name in ("a", "b"):
        rows = [{"body": f"{name} {i // 2}", "lang": "en" if i % 4 else "de"} for i in range(400)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = expand(str(tmp_path / "*.jsonl"))

    def cache(*sources: SourceText, after: list[TokenCache] | None = None) -> TokenCache:
        return prepare(sources, byte_tokenizer, 64, tmp_path / "cache", part_bytes=900, deduplicate_after=after)

    def digests(cache: TokenCache) -> list[int]:
        return [digest for block in stored_digests(cache) for digest in block.tolist()]

    rule = DocumentRule(text="body", equals=(("lang", "en"),))
    everything = cache(SourceText(files, rule))
    assert (everything.manifest.documents, everything.manifest.filtered) == (600, 200)
    limited = cache(SourceText(files, dataclasses.replace(rule, limit=333)))
    assert digests(limited) == digests(everything)[:333]
    assert [file.documents for file in limited.manifest.files] == [300, 33]
    split = dataclasses.replace(rule, held_out=0.1)
    training = cache(SourceText(files, split))
    held_out = cache(*(SourceText([file], dataclasses.replace(split, split="validation")) for file in files))
    assert not set(digests(training)) & set(digests(held_out))
    assert sorted(digests(training) + digests(held_out)) == sorted(digests(everything))
    first = cache(SourceText(files[:1], rule), after=[])
    rest = cache(SourceText(files, rule), after=[first])
    assert digests(first) + digests(rest) == list(dict.fromkeys(digests(everything)))
    assert (first.manifest.duplicates, rest.manifest.duplicates) == (100, 400)
    assert len({found.fingerprint for found in (everything, limited, training, held_out, first, rest)}) == 6
    assert cache(SourceText(files, rule)).fingerprint == everything.fingerprint


def test_every_format_gives_the_same_rows_and_problems_are_named_by_row_or_line(
    tmp_path: Path, byte_tokenizer: Tokenizer
) -> None:
    rows = [{"text": text} for text in ["first", "second", "", "fourth"]]
    table = pa.Table.from_pylist(rows)
    (tmp_path / "src").mkdir()
    (tmp_path / "src/x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "src/x.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "src/x.csv").write_text('"text","other"\n' + "".join(f'"{row["text"]}",\n' for row in rows))
    pq.write_table(table, tmp_path / "src/x.parquet")
    pa.feather.write_feather(table, str(tmp_path / "src/x.arrow"))
    contents = set()
    for suffix, unit in {"jsonl": "line", "json": "record", "csv": "row", "parquet": "row", "arrow": "row"}.items():
        cache = prepare(expand(str(tmp_path / f"src/x.{suffix}")), byte_tokenizer, 16, tmp_path / suffix)
        contents.add((cache.folder / cache.manifest.shards[0].name).read_bytes())
        assert invalid_line_report(cache.manifest) == [f'x.{suffix} {unit} 3: "text" is empty; skipped, 1 of 4 {unit}s']
    assert len(contents) == 1
    (tmp_path / "src/notes.txt").write_text("a\n\nb\n")
    files = expand(str(tmp_path / "src/notes.txt"))
    blocks = expand(str(tmp_path / "src/notes.txt"), text_blocks=True)
    caches = [prepare(listed, byte_tokenizer, 16, tmp_path / "text") for listed in (files, blocks)]
    assert [cache.manifest.documents for cache in caches] == [1, 2], "the setting is part of a cache's identity"
