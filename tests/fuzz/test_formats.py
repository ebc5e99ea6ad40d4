"""The readers of every format: intact files yield their rows, damaged ones records, problems or an error with their name."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
from random import Random
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from savant_ray.data import decoded_stream
from savant_ray.data.documents import TEXT_RULE
from savant_ray.data.formats import CODECS, FORMAT_SUFFIXES
from savant_ray.data.record_reader import RecordReader, plan_parts
from savant_ray.data.records import Record
from savant_ray.data.sources import SourceFile, expand
from savant_ray.errors import DataError
from tests.fuzz.drawing import damaged, from_seed, random_text, random_value
from tests.fuzz.property import INPUTS, holds_for, scratch

COMPRESSIONS = {
    "": bytes,
    "gzip": lambda raw: gzip.compress(raw, 1, mtime=0),
    "bz2": bz2.compress,
    "xz": lambda raw: lzma.compress(raw, preset=0),
    "zstd": lambda raw: pa.compress(raw, "zstd", asbytes=True),
    "lz4": lambda raw: pa.compress(raw, "lz4", asbytes=True),
}
LIMIT = 100_000
Rows = list[dict[str, Any]]
Case = tuple[Rows, bytes, str]  # the rows, the intact file, its format


def valid_text(rng: Random, longest: int = 12) -> str:
    """Return a text without NUL and half surrogate pairs, which not every format can have."""
    return random_text(rng, longest).encode(errors="ignore").decode().replace("\0", "")


def random_rows(rng: Random) -> Rows:
    """Return up to 12 rows with equal keys."""
    return [
        {"text": valid_text(rng).replace("\r", ""), "lang": rng.choice(("en", ""))} for _ in range(rng.randrange(1, 12))
    ]


def json_file(rng: Random) -> Case:
    """Return an array, on one line or indented, or indented objects."""
    rows: Rows = [{"text": valid_text(rng), "more": _exact(random_value(rng))} for _ in range(rng.randrange(12))]
    if rng.random() < 0.3:
        return rows, "\n".join(json.dumps(row, indent=1) for row in rows).encode(), "json"
    return rows, json.dumps(rows, indent=rng.choice((None, 0, 2)), ensure_ascii=rng.random() < 0.5).encode(), "json"


def csv_file(rng: Random) -> Case:
    """Return CSV with a random delimiter, line end and quoting."""
    rows, sink = random_rows(rng), io.StringIO()
    quoting = rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    writer = csv.DictWriter(
        sink, list(rows[0]), delimiter=rng.choice(",;\t"), lineterminator=rng.choice(("\n", "\r\n")), quoting=quoting
    )
    writer.writeheader()
    writer.writerows(rows)
    return rows, sink.getvalue().encode(), "csv"


def text_file(rng: Random) -> Case:
    """Return one text, and the row that it is."""
    text = valid_text(rng).replace("\r", "").replace("\ufeff", "").rstrip("\n")
    return [{"text": text}] if text and not text.isspace() else [], text.encode(), "text"


def table_file(rng: Random) -> Case:
    """Return a Parquet file, an Arrow file or an Arrow stream with random options."""
    rows, sink = random_rows(rng), io.BytesIO()
    nested = [pa.array([[{"a": _scalar(rng)}, None] for _ in rows], pa.list_(pa.struct({"a": pa.string()})))]
    table = pa.Table.from_pylist(rows, pa.schema({"text": pa.string(), "lang": pa.string()}))
    if rng.random() < 0.5:
        table = table.append_column("nested", nested[0])
        rows = [{**row, "nested": value} for row, value in zip(rows, nested[0].to_pylist(), strict=True)]
    if rng.random() < 0.3:
        table = table.set_column(1, "lang", table["lang"].dictionary_encode())
    step = rng.randrange(1, 13)
    if rng.random() < 0.4:
        options = {"compression": rng.choice(("none", "snappy", "zstd", "gzip")), "use_dictionary": rng.random() < 0.5}
        pq.write_table(table, sink, row_group_size=step, **options)
        return rows, sink.getvalue(), "parquet"
    new = rng.choice((pa.ipc.new_file, pa.ipc.new_stream))
    options = pa.ipc.IpcWriteOptions(compression=rng.choice((None, "lz4", "zstd")))
    with new(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=step)
    return rows, sink.getvalue(), "arrow"


def file_of_any_format(rng: Random) -> Case:
    """Return a file of one of the formats."""
    return rng.choice((json_file, csv_file, text_file, table_file, table_file))(rng)


def damaged_file(rng: Random) -> tuple[bytes, str, str, bool]:
    """Return content, format, compression, and whether blocks of text are documents; the content may be any bytes."""
    _, content, file_format = file_of_any_format(rng)
    for _ in range(rng.choice((1, 1, 2, 5))):
        content = damaged(content, rng)
    if rng.random() < 0.1:
        content = bytes(rng.choices(b'\n\n\r{}"\xff\xefa:[,;\t\0\\', k=rng.randrange(200)))
    encoding = "" if file_format in ("parquet", "arrow") else rng.choice(tuple(COMPRESSIONS))
    content = COMPRESSIONS[encoding](content)
    return (
        damaged(content, rng) if encoding and rng.random() < 0.5 else content,
        file_format,
        encoding,
        rng.random() < 0.5,
    )


def named_file(rng: Random) -> tuple[str, bytes]:
    """Return a damaged file and its name, whose suffix fits in two of three cases."""
    content, file_format, encoding, _ = damaged_file(rng)
    if rng.random() < 0.3:
        _, content, file_format = file_of_any_format(rng)  # intact, perhaps under the name of another format
        encoding = ""
    if rng.random() < 0.3:
        file_format, encoding = rng.choice(tuple(FORMAT_SUFFIXES)), rng.choice(tuple(COMPRESSIONS))
    compressed = next((suffix for suffix, name in CODECS.items() if name == encoding), "")
    return f"any{rng.choice(FORMAT_SUFFIXES[file_format])}{compressed}", content


def read(content: bytes, options: dict[str, Any], part_bytes: int, block: int) -> list[Record]:
    """Return the records of the parts, numbered from the start of the file."""
    path = scratch() / "any.data"
    path.write_bytes(content)
    return read_file(SourceFile(str(path), len(content), 0, **options), part_bytes, block)


def read_file(file: SourceFile, part_bytes: int, block: int) -> list[Record]:
    """Return the records of the parts, numbered from the start of the file."""
    records: list[Record] = []
    with patch.object(decoded_stream, "BLOCK_BYTES", max(block, file.size // 100)):  # at most about 100 blocks
        for part in plan_parts([file], max(part_bytes, file.size // 20)):
            before = len(records)
            with RecordReader(part, LIMIT) as reader:
                records += [record._replace(number=record.number + before) for record in reader]
    return records


def check(records: list[Record]) -> None:
    assert [record.number for record in records] == list(range(1, len(records) + 1)), "lost or duplicated"
    for record in records:
        assert record.value is None or not record.problem
        assert record.problem.isprintable() and len(record.problem) < 500
        json.dumps(record.value)
    assert len(list(TEXT_RULE.documents(records))) == len(records)


PART_BYTES = st.sampled_from([1, 30, 300, 1 << 20])
BLOCKS = st.sampled_from([1, 3, 16, 1 << 20])


@holds_for(
    "JSON arrays, objects over several lines, CSV, text, Parquet, Arrow files and streams, text formats also compressed",
    case=from_seed(file_of_any_format),
    compression=st.sampled_from(list(COMPRESSIONS)),
    part_bytes=PART_BYTES,
    block=BLOCKS,
)
def test_any_parts_of_an_intact_file_yield_its_rows(case: Case, compression: str, part_bytes: int, block: int) -> None:
    rows, content, file_format = case
    if file_format not in ("parquet", "arrow"):
        content = COMPRESSIONS[compression](content)
    records = read(content, {"format_setting": file_format}, part_bytes, block)
    check(records)
    assert [record.value for record in records if record.value is not None] == rows


@holds_for(
    "such files after 1 to 5 damages, or of any bytes, in compressed files that may be damaged as well",
    case=from_seed(damaged_file),
    part_bytes=PART_BYTES,
    block=BLOCKS,
)
def test_a_damaged_file_of_any_format_yields_records_problems_or_an_error_with_its_name(
    case: tuple[bytes, str, str, bool], part_bytes: int, block: int
) -> None:
    content, file_format, encoding, text_blocks = case
    INPUTS[_reader(file_format, encoding)] += 1
    options = {"format": file_format, "encoding": encoding, "text_blocks": text_blocks}
    results = []
    for sizes in ((part_bytes, block), (1 << 20, 1 << 20)):
        try:
            records = read(content, options, *sizes)
        except DataError as error:
            assert "any.data: " in str(error) and str(error).isprintable()
            records = []
            results.append(None)
        else:
            check(records)
            results.append([(record.value, record.problem) for record in records])
    assert repr(results[0]) == repr(results[1]), "the parts together equal the file read at once"


@holds_for(
    "such files and intact ones under names of any format, which are detected by their first bytes",
    case=from_seed(named_file),
    part_bytes=PART_BYTES,
)
def test_a_file_whose_format_is_detected_yields_records_problems_or_an_error_with_its_name(
    case: tuple[str, bytes], part_bytes: int
) -> None:
    name, content = case
    (path := scratch() / name).write_bytes(content)
    try:
        (file,) = expand(str(path))
        INPUTS[_reader(file.format, file.encoding)] += 1
        check(read_file(file, part_bytes, 1 << 20))
    except DataError as error:
        assert f"{name}: " in str(error) and str(error).isprintable()
    finally:
        path.unlink()


def _reader(file_format: str, encoding: str) -> str:
    return ", ".join(filter(None, (file_format, encoding)))


def _exact(value: Any) -> Any:
    """Return a value that is equal to itself after it was written as JSON and read."""
    written = re.sub(r"\\ud[89a-f]..", "", json.dumps(value)).replace("NaN", "0").replace("Infinity", "0")
    return json.loads(written)


def _scalar(rng: Random) -> str | None:
    return rng.choice((None, valid_text(rng)))
