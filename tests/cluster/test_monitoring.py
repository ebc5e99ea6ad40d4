"""The metrics that workers export equal the record of the run; they are found as jobs/monitoring/prometheus.yml does."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

from savant_ray.reporting.page import write_page
from savant_ray.reporting.run_report import LOG
from savant_ray.reporting.wording import percent
from savant_ray.worker.metrics import METRICS
from tests.cluster.conftest import (
    ROOT,
    Head,
    environment,
    free_port,
    losses,
    records,
    running_cluster,
    start_job,
    steps_done,
    wait_for,
)
from tests.reporting.test_page import drawn
from tests.reporting.test_tensorboard import steps_shown
from tests.test_monitoring import expressions, names

pytestmark = pytest.mark.slow
RUN = {
    "training__max_steps": 5000,
    "training__accumulation": 16,  # a step takes long enough for a scrape to fall into few of them
    "validation__every_steps": 10,
    "checkpoint__every_steps": 10,
    "scaling__num_workers": 2,
    "scaling__resources_per_worker": "{CPU: 1}",
}
FAULTS = """
import sys, ray
from savant_ray.worker.metrics import RunMetrics
from savant_ray.events import CheckpointFailed, MicroBatchSkipped, Rewound
from tests.reporting.events import spike, step_done

ray.init(address=sys.argv[1], log_to_driver=False)
metrics = RunMetrics("broken", 1)
skipped = MicroBatchSkipped(step=1, rank=1, loss="nan", positions=(3,))
faults = (spike(1), Rewound(step=0, spike=spike(2)), CheckpointFailed(step=1, text="disk full"))
for event in (skipped, skipped, step_done(1, update_skipped=True), *faults):
    metrics.observe(event)
