"""Settings of a comparison, what a sequence of each costs, and held-out documents."""

import json
from pathlib import Path

import pytest

from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.held_out import read_held_out, read_kinds
from lola_vllm.evaluation.results import fingerprint
from lola_vllm.evaluation.settings import Setting, check, measure, parse_settings
from lola_vllm.training.texts import SEPARATOR, is_held_out


def test_settings(models):
    lola, sweep = models / "lola", models / "sweep.json"
    assert parse_settings(lola, [], None, None) == [Setting("model", lola)]
    for text, setting in (
        ('{"a": "b=c"}', Setting("override", lola, {"a": "b=c"})),
        ('D = 8={"a": 1}', Setting("D = 8", lola, {"a": 1})),
    ):
        assert parse_settings(lola, [text], None, None) == [setting]
    rows = [
        {"name": "kv", "model": "elsewhere"},
        {"name": "H off", "without": "hidden-state", "lola_config": {"window_size": 4}},
    ]
    sweep.write_text(json.dumps(rows))
    configs = ['w8={"window_size": 8}', "as is={}"]
    assert parse_settings(lola, configs, sweep, models / "llama", "importance") == [
        Setting("reference", models / "llama"),
        Setting("w8", lola, {"window_size": 8}, "importance"),
        Setting("as is", lola, {}, "importance"),
        Setting("kv", Path("elsewhere"), {}, "importance"),
        Setting("H off", lola, {"window_size": 4}, "hidden-state"),
    ]


def test_memory(models):
    plain = measure(Setting("a", models / "llama"), "bfloat16")
    assert plain is not None and plain.state_bytes is None and plain.lola_config is None
    assert plain.full_kv_bytes_per_token == 2 * 2 * 2 * 16 * 2  # layers, K and V, heads, d, bytes
    lola = measure(Setting("a", models / "lola", {"sparse_cache_size": 0}), "bfloat16")
    more = measure(Setting("a", models / "lola", {"sparse_cache_size": 256}), "bfloat16")
    assert lola and more and lola.state_bytes and more.state_bytes
    assert more.lola_config and more.lola_config["sparse_cache_size"] == 256
    assert more.lola_config["window_size"] == 16  # the checkpoint's own
    pairs = 256 * plain.full_kv_bytes_per_token
    positions = 256 * 2 * 2 * 4  # int32, per layer and sparse set
    assert more.state_bytes - lola.state_bytes == pytest.approx(pairs + positions, rel=0.05)
    wide = measure(Setting("a", models / "llama"), "float32")
    assert wide and wide.full_kv_bytes_per_token == 2 * plain.full_kv_bytes_per_token
    assert measure(Setting("a", models / "gpt"), "bfloat16") is None


def test_a_length_must_be_in_the_models_context_if_that_ends(models):
    check(Setting("a", models / "lola"), 4096)
    with pytest.raises(EvalError, match=r"4097 tokens: .* takes 4096"):
        check(Setting("a", models / "lola"), 4097)
    check(Setting("a", models / "lola", {"context_shift": 1024}), 4097)
    check(Setting("a", models / "gpt"), 10**6)  # its config does not say


def test_fingerprints_follow_the_weights(models):
    weights = models / "lola" / "model.safetensors"
    weights.write_bytes(b"a" * 10_000_000)
    before = fingerprint(models / "lola")
    assert before == fingerprint(models / "lola")
    weights.write_bytes(b"a" * 5_000_000 + b"b" + b"a" * 4_999_999)
    assert fingerprint(models / "lola") != before


def test_held_out_documents_alone_are_read_by_file_and_by_kind(tmp_path):
    documents = [f"Document number {i}." for i in range(300)]
    kept = [document for document in documents if is_held_out(document)]
    for i, name in enumerate(("web_bible", "jane_austen", "mine")):
        text = SEPARATOR.join(documents[100 * i : 100 * i + 100])
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "SOURCES.json").write_text("[]")
    found = read_held_out(tmp_path)
    assert list(found) == ["jane_austen", "mine", "web_bible"]
    assert found["web_bible"] + found["jane_austen"] + found["mine"] == kept
    assert read_held_out(tmp_path / "mine.txt") == {"mine": found["mine"]}
    kinds = read_kinds(tmp_path, [])
    assert {kind: list(files) for kind, files in kinds.items()} == {
        "prose": ["jane_austen", "web_bible"],
        "mine": ["mine"],
    }
    assert read_kinds(tmp_path, ["web_bible"]) == {"web_bible": {"web_bible": found["web_bible"]}}
    trained = next(document for document in documents if not is_held_out(document))
    (tmp_path / "empty").mkdir()
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "c.txt").write_text(trained)
    for name, kinds_wanted, message in (
        ("nowhere", [], "no such file"),
        ("empty", [], r"no \.txt file"),
        ("trained", [], "no document is held out"),
        (".", ["code"], "has no code, only prose, mine in the files jane_austen, mine,"),
    ):
        with pytest.raises(EvalError, match=message):
            read_kinds(tmp_path / name, kinds_wanted)
