"""What the benchmarks' reports say of their models."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

from lola_vllm.evaluation.results import fingerprint

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from common import write_report


def test_a_report_tells_its_models_by_fingerprint(tmp_path: Path) -> None:
    for name in ("lola", "base"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"of": name}))
    out = tmp_path / "report.json"
    args = Namespace(model=tmp_path / "lola", stock=tmp_path / "base", dir=tmp_path, out=out)
    write_report(args, {"found": 3})
    report = json.loads(out.read_text())
    assert report["settings"] == {"model": "lola", "stock": "base", "dir": tmp_path.name}
    assert report["models"] == {
        "model": fingerprint(tmp_path / "lola"), "stock": fingerprint(tmp_path / "base"),
    }  # fmt: skip
    assert report["models"]["model"] != report["models"]["stock"]
