"""`lola-vllm convert`: every naming, the merge, the card, the command line, and memory."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from lola_vllm.command import cli
from lola_vllm.core.config import TensorFacts
from lola_vllm.models import expected_tensors, read_facts
from lola_vllm.models.convert import convert_checkpoint
from lola_vllm.models.files import read_shapes, weight_files
from tests.support.lolcats_files import (
    ROWS,
    F,
    State,
    distill_tensors,
    lora_tensors,
    make_base,
    one_file_tensors,
    read_tensors,
    renamed,
    save,
)


@pytest.fixture
def base(tmp_path) -> Path:
    return make_base(tmp_path / "base")


def converted(
    base: Path, distill: object, lora: object = None, name: str = "lola", **options: Any
) -> State:
    """The tensors of the model that files with these contents lead to."""
    files = [
        None if content is None else save(base.parent / f"{name}-{role}.pt", content)
        for role, content in (("distill", distill), ("lora", lora))
    ]
    convert_checkpoint(base, files[0], base.parent / name, {}, files[1], **options)
    return read_tensors(base.parent / name)


def assert_same(found: State, expected: State) -> None:
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_maps_are_added_to_the_base(tmp_path, sharded, tied):
    base = make_base(tmp_path / "base", sharded=sharded, tie_word_embeddings=tied)
    tensors = distill_tensors()
    distill, out = save(tmp_path / "distill.pt", tensors), tmp_path / "lola"
    config = convert_checkpoint(base, distill, out, {"window_size": 16})

    assert len(weight_files(out)) == len(weight_files(base)) > (1 if sharded else 0)
    expected = read_tensors(base)
    for i in range(2):
        attn = f"model.layers.{i}.self_attn."
        for kind in ("feature_map_q", "feature_map_k"):
            expected[attn + kind] = tensors[f"{attn}{kind}.mlp.layer"]
        expected[f"{attn}window_factors"] = tensors[f"{attn}window_factors"].flatten().float()
    found = read_tensors(out)
    assert_same(found, expected)
    assert all(found[name].dtype == tensor.dtype for name, tensor in expected.items())
    assert config.facts == TensorFacts(F, 4)
    assert expected_tensors(config).items() <= read_shapes(out).items()
    assert not config.tie_word_embeddings or "lm_head.weight" not in read_shapes(out)

    written = json.loads((out / "config.json").read_text())["lola_config"]
    shift = config.max_position_embeddings // 4
    assert written == {"mixing": "lola", "window_size": 16, "context_shift": shift}


@pytest.mark.parametrize(
    ("prefix", "old_names", "wrapped", "suffix"),
    [
        ("", True, False, "pt"),
        ("model.", False, True, "pt"),
        ("model.model.", True, False, "safetensors"),
        ("base_model.model.model.", True, True, "pt"),
    ],
)
def test_every_naming_gives_the_same_checkpoint(base, tmp_path, prefix, old_names, wrapped, suffix):
    maps = renamed(distill_tensors(), "model.layers", f"{prefix}layers")
    lora = renamed(lora_tensors(), "base_model.model.model.layers", f"{prefix}layers")
    if old_names:
        maps = renamed(maps, "window_factors", "window_factor")
        maps = {n: t.flatten() if "factor" in n else t for n, t in maps.items()}
        lora = renamed(lora, ".default", "")
    files = []
    for role, tensors in (("distill", maps), ("lora", lora)):
        content = {"model_state_dict": tensors, "step": 7} if wrapped else tensors
        files.append(save(tmp_path / f"{role}.{suffix}", content))
    convert_checkpoint(base, files[0], tmp_path / "lola", {}, files[1])
    plain = converted(base, distill_tensors(), lora_tensors(), "plain")
    assert_same(read_tensors(tmp_path / "lola"), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize(
    ("linears", "rank", "options", "scale"),
    [(tuple(ROWS), 8, {}, 2), (("q_proj", "v_proj"), 4, {"lora_alpha": 2}, 0.5)],
    ids=["all", "alpha-and-a-subset"],
)
def test_lora_is_merged_in_float32(tmp_path, dtype, sharded, linears, rank, options, scale):
    base = make_base(tmp_path / "base", sharded=sharded, dtype=dtype)
    lora = lora_tensors(rows={name: ROWS[name] for name in linears}, r=rank)
    before, after = read_tensors(base), converted(base, distill_tensors(), lora, **options)
    changed = 0
    for name, weight in before.items():
        key = f"base_model.model.{name.removesuffix('weight')}lora_%s.default.weight"
        if key % "A" in lora:
            product = lora[key % "B"].float() @ lora[key % "A"].float()
            weight = (weight.float() + scale * product).to(dtype)
            assert not torch.equal(weight, before[name])
            changed += 1
        assert after[name].dtype == dtype
        assert torch.equal(after[name], weight)
    assert changed == 2 * len(linears)


# As LoLCATs' sharded training saves it, of its 70B and of its 405B.
@pytest.mark.parametrize(("lora_option", "rank", "wrapper"), [(False, 8, "model"), (True, 4, None)])
def test_one_file_may_hold_maps_and_adapters(base, tmp_path, lora_option, rank, wrapper):
    tensors = one_file_tensors(r=rank)
    both = save(tmp_path / "maps_and_lora.bin", {wrapper: tensors} if wrapper else tensors)
    convert_checkpoint(base, both, tmp_path / "lola", {}, both if lora_option else None)
    # LoLCATs' 70B was trained with alpha 16, its 405B with alpha 8: twice the rank.
    adapters = lora_tensors(r=rank)
    apart = converted(base, distill_tensors(), adapters, "two", lora_alpha=2 * rank)
    assert_same(read_tensors(tmp_path / "lola"), apart)
    name = "model.layers.0.self_attn.o_proj.weight"
    assert not torch.equal(apart[name], read_tensors(base)[name])
    card = (tmp_path / "lola" / "README.md").read_text()
    assert f"--distill maps_and_lora.bin --lora-alpha {2 * rank} --out DIR" in card


def test_missing_window_factors_mean_a_tenth(base):
    tensors = {n: t for n, t in distill_tensors().items() if "window" not in n}
    factors = converted(base, tensors)["model.layers.0.self_attn.window_factors"]
    assert factors.dtype == torch.float32 and factors.shape == (4,)
    torch.testing.assert_close(factors.sigmoid(), torch.full((4,), 0.1))


def test_maps_of_the_second_stage_replace_those_of_the_first(base):
    first = distill_tensors()
    tuned = {name: tensor + 1 for name, tensor in first.items() if "feature_map_k" not in name}
    both = lora_tensors() | renamed(tuned, "model.layers", "base_model.model.model.layers")
    after = converted(base, first, both)
    attn = "model.layers.1.self_attn."
    for name, added in (("feature_map_q", 1), ("feature_map_k", 0)):
        assert torch.equal(after[attn + name], first[f"{attn}{name}.mlp.layer"] + added)
    factors = (first[f"{attn}window_factors"] + 1).flatten().float()
    assert torch.equal(after[f"{attn}window_factors"], factors)


def test_state_heads_follow_from_the_file_and_wide_maps_are_cast(base, tmp_path):
    after = converted(base, {name: t.float() for name, t in distill_tensors(Hs=2).items()})
    assert read_facts(tmp_path / "lola") == TensorFacts(F, 2)
    assert {t.dtype for n, t in after.items() if "feature" in n} == {torch.bfloat16}


def test_the_model_card_says_what_went_in(base, tmp_path):
    (base / "README.md").write_text("---\nlicense: llama3.1\nlicense_name: L\n---\n# Base\n")
    distill = save(tmp_path / "my distill.pt", distill_tensors())
    lora = save(tmp_path / "lora.safetensors", lora_tensors())
    convert_checkpoint(base, distill, tmp_path / "lola", {"sink_size": 4}, lora)
    card = (tmp_path / "lola" / "README.md").read_text()
    assert str(tmp_path) not in card
    for path in (base / "model.safetensors", distill, lora):
        assert f"`{path.name}` | `{hashlib.sha256(path.read_bytes()).hexdigest()}`" in card
    assert (
        "lola-vllm convert --base base --distill 'my distill.pt' --lora lora.safetensors "
        "--lola-config '{\"sink_size\": 4}' --lora-alpha 6 --out DIR" in card
    )
    assert '"sink_size": 4' in card and '"mixing": "lola"' in card
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["license"] == "llama3.1" and metadata["license_name"] == "L"


# ---- the command


def test_command_line(base, tmp_path, capsys):
    distill = save(tmp_path / "d.pt", distill_tensors())
    lora = save(tmp_path / "l.pt", lora_tensors())
    out = tmp_path / "lola"
    argv = ["convert", "--base", str(base), "--distill", str(distill), "--out", str(out)]
    lola = {
        "window_size": 8,
        "sparse_cache_size": 0,
        "update_interval": 4,
        "sink_size": 2,
        "mixing": "lolcats",
        "sparse_sharing": "kv_head",
        "context_shift": 0,
    }
    options = ["--lora-alpha", "32", "--lola-config", json.dumps(lola)]
    assert cli.main([*argv, "--lora", str(lora), *options]) == 0
    assert json.loads((out / "config.json").read_text())["lola_config"] == lola
    lines = capsys.readouterr().out.splitlines()
    assert "LoLCATs feature maps" in lines[0]
    assert "--lora-alpha 32" in (out / "README.md").read_text()
    assert cli.main(argv) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.main([*argv, "--force"]) == 0
    assert "--lora-alpha" not in (out / "README.md").read_text()
    argv[4] = str(save(tmp_path / "both.bin", one_file_tensors()))
    assert cli.main([*argv, "--force"]) == 0
    assert "--lora-alpha" in (out / "README.md").read_text()


# ---- memory


def save_zeros(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """A bfloat16 safetensors file of zeros that takes no room on a disk; its size."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    return path.stat().st_size


