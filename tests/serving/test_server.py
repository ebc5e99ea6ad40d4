"""`savant serve` as clients see it, tried with OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from savant_ray.cli import main
from savant_ray.config import Config, dump_yaml
from savant_ray.data.conversations import conversation_prompt
from savant_ray.data.tokenizer import train_tokenizer
from savant_ray.errors import CheckpointError
from savant_ray.evaluation.from_checkpoint import TEXT_FILES, load_model, load_tokenizer
from savant_ray.inference.generate import generate
from savant_ray.inference.sampling import Sampling
from savant_ray.training.checkpoint import write_checkpoint
from savant_ray.training.state import new_state
from tests.cluster.conftest import ROOT, environment, free_port
from tests.training.tiny import CPU, MODEL

openai = pytest.importorskip("openai")
pytest.importorskip("ray.serve", reason="needs the extra serve")

LONG = 20_000  # tokens, more than are generated before a test ends
KEY = "a key"
LOG = "serve.log"  # in the run folder: what the command prints


def write_run(folder: Path, head: float = 20) -> Path:
    """Write a run with random weights; those of the head are multiplied by `head`."""
    text = "Question: what is one plus two? The answer is three, not four or five.\n"
    model = MODEL | {"vocab_size": 400, "dim": 32, "max_seq_len": 64, "window_size": 16}
    config = Config.from_dict({"model": model, "training": {"precision": "fp32"}, "validation": {"max_new_tokens": 9}})
    tokenizer = train_tokenizer(iter([text] * 9), 300)
    texts = {"config.yaml": dump_yaml(config), "tokenizer.json": tokenizer.to_json()}
    torch.manual_seed(0)
    state = new_state(config, CPU)
    with torch.no_grad():
        state.model.head.weight.mul_(head)  # an untrained head is nearly flat
        state.model.head.weight[tokenizer.end_of_document] = 0
    return write_checkpoint(folder / "tiny", {**state.to_checkpoint(), "step": 3}, texts).parent


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "example.org", "127.example.org"])
def test_an_address_that_others_can_reach_is_refused_without_a_key(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SAVANT_API_KEY", raising=False)
    assert main(["serve", str(tmp_path), "--host", host]) == 2
    assert "--api-key" in capsys.readouterr().err


def test_a_key_of_white_space_is_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SAVANT_API_KEY", " \n")
    assert main(["serve", str(tmp_path), "--host", "0.0.0.0"]) == 2
    assert "--api-key" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_a_missing_checkpoint_is_named_before_ray_starts_and_loopback_addresses_need_no_key(
    host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(tmp_path / "nothing"), "--host", host]) == 4
    assert "nothing" in capsys.readouterr().err


def test_text_is_encoded_without_the_weights_of_a_checkpoint(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    _, expected, _ = load_model(run)
    for file in run.glob("step_3/*"):
        if file.name not in (*TEXT_FILES, "manifest.json"):
            file.unlink()
    tokenizer, config = load_tokenizer(run)
    assert tokenizer.fingerprint == expected.fingerprint and config.model.max_seq_len == 64
    with pytest.raises(CheckpointError):
        load_model(run)


def test_a_replica_of_a_model_that_cannot_answer_does_not_start(tmp_path: Path) -> None:
    from savant_ray.serving.server import ModelServer

    run = write_run(tmp_path, head=float("nan"))
    with pytest.raises(CheckpointError, match="not finite"):
        ModelServer(str(run), {}, None, raw_weights=False)


def test_an_address_that_is_not_text_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "run", "--host", "\udcff"]) == 2
    assert "--host: \\xff is not UTF-8 text" in capsys.readouterr().err


def test_an_address_that_is_in_use_is_named_before_ray_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", str(run), "--port", str(port)]) == 1
    assert f"--port {port}: Address already in use" in capsys.readouterr().err


@pytest.fixture
def without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace Ray by two nodes on which no replica can be started; return the names of the applications."""
    import ray
    import uvicorn
    from ray import serve

    from savant_ray.serving import server

    run, applications = write_run(tmp_path), list[str]()
    message = "The deployment failed.\nsavant_ray.errors.CheckpointError: step_3.pt is damaged\nCopy it again."

    def deploy(_: Any, name: str, **__: Any) -> None:
        applications.append(name)
        raise RuntimeError("Failed to update the deployments ['model'].")

    def status() -> Any:
        application = SimpleNamespace(deployments={"model": SimpleNamespace(message=message)})
        return SimpleNamespace(applications=dict.fromkeys(applications, application))

    monkeypatch.setattr(server, "ray_session", lambda *_: nullcontext())
    monkeypatch.setattr(server, "local_checkpoint", lambda *_: nullcontext(run))
    monkeypatch.setattr(server, "node_resources", lambda: [{"CPU": 2.0, "GPU": 1.0}, {"CPU": 0.5, "GPU": 1.0}])
    monkeypatch.setattr(server, "owns_ray", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.5, "GPU": 2.0})
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_: None)
    for name, replacement in {
        "start": lambda **_: None,
        "run": deploy,
        "status": status,
        "delete": lambda _: None,
    }.items():
        monkeypatch.setattr(serve, name, replacement)
    return applications


