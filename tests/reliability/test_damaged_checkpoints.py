"""Files that are damaged, or of another model, stop the start and are named."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.engine import engine
from tools.support.tiny import make_tiny

LOLA = {"window_size": 8, "sparse_cache_size": 4}
LAYER = "model.layers.1."


@pytest.fixture
def tiny(tmp_path):
    directory = make_tiny(tmp_path / "tiny", LOLA)
    path = directory / "config.json"
    # As real ones say it. Without, vLLM looks into the weights before it knows that they are ours.
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}))
    return directory


def edit(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def cut(share):
    def damage(directory):
        path = directory / "model.safetensors"
        os.truncate(path, int(path.stat().st_size * share))

    return damage


def shard(directory):
    """Two shards in the index, one on the disk."""
    path = directory / "model.safetensors"
    names = list(load_file(path))
    path.rename(directory / "model-00001-of-00002.safetensors")
    index = {name: "model-00001-of-00002.safetensors" for name in names}
    index[f"{LAYER}self_attn.feature_map_q"] = "model-00002-of-00002.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def put(name, value):
    return lambda directory: edit(directory, lambda found: found[name].view(-1)[-1:].fill_(value))


MAP, GATES = LAYER + "self_attn.feature_map_k", LAYER + "self_attn.window_factors"
Q = LAYER + "self_attn.q_proj.weight"
DAMAGES = {
    "truncated-end": (cut(0.999), ["model.safetensors"]),
    "truncated-header": (cut(0.0001), ["model.safetensors"]),
    "a-shard-is-missing": (shard, ["model-00002-of-00002.safetensors"]),
    "infinite-query-weights": (put(Q, torch.inf), [Q, "not finite"]),
    "nan-in-a-gate": (put(GATES, torch.nan), [GATES, "not finite"]),
    "maps-of-another-model": (
        lambda directory: edit(directory, lambda t: t.update({MAP: torch.ones(4, 16, 8)})),
        [MAP, "wrong shape"],
    ),
    "no-gates": (
        lambda directory: edit(directory, lambda t: t.pop(GATES)), ["missing", GATES],
    ),
    "an-extra-tensor": (
        lambda directory: edit(directory, lambda t: t.update(extra=torch.ones(1))),
        ["extra"],
    ),
    "queries-of-another-model": (
        lambda directory: edit(directory, lambda t: t.update({Q: torch.ones(8, 8)})), [Q],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_damage_stops_the_start_and_is_named(tiny, damage, words):
    damage(tiny)
    with pytest.raises(Exception) as error, engine(tiny):
        pass
    for word in words:
        assert word in str(error.value)
