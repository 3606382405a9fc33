"""Settings of a comparison, the command line around them, and what a sequence of each costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lola_vllm.core.config import LolaConfigError
from lola_vllm.evaluation import EvalError, engine
from lola_vllm.evaluation.engine import run_setting
from lola_vllm.evaluation.results import Record, fingerprint
from lola_vllm.evaluation.settings import Setting, check, measure, parse_settings, read_held_out
from lola_vllm.training.texts import SEPARATOR, is_held_out


def parse(models: Path, *configs: str, sweep: Any = None, **options: Any) -> list[Setting]:
    path = None
    if sweep is not None:
        path = models / "sweep.json"
        path.write_text(sweep if isinstance(sweep, str) else json.dumps(sweep))
    return parse_settings(models / "lola", configs, path, options.get("reference"))


def test_settings(models: Path) -> None:
    lola = models / "lola"
    assert parse(models) == [Setting("model", lola)]
    assert parse(models, '{"a": "b=c"}') == [Setting("override", lola, {"a": "b=c"})]
    assert parse(models, 'D = 8={"a": 1}') == [Setting("D = 8", lola, {"a": 1})]
    found = parse(
        models,
        'w8={"window_size": 8}',
        "as is={}",
        sweep=[{"name": "kv", "model": "elsewhere"}, {"name": "last"}],
        reference=models / "llama",
    )
    assert found == [
        Setting("reference", models / "llama"),
        Setting("w8", lola, {"window_size": 8}),
        Setting("as is", lola),
        Setting("kv", Path("elsewhere")),
        Setting("last", lola),
    ]
    found = parse(models, "as is={}", sweep=[{"name": "H off", "without": "hidden-state"}])
    assert [setting.without for setting in found] == ["", "hidden-state"]


def test_parts_are_left_out_of_lola_models_that_have_them(models: Path) -> None:
    with pytest.raises(EvalError, match="'window' is no part"):
        check(Setting("x", models / "lola", without="window"), 8)
    with pytest.raises(EvalError, match="has no lola_config and no sparse cache"):
        check(Setting("x", models / "llama", without="hidden-state"), 8)


@pytest.mark.parametrize(
    ("configs", "sweep", "message"),
    [
        (["a={"], None, "'a={': not JSON"),
        (["a=3"], None, "must be a JSON object"),
        (["{}", "{}"], None, "two settings are named 'override'"),
        ([], "{", "Invalid JSON"),
        ([], {}, "Input should be a valid array; must be a list of objects with name, model"),
        ([], [3], "0: Input should be an object"),
        ([], [{"name": "a", "window": 8}], "0.window: Extra inputs are not permitted"),
        ([], [{"lola_config": {}}], "0.name: Field required"),
        ([], [{"name": "a", "lola_config": 3}], "0.lola_config: Input should be an object"),
    ],
)
def test_settings_that_cannot_be_read(
    models: Path, configs: list[str], sweep: Any, message: str
) -> None:
    with pytest.raises(EvalError) as error:
        parse(models, *configs, sweep=sweep)
    assert message in str(error.value)


def test_memory(models: Path) -> None:
    plain = measure(Setting("a", models / "llama"), "bfloat16")
    assert plain is not None and plain.state_bytes is None and plain.lola_config is None
    assert plain.full_kv_bytes_per_token == 2 * 2 * 2 * 16 * 2  # layers, K and V, heads, d, bytes
    assert plain.bytes_at(100) == 25600 and plain.saving_at(100) == 1
    lola = measure(Setting("a", models / "lola", {"sparse_cache_size": 0}), "bfloat16")
    more = measure(Setting("a", models / "lola", {"sparse_cache_size": 256}), "bfloat16")
    assert lola and more and lola.state_bytes and more.state_bytes
    assert more.lola_config and more.lola_config["sparse_cache_size"] == 256
    assert more.lola_config["window_size"] == 16  # the checkpoint's own
    pairs = 256 * plain.full_kv_bytes_per_token
    positions = 256 * 2 * 2 * 4  # int32, per layer and sparse set
    assert more.state_bytes - lola.state_bytes == pytest.approx(pairs + positions, rel=0.05)
    assert more.bytes_at(1) == more.bytes_at(10**6) == more.state_bytes
    wide = measure(Setting("a", models / "llama"), "float32")
    assert wide and wide.full_kv_bytes_per_token == 2 * plain.full_kv_bytes_per_token
    assert measure(Setting("a", models / "gpt"), "bfloat16") is None


def test_what_no_engine_would_take_is_refused_at_once(models: Path) -> None:
    check(Setting("a", models / "lola", {"window_size": 8}), 4096)
    check(Setting("a", models / "gpt"), 10**6)  # its config does not say
    for setting, length, message in (
        (Setting("a", models / "lola"), 4097, "4097 tokens: .* takes 4096"),
        (Setting("a", models / "llama", {"window_size": 8}), 64, "is a llama model, which has no"),
        (Setting("a", models / "llama", {}, "importance"), 64, "make a LoLA checkpoint with"),
        (Setting("a", models / "nowhere"), 64, "no such directory, and no http"),
    ):
        with pytest.raises(EvalError, match=message):
            check(setting, length)
    with pytest.raises(LolaConfigError, match="nearest valid name: 'window_size'"):
        check(Setting("a", models / "lola", {"windw_size": 8}), 64)
    (models / "gpt" / "config.json").write_text("{")
    with pytest.raises(EvalError, match=r"config\.json cannot be read"):
        check(Setting("a", models / "gpt"), 64)


def test_fingerprints_follow_the_weights(models: Path) -> None:
    weights = models / "lola" / "model.safetensors"
    weights.write_bytes(b"a" * 10_000_000)
    before = fingerprint(models / "lola")
    assert before == fingerprint(models / "lola")
    weights.write_bytes(b"a" * 5_000_000 + b"b" + b"a" * 4_999_999)
    assert fingerprint(models / "lola") != before


def test_held_out_documents_alone_are_read(tmp_path: Path) -> None:
    documents = [f"Document number {i}." for i in range(200)]
    kept = [document for document in documents if is_held_out(document)]
    (tmp_path / "b.txt").write_text(SEPARATOR.join(documents[:100]))
    (tmp_path / "a.txt").write_text(SEPARATOR.join(documents[100:]))
    (tmp_path / "SOURCES.json").write_text("[]")
    found = read_held_out(tmp_path)
    assert list(found) == ["a", "b"] and found["b"] + found["a"] == kept
    assert read_held_out(tmp_path / "a.txt") == {"a": found["a"]}
    trained = next(document for document in documents if not is_held_out(document))
    (tmp_path / "c").mkdir()
    with pytest.raises(EvalError, match=r"no \.txt file"):
        read_held_out(tmp_path / "c")
    (tmp_path / "c" / "c.txt").write_text(trained)
    with pytest.raises(EvalError, match="no document is held out"):
        read_held_out(tmp_path / "c")
    with pytest.raises(EvalError, match="no such file"):
        read_held_out(tmp_path / "d")


def test_contexts_without_end_may_be_asked_for(models: Path) -> None:
    with pytest.raises(EvalError, match="takes 4096"):
        check(Setting("row", models / "lola"), 4097)
    check(Setting("row", models / "lola", {"context_shift": 1024}), 4097)


def test_a_childs_error_is_the_callers(models: Path) -> None:
    from lola_vllm.evaluation.recall import RecallPlan

    events: list[dict[str, Any]] = []
    record = Record(Setting("row", models / "lola"))
    plan = RecallPlan(["niah-1"], [512], 1)
    with pytest.raises(EvalError) as error:
        run_setting(plan, record, 1, {"max_model_len": 8}, events.append)
    assert "setting 'row': --engine-args: max_model_len is set by the evaluation" in str(
        error.value
    )
    assert events == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's dtype is left to vLLM")
def test_on_a_cpu_the_dtype_is_the_fast_one(tmp_path, monkeypatch):
    """Base and LoLA model alike; quantized weights are left to vLLM."""
    config = tmp_path / "config.json"
    config.write_text('{"dtype": "bfloat16"}')
    monkeypatch.setenv("LOLA_VLLM_CPU_ISA", "avx2")
    assert engine.dtype_of(Setting("a", tmp_path), {}) == "float32"
    config.write_text('{"dtype": "bfloat16", "quantization_config": {}}')
    assert engine.dtype_of(Setting("a", tmp_path), {}) == "auto"


def test_a_child_does_not_outlive_its_parent() -> None:
    """A killed parent cannot stop it, and a long prompt keeps it busy for minutes."""
    work = "import time; from lola_vllm.evaluation import engine as e; "
    work += "e._run = lambda job, emit: (emit(job), time.sleep(300)); e.main()"
    child = subprocess.Popen(
        [sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin and child.stdout
    with child:
        try:
            child.stdin.write('{"event": "here"}\n')
            child.stdin.flush()
            assert json.loads(child.stdout.readline()) == {"event": "here"}
            assert child.poll() is None
            child.stdin.close()
            assert child.wait(30) == engine.USER_ERROR
        finally:
            child.kill()
