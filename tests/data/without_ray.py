"""Token caches that are written without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from savant_ray.data.documents import Document
from savant_ray.data.shard_writer import PartSummary, Recipe, shard_name, write_documents
from savant_ray.data.token_cache import MANIFEST, FileSummary, Manifest, ShardInfo, TokenCache
from savant_ray.data.tokenizer import Tokenizer


def cache_of(documents: Sequence[Document], tokenizer: Tokenizer, sequence_length: int, folder: Path) -> TokenCache:
    """Return a token cache of one shard with these documents, each of which has its number."""
    folder.mkdir(parents=True, exist_ok=True)
    list(write_documents(folder, 0, documents, Recipe.of(tokenizer, sequence_length, 1 << 20), PartSummary()))
    counts = PartSummary.read(folder / shard_name(0))
    names = {field.name for field in fields(Manifest)} & {field.name for field in fields(PartSummary)}
    manifest = Manifest(
        fingerprint="",
        sequence_length=sequence_length,
        files=(FileSummary("made.jsonl", counts.lines, counts.documents, counts.bad_lines),),
        shards=(ShardInfo(shard_name(0), counts.shard_bytes, counts.rows, "made.jsonl", 0, counts.shard_crc32),),
        first_bad_lines=(),
        **{name: getattr(counts, name) for name in names - {"first_bad_lines", "first_dropped"}},
    )
    (folder / MANIFEST).write_text(manifest.to_json())
    return TokenCache.open(folder)
