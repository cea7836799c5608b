"""The progress on Ray's Prometheus page, and in deploy/grafana.json."""

import json
import re
import urllib.request
from pathlib import Path

from orchestrator.cluster import gauges
from tests.helpers import small_run
from tests.helpers.wait import wait_until

DASHBOARD = Path(__file__).resolve().parents[2] / "deploy" / "grafana.json"


def test_prometheus_page_of_the_node_shows_the_progress(ray_cluster):
    name = "test of the page"  # runs of other tests are on this page, too
    gauges.show(name, step=40, steps=60, train_loss=2.5, val_loss=None, left_seconds=7)
    (node,) = ray_cluster.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def shown() -> dict[str, float]:
        with urllib.request.urlopen(address, timeout=10) as page:  # noqa: S310 - loopback
            text = page.read().decode()
        found = re.findall(
            rf'^ray_espalier_(\w+)\{{.*name="{name}".*\}} (\S+)$', text, re.MULTILINE
        )
        return {name: float(value) for name, value in found}

    # Ray sends metrics every ten seconds, perhaps some of them before the others.
    expected = {"step": 40, "steps": 60, "train_loss": 2.5, "left_seconds": 7}
    wait_until(lambda: shown() == expected, pause_s=0.5)


def test_run_sets_all_gauges(tiny_corpus, tiny_dataset, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(gauges, "show", lambda name, **values: seen.append((name, values)))
    small_run.run_here(tmp_path, tiny_corpus, f"data.dir={tiny_dataset}", "train.max_steps=20")
    lines = small_run.curve(tmp_path / "small")
    assert [(name, values["step"]) for name, values in seen] == [
        ("small", line["step"]) for line in lines
    ]
    name, last = seen[-1]
    assert last.keys() == gauges.GAUGES.keys()
    assert (last["steps"], last["train_loss"]) == (20, lines[-1]["train/loss"])


def test_nothing_is_set_without_ray(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(gauges, "_gauge", lambda key: 1 / 0)
    gauges.show("small", step=1)


def test_dashboard_shows_every_gauge_and_no_other():
    text = DASHBOARD.read_text("utf-8")
    assert set(re.findall(r"ray_espalier_(\w+)", text)) == gauges.GAUGES.keys()
    dashboard = json.loads(text)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    for panel in dashboard["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables
