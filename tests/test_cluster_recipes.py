"""The manifests in jobs/cluster agree with each other, with the settings and with Ray.

`kubectl apply --dry-run=server` compares their fields with the CRDs of a cluster.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from savant_ray.commands import COMMANDS
from savant_ray.config import Config, load_config
from savant_ray.settings.files import settings_file
from tests.test_docs import unknown_to_ray

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "jobs/cluster"
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


def cluster(name: str) -> dict[str, Any]:
    """Return the cluster that a manifest describes."""
    spec = manifest(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def pods(name: str) -> list[dict[str, Any]]:
    """Return the specifications of the head's pod and of the workers' pods."""
    described = cluster(name)
    groups = [described["headGroupSpec"], *described["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def before_stop(pod: dict[str, Any]) -> str:
    """Return the program that a pod runs before it ends."""
    return pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]


def runtime_variables(text: str) -> dict[str, str]:
    return yaml.safe_load(text)["env_vars"]


SUBMITTED = runtime_variables((ROOT / "jobs/runtime_env.yaml").read_text())
SHIPPED = load_config((), {}, ROOT / "configs/cluster.yaml")
both = pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])


def test_job_and_cluster_describe_the_same_pods() -> None:
    assert cluster("rayjob.yaml") == cluster("raycluster.yaml")


@both
def test_the_cluster_requires_a_token_and_all_nodes_share_the_storage(name: str) -> None:
    assert cluster(name)["authOptions"] == {"mode": "token"}
    assert manifest("storage.yaml")["spec"]["accessModes"] == ["ReadWriteMany"]


@both
def test_the_pods_run_the_pinned_version_of_ray(name: str) -> None:
    pinned = re.search(r"^ray\S*==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert pinned and cluster(name)["rayVersion"] == pinned[1]
    assert {container["image"] for pod in pods(name) for container in pod["containers"]} == {"${SAVANT_IMAGE}"}


@both
def test_a_deleted_pod_has_enough_time_to_save(name: str) -> None:
    head, worker = pods(name)
    compile(before_stop(head), "preStop", "exec")
    assert unknown_to_ray(shlex.split(before_stop(worker).partition("sleep")[0])[1:]) == set()
    drained, slept = (float(seconds) for seconds in re.findall(r"(?:seconds|sleep) (\d+)", before_stop(worker)))
    assert drained == slept > Config().run.grace_seconds
    assert worker["terminationGracePeriodSeconds"] >= slept + 30
    assert head["terminationGracePeriodSeconds"] >= float(SUBMITTED[STOP_WAIT]) + 30


@both
def test_every_pod_mounts_the_storage_of_the_settings_and_has_the_variables_of_a_job(name: str) -> None:
    claim = manifest("storage.yaml")["metadata"]["name"]
    for pod in pods(name):
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes.keys() == mounts.keys() and volumes["storage"]["persistentVolumeClaim"]["claimName"] == claim
        for path in (SHIPPED.run.storage_path, SHIPPED.data.cache_dir):
            assert str(path).startswith(f"{mounts['storage']}/")
        variables = {variable["name"]: variable["value"] for variable in container["env"]}
        assert variables.items() >= SUBMITTED.items()


@both
def test_there_is_a_gpu_for_each_worker_of_the_settings(name: str) -> None:
    (group,) = cluster(name)["workerGroupSpecs"]
    assert group["replicas"] == group["maxReplicas"] == SHIPPED.scaling.num_workers
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert cluster(name)["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


def test_the_job_names_a_command_and_settings_that_exist() -> None:
    spec = manifest("rayjob.yaml")["spec"]
    program, command, option, name = spec["entrypoint"].split()
    assert (program, option) == ("savant", "--config") and command in COMMANDS
    variables = runtime_variables(spec["runtimeEnvYAML"])
    assert variables.items() >= SUBMITTED.items()
    config = load_config((), variables, settings_file(Path(name)))
    for path in (config.data.validation, *(source.path for source in config.data.sources)):
        assert str(path).startswith(f"{SHIPPED.run.storage_path}/")


def test_ray_up_accepts_the_launcher() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    launcher = manifest("launcher.yaml")
    config = prepare_config(launcher)
    validate_config(config)
    assert config["max_workers"] == len(launcher["provider"]["worker_ips"])
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config | {"worker_start_commands": []})


def test_the_launchers_nodes_share_a_token_and_their_dashboard_listens_on_loopback() -> None:
    launcher = manifest("launcher.yaml")
    starts = [launcher[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker")]
    assert all("RAY_AUTH_MODE=token" in start for start in starts)
    assert f"{STOP_WAIT}={SUBMITTED[STOP_WAIT]}" in starts[0] and "--dashboard-host=127.0.0.1" in starts[0]
    assert launcher["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
