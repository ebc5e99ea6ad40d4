"""Records of every format: the same documents, any division into parts, damaged files, folders with several formats."""

from __future__ import annotations

import bz2
import csv
import datetime
import gzip
import io
import json
import lzma
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from savant_ray.data import decoded_stream
from savant_ray.data.content import content_hashes
from savant_ray.data.documents import TEXT_RULE, DocumentRule
from savant_ray.data.readers import tables
from savant_ray.data.record_reader import RecordReader, documents, plan_parts, records_before
from savant_ray.data.records import Record
from savant_ray.data.sources import SourceFile, expand
from savant_ray.errors import DataError

ROWS = [
    {"text": "first", "lang": "en"},
    {"text": 'two lines,\nwith "quotes"; and\ta tab', "lang": "de"},
    {"text": "déjà 漢字 🎉 \\ [{,", "lang": "fr"},
    {"text": "\u2028 last }]", "lang": "en"},
]


def parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, **options)
    return sink.getvalue()


def arrow(rows: list[dict[str, Any]], new: Callable[..., Any] = pa.ipc.new_file, batch_rows: int = 2) -> bytes:
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch_rows)
    return sink.getvalue()


def feather(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pyarrow.feather.write_feather(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def comma_separated(
    rows: list[dict[str, Any]], delimiter: str = ",", encoding: str = "utf-8", end: str = "\r\n"
) -> bytes:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, list(rows[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue().encode(encoding)


LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, ensure_ascii=False).encode()
CSV = comma_separated(ROWS)
FILES = {
    "lines.jsonl": LINES,
    "array.json": ARRAY,
    "indented.json": json.dumps(ROWS, indent=2).encode(),
    "brackets in one line.json": b"[ " + b", ".join(json.dumps(row, indent=1).encode() for row in ROWS) + b" ]\n",
    "comma first.json": ARRAY.replace(b"}, {", b"}\n,{"),
    "byte order mark.json": b"\xef\xbb\xbf" + ARRAY,
    "objects.json": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "x.parquet": parquet(ROWS, row_group_size=3),
    "brotli.parquet": parquet(ROWS, compression="brotli", data_page_version="2.0"),
    "x.arrow": arrow(ROWS),
    "stream.arrow": arrow(ROWS, pa.ipc.new_stream),
    "x.feather": feather(ROWS),
    "x.csv": CSV,
    "byte order mark.csv": b"\xef\xbb\xbf" + CSV,
    "x.tsv": comma_separated(ROWS, "\t"),
    "semicolon.csv": comma_separated(ROWS, ";", end="\n"),
    "unicode text of Excel.csv": comma_separated(ROWS, "\t", "utf-16"),
    "wrong.jsonl": parquet(ROWS),
    "wrong.parquet": LINES,
    "no suffix": arrow(ROWS),
    "wrong.csv": ARRAY,
    "lines.txt": LINES,
    **{
        f"{kind}.{kind}.{suffix}": compress(content)
        for kind, content in {"jsonl": LINES, "json": ARRAY, "csv": CSV}.items()
        for suffix, compress in {
            "gz": gzip.compress,
            "bz2": bz2.compress,
            "xz": lzma.compress,
            "zst": lambda raw: pa.compress(raw, "zstd", asbytes=True),
        }.items()
    },
    "lz4.jsonl": pa.compress(LINES, "lz4", asbytes=True),
}


def read(path: Path, part_bytes: int | None = None, limit: int = 1 << 20, **options: Any) -> list[Record]:
    """Read a file part by part; return all records, numbered from the start of the file."""
    records: list[Record] = []
    for part in plan_parts(expand(str(path), **options), part_bytes):
        with RecordReader(part, limit) as reader:
            before = len(records)
            records += [record._replace(number=record.number + before) for record in reader]
            assert reader.bytes_read <= part.stored_bytes or part_bytes
    return records


def values(records: list[Record]) -> list[Any]:
    assert [record.number for record in records] == list(range(1, len(records) + 1))
    assert not [record for record in records if record.problem]
    return [record.value for record in records if record.value is not None]


def problems(records: list[Record]) -> dict[int, str]:
    for record in records:
        assert record.problem.isprintable()
    return {record.number: record.problem for record in records if record.problem}


@pytest.fixture(params=[1 << 20, 7], ids=["large blocks", "small blocks"])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded_stream, "BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("scheme", ["", "mock://"], ids=["local", "uri"])
def test_the_same_rows_are_read_from_every_format_and_compression(
    tmp_path: Path, name: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name])
    if not scheme:
        assert values(read(path)) == ROWS
        return
    # A listing of object storage opens no file: only path and size are known.
    files = [SourceFile(str(path), len(FILES[name]), 0)]
    content_hashes(files, tmp_path / "cache")
    assert [document.text for document in documents(files)] == [row["text"] for row in ROWS]


LISTS = st.lists(st.text('ab é\n",;[{\\}]', min_size=1, max_size=12), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(texts=LISTS, group=st.integers(1, 7), part_bytes=st.integers(1, 3_000), batch=st.sampled_from([1, 3, 512]))
@pytest.mark.parametrize("kind", ["parquet", "file", "stream", "one batch"])
def test_any_parts_of_a_table_have_each_row_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, kind: str, texts: list[str], group: int, part_bytes: int, batch: int
) -> None:
    rows = [{"text": text, "n": n} for n, text in enumerate(texts)]
    path = tmp_path_factory.mktemp("rows") / "rows"
    match kind:
        case "parquet":
            path.write_bytes(parquet(rows, row_group_size=group))
        case "file":
            path.write_bytes(arrow(rows, batch_rows=group))
        case "stream":
            path.write_bytes(arrow(rows, pa.ipc.new_stream, group))
        case "one batch":
            path.write_bytes(arrow(rows, batch_rows=100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "BATCH_ROWS", batch)
        assert values(read(path, part_bytes)) == rows
    parts = plan_parts(expand(str(path)), part_bytes)
    assert sum(part.stored_bytes for part in parts) == path.stat().st_size
    before = 0
    for part in parts:
        assert records_before(part) == before
        with RecordReader(part) as records:
            before += len(list(records))
            assert records.bytes_read == part.stored_bytes


PIECES = st.sampled_from(["\n", "\n", "\n\n", "\r\n", "\r\n\r\n", " ", "\t", "a", "word", "é", "\n \n", "\u2028"])


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(PIECES, max_size=30), part_bytes=st.integers(1, 60), block=st.sampled_from([1, 3, 1 << 20]))
def test_any_parts_of_a_text_have_each_block_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[str], part_bytes: int, block: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "x.txt"
    path.write_bytes("".join(pieces).encode())
    blocks: list[list[str]] = [[]]
    for line in "".join(pieces).replace("\r\n", "\n").split("\n"):
        if line.strip(" \t"):
            blocks[-1].append(line)
        else:
            blocks.append([])
    expected = ["\n".join(lines) for lines in blocks if lines]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoded_stream, "BLOCK_BYTES", block)
        found = values(read(path, part_bytes, text_blocks=True))
    assert [value["text"] for value in found] == [text for text in expected if not text.isspace()]


def test_a_text_file_is_one_document_or_one_per_block(tmp_path: Path) -> None:
    path = tmp_path / "notes.md"
    path.write_bytes(b"\xef\xbb\xbf# A\r\n\r\nb\r\nc\r\n\r\n\r\nd\r\n")
    assert values(read(path)) == [{"text": "# A\n\nb\nc\n\n\nd"}]
    assert values(read(path, text_blocks=True)) == [{"text": "# A"}, {"text": "b\nc"}, {"text": "d"}]
    (tmp_path / "notes.txt.xz").write_bytes(lzma.compress(b"a\n\nb\n"))
    assert values(read(tmp_path / "notes.txt.xz", text_blocks=True)) == [{"text": "a"}, {"text": "b"}]


def test_values_of_all_arrow_types_become_json_values(tmp_path: Path) -> None:
    moment = datetime.datetime(2024, 2, 29, 12, 30, tzinfo=datetime.UTC)
    table = pa.table(
        {
            "large": pa.array(["a"], pa.large_string()),
            "category": pa.array(["b"]).dictionary_encode(),
            "binary": pa.array([b"c"], pa.binary()),
            "number": [1.5],
            "flag": [True],
            "null": [None],
            "day": [moment.date()],
            "moment": pa.array([moment.replace(tzinfo=None)], pa.timestamp("ns")),
            "far": pa.array([2**62], pa.timestamp("s")),
            "length": pa.array([5], pa.duration("s")),
            "decimal": pa.array([Decimal("1.10")]),
            "messages": [[{"role": "user", "content": "d", "at": moment.date()}]],
            "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
        }
    )
    expected = {
        "large": "a",
        "category": "b",
        "binary": "c",
        "number": 1.5,
        "flag": True,
        "null": None,
        "day": "2024-02-29",
        "moment": "2024-02-29 12:30:00.000000000",
        "decimal": "1.10",
        "length": "5",
        "messages": [{"role": "user", "content": "d", "at": "2024-02-29"}],
        "map": [["k", 1]],
    }
    pyarrow.feather.write_feather(table, tmp_path / "x.feather")
    (value,) = values(read(tmp_path / "x.feather"))
    assert "out of range" in value.pop("far")
    assert value == expected
    pq.write_table(table.drop_columns(["far"]), tmp_path / "x.parquet")
    assert values(read(tmp_path / "x.parquet"))[0]["messages"] == expected["messages"]


def test_only_the_requested_columns_are_read_if_they_exist(tmp_path: Path) -> None:
    for name in ("x.parquet", "x.arrow"):
        (tmp_path / name).write_bytes(FILES[name])
        (part, *_) = plan_parts(expand(str(tmp_path / name)))
        for fields, keys in ({"text"}, {"text"}), ({"text", "gone"}, {"text", "lang"}), (None, {"text", "lang"}):
            with RecordReader(part, fields=fields) as records:
                assert all(set(record.value or {}) == keys for record in records)


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_columns_that_the_rule_does_not_name_cannot_make_a_row_invalid(tmp_path: Path, name: str) -> None:
    table = pa.table({"body": ["a", "b", None], "lang": ["en", "de", "en"], "page": [b"\xff", b"\xff", b"\xff"]})
    if name.endswith("parquet"):
        pq.write_table(table, tmp_path / name)
    else:
        pyarrow.feather.write_feather(table, tmp_path / name, compression="uncompressed")
    files = expand(str(tmp_path / name))

    def results(**rule: Any) -> list[tuple[str, str]]:
        (part,) = plan_parts(files)
        chosen = DocumentRule(**rule)
        with RecordReader(part, fields=chosen.fields) as records:
            return [(document.text, document.problem) for document in chosen.documents(records)]

    assert results(text="body") == [("a", ""), ("b", ""), ("", '"body" is null, not a string')]
    assert results(template="{body}!", equals=(("lang", "de"),)) == [("", ""), ("b!", ""), ("", "")]
    assert results(text="page") == [("", '"page" is binary data that is not UTF-8, not a string')] * 3
    assert [document.text for document in documents(files, rule=DocumentRule(text="body"))] == ["a", "b"]


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
@pytest.mark.parametrize("binary", [pa.binary(), pa.binary(4), pa.struct({"bytes": pa.large_binary()})])
@pytest.mark.parametrize(
    ("fields", "rule", "text"),
    [
        ({"text": "a"}, {}, "a"),
        ({"meta": {"text": "b"}}, {"text": "meta.text"}, "b"),
        ({"prompt": "c", "completion": "d"}, {}, "Question: c\nAnswer: d"),
    ],
)
def test_binary_columns_beside_the_text_make_no_row_invalid(
    tmp_path: Path, name: str, binary: pa.DataType, fields: dict[str, Any], rule: dict[str, Any], text: str
) -> None:
    values = [b"\x89PNG", b"text", b"\xff\xd8\xff\xe0", None]
    column = pa.array([{"bytes": value} for value in values] if pa.types.is_struct(binary) else values, binary)
    table = pa.table({"image": column, **{field: [value] * len(values) for field, value in fields.items()}})
    (pq.write_table if name.endswith("parquet") else pyarrow.feather.write_feather)(table, tmp_path / name)
    read_documents = documents(expand(str(tmp_path / name)), rule=DocumentRule(**rule))
    assert [document.text for document in read_documents] == [text] * len(values)


def test_a_table_with_ten_thousand_columns_is_read(tmp_path: Path) -> None:
    wide = pa.table({"text": ["a", "b"], **{f"c{n}": [n, n] for n in range(10_000)}})
    pq.write_table(wide, tmp_path / "wide.parquet")
    assert [value["c9999"] for value in values(read(tmp_path / "wide.parquet"))] == [9999, 9999]


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.csv"])
def test_a_table_without_rows_has_no_records(tmp_path: Path, name: str) -> None:
    empty = pa.table({"text": pa.array([], pa.string())})
    match name:
        case "x.parquet":
            pq.write_table(empty, tmp_path / name)
        case "x.arrow":
            pyarrow.feather.write_feather(empty, tmp_path / name)
        case "x.csv":
            (tmp_path / name).write_text("text,label\n")
    assert read(tmp_path / name) == []


def test_a_row_without_a_text_is_reported_with_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None], "id": [1, 2]}), tmp_path / "x.parquet")
    (part,) = plan_parts(expand(str(tmp_path / "x.parquet")))
    with RecordReader(part) as records:
        (good, bad) = TEXT_RULE.documents(records)
    assert (good.text, bad.problem) == ("a", '"text" is null, not a string')
    assert part.file.record_name == "row"