def test_two_servers_on_a_cluster_have_applications_of_their_own_and_a_killed_one_is_replaced(
    without_ray: list[str],
) -> None:
    ports = [str(free_port()), str(free_port())]
    for port in [*ports, ports[0]]:
        assert main(["serve", "run", "--port", port]) == 1
    assert without_ray[0] == without_ray[2] != without_ray[1]


def test_ctrl_c_before_ray_serve_has_started_ends_the_command_without_an_error(
    without_ray: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray import serve
    from ray.serve.exceptions import RayServeException

    def interrupted(**_: Any) -> None:
        raise KeyboardInterrupt

    def not_started(_: str) -> None:
        raise RayServeException("There is no Serve instance running on this Ray cluster.")

    monkeypatch.setattr(serve, "start", interrupted)
    monkeypatch.setattr(serve, "delete", not_started)
    assert main(["serve", "run", "--port", str(free_port())]) == 0
    printed = capsys.readouterr()
    assert "stopping" in printed.out and printed.err == ""


def test_why_a_replica_cannot_be_started_is_printed(without_ray: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "run", "--port", str(free_port())]) == 1
    assert capsys.readouterr().err == (
        "error: the server could not be started: step_3.pt is damaged\n       Copy it again.\n"
    )


@pytest.mark.parametrize("replicas", ["2", "2-4"])
def test_replicas_for_which_this_machine_has_no_room_are_refused(
    replicas: str, without_ray: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "run", "--port", str(free_port()), "--replicas", replicas]) == 2
    message = "--replicas 2: there is room for 1, because each replica needs a core and a GPU"
    assert message in capsys.readouterr().err and not without_ray


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("/runs/one", "one"),
        ("/runs/one/step_3/", "one"),
        ("s3://bucket/runs/one", "one"),
        ("s3://bucket/one?endpoint_override=127.0.0.1:9000&scheme=http", "one"),
        ("s3://bucket/one/step_3?endpoint_override=http://127.0.0.1:9000", "one"),
        ("/runs/one/step_3.pt", "one"),  # of the original script
        ("/runs/one/step_3/step_3.pt", "one"),
    ],
)
def test_the_model_has_the_name_of_the_run_folder(
    checkpoint: str,
    name: str,
    without_ray: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ray import serve

    monkeypatch.setattr(serve, "run", lambda *_, **__: SimpleNamespace(options=lambda **_: None))
    assert main(["serve", checkpoint, "--port", str(free_port())]) == 0
    assert f"\n{name} is served at http://127.0.0.1:" in capsys.readouterr().out


def test_a_key_from_a_file_may_end_with_a_newline_and_idle_connections_are_kept_longer_than_clients_keep_them(
    without_ray: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import uvicorn
    from ray import serve
    from starlette.testclient import TestClient

    servers = list[uvicorn.Server]()
    monkeypatch.setattr(serve, "run", lambda *_, **__: SimpleNamespace(options=lambda **_: None))
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, _: servers.append(server))
    monkeypatch.setenv("SAVANT_API_KEY", "secret\n")
    assert main(["serve", "/runs/one", "--host", "0.0.0.0", "--port", str(free_port())]) == 0
    (config,) = (server.config for server in servers)
    client, key = TestClient(config.app), {"Authorization": "Bearer secret"}
    models = client.get("/v1/models", headers=key)
    assert models.status_code == 200 and client.get("/v1/models/one", headers=key).json() == models.json()["data"][0]
    assert client.get("/v1/models/other", headers=key).json()["error"]["code"] == "model_not_found"
    for path in ("/v1/models", "/v1/models/one"):
        assert client.get(path, headers={"Authorization": "Bearer other"}).status_code == 401
    assert config.timeout_keep_alive > 90


def test_a_server_whose_ray_fails_ends_with_the_reason(
    without_ray: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray
    import uvicorn
    from ray import serve

    from savant_ray.cluster import session

    def wait_until_it_should_exit(server: uvicorn.Server, _: Any) -> None:
        wait_until(lambda: server.should_exit, 60)

    head = SimpleNamespace(all_processes={}, dead_processes=lambda: [("gcs_server", None)])
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # otherwise the command ends this process
    monkeypatch.setattr(session, "started_head", lambda: head)
    monkeypatch.setattr(serve, "run", lambda *_, **__: SimpleNamespace(options=lambda **_: None))
    monkeypatch.setattr(serve, "delete", lambda _: pytest.fail("Ray would not answer"))
    monkeypatch.setattr(uvicorn.Server, "run", wait_until_it_should_exit)
    assert main(["serve", "/runs/one", "--port", str(free_port())]) == 1
    assert "Ray failed: its gcs_server on this machine was killed" in capsys.readouterr().err


@contextmanager
def serving(run: Path, *options: str) -> Iterator[tuple[str, psutil.Process]]:
    """Serve a run with these options; yield the URL of the server and its process."""
    port = free_port()
    command = [sys.executable, "-m", "savant_ray.cli", "serve", str(run), "--port", str(port), *options]
    log = run / LOG
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment() | {"SAVANT_API_KEY": KEY}, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        wait_until(lambda: process.poll() is not None or "is served at" in log.read_text(), 120)
        assert process.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, psutil.Process]]:
    """Yield the run, the URL of its server, and the server's process."""
    run = write_run(tmp_path_factory.mktemp("serve"))
    with serving(run, "--max-length", str(2 * LONG), "--max-batch", "8", "--max-queue", "60") as (url, process):
        yield run, url, process


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def ask(url: str, questions: Callable[[Any], Awaitable[None]], key: str = KEY) -> None:
    async def session() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120) as client:
            await asyncio.wait_for(questions(client), 150)

    asyncio.run(session())