sys.stdin.read()
"""
OF_THE_STEP = {metric.prometheus_name: metric.field for metric in METRICS if metric.event.kind == "step"}
OF_THE_CHECKPOINT = {metric.prometheus_name: metric.field for metric in METRICS if metric.event.kind == "checkpoint"}


@dataclass(frozen=True)
class Scraped:
    """A head, and the file in which Ray lists the targets to scrape."""

    head: Head
    targets: Path


@pytest.fixture(scope="module")
def scraped() -> Iterator[Scraped]:
    """Yield a head that collects metrics every second."""
    system = {"metrics_report_interval_ms": 1000}
    ports = {"dashboard_port": free_port(), "dashboard_agent_listen_port": free_port()}
    with running_cluster(
        num_cpus=2, object_store_memory=200 << 20, include_dashboard=True, _system_config=system, **ports
    ) as cluster:
        folder = Path(cluster.head_node._ray_params.temp_dir)
        yield Scraped(Head(cluster.address, ""), folder / PROMETHEUS_SERVICE_DISCOVERY_FILE)


def scrape(targets: Path) -> dict[str, list[Sample]]:
    """Return all samples of this package by name."""
    found: dict[str, list[Sample]] = {}
    for target in json.loads(targets.read_text())[0]["targets"]:
        try:
            with urlopen(f"http://{target}/metrics", timeout=30) as page:
                text = page.read().decode()
        except URLError:  # the autoscaler's port is one for all Rays of a machine; Prometheus goes on as well
            continue
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("ray_savant_"):
                    found.setdefault(sample.name, []).append(sample)
    return found


def of_rank(samples: list[Sample], rank: int) -> float:
    (sample,) = (sample for sample in samples if sample.labels["rank"] == str(rank))
    return sample.value


def test_exported_metrics_equal_the_record_and_have_labels_for_run_and_rank(scraped: Scraped, workplace: Path) -> None:
    run = workplace / "tiny"
    job = start_job(scraped.head, workplace, **RUN, validation__logic_problems=12)
    wait_for(lambda: job.poll() is not None or steps_done(run) >= 12)
    wait_for(lambda: len(scrape(scraped.targets).get("ray_savant_memory_gb", [])) == 2, seconds=30)
    found = scrape(scraped.targets)
    job.send_signal(signal.SIGTERM)
    printed, _ = job.communicate(timeout=600)
    assert job.returncode == 75, printed

    check_that_panels_are_fed(found, run)
    for samples in found.values():
        assert {sample.labels["run"] for sample in samples} == {"tiny"}
    for name in ("ray_savant_memory_gb", "ray_savant_data_wait_seconds"):
        assert all(of_rank(found[name], rank) >= 0 for rank in (0, 1)), "each worker has its own"
    check_values(found, run)
    assert steps_shown(run) == sorted({line["step"] for line in records(run, "step")})
    check_log(run)
    check_page(run)


def check_that_panels_are_fed(found: dict[str, list[Sample]], run: Path) -> None:
    """Check that all metrics of the dashboard are exported, except for faults that did not happen in this run."""
    asked = set.union(*(names(expression) for expression in expressions()))
    faults = {metric.prometheus_name for metric in METRICS if "Skipped" in metric.event.__name__}
    faults |= {"ray_savant_failed_checkpoints_total", "ray_savant_skipped_updates_total"}
    faults |= {"ray_savant_spikes_total", "ray_savant_rewinds_total"}
    assert asked - faults <= set(found), "asked for by a panel, exported by nobody"


def check_values(found: dict[str, list[Sample]], run: Path) -> None:
    """Check that each value is that of a step nearby: Ray reads the values one after the other while training continues."""
    steps = records(run, "step")
    at = int(of_rank(found["ray_savant_step"], 0))
    near = [step for step in steps if abs(step["step"] - at) <= 3]
    sums = [sum(step["tokens"] for step in steps[:count]) for count in range(len(steps) + 1)]
    for name, field in OF_THE_STEP.items():
        if name == "ray_savant_tokens_total":
            assert of_rank(found[name], 0) in sums[at - 3 : at + 4]
        elif name in found and not name.endswith("_total"):
            assert of_rank(found[name], 0) in [step[field] for step in near], name
    for name, field in OF_THE_CHECKPOINT.items():
        assert of_rank(found[name], 0) in [saved[field] for saved in records(run, "checkpoint")], name
    validations = [done["validation_loss"] for done in records(run, "validation")]
    assert of_rank(found["ray_savant_validation_loss"], 0) in validations
    assert of_rank(found["ray_savant_workers"], 0) == 2


def check_log(run: Path) -> None:
    """Check that the figures in the log are those of the record, rounded to the digits shown."""
    log = (run / LOG).read_text()
    steps = {step["step"]: step for step in records(run, "step")}
    printed = re.findall(r"step ([\d,]+)/5,000 · (.*)", log)
    assert printed
    for number, figures in printed:
        step = steps[int(number.replace(",", ""))]
        assert re.findall(r"loss ([\d.]+) · rate ([\d.e-]+) · ([\d,]+) tokens/s", figures) == [
            (f"{step['train_loss']:.4f}", f"{step['learning_rate']:.2e}", f"{step['tokens_per_second']:,.0f}")
        ]
        assert re.findall(r"([\d.]+ %) of peak", figures) == [percent(step["share_of_peak"])]
        assert re.findall(r"([\d.]+) GiB", figures) == [f"{step['memory_gb']:.1f}"]
        assert sum(map(int, re.findall(r"(\d+) micro-batches skipped", figures))) == step["skipped_micro_batches"]
    validations = records(run, "validation")
    validated = [
        (line["step"], f"{line['validation_loss']:.4f}", f"{line['bits_per_byte']:.3f}") for line in validations
    ]
    shown = re.findall(r"validation at step ([\d,]+): loss ([\d.]+) · ([\d.]+) bits per byte", log)
    assert validated == [(int(step.replace(",", "")), loss, bits) for step, loss, bits in shown]


def check_page(run: Path) -> None:
    """Check that the figures in the report are those of the record."""
    write_page([run], run / "report.html", lambda _: False)
    raw, _, validated = drawn((run / "report.html").read_text())[0]["series"]
    assert [loss for loss in raw["values"] if loss is not None] == [float(f"{loss:.5g}") for loss in losses(run)]
    expected = [float(f"{line['validation_loss']:.5g}") for line in records(run, "validation")]
    assert [loss for loss in validated["values"] if loss is not None] == expected


def test_faults_are_counted_per_worker(scraped: Scraped) -> None:
    command = [sys.executable, "-c", FAULTS, scraped.head.address]
    worker = subprocess.Popen(command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, text=True)
    counted = {metric.prometheus_name for metric in METRICS if metric.is_counter} - {"ray_savant_tokens_total"}
    wait_for(lambda: counted <= set(scrape(scraped.targets)))
    found = scrape(scraped.targets)
    worker.communicate(timeout=600)
    assert {name: of_rank(found[name], 1) for name in counted} == {
        "ray_savant_skipped_micro_batches_total": 2,
        "ray_savant_skipped_updates_total": 1,
        "ray_savant_spikes_total": 1,
        "ray_savant_rewinds_total": 1,
        "ray_savant_failed_checkpoints_total": 1,
    }