def test_invalid_rows_of_a_table_are_reported_and_the_others_are_read(tmp_path: Path) -> None:
    binary = pa.array([b"a", b"\xff", b"c", b"x" * 3_000], pa.binary())
    damaged = pa.StringArray.from_buffers(4, *binary.buffers()[1:])
    reasons = {"binary": "binary data that is not UTF-8, not a string", "string": "not valid UTF-8"}
    for name, column in {"binary": binary, "string": damaged}.items():
        pyarrow.feather.write_feather(pa.table({"text": column}), tmp_path / f"{name}.arrow")
        found = list(TEXT_RULE.documents(read(tmp_path / f"{name}.arrow", limit=2_000)))
        assert [document.text for document in found] == ["a", "", "c", ""]
        assert [found[1].problem, found[3].problem] == [
            f'"text" is {reasons[name]}',
            "row of 3,004 bytes, over the limit of 2,000",
        ]


def test_an_invalid_value_in_a_list_of_parquet_concerns_only_its_row(tmp_path: Path) -> None:
    rows = [{"text": "a", "tags": ["good"]}, {"text": "b", "tags": ["w?rd"]}, {"text": "c", "tags": []}]
    content = parquet(rows, compression="none", use_dictionary=False, write_statistics=False)
    (tmp_path / "x.parquet").write_bytes(content.replace(b"w?rd", b"w\xefrd"))
    records = read(tmp_path / "x.parquet")
    assert [record.value["text"] for record in records if record.value] == ["a", "c"]
    assert problems(records) == {2: '"tags" is not valid UTF-8'}


