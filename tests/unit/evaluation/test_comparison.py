"""A call of `lola-vllm eval`: its files, how it is resumed, and the process of a setting."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lola_vllm.command import cli
from lola_vllm.evaluation import EvalError, engine
from lola_vllm.evaluation.plan import Plan
from lola_vllm.evaluation.recall import RecallPlan
from lola_vllm.evaluation.settings import Setting
from tests.support.evaluations import Finding

Run = Callable[..., int]


@pytest.fixture
def ran(monkeypatch) -> list[tuple[str, Finding]]:
    """The settings that are asked, and the models that answer: the last one is of the next."""
    found: list[tuple[str, Finding]] = [("", Finding())]

    def ask(plan: Plan, setting: Setting, done: Any, *_: Any) -> Iterator[dict[str, Any]]:
        model = found[-1][1]
        found[-1:] = [(setting.name, model), ("", Finding())]
        yield {"dtype": "float32"}
        for rows in plan.run(model, done):
            yield {"rows": json.loads(json.dumps(rows))}

    monkeypatch.setattr(engine, "ask", ask)
    return found


@pytest.fixture
def recall(models, ran) -> Run:
    """The command, of 6 questions of each of two lengths."""

    def run(*options: str) -> int:
        argv = ["eval", "recall", "--model", str(models / "lola"), "--out", str(models / "out")]
        argv += ["--tasks", "niah-1", "--lengths", "1024,2048", "--samples", "6"]
        return cli.main([*argv, *options])

    return run


def read(models: Path) -> Any:
    return json.loads((models / "out" / "recall.json").read_text())


def test_files_of_a_comparison(models, recall, ran, capsys):
    small = ["--lola-config", 'small={"sparse_cache_size": 8}']
    assert recall("--reference", str(models / "llama"), *small) == 0
    said = capsys.readouterr()
    assert "| small     | 100% [61%, 100%] | 100% [61%, 100%] |" in said.out
    assert said.err.startswith("llama, lola on the ")
    assert "recall of tasks ['niah-1'], lengths [1024, 2048], samples 6, seed 0" in said.err
    assert " for each of 2 settings\n" in said.err and "small: 12 rows after" in said.err
    whole = read(models)
    assert str(models) not in json.dumps(whole)  # results may be published
    stock, lola = whole["settings"]
    assert (stock["name"], lola["name"]) == ("reference", "small")
    assert (lola["model"], lola["dtype"], lola["finished"]) == ("lola", "float32", True)
    assert len(lola["samples"]) == 12 and lola["fingerprint"] != stock["fingerprint"]
    assert lola["state_bytes"] and lola["lola_config"]["window_size"] == 16
    assert stock["full_kv_bytes_per_token"] == 512 and stock["state_bytes"] is None
    summary = json.loads((models / "out" / "recall.summary.json").read_text())
    assert summary["made_by"] == "lola-vllm eval" and "samples" not in summary["settings"][0]
    assert [cell["exact"] for cell in summary["settings"][1]["cells"]] == [6, 6]
    assert (models / "out" / "recall.md").read_text() in said.out
    assert not list((models / "out").glob("*.part"))
    # What was asked before is not asked again.
    more = [*small, "--lola-config", "as it is={}", "--resume"]
    assert recall("--reference", str(models / "llama"), *more) == 0
    assert [name for name, _ in ran[:-1]] == ["reference", "small", "as it is"]


def test_an_interrupted_run_goes_on(models, recall, ran, capsys):
    ran[-1] = ("", Finding(left=6))
    assert recall() == 2 and "out of order" in capsys.readouterr().err
    (stopped,) = read(models)["settings"]
    assert len(stopped["samples"]) == 6 and stopped["finished"] is False
    assert recall("--resume") == 0
    (whole,) = read(models)["settings"]
    assert whole["samples"][:6] == stopped["samples"] and len(whole["samples"]) == 12
    assert [model.asked for _, model in ran[:-1]] == [6, 6] and whole["finished"] is True


def test_other_results_are_not_gone_on_with(models, recall, capsys):
    assert recall() == 0
    (models / "lola" / "tokenizer.json").write_text("another one")
    for options, message in (
        ([], "--resume goes on with it, --out puts"),
        (["--resume", "--samples", "7"], "of another plan: samples was 6, is 7"),
        (["--resume"], "setting 'model' in "),
    ):
        assert recall(*options) == 2 and message in capsys.readouterr().err
    (models / "out" / "recall.json").write_text("{")
    assert recall("--resume") == 2 and "cannot be read" in capsys.readouterr().err


# --- the process of a setting


def test_a_childs_error_is_the_callers(models):
    plan, setting = RecallPlan(["niah-1"], [512], 1), Setting("row", models / "lola")
    message = "setting 'row': --engine-args: max_model_len is set by the evaluation"
    with pytest.raises(EvalError, match=message):
        list(engine.ask(plan, setting, set(), 1, {"max_model_len": 8}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's dtype is left to vLLM")
def test_on_a_cpu_the_dtype_is_the_fast_one(tmp_path, monkeypatch):
    """Base and LoLA model alike; quantized weights are left to vLLM."""
    config = tmp_path / "config.json"
    config.write_text('{"dtype": "bfloat16"}')
    monkeypatch.setenv("LOLA_VLLM_CPU_ISA", "avx2")
    assert engine.dtype_of(Setting("a", tmp_path), {}) == "float32"
    config.write_text('{"dtype": "bfloat16", "quantization_config": {}}')
    assert engine.dtype_of(Setting("a", tmp_path), {}) == "auto"


def test_a_child_does_not_outlive_its_parent():
    """A killed parent cannot stop it, and a long prompt keeps it busy for minutes."""
    work = "import time; from lola_vllm.evaluation import engine as e; "
    work += "e.answers = lambda *job: (time.sleep(300 * i) or {} for i in (0, 1)); e.main()"
    child = subprocess.Popen(
        [sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin and child.stdout
    with child:
        try:
            child.stdin.write(pickle.dumps(()))
            child.stdin.flush()
            assert json.loads(child.stdout.readline()) == {}
            assert child.poll() is None
            child.stdin.close()
            assert child.wait(30) == engine.USER_ERROR
        finally:
            child.kill()
