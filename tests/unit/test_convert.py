"""LoLCATs files to a LoLA checkpoint: every naming, the merge, what is refused, and memory."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lola_vllm import cli
from lola_vllm.checkpoint import CheckpointError, expected_tensors
from lola_vllm.checkpoint.convert import convert_checkpoint
from lola_vllm.checkpoint.files import read_shapes, weight_files
from lola_vllm.config import LolaConfigError, LolaLlamaConfig
from lola_vllm.reference import lola_attention

# head_dim differs from hidden_size / num_attention_heads on purpose, and F from head_dim
TINY = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
}
F, RANK = 6, 3
ROWS = {"q_proj": (32, 24), "k_proj": (16, 24), "v_proj": (16, 24), "o_proj": (24, 32)}
State = dict[str, torch.Tensor]


def make_base(path: Path, *, sharded: bool = False, dtype=torch.bfloat16, **changes) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})).to(dtype)
    model.save_pretrained(path, max_shard_size="8KB" if sharded else "1GB")
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE"):
        (path / name).write_text(f"{name} of the base")
    return path


def distill_tensors(layers: int = 2, Hq: int = 4, Hs: int = 4, d: int = 8, F: int = F) -> State:
    g = torch.Generator().manual_seed(1)
    tensors = {}
    for i in range(layers):
        attn = f"model.layers.{i}.self_attn."
        for letter, heads in (("q", Hq), ("k", Hs)):
            weight = torch.randn(heads, d, F, generator=g).bfloat16()
            tensors[f"{attn}feature_map_{letter}.mlp.layer"] = weight
        tensors[f"{attn}window_factors"] = torch.randn(1, Hq, 1, 1, generator=g).bfloat16()
    return tensors


def lora_tensors(layers: int = 2, rows: dict[str, tuple[int, int]] = ROWS, r: int = RANK) -> State:
    g = torch.Generator().manual_seed(2)
    tensors = {}
    for i in range(layers):
        for linear, (n_out, n_in) in rows.items():
            prefix = f"base_model.model.model.layers.{i}.self_attn.{linear}.lora_"
            tensors[f"{prefix}A.default.weight"] = torch.randn(r, n_in, generator=g).bfloat16()
            tensors[f"{prefix}B.default.weight"] = torch.randn(n_out, r, generator=g).bfloat16()
    return tensors


def renamed(tensors: State, old: str, new: str) -> State:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


def save(path: Path, tensors: object) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)  # type: ignore[arg-type]
    else:
        torch.save(tensors, path)
    return path


def read_tensors(path: Path) -> State:
    return {name: t for file in weight_files(path) for name, t in load_file(file).items()}


def listing(path: Path) -> set[str]:
    return {str(entry.relative_to(path)) for entry in path.rglob("*")}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


# ---- what is written


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_maps_are_added_to_the_base(tmp_path: Path, sharded: bool, tied: bool) -> None:
    base = make_base(tmp_path / "base", sharded=sharded, tie_word_embeddings=tied)
    tensors = distill_tensors()
    distill, out = save(tmp_path / "distill.pt", tensors), tmp_path / "lola"
    config = convert_checkpoint(base, distill, out, {"window_size": 16})

    assert len(weight_files(out)) == len(weight_files(base)) > (1 if sharded else 0)
    after = read_tensors(out)
    for name, tensor in read_tensors(base).items():
        assert torch.equal(after.pop(name), tensor)
    for i in range(2):
        attn = f"model.layers.{i}.self_attn."
        for kind in ("feature_map_q", "feature_map_k"):
            weight = after.pop(attn + kind)
            assert weight.dtype == torch.bfloat16
            assert torch.equal(weight, tensors[f"{attn}{kind}.mlp.layer"])
        factors = after.pop(f"{attn}window_factors")
        assert factors.dtype == torch.float32
        assert torch.equal(factors, tensors[f"{attn}window_factors"].flatten().float())
    assert not after
    assert read_shapes(out) == expected_tensors(config, 4)
    assert not config.tie_word_embeddings or "lm_head.weight" not in read_shapes(out)

    old, new = (json.loads((path / "config.json").read_text()) for path in (base, out))
    lola_config = {"mixing": "lola", "window_size": 16, "feature_dim": F, "num_state_heads": 4}
    changed = {"model_type": "lola_llama", "architectures": ["LolaLlamaForCausalLM"]}
    assert new == {**old, **changed, "lola_config": lola_config}
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    if sharded:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(read_shapes(out))
        size = sum(t.nbytes for t in read_tensors(out).values())
        assert index["metadata"]["total_size"] == size


PREFIXES = ["", "model.", "model.model.", "base_model.model.model."]


@pytest.mark.parametrize(
    ("wrapped", "suffix"), [(False, "pt"), (True, "pt"), (False, "safetensors")]
)
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("old_names", [True, False])
def test_every_naming_gives_the_same_checkpoint(
    base: Path, tmp_path: Path, prefix: str, old_names: bool, wrapped: bool, suffix: str
) -> None:
    plain = (save(tmp_path / "d.pt", distill_tensors()), save(tmp_path / "l.pt", lora_tensors()))
    convert_checkpoint(base, plain[0], tmp_path / "plain", {}, plain[1])

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

    expected, found = (read_tensors(tmp_path / name) for name in ("plain", "lola"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_file_of_the_old_pickle_format_is_read(base: Path, tmp_path: Path) -> None:
    distill = tmp_path / "d.pt"
    torch.save(distill_tensors(), distill, _use_new_zipfile_serialization=False)
    convert_checkpoint(base, distill, tmp_path / "lola", {})
    name = "model.layers.1.self_attn.feature_map_k"
    expected = distill_tensors()[f"{name}.mlp.layer"]
    assert torch.equal(read_tensors(tmp_path / "lola")[name], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharded", [True, False])
def test_lora_is_merged_in_float32(tmp_path: Path, dtype: torch.dtype, sharded: bool) -> None:
    base = make_base(tmp_path / "base", sharded=sharded, dtype=dtype)
    lora = lora_tensors(r=8)
    distill = save(tmp_path / "d.pt", distill_tensors())
    convert_checkpoint(base, distill, tmp_path / "lola", {}, save(tmp_path / "l.pt", lora))
    before, after = read_tensors(base), read_tensors(tmp_path / "lola")
    changed = 0
    for name, weight in before.items():
        key = f"base_model.model.{name.removesuffix('weight')}lora_%s.default.weight"
        if key % "A" in lora:
            product = lora[key % "B"].float() @ lora[key % "A"].float()
            weight = (weight.float() + 2 * product).to(dtype)
            assert not torch.equal(weight, before[name])
            changed += 1
        assert after[name].dtype == dtype
        assert torch.equal(after[name], weight)
    assert changed == 8


def test_alpha_rank_and_a_subset_of_the_linears(base: Path, tmp_path: Path) -> None:
    rows = {name: ROWS[name] for name in ("q_proj", "v_proj")}
    lora = lora_tensors(rows=rows, r=4)
    files = save(tmp_path / "d.pt", distill_tensors()), save(tmp_path / "l.pt", lora)
    convert_checkpoint(base, files[0], tmp_path / "lola", {}, files[1], lora_alpha=2)
    before, after = read_tensors(base), read_tensors(tmp_path / "lola")
    for linear in ROWS:
        name = f"model.layers.1.self_attn.{linear}."
        weight = before[f"{name}weight"]
        if linear in rows:
            A, B = (lora[f"base_model.model.{name}lora_{x}.default.weight"].float() for x in "AB")
            weight = (weight.float() + 0.5 * (B @ A)).bfloat16()
        assert torch.equal(after[f"{name}weight"], weight)


def test_missing_window_factors_mean_a_tenth(base: Path, tmp_path: Path) -> None:
    tensors = {n: t for n, t in distill_tensors().items() if "window" not in n}
    convert_checkpoint(base, save(tmp_path / "d.pt", tensors), tmp_path / "lola", {})
    factors = read_tensors(tmp_path / "lola")["model.layers.0.self_attn.window_factors"]
    assert factors.dtype == torch.float32 and factors.shape == (4,)
    torch.testing.assert_close(factors.sigmoid(), torch.full((4,), 0.1))


def test_maps_of_the_second_stage_replace_those_of_the_first(base: Path, tmp_path: Path) -> None:
    tuned = renamed(distill_tensors(), "model.layers", "base_model.model.model.layers")
    tuned = {name: tensor + 1 for name, tensor in tuned.items() if "feature_map_k" not in name}
    lora = save(tmp_path / "l.pt", {**lora_tensors(), **tuned})
    distill = save(tmp_path / "d.pt", distill_tensors())
    convert_checkpoint(base, distill, tmp_path / "lola", {}, lora)
    after, first = read_tensors(tmp_path / "lola"), distill_tensors()
    attn = "model.layers.1.self_attn."
    layer = f"{attn}feature_map_q.mlp.layer"
    assert torch.equal(after[f"{attn}feature_map_q"], first[layer] + 1)
    layer = f"{attn}feature_map_k.mlp.layer"
    assert torch.equal(after[f"{attn}feature_map_k"], first[layer])
    factors = (first[f"{attn}window_factors"] + 1).flatten().float()
    assert torch.equal(after[f"{attn}window_factors"], factors)


def test_state_heads_follow_from_the_file_and_wide_maps_are_cast(
    base: Path, tmp_path: Path
) -> None:
    tensors = {name: t.float() for name, t in distill_tensors(Hs=2).items()}
    config = convert_checkpoint(base, save(tmp_path / "d.pt", tensors), tmp_path / "lola", {})
    assert config.lola.num_state_heads == 2
    assert read_shapes(tmp_path / "lola") == expected_tensors(config, 2)
    dtypes = {t.dtype for n, t in read_tensors(tmp_path / "lola").items() if "feature" in n}
    assert dtypes == {torch.bfloat16}


def test_maps_that_share_memory_are_written_apart(base: Path, tmp_path: Path) -> None:
    tensors = distill_tensors()
    for i in range(2):
        attn = f"model.layers.{i}.self_attn.feature_map_"
        tensors[f"{attn}k.mlp.layer"] = tensors[f"{attn}q.mlp.layer"]
    convert_checkpoint(base, save(tmp_path / "d.pt", tensors), tmp_path / "lola", {})
    after = read_tensors(tmp_path / "lola")
    attn = "model.layers.0.self_attn.feature_map_"
    assert torch.equal(after[f"{attn}q"], after[f"{attn}k"])


def test_the_converted_maps_compute_lolcats(base: Path, tmp_path: Path) -> None:
    """arXiv 2410.10254 eq. 6 written out with the tensors of the LoLCATs file itself."""
    tensors = distill_tensors()
    options = {"window_size": 4, "sparse_cache_size": 0, "mixing": "lolcats"}
    out = tmp_path / "lola"
    config = convert_checkpoint(base, save(tmp_path / "d.pt", tensors), out, options)
    attn, T = "model.layers.1.self_attn.", 11
    g = torch.Generator().manual_seed(3)
    q = torch.randn(T, 4, 8, generator=g, dtype=torch.float64)
    k, v = torch.randn(2, T, 2, 8, generator=g, dtype=torch.float64)
    after = read_tensors(out)
    maps = [after[attn + kind] for kind in ("feature_map_q", "feature_map_k", "window_factors")]
    found, _ = lola_attention(q, k, v, *maps, config.lola)

    W_q, W_k = (tensors[f"{attn}feature_map_{x}.mlp.layer"].double() for x in "qk")
    gates = tensors[f"{attn}window_factors"].double().sigmoid().flatten()
    for t in range(T):
        start = max(0, (t // 4 - 1) * 4)  # the terraced window: this block of 4 and the one before
        for h in range(4):
            z = k[start : t + 1, h // 2] @ q[t, h] / 8**0.5
            soft = gates[h] * (z - z.max()).exp()
            x, y = q[t, h] @ W_q[h], k[:start, h // 2] @ W_k[h]
            phi_q = torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)
            phi_k = torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)
            linear = phi_k @ phi_q
            total = soft @ v[start : t + 1, h // 2] + linear @ v[:start, h // 2]
            expected = total / (soft.sum() + linear.sum())
            torch.testing.assert_close(found[t, h], expected, rtol=1e-9, atol=1e-12)


def test_the_model_card_says_what_went_in(base: Path, tmp_path: Path) -> None:
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
        "--sink-size 4 --lora-alpha 16 --out DIR" in card
    )
    assert '"sink_size": 4' in card and '"mixing": "lola"' in card
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["license"] == "llama3.1" and metadata["license_name"] == "L"


@pytest.mark.parametrize(
    ("card", "config", "text"),
    [
        (None, {}, "Licence of the base: not stated"),
        ("---\nlicense: [\n---\n", {}, "Licence of the base: not stated"),
        (None, {"license": "apache-2.0"}, "Licence of the base: apache-2.0."),
        ("---\nlicense: mit\n---\n", {}, "Licence of the base: mit."),
    ],
)
def test_the_licence_comes_from_card_or_config(
    base: Path, tmp_path: Path, card: str | None, config: dict[str, str], text: str
) -> None:
    if card is not None:
        (base / "README.md").write_text(card)
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**raw, **config}))
    convert_checkpoint(base, save(tmp_path / "d.pt", distill_tensors()), tmp_path / "lola", {})
    assert text in (tmp_path / "lola" / "README.md").read_text()


# ---- what is refused: nothing is written


def refused(base: Path, distill: object, lora: object = None, **options) -> str:
    """The message of a conversion that must fail and leave a model at `out` as it was."""
    work = base.parent
    paths = [
        content if content is None or isinstance(content, Path) else save(work / name, content)
        for name, content in (("distill.pt", distill), ("lora.pt", lora))
    ]
    out = work / "lola"
    out.mkdir()
    (out / "config.json").write_text("the old model")
    before = listing(work)
    with pytest.raises(CheckpointError) as error:
        convert_checkpoint(base, paths[0], out, {}, paths[1], force=True, **options)
    assert listing(work) == before
    assert (out / "config.json").read_text() == "the old model"
    return str(error.value)


BASE_IS = "the base has 2 layers, 4 query heads of size 8, 2 KV heads, hidden size 24"


def test_maps_of_a_deeper_model(base: Path) -> None:
    message = refused(base, distill_tensors(layers=3))
    assert "distill.pt: does not fit the base\nunexpected (3):" in message
    assert "model.layers.2.self_attn.feature_map_q.mlp.layer" in message
    assert "it fits a model with 3 layers, 4 query heads of size 8, F 6" in message
    assert BASE_IS in message


def test_maps_of_a_shallower_model(base: Path) -> None:
    message = refused(base, distill_tensors(layers=1))
    assert "missing (3):\n  model.layers.1.self_attn.feature_map_q [4, 8, 6]" in message
    assert "it fits a model with 1 layers" in message


@pytest.mark.parametrize(
    ("sizes", "wrong", "fit"),
    [
        ({"Hq": 8, "Hs": 8}, 6, "8 query heads of size 8, F 6"),
        ({"Hs": 3}, 2, "4 query heads of size 8, F 6, 3 state heads"),
        ({"Hs": 8}, 2, "4 query heads of size 8, F 6, 8 state heads"),
        ({"d": 16}, 4, "4 query heads of size 16, F 6"),
    ],
)
def test_maps_of_other_heads(base: Path, sizes: dict[str, int], wrong: int, fit: str) -> None:
    message = refused(base, distill_tensors(**sizes))
    assert f"wrong shape ({wrong}):" in message and "expected [4, 8, 6]" in message
    assert f"it fits a model with 2 layers, {fit}" in message


def test_every_fault_is_named_and_long_lists_are_cut(base: Path) -> None:
    tensors = distill_tensors()
    del tensors["model.layers.0.self_attn.window_factors"]
    layer = "model.layers.1.self_attn.feature_map_q.mlp.layer"
    tensors[layer] = tensors[layer][..., :5]
    tensors |= {f"model.layers.0.mlp.extra{i}": torch.zeros(1) for i in range(12)}
    message = refused(base, tensors)
    assert "missing (1):\n  model.layers.0.self_attn.window_factors [4]" in message
    assert "unexpected (12):\n  model.layers.0.mlp.extra0" in message and "and 2 more" in message
    assert f"wrong shape (1):\n  {layer}: found [4, 8, 5], expected [4, 8, 6]" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["distill", "lora"])
def test_values_that_are_not_finite(base: Path, value: float, where: str) -> None:
    distill, lora = distill_tensors(), lora_tensors()
    tensors = distill if where == "distill" else lora
    name = list(tensors)[1]
    tensors[name].flatten()[3] = value
    assert f"{name} holds values that are not finite" in refused(base, distill, lora)


def test_integers_are_no_maps(base: Path) -> None:
    tensors = {name: t.to(torch.int8) for name, t in distill_tensors().items()}
    assert "found torch.int8, expected floating point" in refused(base, tensors)


def test_two_names_of_one_tensor(base: Path) -> None:
    tensors = distill_tensors()
    tensors["layers.0.self_attn.window_factor"] = torch.zeros(4)
    message = refused(base, tensors)
    assert "'layers.0.self_attn.window_factor' are the same tensor" in message


@pytest.mark.parametrize(
    ("lora", "parts"),
    [
        (
            lambda: lora_tensors(rows={"q_proj": (32, 48), "k_proj": (64, 48)}),
            [
                "wrong shape (6):",
                "found [64, 3], expected [16, 3]",
                "it fits a model with 2 layers, hidden size 48, LoRA rank 3, 32 rows in q_proj",
            ],
        ),
        (lambda: lora_tensors(layers=1), ["missing (8):", "layers.1.self_attn.q_proj.lora_A [3, "]),
        (lambda: lora_tensors(layers=3), ["unexpected (8):", "it fits a model with 3 layers"]),
        (
            lambda: {n: t for n, t in lora_tensors().items() if "k_proj.lora_B" not in n},
            ["missing (2):", "layers.0.self_attn.k_proj.lora_B [16, 3]"],
        ),
        (
            lambda: {
                **lora_tensors(),
                "base_model.model.lm_head.lora_A.weight": torch.zeros(3, 24),
            },
            ["unexpected (1):", "lm_head.lora_A"],
        ),
        (lambda: lora_tensors(r=0), ["wrong shape (16):", "found [0, 24], expected [1, 24]"]),
        (
            lambda: {**lora_tensors(), **distill_tensors(F=5)},
            ["wrong shape (4):", "found [4, 8, 5], expected [4, 8, 6]"],
        ),
    ],
)
def test_lora_of_another_model(base: Path, lora: Callable[[], State], parts: list[str]) -> None:
    message = refused(base, distill_tensors(), lora())
    assert "lora.pt: does not fit the base" in message
    for part in [*parts, BASE_IS]:
        assert part in message


def test_swapped_files(base: Path) -> None:
    message = refused(base, lora_tensors())
    assert "it looks like a LoRA file; give it with --lora" in message


def test_swapped_lora(base: Path) -> None:
    message = refused(base, distill_tensors(), distill_tensors())
    assert "lora.pt: no LoRA tensors; it looks like a distill file" in message


def test_a_merge_that_overflows(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=torch.float16)
    lora = {name: t * 1000 for name, t in lora_tensors().items()}
    message = refused(base, distill_tensors(), lora)
    assert "_proj.weight: not finite in torch.float16 after merging the LoRA" in message


class Code:
    """Unpickled, it would make a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("where", ["distill", "lora"])