def test_invalid_rows_of_csv_are_reported_with_their_line_and_the_others_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(
        b'text,label\na,1\n"two\nlines",2\nb\nc,3,more\n\n"d"e,4\nf\xff,5\ng\0,6\n'
        + b"h" * 2_000
        + b',7\ni,8\n"not closed,9\nj,10\n'
    )
    records = read(tmp_path / "x.csv", limit=1_000)
    texts = [record.value["text"] for record in records if record.value]
    assert texts == ["a", "two\nlines", "i", "j"]
    assert problems(records) == {
        3: "1 fields, but the header has 2 (line 5 of the file)",
        4: "3 fields, but the header has 2 (line 6 of the file)",
        6: "',' expected after '\"'; if quotes are ordinary characters in this file, set quotes: false (line 8 of the file)",
        7: "invalid UTF-8 (0xff at byte 2) (line 9 of the file)",
        8: "contains a NUL character (line 10 of the file)",
        9: "line of 2,002 bytes, over the limit of 1,000 (line 11 of the file)",
        11: "a quote is not closed: with it, the row would have all 2 lines to the end of the file; if quotes are ordinary "
        "characters in this file, set quotes: false (line 13 of the file)",
    }


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('id\ttext\n1\t"a\n2\tb\n3\tc" d\n4\te\n', ['"a', "b", 'c" d', "e"]),  # never closed
        ('id\ttext\n1\t"a\n2\tb\n3\t"c\n4\te\n', ['"a', "b", '"c', "e"]),  # closed by another field's quote
        ('id\ttext\n1\t"a" b\n2\t5" disk\n3\t"c"\n', ['"a" b', '5" disk', "c"]),
        ('id\ttext\n1\t"a" b\n2\t"c\n3\td"\n', ['"a" b', '"c', 'd"']),  # the first row shows that there is no quoting
        ('text\tid\n"a\tb\nc"\t1\nd\t2\n', ["a\tb\nc", "d"]),
        ('id\ttext\n1\t"two\nlines"\n2\t"a ""b"""\n', ["two\nlines", 'a "b"']),
    ],
)
def test_a_stray_quote_between_tabs_takes_no_other_row_with_it(tmp_path: Path, content: str, texts: list[str]) -> None:
    (tmp_path / "x.tsv").write_text(content)
    records = read(tmp_path / "x.tsv")
    assert not problems(records)
    assert [value["text"] for value in values(records)] == texts


