"""Fixtures: a local Ray, a byte-level tokenizer without merges, JSONL files, a small Hugging Face Hub."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from savant_ray.data.tokenizer import Tokenizer, train_tokenizer
from tests.data.hub_on_loopback import Hub, served_hub

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def default_recursion_limit() -> Iterator[None]:
    """Set Python's default recursion limit, which limits how deep JSON can be nested; PyTorch's compiler increases it."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """A tokenizer with one token per byte, and one at the end of each document."""
    return train_tokenizer(iter(()), vocab_size=258)


@pytest.fixture(scope="module")
def real_ray() -> Iterator[None]:
    """A local Ray with two CPUs, shut down after the module."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        yield
        ray.shutdown()


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, Iterable[str]], Path]:
    """A function that writes texts as a JSONL file in the folder of the test."""

    def write(name: str, texts: Iterable[str]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return path

    return write


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with one data set, to which HF_ENDPOINT points."""
    with served_hub() as (served, address):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the environment of tests may set it
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield served
