"""`lola-vllm eval` in vLLM: what must be perfect is, and equal models measure equal."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lola_vllm.command import cli
from lola_vllm.evaluation.stream import StreamPlan
from lola_vllm.models.init import init_checkpoint
from lola_vllm.training.texts import SEPARATOR
from tests.support.engine import not_compiled, replace_kernels_once
from tests.support.evaluations import in_this_process, make_pair

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "models"
FLOAT32 = ["--engine-args", '{"dtype": "float32"}']


@pytest.mark.slow
def test_what_a_real_model_recalls_at_a_distance(tmp_path, monkeypatch):
    in_this_process(monkeypatch)
    argv = ["eval", "recall", "--model", str(MODELS / "smollm2-lola"), "--out", str(tmp_path)]
    argv += ["--tasks", "niah-1", "--samples", "2", "--distances", "32,600", "--lengths", "900"]
    argv += ["--lola-config", "all={}", "--lola-config", 'none={"sparse_cache_size": 0}', *FLOAT32]
    assert cli.main(argv) == 0
    settings = json.loads((tmp_path / "recall.json").read_text())["settings"]
    assert [(row["name"], row["dtype"]) for row in settings] == [
        ("all", "float32"),
        ("none", "float32"),
    ]
    questions = [[(s["expected"], s["distance"]) for s in row["samples"]] for row in settings]
    assert questions[0] == questions[1]
    # Without a cache, the window of 64 holds the needle 64 tokens back, of the one 68 back a part,
    # and nothing of the far ones.
    exact = [[cell["exact"] for cell in row["cells"]] for row in settings]
    assert exact[0] == [2, 2] and exact[1][0] > 0 == exact[1][1]
    shipped, bare = settings
    assert bare["state_bytes"] < shipped["state_bytes"] < 900 * shipped["full_kv_bytes_per_token"]
    assert "| all" in (tmp_path / "recall.md").read_text()


@pytest.fixture(scope="module", autouse=True)
def quick_starts() -> Iterator[None]:
    """Of the engines that an evaluation starts in this process."""
    replace_kernels_once()
    with not_compiled():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A softmax model and a LoLA model with its weights, and texts."""
    place = tmp_path_factory.mktemp("eval")
    make_pair(place / "speaking", place / "base")
    init_checkpoint(place / "base", place / "lola", {"sparse_cache_size": 16})
    paragraphs = [
        paragraph
        for page in [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
        for paragraph in page.read_text().split("\n\n")
    ]
    (place / "docs.txt").write_text(SEPARATOR.join(paragraphs))
    return place


def evaluate(place: Path, out: Path, verb: str, *options: str) -> list[dict[str, Any]]:
    """The reference, and the same weights with a window that holds every text and a narrow one."""
    argv = ["eval", verb, "--model", str(place / "lola"), "--reference", str(place / "base")]
    argv += ["--lola-config", 'wide={"window_size": 1024}']
    argv += ["--lola-config", 'narrow={"window_size": 64, "sparse_cache_size": 0}']
    assert cli.main([*argv, "--out", str(out), *FLOAT32, *options]) == 0
    (found,) = [file for file in out.glob("*.json") if "summary" not in file.name]
    settings: list[dict[str, Any]] = json.loads(found.read_text())["settings"]
    return settings


@pytest.mark.slow
def test_a_setting_has_a_process_and_its_refusal_reaches_the_user(place, tmp_path, capsys):
    argv = ["eval", "recall", "--model", str(place / "lola"), "--tasks", "niah-1"]
    argv += ["--lengths", "512", "--samples", "1", "--out"]
    refused = [*argv, str(tmp_path / "refused")]
    assert cli.main([*refused, "--engine-args", '{"kv_cache_dtype": "fp8"}']) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "lola-vllm: error: setting 'model': " in message and "fp8" in message
    assert cli.main([*argv, str(tmp_path), *FLOAT32]) == 0
    (row,) = json.loads((tmp_path / "recall.json").read_text())["settings"]
    assert row["dtype"] == "float32" and len(row["samples"]) == 1


# --- in this process


def test_equal_models_predict_equally_by_windows_and_along_a_stream(place, tmp_path, monkeypatch):
    """The windows are read in vLLM's engine, the stream in transformers."""
    in_this_process(monkeypatch)
    texts = ["--texts", str(place / "docs.txt")]
    options = [*texts, "--windows", "99", "--window-length", "1024"]
    stock, wide, narrow = evaluate(place, tmp_path / "windows", "perplexity", *options)
    assert stock["kinds"]["docs"]["ratio"] is None
    assert wide["kinds"]["docs"]["ratio"] == pytest.approx([1, 1, 1], abs=1e-3)
    assert narrow["kinds"]["docs"]["ratio"] != pytest.approx([1, 1, 1], abs=1e-3)
    short = partial(StreamPlan, block=256, context=1024)
    monkeypatch.setattr("lola_vllm.evaluation.command.StreamPlan", short)
    streams = evaluate(place, tmp_path / "stream", "perplexity", *texts, "--stream", "1024")
    # The reference sees all of so short a stream, as the wide window does and the narrow one not.
    ratios = [[p["ratio"] for p in row["streams"]["docs"]["points"]] for row in streams[1:]]
    assert ratios[0] == pytest.approx([1] * 4, abs=1e-3)
    assert all(ratio != pytest.approx(1, abs=1e-3) for ratio in ratios[1][1:])
    # The same text as the first of all windows.
    for of_windows, of_stream in zip((stock, wide, narrow), streams, strict=True):
        first = of_windows["samples"][0]
        assert first["index"] == 0
        assert first["tokens"] == sum(s["tokens"] for s in of_stream["samples"])
        nats = sum(s["nats"] for s in of_stream["samples"])
        assert nats == pytest.approx(first["nats"], rel=1e-4)
