"""The dashboard in jobs/monitoring queries the metrics that workers export, and all services listen on loopback."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from savant_ray.worker.metrics import LABELS, METRICS
from tests.tracked_files import tracked_files

FOLDER = Path(__file__).parents[1] / "jobs/monitoring"
DASHBOARD = json.loads((FOLDER / "grafana/dashboards/savant.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPORTED = {metric.prometheus_name for metric in METRICS}
WORDS_OF_PROMQL = {"by", "max", "sum", "rate", "count", "last_over_time", "run", "rank"}
WIDTH = 24  # of a dashboard, in Grafana's own unit


def expressions() -> Iterator[str]:
    """Yield the PromQL expressions of all panels."""
    for panel in PANELS:
        yield from (target["expr"] for target in panel["targets"])


def names(expression: str) -> set[str]:
    """Return the names of the metrics in an expression."""
    bare = re.sub(r'"[^"]*"|\$\w+', "", expression)
    return set(re.findall(r"[a-z_]\w*", bare)) - WORDS_OF_PROMQL


def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
    place = panel["gridPos"]
    columns = range(place["x"], place["x"] + place["w"])
    return {(x, y) for x in columns for y in range(place["y"], place["y"] + place["h"])}


def test_the_panels_query_all_exported_metrics_and_no_others() -> None:
    asked = set.union(*(names(expression) for expression in expressions()))
    assert asked == EXPORTED


def test_every_query_selects_the_chosen_runs() -> None:
    for expression in expressions():
        assert len(re.findall(r'\{run=~"\$run"\}', expression)) == len(re.findall("ray_savant", expression))
        assert re.findall(r"by \(([\w, ]+)\)", expression)[0] in (LABELS[0], ", ".join(LABELS))


def test_runs_and_datasource_are_variables() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert set(variables) == {"datasource", "run"} and variables["datasource"]["type"] == "datasource"
    asked = re.fullmatch(r"label_values\((\w+), run\)", variables["run"]["query"]["query"])
    assert asked and asked[1] in EXPORTED and variables["run"]["includeAll"]
    for panel in PANELS:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


def test_every_panel_has_a_description_and_a_unit_and_overlaps_no_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        assert not taken & cells(panel) and max(x for x, _ in cells(panel)) < WIDTH, panel["title"]
        taken |= cells(panel)
    assert all(panel["description"] and panel["fieldConfig"]["defaults"]["unit"] for panel in PANELS)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_the_dashboard_has_one_row_per_topic() -> None:
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Progress", "Reasoning", "Speed", "Memory", "Checkpoints", "Faults"]


def test_prometheus_finds_the_nodes_in_the_file_that_ray_writes() -> None:
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    (job,) = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    assert job["file_sd_configs"] == [{"files": [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]}]


def test_grafana_is_provisioned_with_this_dashboard_and_the_datasource_of_rays_own() -> None:
    from ray.dashboard.modules.metrics.metrics_head import DEFAULT_PROMETHEUS_NAME

    provisioning = FOLDER / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    assert (source["name"], source["url"]) == (DEFAULT_PROMETHEUS_NAME, "http://127.0.0.1:9090")
    provider, _ = yaml.safe_load((provisioning / "dashboards/savant.yml").read_text())["providers"]
    path = provider["options"]["path"].replace("$MONITORING", str(FOLDER))
    assert tracked_files("jobs/monitoring/*.json") == [Path(path) / "savant.json"]


def test_the_recipes_use_only_loopback_addresses() -> None:
    for path in tracked_files("jobs/monitoring/*.yml"):
        addresses = re.findall(r"(?:\d+\.){3}\d+", path.read_text())
        assert set(addresses) <= {"127.0.0.1"}, path.name
