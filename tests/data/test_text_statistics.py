"""`savant data`: what is in the text, before a run prepares it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from savant_ray.cli import main
from savant_ray.data.documents import Document, DocumentRule, SourceText
from savant_ray.data.overlap import count_duplicates
from savant_ray.data.record_reader import documents
from savant_ray.data.records import Record
from savant_ray.data.sources import expand
from savant_ray.data.text_statistics import TextStatistics, named_lengths, shown_example, text_statistics
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.driver import data_files
from tests.data.without_ray import cache_of

CHAT = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}


def write_lines(path: Path, rows: list[Any]) -> Path:
    """Write JSON lines; strings are written as they are."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def count(path: Path, tokenizer: Tokenizer, rule: DocumentRule | None = None, **options: Any) -> TextStatistics:
    """Return the statistics of a file in sequences of 16 tokens."""
    text = SourceText(expand(str(path)), rule or DocumentRule())
    return text_statistics("any", text, tokenizer, 16, 1 << 20, set(), **options)


def test_the_counts_are_those_of_the_prepared_text(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    rows = [{"text": "x" * n} for n in (3, 3, 20, 40)] + ["broken", {"text": ""}, CHAT]
    path = write_lines(tmp_path / "a.jsonl", rows)
    counted = count(path, byte_tokenizer)
    rule = DocumentRule()
    records = [(number, row) for number, row in enumerate(rows, start=1) if isinstance(row, dict)]
    documents = [document for document in rule.documents(Record(*pair) for pair in records) if document.text]
    manifest = cache_of(documents, byte_tokenizer, 16, tmp_path / "cache").manifest
    assert (counted.documents, counted.tokens, counted.sequences) == (
        manifest.documents,
        manifest.tokens,
        manifest.rows,
    )
    assert counted.padding == manifest.rows * 16 - manifest.tokens
    for name in ("trained_tokens", "cut_documents", "shortest", "longest"):
        assert getattr(counted, name) == getattr(manifest, name) > 0
    assert (
        counted.lengths == named_lengths(manifest.lengths) == {"4 to 7": 2, "8 to 15": 0, "16 to 31": 2, "32 to 63": 1}
    )
    assert (counted.records, counted.bad_records, counted.duplicates, counted.cut_documents) == (7, 2, 1, 3)
    assert counted.bytes_read == counted.bytes == path.stat().st_size
    assert [problem.partition(" ")[2] for problem in counted.first_bad_records] == [
        "line 5: not JSON: Expecting value at character 1",
        'line 6: "text" is empty',
    ]
    assert sum(counted.lengths.values()) == counted.documents


@pytest.mark.parametrize("max_digests", [1, 7, 1 << 20])
def test_duplicates_in_prepared_text_are_those_that_the_command_counts(
    tmp_path: Path, byte_tokenizer: Tokenizer, max_digests: int
) -> None:
    draw = random.Random(1)
    texts = [[f"text {draw.randrange(60)}" for _ in range(50)] for _ in range(3)]
    seen: set[bytes] = set()
    counted, caches = [], []
    for number, of_source in enumerate(texts):
        path = write_lines(tmp_path / f"{number}.jsonl", [{"text": text} for text in of_source])
        source = SourceText(expand(str(path)))
        counted.append(text_statistics("any", source, byte_tokenizer, 16, 1 << 20, seen).duplicates)
        documents = [Document(line, text) for line, text in enumerate(of_source, start=1)]
        caches.append(cache_of(documents, byte_tokenizer, 16, tmp_path / f"cache {number}"))
    assert count_duplicates(caches, max_digests) == counted
    for digests in tmp_path.glob("*/*.documents"):
        digests.unlink()
    assert count_duplicates(caches, max_digests) == counted, "the counts are cached"
    assert count_duplicates(caches[:1], max_digests) is None, "a cache of an older version"


def test_examples_of_prepared_text_are_from_all_of_it(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    documents = [Document(number, f"number {number:03d}", trained=((7, 10),)) for number in range(1, 101)]
    for n_documents in (1, 2, 3, 100):
        cache = cache_of(documents[:n_documents], byte_tokenizer, 64, tmp_path / str(n_documents))
        examples = [shown_example(byte_tokenizer, example) for example in cache.examples(3)]
        assert len({str(example) for example in examples}) == len(examples) == min(n_documents, 3)
        for example in examples:
            assert [is_trained for _, is_trained in example] == [False, True]
            assert example[0][0] == "number " and example[1][0][:3].isdigit()


def test_examples_show_what_is_trained_on(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    counted = count(write_lines(tmp_path / "a.jsonl", [CHAT]), byte_tokenizer)
    (pieces,) = counted.examples
    assert [is_trained for _, is_trained in pieces] == [False, True]
    assert pieces[0][0] == "Question: 1 + 1?\nAnswer:"
    assert pieces[1][0].startswith(" 2")
    assert 0 < counted.trained_tokens < counted.tokens


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.csv"])
def test_a_sample_is_a_part_of_the_source_and_estimates_the_whole(
    tmp_path: Path, byte_tokenizer: Tokenizer, name: str
) -> None:
    draw = random.Random(0)
    frame = pd.DataFrame({"text": [f"{draw.getrandbits(200):x} {number:06d}" for number in range(20_000)]})
    path = tmp_path / name
    if name.endswith(".parquet"):
        frame.to_parquet(path, row_group_size=1000)
    elif name.endswith(".csv"):
        frame.to_csv(path, index=False)
    else:
        frame.to_json(path, orient="records", lines=True)
    counted = count(path, byte_tokenizer, sample_bytes=200_000)
    assert counted.bytes_read < counted.bytes
    assert counted.documents * counted.bytes / counted.bytes_read == pytest.approx(20_000, rel=0.2)
    everything = count(path, byte_tokenizer, sample_bytes=None)
    assert (everything.documents, everything.bytes_read) == (20_000, everything.bytes)


@pytest.mark.parametrize("limit", [1, 50, 120, 299])
@pytest.mark.parametrize("sample_bytes", [None, 8 << 20, 4_000])
@pytest.mark.parametrize("held_out", [0.0, 0.2])
def test_a_limit_is_that_of_the_source_and_not_of_each_file(
    tmp_path: Path, byte_tokenizer: Tokenizer, limit: int, sample_bytes: int | None, held_out: float
) -> None:
    for name in "abc":
        write_lines(tmp_path / f"{name}.jsonl", [*({"text": f"{name} {number}"} for number in range(100)), "{"])
    rule = DocumentRule(limit=limit, held_out=held_out)
    taken = sum(1 for _ in documents(expand(str(tmp_path)), rule=rule))
    counted = count(tmp_path, byte_tokenizer, rule, sample_bytes=sample_bytes)
    if sample_bytes == 4_000 and limit > 120:
        assert counted.documents < taken and not counted.is_limit_reached
    else:
        assert counted.documents == taken
        assert counted.is_limit_reached


def test_the_command_prints_the_documents_up_to_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        write_lines(tmp_path / f"{name}.jsonl", [{"text": f"{name} {number}"} for number in range(100)])
    sources = "[{path: [a.jsonl, b.jsonl, c.jsonl], weight: 1, limit: 50}]"
    for full in ([], ["--full"]):
        assert main(["data", "--data.sources", sources, "--model.vocab_size", "300", *full]) == 0
        printed = capsys.readouterr().out
        assert "documents         50" in printed and "(up to the limit)" in printed


def test_the_command_prints_counts_examples_and_steps_per_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "a.jsonl", [{"text": f"text {number}"} for number in range(50)] + ["{"])
    write_lines(tmp_path / "b.jsonl", [CHAT] * 2)
    settings = ["--model.vocab_size", "300", "--model.max_seq_len", "32", "--training.accumulation", "1"]
    assert main(["data", "a.jsonl", "b.jsonl", *settings, "--json", "figures.json"]) == 0
    printed = capsys.readouterr().out
    for expected in ("documents         50", "1 of 51 records", "line 51: ", "⟦Question: 1 + 1?", "steps per epoch"):
        assert expected in printed
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [source["documents"] for source in figures["sources"]] == [50, 2]
    assert [source["duplicates"] for source in figures["sources"]] == [0, 1]
    assert figures["fractions"] == [0.5, 0.5]


def test_weights_of_documents_are_printed_as_the_fractions_of_the_sequences_that_a_run_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "short.jsonl", [{"text": f"{number:03d}"} for number in range(320)])
    write_lines(tmp_path / "long.jsonl", [{"text": f"{number:03d} " + "x y z " * 200} for number in range(20)])
    write_lines(tmp_path / "blank.jsonl", [{"body": 1}])
    settings = ["--model.vocab_size", "300", "--model.max_seq_len", "64", "--data.mix_by", "documents"]
    assert main(["data", "short.jsonl", "long.jsonl", *settings, "--json", "figures.json"]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    sources, fractions = figures["sources"], figures["fractions"]
    n_documents = [
        fraction * source["documents"] / source["sequences"]
        for source, fraction in zip(sources, fractions, strict=True)
    ]
    assert sum(fractions) == pytest.approx(1) and fractions[1] > 0.9
    assert n_documents[0] == pytest.approx(n_documents[1]), "equal weights: equally many documents of both"
    assert main(["data", "short.jsonl", "blank.jsonl", *settings, "--json", "figures.json"]) == 0, (
        "one has no documents"
    )


def test_a_source_without_documents_has_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "a.jsonl", [{"text": "x" * 50}] * 5)
    write_lines(tmp_path / "b.jsonl", [{"body": 3}])
    assert main(["data", "a.jsonl", "b.jsonl", "--model.vocab_size", "300"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("warning: no documents") == 1 and '"text"' in printed and "less than 1" in printed


def test_the_command_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "missing.jsonl"]) != 0
    error = capsys.readouterr().err
    assert "data.sources[0].path: " in error and "missing.jsonl: no such file" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ful", "a.jsonl"], "--ful: no such option; did you mean --full?"),
        (["a.jsonl", "--jsn", "figures.json"], "--jsn: no such option; did you mean --json?"),
        (["a.jsonl", "--data.tokeniser", "x.json"], "did you mean data.tokenizer?"),
        (["a.jsonl", "--tokenizer", "x.json"], "data.tokenizer"),
    ],
)
def test_a_misspelt_option_is_named_with_a_suggestion(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    assert main(["data", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_validation_files_in_the_folder_of_a_source_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    write_lines(tmp_path / "text/a.jsonl", [{"text": f"text {number}"} for number in range(50)])
    write_lines(tmp_path / "text/held_out.jsonl", [{"text": f"other {number}"} for number in range(9)])
    settings = ["--model.vocab_size", "300", "--json", "figures.json"]
    for validation, n_documents in (("text/held_out.jsonl", 50), ("missing.jsonl", 59)):
        assert main(["data", "text", "--data.validation", validation, *settings]) == 0
        (source,) = json.loads((tmp_path / "figures.json").read_text())["sources"]
        assert source["documents"] == n_documents
        is_named = "left out of the training text, because it is the validation text" in "".join(capsys.readouterr())
        assert is_named == (n_documents == 50)


def test_of_a_source_with_many_paths_the_first_ones_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [str(write_lines(tmp_path / f"{number}.jsonl", [{"text": "a"}])) for number in range(900)]
    (tmp_path / "many.yaml").write_text(json.dumps({"data": {"sources": [{"path": paths, "weight": 1}]}}))
    assert main(["data", "--config", "many.yaml", "--model.vocab_size", "300"]) == 0
    printed = capsys.readouterr().out
    assert "0.jsonl, 1.jsonl, 2.jsonl, 3.jsonl, 4.jsonl and 895 more" in printed and "899.jsonl" not in printed


def test_the_command_writes_the_quickstarts_text_unless_other_sources_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def write(folder: Path, log: Any) -> None:  # the real text takes some 10 s
        folder.mkdir()
        write_lines(folder / "savant_dataset_train.jsonl", [{"text": "generated"}] * 7)
        write_lines(folder / "genius_dataset.jsonl", [{"text": "as well"}])

    monkeypatch.setattr(data_files, "write_quickstart", write)
    write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    settings = ["--model.vocab_size", "300", "--data.quickstart", "true"]
    assert main(["data", "a.jsonl", *settings]) == 0
    assert not (tmp_path / "dataset").exists()
    assert main(["data", *settings]) == 0
    assert "documents         7" in capsys.readouterr().out


def test_the_quickstarts_text_is_not_written_beside_other_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_files, "write_quickstart", lambda folder, log: pytest.fail(f"written into {folder}"))
    (tmp_path / "own").mkdir()
    write_lines(tmp_path / "own/a.jsonl", [{"text": f"text {number}"} for number in range(9)])
    (tmp_path / "copy.yaml").write_text(
        """
        data:
          quickstart: true  # as in configs/quickstart.yaml, of which this is a copy
          sources:
            - {path: own/*.jsonl, weight: 1}
            - {path: "other://host/savant_dataset_train.jsonl", weight: 1, optional: true}
          validation: {fraction: 0.5}
        """
    )
    assert main(["data", "--config", "copy.yaml", "--model.vocab_size", "300"]) == 0
    assert "1 file" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "copy.yaml", "own"]