def expected_ids(run: Path, prompt: str, **changes: Any) -> tuple[Any, list[int]]:
    model, tokenizer, _ = load_model(run)
    sampling = Sampling.for_tokenizer(tokenizer, **{"max_new_tokens": 9, "temperature": 0.6} | changes)
    return tokenizer, list(generate(model.cpu(), tokenizer.encode_prompts([prompt])[0], sampling))


async def streamed(client: Any, prompt: str, **options: Any) -> list[Any]:
    return await consumed(await client.completions.create(model="tiny", prompt=prompt, stream=True, **options))


async def consumed(stream: Any) -> list[Any]:
    return [chunk async for chunk in stream]


@pytest.mark.slow
def test_answers_are_those_of_savant_generate(server: tuple[Path, str, psutil.Process]) -> None:
    run, url, _ = server
    tokenizer, ids = expected_ids(run, "what is", seed=5, max_new_tokens=30)
    text = tokenizer.decode_continuation(tokenizer.encode_prompts(["what is"])[0], ids)
    options: dict[str, Any] = {"seed": 5, "temperature": 0.6, "max_tokens": 30}

    async def questions(client: Any) -> None:
        assert [model.id async for model in client.models.list()] == ["tiny"]
        answer = await client.completions.create(model="tiny", prompt="what is", **options)
        assert answer.choices[0].text == text and answer.choices[0].finish_reason == "length"
        assert (answer.usage.completion_tokens, answer.object) == (30, "text_completion")
        chunks = await streamed(client, "what is", stream_options={"include_usage": True}, **options)
        assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == text
        assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == ["length"]
        assert not chunks[-1].choices and chunks[-1].usage == answer.usage
        stop = text[10:12]
        answer = await client.completions.create(model="tiny", prompt="what is", stop=[stop, "no such"], **options)
        assert answer.choices[0].text == text[: text.index(stop)] and answer.choices[0].finish_reason == "stop"
        messages = [{"role": "user", "content": "what is one"}]
        prompt = conversation_prompt(messages, None)
        chat = await client.chat.completions.create(model="tiny", messages=messages, temperature=0)
        _, chat_ids = expected_ids(run, prompt, temperature=0)
        assert chat.choices[0].message.content == tokenizer.decode_continuation(tokenizer.encode(prompt), chat_ids)
        stream = await client.chat.completions.create(model="tiny", messages=messages, temperature=0, stream=True)
        deltas = [chunk.choices[0].delta async for chunk in stream]
        assert "".join(delta.content or "" for delta in deltas) == chat.choices[0].message.content
        assert [delta.role for delta in deltas] == ["assistant", *[None] * (len(deltas) - 1)]

    ask(url, questions)


@pytest.mark.slow
def test_health_needs_no_key_and_prometheus_finds_metrics(server: tuple[Path, str, psutil.Process]) -> None:
    run, url, _ = server
    assert json.loads(downloaded(f"{url}/health")) == {"replicas": {"RUNNING": 1}}

    async def questions(client: Any) -> None:
        await client.completions.create(model="tiny", prompt="what", max_tokens=3)

    ask(url, questions)
    (metrics,) = re.findall("Prometheus finds metrics at (.*)", (run / LOG).read_text())
    expected = ("ray_savant_serve_tokens_total", "ray_savant_serve_first_token_seconds_bucket", "ray_serve_")
    wait_until(lambda: all(name in downloaded(metrics) for name in expected), 60)


