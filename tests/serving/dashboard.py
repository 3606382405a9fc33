"""The metrics that the Grafana dashboard asks for."""

from __future__ import annotations

import json
import re
from pathlib import Path

DASHBOARD = Path(__file__).parents[2] / "serving/deploy/grafana/dashboards/lola.json"


def queried() -> set[str]:
    """Names of all metrics in the panels' and variables' queries."""
    board = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [v["query"]["query"] for v in board["templating"]["list"] if v["type"] == "query"]
    return set(re.findall(r"\b(?:lola|vllm):\w+", " ".join(queries)))
