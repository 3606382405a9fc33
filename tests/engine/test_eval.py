"""`lola-vllm eval` on a real model: what must be perfect is, and equal models measure equal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lola_vllm.command import cli
from lola_vllm.evaluation.distance import PRECEDING, SPREAD
from lola_vllm.training.texts import SEPARATOR

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "models"


def evaluate(kind: str, model: Path, out: Path, *options: str) -> list[dict]:
    argv = ["eval", kind, "--model", str(model), "--out", str(out)]
    argv += ["--reference", str(MODELS / "smollm2-base"), *options]
    assert cli.main([*argv, "--engine-args", '{"dtype": "float32"}']) == 0
    return json.loads((out / f"{kind}.json").read_text())["settings"]


@pytest.mark.slow
def test_recall_of_a_softmax_model_of_its_equal_and_of_an_ablation(
    tmp_path: Path, untrained: Path
) -> None:
    rows = [
        {"name": "window", "lola_config": {"window_size": 1024}},
        {"name": "newest", "score": "newest"},
    ]
    (tmp_path / "sweep.json").write_text(json.dumps(rows))
    options = ["--tasks", "niah-1", "--lengths", "512", "--samples", "4"]
    options += ["--sweep", str(tmp_path / "sweep.json")]
    stock, window, newest = evaluate("recall", untrained, tmp_path, *options)
    for row in (stock, window):
        assert row["dtype"] == "float32" and row["selections_by_other_score"] == 0
        assert [sample["exact"] for sample in row["samples"]] == [True] * 4
    assert [s["answer"] for s in window["samples"]] == [s["answer"] for s in stock["samples"]]
    # The same questions, and a window of 64 with 128 newer pairs cannot answer the early ones.
    questions = [[(s["expected"], s["depth"]) for s in row["samples"]] for row in (stock, newest)]
    assert questions[0] == questions[1]
    early = [s["exact"] for s in newest["samples"] if s["depth"] < 0.4]
    assert early and not any(early)
    assert newest["selections_by_other_score"] > 0
    assert newest["state_bytes"] < stock["full_kv_bytes_per_token"] * 1024 < window["state_bytes"]
    table = (tmp_path / "recall.md").read_text().splitlines()
    assert [line.split("|")[2].strip() for line in table if "| window" in line] == [
        "100% [51%, 100%]",
        f"{window['state_bytes'] / 2**20:.1f}, {window['cells'][0]['full_kv_over_bytes']:.1f}x",
    ]


@pytest.mark.slow
def test_perplexity_of_equal_models_is_equal(tmp_path: Path, untrained: Path) -> None:
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    paragraphs = [p for page in sorted(pages) for p in page.read_text().split("\n\n")]
    (tmp_path / "docs.txt").write_text(SEPARATOR.join(paragraphs))
    options = ["--texts", str(tmp_path), "--windows", "2", "--window-length", "384"]
    options += ["--lola-config", '{"window_size": 1024}']
    stock, window = evaluate("perplexity", untrained, tmp_path / "out", *options)
    value, low, high = stock["kinds"]["docs"]["perplexity"]
    assert 5 < low <= value <= high < 200  # neither random nor knowing the future
    assert window["kinds"]["docs"]["ratio"] == pytest.approx([1, 1, 1], abs=1e-2)
    assert stock["kinds"]["docs"]["ratio"] is None


@pytest.mark.slow
def test_vllms_refusal_reaches_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["eval", "recall", "--model", str(MODELS / "smollm2-lola"), "--out", str(tmp_path)]
    argv += ["--tasks", "niah-1", "--lengths", "512", "--samples", "1"]
    assert cli.main([*argv, "--engine-args", '{"kv_cache_dtype": "fp8"}']) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "lola-vllm: error: setting 'model': " in message and "fp8" in message


@pytest.mark.slow
def test_a_stream_of_equal_models_is_equal_and_goes_past_the_window(
    tmp_path: Path, untrained: Path
) -> None:
    """The reference sees all of so short a stream, as the first window does and the second not."""
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    paragraphs = [p for page in sorted(pages) for p in page.read_text().split("\n\n")]
    (tmp_path / "docs.txt").write_text(SEPARATOR.join(paragraphs))
    options = ["--texts", str(tmp_path), "--stream", "--stream-length", "1024", "--block", "256"]
    options += ["--lola-config", 'wide={"window_size": 1024}']
    options += ["--lola-config", 'narrow={"window_size": 64, "sparse_cache_size": 0}']
    argv = ["eval", "perplexity", "--model", str(untrained), "--out", str(tmp_path / "out")]
    argv += ["--reference", str(MODELS / "smollm2-base"), "--engine-args", '{"dtype": "float32"}']
    assert cli.main([*argv, *options]) == 0
    stock, wide, narrow = json.loads((tmp_path / "out" / "stream.json").read_text())["settings"]
    levels = [point["perplexity"] for point in stock["streams"]["docs"]["points"]]
    assert len(levels) == 4 and all(5 < level < 200 for level in levels)
    ratios = [point["ratio"] for point in wide["streams"]["docs"]["points"]]
    assert ratios == pytest.approx([1] * 4, abs=1e-3)
    assert narrow["streams"]["docs"]["points"][3]["ratio"] > 1.05
    # The same text as the first of all windows, in vLLM's engine.
    windows = [
        "--windows",
        "99",
        "--window-length",
        "1024",
        "--texts",
        str(tmp_path),
        *options[-2:],
    ]
    (row,) = evaluate("perplexity", untrained, tmp_path / "windows", *windows)[1:]
    own = row["samples"][0]
    assert (own["index"], own["tokens"]) == (0, sum(s["tokens"] for s in narrow["samples"]))
    assert sum(s["nats"] for s in narrow["samples"]) == pytest.approx(own["nats"], rel=1e-4)


@pytest.mark.slow
def test_recall_at_a_distance(tmp_path: Path) -> None:
    options = ["--tasks", "niah-1", "--distances", "32,600", "--samples", "3"]
    options += ["--lola-config", 'none={"sparse_cache_size": 0}']
    base, none = evaluate("recall", MODELS / "smollm2-lola", tmp_path, *options)
    cells = {cell["distance"]: cell for cell in base["cells"]}
    assert (cells[32]["exact"], cells[600]["exact"]) == (3, 3)
    rest = PRECEDING + SPREAD
    assert [cell["length"] for cell in base["cells"]] == [32 + rest, 600 + rest]
    # The window of 64 holds the near needle; nothing holds the far one.
    cells = {cell["distance"]: cell for cell in none["cells"]}
    assert (cells[32]["exact"], cells[600]["exact"]) == (3, 0)
    assert (tmp_path / "recall-distance-niah-1.png").is_file()
