"""Alerts and dashboard name only metrics and labels the code exports, and are shaped as Prometheus and Grafana read them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from cellplane.serve.meters import ABOUT
from cellplane.train.gauges import GAUGES
from tests.house.source import ROOT, sources

ALERTS = ROOT / "configs" / "cluster" / "prometheus" / "alerts.yaml"
DASHBOARD = ROOT / "configs" / "cluster" / "grafana" / "cellplane.json"
GROUPS: list[dict[str, Any]] = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
BOARD: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
EXPRESSIONS = [rule["expr"] for rule in RULES]
EXPRESSIONS += [target["expr"] for panel in BOARD["panels"] for target in panel.get("targets", [])]
OF_PROMETHEUS = {"up", "probe_success"}  # its own, and the blackbox exporter's
FUNCTIONS = {
    "rate",
    "increase",
    "changes",
    "delta",
    "histogram_quantile",
    "min_over_time",
    "avg_over_time",
    "sum",
    "max",
    "min",
    "by",
    "and",
}
LABELS = {"model", "version", "status", "method", "outcome", "task", "run", "le"}
DURATION = re.compile(r"^[0-9]+(s|m|h|d)$")
each_expression = pytest.mark.parametrize("expression", EXPRESSIONS)


def exported() -> set[str]:
    """Every name a scraper may see of ours."""
    names = {f"ray_{name}" for name in GAUGES}
    for name, (kind, _) in ABOUT.items():
        names |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"} if kind == "histogram" else {name}
    return names


def words(expression: str) -> set[str]:
    """Names in an expression, without what stands in braces, brackets, after `by`, or is a number."""
    bare = re.sub(r"\bby\s*\([^)]*\)", " ", re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", expression))
    return set(re.findall(r"[a-zA-Z_][a-zA-Z0-9_]*", bare)) - FUNCTIONS


@each_expression
def test_every_metric_exists(expression: str) -> None:
    names = words(expression)
    assert names
    rays = {name for name in names - exported() - OF_PROMETHEUS if name.startswith("ray_node_")}
    reporter = Path(str(metadata.distribution("ray").locate_file("ray/dashboard/modules/reporter/reporter_agent.py"))).read_text()
    assert not [name for name in rays if f'"{name.removeprefix("ray_")}"' not in reporter]
    assert names - rays <= exported() | OF_PROMETHEUS


@each_expression
def test_labels_are_ours_and_brackets_close(expression: str) -> None:
    for inner in re.findall(r"\{([^}]*)\}", expression):
        assert set(re.findall(r"(\w+)\s*(?:=~|!=|=)", inner)) <= LABELS | {"job"}
    for inner in re.findall(r"\bby\s*\(([^)]*)\)", expression):
        assert {label.strip() for label in inner.split(",")} <= LABELS
    depth = 0
    for sign in expression:
        depth += (sign in "([{") - (sign in ")]}")
        assert depth >= 0
    assert depth == 0
    assert all(DURATION.match(span) or span == "$__rate_interval" for span in re.findall(r"\[([^\]]*)\]", expression))


def test_every_counter_is_added_to_somewhere() -> None:
    text = "\n".join(source.text for source in sources() if source.place.startswith("serve/") and not source.place.endswith("meters.py"))
    counted = {name for name in ABOUT if f'"{name}"' in text}
    written = {"cellplane_request_seconds", "cellplane_forward_total", "cellplane_forward_requests_total", "cellplane_forward_cells_total"}
    assert counted | written == set(ABOUT)  # `time`, and what replicas count under cellplane_forward_*


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_is_one_that_prometheus_loads(rule: dict[str, Any]) -> None:
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"[A-Z][A-Za-z]+", rule["alert"])
    assert "for" not in rule or DURATION.match(rule["for"])
    assert rule["labels"]["severity"] in ("info", "warning", "critical")
    assert re.search(r"[<>]|==", rule["expr"]), "without a comparison it would always fire"
    for text in rule["annotations"].values():
        assert text.count("{{") == text.count("}}")
        assert set(re.findall(r"\$labels\.(\w+)", text)) <= LABELS | {"instance"}
        for label in set(re.findall(r"\$labels\.(\w+)", text)) - {"instance"}:
            assert re.search(rf"by \([^)]*\b{label}\b", rule["expr"]) or "changes(ray_cellplane" in rule["expr"]


def test_alerts_have_names_of_their_own_and_the_page_tells_each() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names)
    page = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
    assert [name for name in names if f"`{name}`" not in page] == []
    assert len({group["name"] for group in GROUPS}) == len(GROUPS)


def panels() -> Iterator[dict[str, Any]]:
    yield from BOARD["panels"]


def test_the_dashboard_is_one_that_grafana_loads() -> None:
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
    assert {"title", "uid", "schemaVersion", "templating", "time"} <= BOARD.keys()
    variables = {variable["name"] for variable in BOARD["templating"]["list"]}
    for panel in panels():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for target in panel.get("targets", []):
            assert set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"} <= variables
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"


def test_panels_do_not_lie_on_one_another() -> None:
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels())
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
