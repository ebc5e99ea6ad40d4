"""`python jobs/train.py` from text to a checkpoint that generates, stopped and resumed in between."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from savant_ray.cli import main
from savant_ray.data.token_cache import TokenCache
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.training.checkpoint import checkpoints, read_checkpoint
from tests.cluster.conftest import (
    ROOT,
    Head,
    environment,
    losses,
    options,
    records,
    run_job,
    wait_for,
    with_text,
)
from tests.data.albert_like import CLS, SEP, with_chat_template

pytestmark = pytest.mark.slow


class Finished(NamedTuple):
    """A completed run of eight steps, and what it printed."""

    workplace: Path
    run: Path
    printed: str


@pytest.fixture(scope="module")
def finished(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    workplace = with_text(tmp_path_factory.mktemp("finished"))
    code, printed = run_job(head, workplace, validation__logic_problems=12)
    assert code == 0, printed
    return Finished(workplace, workplace / "tiny", printed)


def copied(finished: Finished, target: Path) -> Path:
    shutil.copytree(finished.workplace, target, dirs_exist_ok=True)
    return target


@pytest.mark.rare
def test_a_run_equals_its_repetition_without_ray(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(finished.run)]) == 0
    printed = capsys.readouterr().out
    equal = "steps 1 to 8 and the checkpoints step_4, step_8 are equal to the record of the run, bit for bit"
    assert equal in printed and "starting Ray" not in printed


def test_a_finished_run_has_all_its_files_and_records(finished: Finished) -> None:
    run = finished.run
    assert {p.name for p in run.iterdir()} >= {
        "step_4", "step_8", "config.yaml", "metrics.jsonl", "samples.jsonl", "training_log.txt",
    }  # fmt: skip
    assert len(losses(run)) == 8 and losses(run)[-1] < losses(run)[0]
    assert [v["step"] for v in records(run, "validation")] == [4, 8]
    assert [(c["step"], c["reason"]) for c in records(run, "checkpoint")] == [(4, "periodic"), (8, "final")]
    assert all(s["tokens"] > 0 and s["grad_norm"] > 0 for s in records(run, "step"))
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [4, 8] and samples[0]["prompt"].startswith("Question: If X = 5")
    scores = [(s["step"], s["n"], s["final"]) for s in records(run, "score")]
    assert scores == [(4, 12, False), (8, 600, True)]
    log = (run / "training_log.txt").read_text()
    assert all(f"validation at step {step}" in log for step in (4, 8)) and samples[0]["prompt"].split("\n")[1] in log


def test_the_reference_lists_every_file_of_a_run_its_cache_and_its_text(finished: Finished) -> None:
    page = (ROOT / "docs/reference/run_folder.md").read_text()
    listed = re.findall(r"^(?:[│├└─ ]+|\| `)([^ `]+?)/?[ `]", page, re.MULTILINE)
    patterns = [re.sub(r"\d+", r"\\d+", re.escape(name).replace("…", ".*")) for name in listed]
    patterns = [re.sub(r"<\w+>", r"\\w+", pattern) for pattern in patterns]
    files = [path.name for folder in ("tiny", "cache", "dataset") for path in (finished.workplace / folder).rglob("*")]
    assert [name for name in files if not any(re.fullmatch(pattern, name) for pattern in patterns)] == []


def test_a_run_prints_missing_optional_sources_and_the_next_command(finished: Finished) -> None:
    assert "optional genius_dataset.jsonl" in finished.printed
    assert f"jobs/generate.py --checkpoint {finished.run}" in finished.printed


def test_generate_completes_a_prompt_with_a_checkpoint(finished: Finished) -> None:
    command = [sys.executable, str(ROOT / "jobs/generate.py"), "--checkpoint", "tiny", "--prompt", "one two"]
    command += ["--max-new-tokens", "100", "--json", "answer.json"]  # past max_seq_len = 64
    done = subprocess.run(command, cwd=finished.workplace, env=environment(), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads((finished.workplace / "answer.json").read_text())
    assert done.stdout.strip() == "one two" + answer["text"].rstrip() and answer["prompt"] == "one two"


@pytest.mark.rare
def test_a_finished_run_can_be_extended(head: Head, finished: Finished, tmp_path: Path) -> None:
    workplace = copied(finished, tmp_path)
    code, printed = run_job(head, workplace, training__max_steps=10)
    assert code == 0 and "step_8" in printed, printed
    assert "changed since step_8: training.max_steps: 8, now 10" in printed and "schedule of the new length" in printed
    assert losses(workplace / "tiny")[:8] == losses(finished.run) and len(losses(workplace / "tiny")) == 10


@pytest.mark.rare
def test_a_run_from_a_file_of_the_original_equals_one_that_was_extended(
    head: Head, finished: Finished, tmp_path: Path
) -> None:
    workplace = copied(finished, tmp_path)
    original = workplace / "flat/step_8.pt"
    original.parent.mkdir()
    assert main(["export", str(workplace / "tiny"), "--format", "original", "--output", str(original)]) == 0
    code, printed = run_job(head, workplace, training__max_steps=10)
    assert code == 0, printed
    longer, tokenizer = losses(workplace / "tiny"), workplace / "tiny/step_8/tokenizer.json"
    assert longer[:8] == losses(finished.run) and len(longer) == 10
    taken_over = dict(run__name="flat", training__max_steps=10, data__tokenizer=tokenizer)
    code, printed = run_job(head, workplace, **taken_over)
    assert code == 4 and "model.global_every: 2, but the original has 4" in printed, printed
    code, printed = run_job(head, workplace, "--allow-changes", **taken_over)
    assert code == 0 and "saved step_8 (converted from step_8.pt of the original" in printed, printed
    assert f"resuming from {original.with_suffix('')}" in printed
    assert [(s["step"], s["train_loss"]) for s in records(workplace / "flat", "step")] == [
        (9, longer[8]),
        (10, longer[9]),
    ]
    assert original.exists(), "the run must not delete it"
    assert [c["step"] for c in records(workplace / "flat", "checkpoint")] == [8, 10], "converted, then its own"


@pytest.mark.rare
def test_allow_changes_resumes_with_other_text_and_keeps_the_tokenizer(
    head: Head, finished: Finished, tmp_path: Path
) -> None:
    workplace = copied(finished, tmp_path)
    add_other_words(workplace / "dataset/savant_dataset_train.jsonl")
    code, printed = run_job(head, workplace, "--allow-changes", training__max_steps=9)
    assert code == 0 and "step_8" in printed, printed
    assert losses(workplace / "tiny")[:8] == losses(finished.run) and len(losses(workplace / "tiny")) == 9
    assert tokenizer_of(workplace / "tiny/step_9") == tokenizer_of(workplace / "tiny/step_8")


def add_other_words(path: Path) -> None:
    """Append text on which another tokenizer would be trained."""
    with path.open("a") as text:
        text.write((json.dumps({"text": "zebra quartz vexed jumbling waltz nymph " * 9}) + "\n") * 3)


def tokenizer_of(checkpoint: Path) -> str:
    return (checkpoint / "tokenizer.json").read_text()


def test_two_workers_take_the_same_steps_as_one_and_each_writes_its_profile(
    head: Head, finished: Finished, tmp_path: Path
) -> None:
    code, printed = run_job(
        head,
        with_text(tmp_path),
        "--verbose",
        scaling__num_workers=2,
        validation__logic_problems=12,
        training__profile="{first_step: 3, steps: 2, ranks: all}",
    )
    assert code == 0, printed
    assert [s["n"] for s in records(tmp_path / "tiny", "score")] == [12, 600], "shared by the two"
    rays = re.compile(r"\(TrainController pid=\d+\)")
    assert rays.search(printed) and not rays.search(finished.printed), "what Ray says is shown to who asks for it"
    assert losses(tmp_path / "tiny") == pytest.approx(losses(finished.run), rel=1e-3)
    assert losses(tmp_path / "tiny")[0] == pytest.approx(losses(finished.run)[0], rel=1e-6)
    assert records(tmp_path / "tiny", "attempt")[0]["workers"] == 2
    traces = {path.name for path in (tmp_path / "tiny/profile").iterdir()}
    assert traces == {f"rank{rank}-step3.pt.trace.json.gz" for rank in range(2)}


@pytest.mark.rare
def test_a_new_run_starts_from_the_weights_and_tokenizer_of_another(
    head: Head, finished: Finished, tmp_path: Path
) -> None:
    workplace = copied(finished, tmp_path)
    add_other_words(workplace / "dataset/savant_dataset_train.jsonl")
    code, printed = run_job(head, workplace, run__name="second", run__init_from="tiny", training__max_steps=2)
    assert code == 0 and "weights only" in printed, printed
    assert losses(workplace / "second")[0] < losses(finished.run)[0] - 0.1
    assert tokenizer_of(workplace / "second/step_2") == tokenizer_of(workplace / "tiny/step_8")


@pytest.mark.rare
def test_a_new_run_that_continues_from_a_checkpoint_equals_the_run_of_the_checkpoint(
    head: Head, finished: Finished, tmp_path: Path
) -> None:
    workplace = copied(finished, tmp_path)
    code, printed = run_job(head, workplace, run__name="second", run__continue_from="tiny/step_4")
    assert code == 0 and "saved step_4 (copied from " in printed, printed
    second, expected = (
        [(step["step"], step["train_loss"]) for step in records(run, "step")]
        for run in (workplace / "second", finished.run)
    )
    assert second == expected[4:]
    one, other = (read_checkpoint(run / "step_8")["model_state_dict"] for run in (workplace / "second", finished.run))
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_a_fine_tune_on_conversations_trains_on_the_answers_only(
    head: Head, finished: Finished, tmp_path: Path
) -> None:
    workplace = copied(finished, tmp_path)
    turns = [(f"one two {number}", f"three four {number}") for number in range(200)]
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in turns
    ]
    pq.write_table(pa.Table.from_pylist(rows), workplace / "dataset/chat.parquet", row_group_size=50)
    settings = {"data__sources": "[{path: dataset/chat.parquet, weight: 1}]", "data__validation": "{fraction: 0.2}"}
    code, printed = run_job(
        head,
        workplace,
        run__name="chat",
        run__init_from="tiny",
        training__max_steps=4,
        data__cache_dir="chat_cache",
        **settings,
    )
    assert code == 0 and "weights only" in printed, printed
    tokenizer = Tokenizer.load(workplace / "chat/step_4/tokenizer.json")
    training, validation = sorted(
        (TokenCache.open(manifest.parent) for manifest in (workplace / "chat_cache").glob("*/manifest.json")),
        key=lambda cache: -cache.manifest.documents,
    )
    assert training.manifest.documents + validation.manifest.documents == 200
    rows_of_tokens = training.take(np.arange(training.n_sequences))
    masked = tokenizer.decode(rows_of_tokens.tokens[~rows_of_tokens.is_trained].tolist())
    assert "one two" in masked and "three four" not in masked
    (line,) = records(workplace / "chat", "data")
    (source,) = line["sources"]
    assert sum(source["lengths"].values()) == source["documents"] == training.manifest.documents
    assert 0 < source["trained_tokens"] < source["tokens"] and source["repeated"] == 0
    assert (source["fraction"], source["steps_per_epoch"]) == (1, training.n_sequences / 12)
    assert len(source["examples"]) == 3
    for pieces in source["examples"]:
        assert "one two" in "".join(text for text, is_trained in pieces if not is_trained)
        assert "three four" in "".join(text for text, is_trained in pieces if is_trained)


@pytest.mark.rare
def test_a_run_keeps_the_special_tokens_of_its_tokenizer_around_each_document(head: Head, workplace: Path) -> None:
    tokenizer = with_chat_template(workplace / "albert")
    albert = {"data__tokenizer": workplace / "albert"}
    code, printed = run_job(head, workplace, **albert, training__max_steps=2)
    assert code == 0, printed
    assert "add_special_tokens: true" in (workplace / "tiny/step_2/config.yaml").read_text()
    assert Tokenizer.load(workplace / "tiny/step_2").chat_template == tokenizer.chat_template
    caches = [TokenCache.open(manifest.parent) for manifest in (workplace / "cache").glob("*/manifest.json")]
    assert len(caches) == 2, "training and validation text"
    for cache in caches:
        rows = cache.take(np.arange(cache.n_sequences)).tokens
        assert (rows == CLS).sum() == (rows == SEP).sum() == cache.manifest.documents
    code, printed = run_job(head, workplace, **albert, training__max_steps=3, data__add_special_tokens="false")
    assert code == 4 and "data.add_special_tokens: false, but step_2 was trained with true" in printed, printed
    assert "starting Ray" not in printed
    code, printed = run_job(head, workplace, **albert, training__max_steps=3)
    assert code == 0 and len(losses(workplace / "tiny")) == 3, printed


@pytest.mark.parametrize("stop", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.rare)])
def test_without_a_cluster_a_run_starts_its_own_ray_and_a_signal_to_its_process_group_saves(
    stop: signal.Signals, workplace: Path
) -> None:
    """A terminal's Ctrl+C and Ctrl+Z, and the SIGTERM of `timeout`, go to the whole process group."""
    command = [sys.executable, str(ROOT / "jobs/train.py"), *options(training__max_steps=5000)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    tracked = environment(RAY_TRAIN_ENABLE_STATE_TRACKING="1")  # as it is shipped
    job = subprocess.Popen(command, cwd=workplace, env=tracked, text=True, start_new_session=True, **pipes)
    run = workplace / "tiny"
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(records(run, "step")) >= 5)
    started = psutil.Process(job.pid).children(recursive=True)
    assert any(process.name() == "raylet" for process in started), "its own"
    (address,) = re.findall(r"Ray's dashboard: (http://127\.0\.0\.1:\d+)\n", (run / "training_log.txt").read_text())
    check_that_the_dashboard_has(run.name, address)
    os.killpg(job.pid, signal.SIGTSTP)
    wait_for(lambda: {process.status() for process in with_children(job.pid)} <= {"stopped", "zombie"})
    os.killpg(job.pid, signal.SIGCONT)
    steps = len(records(run, "step"))
    wait_for(lambda: len(records(run, "step")) > steps)
    os.killpg(job.pid, stop)
    printed, noise = job.communicate(timeout=600)
    assert job.returncode == 75 and "stopped and saved as" in printed and "run the same command" in printed, printed
    assert checkpoints(run)[-1].name == f"step_{len(losses(run))}"
    assert noise == "", "the noise of a healthy Ray is not the user's"
    wait_for(lambda: not any(process.is_running() for process in started))