def test_a_stray_quote_in_the_header_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text('id\t"text\n1\ta\n')
    with pytest.raises(DataError, match="x.tsv: the header cannot be read .*; if quotes are .*, set quotes: false"):
        read(tmp_path / "x.tsv")
    assert values(read(tmp_path / "x.tsv", quotes=False)) == [{"id": "1", '"text': "a"}]


def test_a_stray_quote_between_commas_makes_one_row_invalid_which_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('id,text\n1,"a\n2,b\n3,c\n4,"d" e\n5,f\n')
    records = read(tmp_path / "x.csv")
    assert [record.value["text"] for record in records if record.value] == ["b", "c", "f"]
    assert list(problems(records)) == [1, 4]
    assert all("set quotes: false (line" in problem for problem in problems(records).values())
    without_quotes = values(read(tmp_path / "x.csv", quotes=False))
    assert [value["text"] for value in without_quotes] == ['"a', "b", "c", '"d" e', "f"]


@pytest.mark.parametrize(
    "content",
    [
        "sep=;\r\nid;text\r\n1;a, b\r\n",  # as Excel reads it
        '\ufeff"sep=\t"\nid\ttext\n1\ta, b\n',
        "id|text\n1|a, b\n",
        'id,text,,\n1,"a, b",,\n',  # empty columns on the right of a spreadsheet
        ',id,text\n0,1,"a, b"\n',  # the index of a data frame
        'id, text\n1, "a, b"\n',
    ],
    ids=["sep", "sep tab", "bar", "unnamed", "index", "spaces"],
)
def test_csv_is_read_as_different_programs_write_it(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.csv").write_text(content, newline="")
    assert values(read(tmp_path / "x.csv")) == [{"id": "1", "text": "a, b"}]


@pytest.mark.parametrize("name", ["x.tsv", "x.TSV", "x.tsv.gz"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("text\na | b\nc, d; e\n", [{"text": "a | b"}, {"text": "c, d; e"}]),
        ("text\ttags|marks\na | b\tc\n", [{"text": "a | b", "tags|marks": "c"}]),
        ("id|text\n1|a\n", [{"id": "1", "text": "a"}]),
    ],
    ids=["one column", "a bar in a name", "bars"],
)
def test_a_file_named_tsv_has_tabs_unless_its_header_has_more_of_another_delimiter(
    tmp_path: Path, name: str, content: str, expected: list[dict[str, str]]
) -> None:
    stored = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(stored) if name.endswith(".gz") else stored)
    assert values(read(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("content", "texts", "expected"),
    [
        (
            b'[\n{"text": "a"},\n{"text": "b\n"},\n17,\n{"text": "c"} {},\n{"text": "d"}\n]\n',
            ["a", "d"],
            ["not JSON: Invalid control character", "a number, not an object", "not JSON: Extra data"],
        ),
        (b"[]\n", [], []),
        (b'[{"text": "a"}]\n\n\n', ["a"], []),
        (b'[\n{"text": "a"},\n{"text": "cut', ["a"], ["truncated JSON"]),
        (b'[\n{"text": "a"},\n', ["a"], ["the JSON array has no closing bracket; the file is truncated"]),
        (
            b'[\n{"text": "a"}, {"text": "' + b"x" * 2_000 + b'"}, {"text": "b"}]',
            ["a", "b"],
            ["JSON value of 2,013 bytes"],
        ),
        (b'[\n{"text": "a"}]\n[{"text": "b"}]', ["a", "b"], []),
        (b'[\n{"text": "a"},\n]', ["a"], []),
        (b'{\n"text": "a"\n}\n}\n{"text": "b"}', ["a"], ["not JSON: Expecting value"]),
        (b"[\n]", [], []),
    ],
)
@pytest.mark.usefixtures("block_bytes")
def test_invalid_elements_of_an_array_are_reported_and_the_others_are_read(
    tmp_path: Path, content: bytes, texts: list[str], expected: list[str]
) -> None:
    (tmp_path / "x.json").write_bytes(content)
    records = read(tmp_path / "x.json", limit=1_000)
    assert [record.value["text"] for record in records if record.value] == texts
    found = list(problems(records).values())
    assert len(found) == len(expected) and all(map(str.startswith, found, expected))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("cut.parquet", FILES["x.parquet"][:-9], "cannot be read"),
        ("magic.parquet", b"PAR1", "cannot be read"),
        ("page.parquet", FILES["x.parquet"][:20] + b"\xff" * 60 + FILES["x.parquet"][80:], "cannot be read"),
        ("footer.arrow", FILES["x.arrow"][:-20] + b"\xff" * 10 + FILES["x.arrow"][-10:], "cannot be read"),
        ("cut.arrow", FILES["x.arrow"][: len(FILES["x.arrow"]) // 2], "cannot be read"),
        ("cut.stream.arrow", FILES["stream.arrow"][:400], "cannot be read"),
        ("cut.jsonl.gz", gzip.compress(LINES)[:-20], "cannot be read"),
        ("cut.csv.gz", gzip.compress(CSV)[:-20], "cannot be read"),
        ("cut.json.xz", lzma.compress(ARRAY)[:-20], "cannot be read"),
        ("garbage.jsonl.xz", b"\xfd7zXZ\x00" + b"x" * 100, "cannot be read"),
        ("names.csv", b"text,text\na,b\n", "2 columns have the name 'text'"),
        ("names.arrow", arrow([]) and b"", ""),
        (
            "header.csv",
            b'"text\na\n',
            r"the header cannot be read \(a quote is not closed: with it, the row would have all 2 lines to the end",
        ),
        (
            "mac.csv",
            b"id,text\r1,a\r",
            r"the header cannot be read \(a carriage return within a line; lines have to end with",
        ),
        ("zip.parquet", b"PK\x03\x04....", "is a zip archive, which is not supported; unpack it"),
    ],
)
def test_a_damaged_file_is_reported_by_name(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    if not content:
        both = pa.table([["a"], ["b"]], names=["text", "text"])
        pyarrow.feather.write_feather(both, tmp_path / name)
        reason = "2 columns have the name 'text'"
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason) as error:
        read(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}: ") and str(error.value).isprintable()


def test_an_arrow_stream_without_an_end_marker_is_read_and_reported(tmp_path: Path) -> None:
    (tmp_path / "x.arrow").write_bytes(FILES["stream.arrow"][:-8])
    for part_bytes in (1, None):
        records = read(tmp_path / "x.arrow", part_bytes)
        assert [record.value for record in records if record.value] == ROWS
        assert problems(records) == {5: "the Arrow stream has no end marker; the file is truncated"}


def test_a_text_that_is_not_text_is_reported(tmp_path: Path) -> None:
    for content, problem in {
        b"a\xff": "invalid UTF-8 (0xff at byte 2)",
        b"a\0b": "contains a NUL character, so it is not text",
        b"x" * 2_000: "text of 2,000 bytes, over the limit of 1,000",
    }.items():
        (tmp_path / "x.txt").write_bytes(content)
        assert problems(read(tmp_path / "x.txt", limit=1_000)) == {1: problem}


@pytest.mark.parametrize("name", ["x.log", "x.mbox", "x.py", "corpus"])
def test_the_first_invalid_line_of_a_file_that_is_not_named_as_json_says_what_to_set(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"Hello\nworld\n")
    hint = "; if the file is plain text or CSV, set format"
    reason = "not JSON: Expecting value at character 1"
    assert problems(read(tmp_path / name)) == {1: reason + hint, 2: reason}
    assert problems(read(tmp_path / name, file_format="jsonl")) == {1: reason, 2: reason}
    assert values(read(tmp_path / name, file_format="text")) == [{"text": "Hello\nworld"}]


def test_a_format_that_is_set_is_used_unless_the_content_shows_another(tmp_path: Path) -> None:
    (tmp_path / "x.dat").write_bytes(CSV)
    assert values(read(tmp_path / "x.dat", file_format="csv")) == ROWS
    (tmp_path / "x.txt").write_bytes(LINES)
    assert values(read(tmp_path / "x.txt", file_format="text")) == [{"text": LINES.decode().rstrip()}]
    (tmp_path / "x.jsonl").write_bytes(FILES["x.parquet"])
    with pytest.raises(DataError, match="is a Parquet file, but its setting is format: jsonl; set format: parquet"):
        expand(str(tmp_path / "x.jsonl"), file_format="jsonl")
    with pytest.raises(DataError, match="is not a Parquet file, but its setting is format: parquet; set format: auto"):
        expand(str(tmp_path / "x.txt"), file_format="parquet")
    with pytest.raises(DataError, match="format: xml is not one of auto, jsonl"):
        expand(str(tmp_path / "x.txt"), file_format="xml")


def names(files: list[SourceFile], folder: Path) -> list[str]:
    return [str(Path(file.path).relative_to(folder)) for file in files]


@pytest.mark.parametrize("scheme", ["", "file://"], ids=["path", "uri"])
def test_plain_text_of_a_folder_is_used_only_if_it_has_no_data_files(tmp_path: Path, scheme: str) -> None:
    for name in (
        "data/a.csv",
        "data/b.parquet",
        "data/README.md",
        "data/requirements.txt",
        "data/code.py",
        "books/a.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(FILES["x.parquet"] if name.endswith("parquet") else b"text\n")
    folder = f"{scheme}{tmp_path}"
    warned: list[str] = []
    assert names(expand(f"{folder}/data", warned.append), tmp_path) == ["data/a.csv", "data/b.parquet"]
    several = "has files in several formats (1 csv, 1 parquet); all are used (set format to choose)"
    assert warned == [f"{folder}/data: {several}"]
    assert names(expand(f"{folder}/data/[!c]*", warned.append), tmp_path) == ["data/a.csv", "data/b.parquet"]
    assert len(warned) == 4 and "README.md: plain text beside data files; skipped" in warned[1]
    assert names(expand(f"{folder}/data/*.md"), tmp_path) == ["data/README.md"]
    assert names(expand(f"{folder}/data/README.md"), tmp_path) == ["data/README.md"]
    assert names(expand(f"{folder}/books"), tmp_path) == ["books/a.txt"]
    text = expand(f"{folder}/data", warned.append, file_format="text")
    assert len(warned) == 4
    assert names(text, tmp_path) == ["data/README.md", "data/requirements.txt"]
    assert names(expand(f"{folder}/data", file_format="csv"), tmp_path) == ["data/a.csv"]


def test_of_a_saved_hugging_face_data_set_only_the_data_is_read(tmp_path: Path) -> None:
    for split in ("train", "test"):
        folder = tmp_path / "saved" / split
        folder.mkdir(parents=True)
        (folder / "data-00000-of-00001.arrow").write_bytes(arrow(ROWS, pa.ipc.new_stream))
        (folder / "cache-0123456789abcdef.arrow").write_bytes(arrow(ROWS, pa.ipc.new_stream))
        for name in ("dataset_info.json", "state.json"):
            (folder / name).write_text('{\n  "text": "a description"\n}')
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    expected = [f"{split}/data-00000-of-00001.arrow" for split in ("test", "train")]
    for pattern in ("saved", "saved/**", "saved/*/*"):
        assert names(expand(str(tmp_path / pattern)), tmp_path / "saved") == expected
    assert values(read(tmp_path / "saved/train")) == ROWS
