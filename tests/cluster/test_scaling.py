"""The resources of a worker, and the messages if the cluster has too few."""

from __future__ import annotations

import pytest

from savant_ray.cluster.session import processes_that_fit
from savant_ray.config import load_config
from savant_ray.driver import trainer, worker_watch
from savant_ray.driver.phases import Phase
from savant_ray.driver.trainer import cpus_per_worker
from savant_ray.driver.worker_watch import SECONDS_UNTIL_REPORT, WorkerWatch, waiting_message
from savant_ray.errors import SettingsError


def test_on_one_machine_the_workers_share_all_cores() -> None:
    assert [cpus_per_worker([{"CPU": 8.0}], workers, False) for workers in (1, 2, 3, 8)] == [8, 4, 2, 1]


def test_a_worker_takes_no_more_cores_than_one_node_has() -> None:
    head, node, gpu_node = {"CPU": 16.0}, {"CPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}
    assert cpus_per_worker([{}, node, node], 1, False) == 4
    assert cpus_per_worker([{}, node, node], 2, False) == 4
    assert cpus_per_worker([{}, node, node], 3, False) == 2
    assert cpus_per_worker([head, gpu_node, gpu_node], 4, True) == 4, "only nodes with a GPU count"
    assert cpus_per_worker([node], 9, False) == 1, "at least one, whether there is room or not"
    assert cpus_per_worker([], 1, False) == 1


def test_workers_that_fit_are_counted_node_by_node() -> None:
    nodes = [{"CPU": 3.0}, {"CPU": 3.0, "GPU": 1.0}]
    assert processes_that_fit(nodes, {"CPU": 2}) == 2
    assert processes_that_fit(nodes, {"CPU": 0.5, "GPU": 1}) == 1
    assert processes_that_fit(nodes, {"CPU": 4}) == 0
    assert processes_that_fit(nodes, {"CPU": 0}) > 1000
    assert [processes_that_fit([{"CPU": 1.0}], {"CPU": 1 / n}) for n in (2, 3, 5, 10)] == [2, 3, 5, 10]


@pytest.mark.parametrize(
    ("own", "arguments", "message"),
    [
        (True, ["--scaling.resources_per_worker", "{CPU: 64}"], "1 worker with {CPU: 64} cannot run: this machine has"),
        (False, ["--scaling.resources_per_worker", "{CPU: 64}"], "cannot run: the cluster's largest node has {CPU: 2}"),
        (True, ["--scaling.resources_per_worker", "{disk: 1}"], "this machine has {disk: 0}, room for 0"),
        (True, ["--scaling.resources_per_worker", "{TPU: 1}"], "scaling.resources_per_worker: `use_tpu` is False"),
        (True, ["--scaling.resources_per_worker", "{GPU: 1}"], "scaling.resources_per_worker: `use_gpu` is False"),
        (True, ["--scaling.num_workers", "5"], "5 workers with {CPU: 1} each cannot run: this machine has {CPU: 2}"),
        (
            False,
            ["--scaling.num_workers", "5"],
            "room for 3; wait until its nodes have joined (`ray status` lists them)",
        ),
        (True, ["--scaling.use_gpu", "true"], "1 GPU workers need 1 GPUs, the cluster has 0"),
        (
            False,
            ["--scaling.use_gpu", "true"],
            "the cluster has 0 now; if more are to join (`ray status`), wait for them",
        ),
    ],
)
def test_insufficient_resources_are_refused_with_numbers(
    own: bool, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "node_resources", lambda: [{"CPU": 2.0}, {"CPU": 1.0}])
    monkeypatch.setattr(trainer, "owns_ray", lambda: own)
    with pytest.raises(SettingsError) as refused:
        trainer.scaling(load_config(arguments, environment={}))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("own", "build", "problem"),
    [(True, None, "is a CPU build"), (True, "13.0", "cannot use it"), (False, None, "is a CPU build")],
)
def test_a_gpu_that_pytorch_cannot_use_is_not_used_and_the_reason_is_named(
    own: bool, build: str | None, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray finds GPUs without PyTorch, and would connect the workers by NCCL, which a CPU build does not have."""
    monkeypatch.setattr(trainer, "node_resources", lambda: [{"CPU": 2.0, "GPU": 1.0}])
    monkeypatch.setattr(trainer, "owns_ray", lambda: own)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", build)
    assert not trainer.scaling(load_config([], environment={})).use_gpu
    assert problem in (trainer.unusable_gpus() or "")
    with pytest.raises(SettingsError, match=f"scaling.use_gpu: this machine has a GPU, but PyTorch .* {problem}"):
        trainer.scaling(load_config(["--scaling.use_gpu", "true"], environment={}))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert trainer.scaling(load_config([], environment={})).use_gpu and trainer.unusable_gpus() is None


@pytest.mark.parametrize(("build", "n_nodes"), [("13.0", 1), (None, 2)])
def test_gpus_of_a_cluster_are_used_although_the_driver_does_not_see_them(
    build: str | None, n_nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "node_resources", lambda: [{"CPU": 2.0, "GPU": 1.0}] * n_nodes)
    monkeypatch.setattr(trainer, "owns_ray", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", build)
    assert trainer.scaling(load_config([], environment={})).use_gpu


def test_missing_resources_are_reported_once_each_time_that_workers_do_not_start(monkeypatch) -> None:
    messages: list[str] = []
    now, phase = 0.0, Phase.WAITING_FOR_WORKERS
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 3.0})
    watch = WorkerWatch(2, {"CPU": 1.0}, messages.append, lambda: now)

    def pass_time(seconds: float) -> int:
        nonlocal now
        now += seconds
        watch.check(phase)
        watch.check(phase)
        return len(messages)

    assert pass_time(SECONDS_UNTIL_REPORT - 1) == 0
    phase = Phase.LOADING
    assert pass_time(1000) == 0, "there are workers"
    phase = Phase.WAITING_FOR_WORKERS
    assert pass_time(1) == 0
    assert pass_time(SECONDS_UNTIL_REPORT) == 1
    assert "2 workers need {CPU: 1} each; the cluster has 1 of 3 CPU free" in messages[0]
    assert pass_time(1000) == 1
    phase = Phase.TRAINING
    pass_time(1)
    phase = Phase.WAITING_FOR_WORKERS
    pass_time(1)
    assert pass_time(SECONDS_UNTIL_REPORT) == 2


def test_workers_that_start_slowly_in_a_ray_of_their_own_are_not_said_to_lack_resources(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    messages: list[str] = []
    times = iter([0.0, SECONDS_UNTIL_REPORT + 1])
    monkeypatch.setattr(worker_watch, "owns_ray", lambda: True)
    watch = WorkerWatch(1, {"CPU": 2.0}, messages.append, lambda: next(times, SECONDS_UNTIL_REPORT + 1))
    watch.check(Phase.WAITING_FOR_WORKERS)
    watch.check(Phase.WAITING_FOR_WORKERS)
    (message,) = messages
    assert "still starting" in message and "CPU" not in message


def test_a_missing_resource_is_named() -> None:
    text = waiting_message(1, {"GPU": 1.0, "CPU": 4.0}, {"CPU": 8.0}, {"CPU": 8.0})
    assert "1 worker needs {GPU: 1, CPU: 4};" in text and "0 of 0 GPU free, 8 of 8 CPU free" in text
