"""Checkpoints: the schema, `init` from tiny random Llamas, and what is refused."""

import json
import os
import shutil
import stat
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lola_vllm.core.config import DecoderConfig, TensorFacts, config_class
from lola_vllm.models import (
    CheckpointError,
    check_tensors,
    expected_tensors,
    read_facts,
)
from lola_vllm.models.files import read_shapes, weight_files
from lola_vllm.models.init import init_checkpoint
from lola_vllm.models.remote_code import AUTO_MAP
from lola_vllm.models.schema import settle_facts
from lola_vllm.models.staging import staged_directory
from tests.support.lolcats_files import TINY, listing, make_base, read_tensors

FACTS = TensorFacts(8, 2)


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


# ---- schema

WEIGHTED = TensorFacts(8, 2, importance=True)


def schema(facts: TensorFacts = WEIGHTED) -> dict[str, tuple[int, ...]]:
    config = config_class("llama")(**TINY)
    config.facts = facts
    return expected_tensors(config)


def test_schema_is_three_tensors_a_layer_and_an_importance_where_there_is_one():
    maps = {"feature_map_q": (4, 8, 8), "feature_map_k": (2, 8, 8), "window_factors": (4,)}
    for facts, own in ((FACTS, maps), (WEIGHTED, {**maps, "importance": (2, 4 + 8 + 1)})):
        assert schema(facts) == {
            f"model.layers.{i}.self_attn.{name}": shape
            for i in range(2)
            for name, shape in own.items()
        }


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("feature_map_k", (4, 8, 8)),
        ("feature_map_k", (2, 8, 16)),
        ("feature_map_q", (4, 16, 8)),
        ("window_factors", (1, 4, 1, 1)),
        ("importance", (4, 13)),
    ],
)
def test_wrong_shape_names_both_shapes(name, shape):
    name = f"model.layers.1.self_attn.{name}"
    with pytest.raises(CheckpointError) as error:
        check_tensors(schema(), {**schema(), name: shape})
    assert f"{name}: found {list(shape)}, expected {list(schema()[name])}" in str(error.value)


def test_missing_and_unexpected_tensors_are_named():
    found = {**schema(), "model.norm.weight": (32,)}  # the base's own are its loader's matter
    check_tensors(schema(), found)
    for name in ("feature_map_q", "importance"):
        del found[f"model.layers.0.self_attn.{name}"]
    found["model.layers.7.self_attn.window_factors"] = (4,)
    with pytest.raises(CheckpointError) as error:
        check_tensors(schema(), found)
    message = str(error.value)
    for part in (
        "missing (2):", "feature_map_q [4, 8, 8]", "importance [2, 13]", "`lola-vllm init`",
        "unexpected (1):", "layers.7.self_attn.window_factors",
    ):  # fmt: skip
        assert part in message
    assert "norm" not in message


# ---- init


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
def test_init_keeps_the_base_and_adds_identity_maps(tmp_path, sharded, tied):
    base = make_base(tmp_path / "base", sharded=sharded, tie_word_embeddings=tied)
    out = tmp_path / "deep" / "lola"
    init_checkpoint(base, out, {"window_size": 16, "sink_size": 4})

    assert len(weight_files(out)) == len(weight_files(base)) > (1 if sharded else 0)
    assert (out / "model.safetensors.index.json").exists() == sharded
    if sharded:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        places = {name: path.name for path in weight_files(out) for name in load_file(path)}
        assert index["weight_map"] == places
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in read_tensors(out).values())
    before, after = read_tensors(base), read_tensors(out)
    for name, tensor in before.items():
        assert torch.equal(after.pop(name), tensor)
    assert ("lm_head.weight" in before) != tied
    for i in range(2):
        prefix = f"model.layers.{i}.self_attn."
        for kind, heads in (("feature_map_q", 4), ("feature_map_k", 2)):
            weight = after.pop(prefix + kind)
            assert weight.dtype == torch.bfloat16
            assert torch.equal(weight, torch.eye(8, dtype=torch.bfloat16).expand(heads, 8, 8))
        factors = after.pop(prefix + "window_factors")
        assert factors.dtype == torch.float32 and factors.shape == (4,)
        torch.testing.assert_close(factors.sigmoid(), torch.full((4,), 0.1))
    assert not after

    old, new = (json.loads((path / "config.json").read_text()) for path in (base, out))
    changed = {
        "model_type": "lola",
        "base_model_type": "llama",
        "architectures": ["LolaLlamaForCausalLM"],
        "lola_config": {
            "window_size": 16,
            "sink_size": 4,
            "context_shift": old["max_position_embeddings"] // 4,
        },
        "auto_map": AUTO_MAP,
    }
    assert new == {**old, **changed}
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert listing(tmp_path / "deep") - {f"lola/{name}" for name in listing(out)} == {"lola"}


def test_biases_and_query_heads(tmp_path):
    base = make_base(tmp_path / "base", attention_bias=True, mlp_bias=True)
    config = init_checkpoint(base, tmp_path / "lola", {}, "query")
    assert config.facts == TensorFacts(8, 4) == read_facts(tmp_path / "lola")
    assert expected_tensors(config).items() <= read_shapes(tmp_path / "lola").items()


def test_files_are_readable_as_the_umask_says(tmp_path):
    old = os.umask(0o022)
    try:
        init_checkpoint(make_base(tmp_path / "base"), tmp_path / "lola", {})
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "lola").stat().st_mode) == 0o755
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "lola").iterdir()}
    assert modes == {0o644}


# ---- refusals: nothing is left behind