def test_pickled_code_is_refused_and_not_run(base: Path, raw: bool, where: str) -> None:
    marker, path = base.parent / "it ran", base.parent / "evil.pt"
    content = {**distill_tensors(), "extra": Code(marker)}
    if raw:
        path.write_bytes(pickle.dumps({"extra": Code(marker)}, protocol=2))
    else:
        torch.save(content, path)
    files = (path, None) if where == "distill" else (distill_tensors(), path)
    message = refused(base, *files)
    assert "evil.pt: refused, it holds more than tensors" in message and "posix.mkdir" in message
    assert not marker.exists()
    pickle.loads(pickle.dumps(Code(marker)))  # the file above was dangerous
    assert marker.exists()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("left", ["nothing", "half", "all but a byte", "noise"])
@pytest.mark.parametrize("where", ["distill", "lora"])
def test_a_truncated_file(base: Path, suffix: str, left: str, where: str) -> None:
    tensors = distill_tensors() if where == "distill" else lora_tensors()
    path = save(base.parent / f"cut.{suffix}", tensors)
    data = path.read_bytes()
    cut = {"nothing": b"", "half": data[: len(data) // 2], "all but a byte": data[:-1]}
    path.write_bytes(cut.get(left, b"hello, this is no checkpoint"))
    message = refused(base, *((path, None) if where == "distill" else (distill_tensors(), path)))
    assert f"cut.{suffix}: not a complete " in message
    assert "weights_only" not in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "must hold a state dict"),
        ({}, "must hold a state dict"),
        ({"model_state_dict": {}}, "must hold a state dict"),
        ({"epoch": 3}, "'epoch' is a int"),
        ({7: torch.zeros(1)}, "7 is a Tensor"),
    ],
)
def test_what_is_no_state_dict(base: Path, content: object, message: str) -> None:
    assert message in refused(base, content)