def with_children(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def check_that_the_dashboard_has(run: str, address: str) -> None:
    """Check that the dashboard's API lists the run's attempt and its worker as alive."""

    def train_run_on_dashboard() -> dict[str, Any]:
        with urlopen(f"{address}/api/train/v2/runs/v1", timeout=30) as answer:
            (train_run,) = json.load(answer)["train_runs"]
        return train_run

    wait_for(lambda: train_run_on_dashboard()["status"] == "RUNNING", seconds=30)
    (attempt,) = train_run_on_dashboard()["attempts"]
    (worker,) = attempt["workers"]
    assert (train_run_on_dashboard()["name"], attempt["status"]) == (run, "RUNNING")
    assert (worker["world_rank"], worker["status"]) == (0, "ALIVE") and psutil.pid_exists(worker["pid"])


def test_invalid_settings_and_missing_text_are_reported_before_ray_starts(head: Head, workplace: Path) -> None:
    code, printed = run_job(head, workplace, model__n_heads=7)
    assert code == 2 and "model.n_heads: 7 does not divide model.dim = 32" in printed
    code, printed = run_job(head, workplace, data__validation="nowhere.jsonl")
    assert code == 3 and "nowhere.jsonl" in printed and "starting Ray" not in printed
    assert "Traceback" not in printed