def _truncate(base: Path, kept: float) -> None:
    (path,) = weight_files(base)
    os.truncate(path, int(kept * (path.stat().st_size - 1)))


def _shard(base: Path, file: str) -> None:
    index = {"weight_map": {"model.norm.weight": file}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "base: no such directory"),
        (lambda base: (base / "config.json").unlink(), "no config.json"),
        (lambda base: (base / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda base: (base / "model.safetensors").unlink(), "no safetensors files"),
        (
            lambda base: edit_config(base, model_type="gpt2"),
            "config.json: a model of type 'gpt2' cannot be the base",
        ),
        (lambda base: edit_config(base, quantization_config={"bits": 4}), "quantized"),
        (lambda base: edit_config(base, hidden_size="wide"), "config.json: .*hidden_size"),
        (lambda base: edit_config(base, num_hidden_layers=3), r"missing.*layers\.2\.self_attn"),
        *(
            (partial(_truncate, kept=kept), "model.safetensors: not a complete safetensors file")
            for kept in (0.0, 0.001, 0.5, 1.0)
        ),
        (partial(_shard, file="../other.safetensors"), "weight_map"),
        (partial(_shard, file="model-9.safetensors"), "'model-9.safetensors', which is missing"),
    ],
)
def test_bad_bases_are_refused(tmp_path, damage, message):
    base = make_base(tmp_path / "base")
    assert callable(damage)
    damage(base)
    before = listing(tmp_path)
    with pytest.raises(CheckpointError, match=rf"(?s){message}"):
        init_checkpoint(base, tmp_path / "new" / "lola", {})
    assert listing(tmp_path) == before


def test_existing_output_needs_force(tmp_path):
    base, out = make_base(tmp_path / "base"), tmp_path / "lola"
    out.mkdir()
    init_checkpoint(base, out, {"window_size": 8})  # an empty directory is no obstacle
    (out / "mine").touch()
    with pytest.raises(CheckpointError, match="--force"):
        init_checkpoint(base, out, {"window_size": 9})
    assert (out / "mine").exists()
    init_checkpoint(base, out, {"window_size": 9}, force=True)
    assert not (out / "mine").exists()
    assert json.loads((out / "config.json").read_text())["lola_config"]["window_size"] == 9
    assert {path.name for path in tmp_path.iterdir()} == {"base", "lola"}


def test_force_never_deletes_the_base_or_what_is_no_model(tmp_path):
    base = make_base(tmp_path / "models" / "base")
    (tmp_path / "models" / "config.json").touch()
    for out in (base, base.parent):
        with pytest.raises(CheckpointError, match="would replace"):
            init_checkpoint(base, out, {}, force=True)
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter").touch()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        init_checkpoint(base, home, {}, force=True)
    with pytest.raises(CheckpointError, match="not a directory"):
        init_checkpoint(base, home / "letter", {}, force=True)


def test_a_failure_while_writing_leaves_the_old_model(tmp_path, monkeypatch):
    base, out = make_base(tmp_path / "base", sharded=True), tmp_path / "lola"
    init_checkpoint(base, out, {"window_size": 8})
    before = {path: path.read_bytes() for path in out.iterdir()}
    calls = []

    def full_disk(*args: object, **kwargs: object) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save_file(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        init_checkpoint(base, out, {"window_size": 9}, force=True)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"base", "lola"}


def test_a_failed_swap_puts_the_old_model_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise PermissionError("not now")
        rename(source, target)

    monkeypatch.setattr("os.rename", refuse)
    with pytest.raises(PermissionError), staged_directory(out, force=True) as staging:
        (staging / "config.json").write_text("new")
    assert (out / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- what tensors say


@pytest.mark.parametrize("sharded", [True, False])
def test_facts_come_from_the_headers(tmp_path, sharded):
    out = tmp_path / "lola"
    init_checkpoint(make_base(tmp_path / "base", sharded=sharded), out, {})
    assert read_facts(out) == read_facts(str(out)) == FACTS
    config = DecoderConfig.from_pretrained(out)
    settle_facts(config, out)
    assert config.has_facts and config.facts == FACTS
    config.facts = TensorFacts(8, 4)
    settle_facts(config, out)  # somebody has read them
    assert config.facts.num_state_heads == 4


def test_without_maps_facts_are_those_of_init(tmp_path):
    config = config_class("llama")(**TINY)
    for model in (tmp_path, make_base(tmp_path / "base")):
        assert read_facts(model) is None
        settle_facts(config, model)
        assert not config.has_facts and config.facts == FACTS


def test_facts_of_a_hub_model_come_from_its_headers(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

    out = tmp_path / "lola"
    init_checkpoint(make_base(tmp_path / "base", sharded=True), out, {})
    asked = []

    def metadata(name: str, *, revision: str | None) -> SafetensorsRepoMetadata:
        asked.append((name, revision))
        files = {}
        for path in weight_files(out):
            with safe_open(path, "pt") as file:
                infos = {
                    tensor: TensorInfo("F32", file.get_slice(tensor).get_shape(), (0, 0))
                    for tensor in file.keys()  # noqa: SIM118
                }
            files[path.name] = SafetensorsFileMetadata({}, infos)
        return SafetensorsRepoMetadata(None, True, {}, files)

    def nothing(*_: object, **__: object) -> None:
        raise OSError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
    assert read_facts("someone/model", "main") == FACTS and asked == [("someone/model", "main")]
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", nothing)
    with pytest.raises(CheckpointError, match=r"someone/model: .*download the model and give its"):
        read_facts("someone/model")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(out))
    assert read_facts("someone/model") == FACTS  # of the cache