def test_missing_files(base: Path) -> None:
    assert "nothing.pt: no such file" in refused(base, base.parent / "nothing.pt")


@pytest.mark.parametrize(
    ("alpha", "lora", "message"),
    [
        (32.0, None, "lora_alpha = 32.0: there is no LoRA file"),
        (float("nan"), {}, "lora_alpha = nan: must be a finite number"),
    ],
)
def test_bad_alpha(base: Path, alpha: float, lora: object, message: str) -> None:
    lora = None if lora is None else lora_tensors()
    assert message in refused(base, distill_tensors(), lora, lora_alpha=alpha)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"window_siz": 4}, "window_siz.*'window_size'"),
        ({"mixing": "both"}, "mixing = 'both'"),
        ({"feature_dim": 8}, "feature_dim follows from d.pt"),
        ({"num_state_heads": 4}, "num_state_heads follows from d.pt"),
    ],
)
def test_bad_options(base: Path, tmp_path: Path, overrides: dict, message: str) -> None:
    distill = save(tmp_path / "d.pt", distill_tensors())
    with pytest.raises((CheckpointError, LolaConfigError), match=message):
        convert_checkpoint(base, distill, tmp_path / "lola", overrides)
    assert not (tmp_path / "lola").exists()


def test_bad_bases(base: Path, tmp_path: Path) -> None:
    distill = save(tmp_path / "d.pt", distill_tensors())
    tensors = read_tensors(base)
    del tensors["model.norm.weight"]
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing .1.:\n  model.norm.weight"):
        convert_checkpoint(base, distill, tmp_path / "lola", {})
    (base / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no safetensors files"):
        convert_checkpoint(base, distill, tmp_path / "lola", {})
    with pytest.raises(CheckpointError, match="no such directory"):
        convert_checkpoint(tmp_path / "nowhere", distill, tmp_path / "lola", {})
    assert not (tmp_path / "lola").exists()


def test_force_never_deletes_an_input(base: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "config.json").touch()
    distill = save(work / "d.pt", distill_tensors())
    with pytest.raises(CheckpointError, match="would replace"):
        convert_checkpoint(base, distill, work, {}, force=True)
    with pytest.raises(CheckpointError, match="--force"):
        convert_checkpoint(base, save(tmp_path / "d.pt", distill_tensors()), work, {})
    assert distill.exists()


# ---- the command


def test_command_line(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    distill = save(tmp_path / "d.pt", distill_tensors())
    lora = save(tmp_path / "l.pt", lora_tensors())
    out = tmp_path / "lola"
    argv = ["convert", "--base", str(base), "--distill", str(distill), "--out", str(out)]
    options = "--window-size 8 --sparse-cache-size 0 --update-interval 4 --sink-size 2 "
    options += "--mixing lolcats --state-dtype bfloat16 --sparse-sharing kv_head --lora-alpha 32"
    assert cli.main([*argv, "--lora", str(lora), *options.split()]) == 0
    assert json.loads((out / "config.json").read_text())["lola_config"] == {
        "window_size": 8,
        "sparse_cache_size": 0,
        "update_interval": 4,
        "sink_size": 2,
        "mixing": "lolcats",
        "state_dtype": "bfloat16",
        "sparse_sharing": "kv_head",
        "feature_dim": F,
        "num_state_heads": 4,
    }
    lines = capsys.readouterr().out.splitlines()
    assert "LoLCATs feature maps" in lines[0] and "LoRA merged" in lines[0]
    assert cli.main(argv) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.main([*argv, "--force"]) == 0
    assert "LoRA" not in capsys.readouterr().out


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
def test_memory_stays_within_two_shards_of_the_8b_layout(tmp_path: Path) -> None:
    """Llama-3.1-8B's shapes, 3 layers, one a shard. In a process of its own: peaks stay."""
    sizes = {
        "vocab_size": 8,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 3,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    }
    base, out = tmp_path / "base", tmp_path / "lola"
    base.mkdir()
    LlamaConfig(**sizes).save_pretrained(base)
    shapes = expected_tensors(LolaLlamaConfig(**sizes), 32)
    weight_map, shard_bytes = {}, 0
    for i in range(3):
        names = [n for n in shapes if f"layers.{i}." in n or (i == 0 and "layers" not in n)]
        names = [n for n in names if "feature_map" not in n and "window_factors" not in n]
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
import torch, transformers, safetensors.torch
from lola_vllm.checkpoint.convert import convert_checkpoint
work = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert_checkpoint(work / "base", work / "d.pt", work / "lola", {}, work / "l.pt")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    try:
        result = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
        )
        config = LolaLlamaConfig.from_pretrained(out)
        assert read_shapes(out) == expected_tensors(config, 32)
    finally:
        shutil.rmtree(out, ignore_errors=True)  # 1.3 GB
    assert shard_bytes > 400e6
    assert int(result.stdout) < 2 * shard_bytes, (int(result.stdout), shard_bytes)