def downloaded(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as response:
        return str(response.read().decode())


@pytest.mark.slow
def test_requests_that_cannot_be_answered_get_errors_of_the_client(server: tuple[Path, str, psutil.Process]) -> None:
    _, url, _ = server

    async def questions(client: Any) -> None:
        for error, options in (
            (openai.BadRequestError, {"prompt": "x" * 3 * LONG * 4}),
            (openai.BadRequestError, {"prompt": "x", "max_tokens": 3 * LONG}),
            (openai.BadRequestError, {"prompt": ""}),
            (openai.BadRequestError, {"prompt": [5, 10**6]}),
            (openai.BadRequestError, {"prompt": "x", "extra_body": {"nothing": 1}}),
            (openai.NotFoundError, {"prompt": "x", "model": "other"}),
            (openai.APIStatusError, {"prompt": "x" * (1 << 21)}),
        ):
            with pytest.raises(error) as raised:
                await client.completions.create(**{"model": "tiny"} | options)
            assert raised.value.body["message"] and raised.value.code
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(model="tiny", messages=[{"role": "assistant", "content": "Yes"}])
        with pytest.raises(openai.NotFoundError):
            await client.embeddings.create(model="tiny", input="x")

    ask(url, questions)

    async def without_key(client: Any) -> None:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()

    ask(url, without_key, key="another")


@pytest.mark.slow
def test_fifty_users_are_served_and_canceled_streams_make_room(server: tuple[Path, str, psutil.Process]) -> None:
    run, url, _ = server
    _, ids = expected_ids(run, "what", seed=7, max_new_tokens=20)

    async def questions(client: Any) -> None:
        endless = [
            await client.completions.create(model="tiny", prompt="one", max_tokens=LONG, temperature=0, stream=True)
            for _ in range(8)
        ]
        for stream in endless:  # all rows are in use
            await anext(aiter(stream))
        for stream in endless:
            await stream.close()
        answers = await asyncio.gather(
            *(
                client.completions.create(model="tiny", prompt="what", seed=7, temperature=0.6, max_tokens=20)
                for _ in range(50)
            )
        )
        assert len({answer.choices[0].text for answer in answers}) == 1
        assert {answer.usage.completion_tokens for answer in answers} == {len(ids)}

    ask(url, questions)


@pytest.mark.slow
def test_requests_beyond_the_queue_are_refused_with_a_time_to_retry(server: tuple[Path, str, psutil.Process]) -> None:
    _, url, _ = server

    async def questions(client: Any) -> None:
        tasks = [
            asyncio.create_task(streamed(client, "one", max_tokens=LONG, temperature=0)) for _ in range(8 + 60 + 20)
        ]
        done, running = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION, timeout=60)
        errors = [error for task in done if (error := task.exception())]
        assert errors and all(isinstance(error, openai.RateLimitError) for error in errors)
        assert int(errors[0].response.headers["retry-after"]) > 0
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        assert await client.completions.create(model="tiny", prompt="what", max_tokens=3)

    ask(url, questions)


@pytest.mark.slow
def test_requests_of_a_killed_replica_get_an_error_and_later_ones_are_served(
    server: tuple[Path, str, psutil.Process],
) -> None:
    _, url, process = server

    async def questions(client: Any) -> None:
        options: dict[str, Any] = {"model": "tiny", "prompt": "one", "max_tokens": LONG, "temperature": 0}
        tasks = [asyncio.create_task(client.completions.create(**options)) for _ in range(2)]
        # A stream is returned with the first token, so the replica is answering.
        streams = [await client.completions.create(stream=True, **options) for _ in range(6)]
        tasks += [asyncio.create_task(consumed(stream)) for stream in streams]
        assert not any(task.done() for task in tasks)
        for child in process.children(recursive=True):
            if any("ServeReplica:savant-" in part for part in child.cmdline()):
                child.kill()
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(error, openai.APIError) and error.code == "replica_failed" for error in errors), errors
        answer = await client.completions.create(model="tiny", prompt="what", max_tokens=3)
        assert answer.usage.completion_tokens == 3

    ask(url, questions)


@pytest.mark.rare
@pytest.mark.slow
def test_replicas_are_started_when_users_wait(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    with serving(run, "--replicas", "1-2", "--max-batch", "2", "--max-length", "1000000") as (url, _):
        assert json.loads(downloaded(f"{url}/health")) == {"replicas": {"RUNNING": 1}}

        async def questions(client: Any) -> None:
            endless = [
                asyncio.create_task(streamed(client, "one", max_tokens=900_000, temperature=0)) for _ in range(6)
            ]
            while json.loads(await asyncio.to_thread(downloaded, f"{url}/health")) != {"replicas": {"RUNNING": 2}}:
                await asyncio.sleep(1)
            for task in endless:
                task.cancel()
            await asyncio.gather(*endless, return_exceptions=True)

        ask(url, questions)
