"""A tokenizer that fits into the vocabulary of `OriginalProgram`."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = [f"w{number}" for number in range(45)]


def write_tokenizer(folder: Path) -> Path:
    """Write a tokenizer.json with 48 words into the folder; return the folder."""
    vocabulary = {word: number for number, word in enumerate(["<unk>", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
