"""Text in object storage: unusual names, globs, and objects whose format differs from their suffix."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from savant_ray.data.content import content_hashes
from savant_ray.data.record_reader import documents
from savant_ray.data.sources import expand
from savant_ray.errors import DataError
from savant_ray.storage.object_store import ObjectStorage
from tests.storage.object_store import ObjectStore

TEXT = b'{"text": "x"}\n'


def test_objects_with_unusual_names_are_found_and_read(store: ObjectStore) -> None:
    for name in ("a b/x%20#1é.jsonl", "a b/deep/[1]/y.JSONL", "a b/notes.txt", "a b/.hidden/z.jsonl"):
        store.write(name, TEXT)
    both = ["s3://bucket/a b/deep/[1]/y.JSONL", "s3://bucket/a b/x%20#1é.jsonl"]
    for pattern in ("a b", "a%20b/", "**/*.[jJ]*", "a*/**/[xy]*", "*/**.*L", "a b/**/*[lL]"):
        uri = store.uri(pattern).replace("s3://", "S3://")
        found = [file.path for file in expand(uri)]
        assert [path for path in found if "notes" not in path] == (both if "**.*L" not in pattern else both[:1]), (
            pattern
        )
    (file,) = expand(store.uri("a b/x*é.jsonl"))
    assert file.query == store.query and [document.text for document in documents([file])] == ["x"]
    for pattern in ("a b/deep/[1]/y.JSONL", "a b/deep/[1]/*", "*/deep/[1]/**"):
        assert [file.path for file in expand(store.uri(pattern))] == both[:1]
    with pytest.raises(DataError, match="no such match"):
        expand(store.uri("a b/*.parquet"))


def test_the_content_of_an_object_decides_its_format(store: ObjectStore, tmp_path: Path) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": ["x"]}), sink)
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, pa.schema({"text": pa.string()})) as writer:
        writer.write_table(pa.table({"text": ["x"]}))
    for name, content in {
        "gz.jsonl": gzip.compress(TEXT),
        "array.json": b'[{"text": "x"}]',
        "utf16.jsonl": TEXT.decode().encode("utf-16"),
        "parquet.jsonl": sink.getvalue(),
        "x.arrow": stream.getvalue(),
        "x.csv": gzip.compress(b"text\nx\n"),
    }.items():
        store.write(f"formats/{name}", content)
        files = expand(store.uri(f"formats/{name}"))
        content_hashes(files, tmp_path)
        assert [document.text for document in documents(files)] == ["x"]
    store.write("formats/pdf.jsonl", b"%PDF-1.4")
    with pytest.raises(DataError, match=r"s3://bucket/formats/pdf.jsonl: is a PDF, which is not supported"):
        content_hashes(expand(store.uri("formats/pdf.jsonl")), tmp_path)


def test_google_cloud_storage_is_not_retried_for_minutes_unless_configured() -> None:
    """Its client retries for 15 minutes without a network."""

    def seconds(uri: str) -> float:
        _, arguments = ObjectStorage(uri, Path("mirror")).filesystem.__reduce__()
        return arguments[0]["retry_time_limit"].total_seconds()

    assert seconds("gs://bucket/run") == seconds("GS://bucket/run?") == 30
    assert seconds("gs://bucket/run?retry_limit_seconds=600") == 600