@pytest.mark.slow
def test_memory_stays_within_two_shards(tmp_path):
    """Three layers with Llama-3.1-8B's heads, one a shard. In a process of its own: peaks stay."""
    sizes = {
        "vocab_size": 8,
        "hidden_size": 4096,
        "intermediate_size": 4096,
        "num_hidden_layers": 3,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    }
    base, out = tmp_path / "base", tmp_path / "lola"
    base.mkdir()
    config = LlamaConfig(**sizes)
    config.save_pretrained(base)
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in LlamaForCausalLM(config).state_dict().items()}
    del shapes["lm_head.weight"]  # tied
    weight_map, shard_bytes = {}, 0
    for i in range(3):
        names = [n for n in shapes if f"layers.{i}." in n or (i == 0 and "layers" not in n)]
        size = save_zeros(base / f"model-{i}.safetensors", {n: shapes[n] for n in names})
        weight_map |= dict.fromkeys(names, f"model-{i}.safetensors")
        shard_bytes = max(shard_bytes, size)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    rows = {"q_proj": (4096, 4096), "k_proj": (1024, 4096)}
    rows |= {"v_proj": (1024, 4096), "o_proj": (4096, 4096)}
    save(tmp_path / "d.pt", distill_tensors(layers=3, Hq=32, Hs=32, d=128, F=64))
    save(tmp_path / "l.pt", lora_tensors(layers=3, rows=rows, r=8))
    code = """
import resource, sys
from pathlib import Path
from typing import Any
import torch, transformers, safetensors.torch
from lola_vllm.models.convert import convert_checkpoint
work = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert_checkpoint(work / "base", work / "d.pt", work / "lola", {}, work / "l.pt")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    try:
        result = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
        )
        assert shapes.items() <= read_shapes(out).items()
    finally:
        shutil.rmtree(out, ignore_errors=True)  # half a GB
    assert shard_bytes > 180e6
    assert int(result.stdout) < 2 * shard_bytes, (int(result.stdout), shard_bytes)
