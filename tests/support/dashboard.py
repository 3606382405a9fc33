"""The metrics that the Grafana dashboard and the alerts ask for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

DEPLOY = Path(__file__).parents[2] / "serving" / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "lola.json"


def queried() -> set[str]:
    """Names of all metrics in the queries of panels, variables and alerts."""
    board = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [v["query"]["query"] for v in board["templating"]["list"] if v["type"] == "query"]
    alerts = yaml.safe_load((DEPLOY / "alerts.yml").read_text())
    queries += [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    return set(re.findall(r"\b(?:lola|vllm):\w+", " ".join(queries)))
