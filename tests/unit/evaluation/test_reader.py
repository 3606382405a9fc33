"""Streams read in pieces are the same as texts read at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lola_vllm.evaluation import EvalError, reader
from lola_vllm.evaluation.reader import Reader, load
from lola_vllm.evaluation.settings import Setting
from tools.support.tiny import random_prompts

BLOCK = 60


def at_once(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of all tokens but the first, computed without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def logprobs(found: list[reader.Prediction]) -> torch.Tensor:
    return torch.tensor([value.logprob for value in found])


@pytest.mark.parametrize("prefix", [[], [7, 8]])
@pytest.mark.parametrize("wanted", [[0, 1, 2, 3], [1, 3]])
def test_a_lola_model_reads_with_one_state(
    lola: Path, monkeypatch: pytest.MonkeyPatch, prefix: list[int], wanted: list[int]
) -> None:
    monkeypatch.setattr(reader, "PIECE", 25)
    (ids,) = random_prompts([4 * BLOCK])
    setting = Setting("a", lola, {"sparse_cache_size": 8})
    model = Reader(setting, context=10, dtype="float32")
    whole = load(setting, "float32")
    assert whole.config.lola.sparse_cache_size == 8
    expected = at_once(whole, prefix + ids)
    found = dict(model.read_blocks(prefix, ids, BLOCK, wanted))
    assert list(found) == wanted
    lead = len(prefix) - 1
    for index, values in found.items():
        start = max(0, index * BLOCK + lead)
        part = expected[start : (index + 1) * BLOCK + lead]
        torch.testing.assert_close(logprobs(values), part, rtol=1e-4, atol=1e-4)


def test_a_softmax_model_sees_the_context_before_each_block_alone(llama: Path) -> None:
    (ids,) = random_prompts([4 * BLOCK])
    model = Reader(Setting("a", llama), context=70, dtype="float32")
    whole = load(Setting("a", llama), "float32")
    found = dict(model.read_blocks([5], ids, BLOCK, [0, 1, 3]))
    for index, values in found.items():
        start = max(0, index * BLOCK - 70)
        seen = at_once(whole, [5, *ids[start : (index + 1) * BLOCK]])
        torch.testing.assert_close(logprobs(values), seen[-BLOCK:], rtol=1e-4, atol=1e-4)
        assert len(values) == BLOCK


def test_positions_are_raised_where_a_setting_says_so(lola: Path) -> None:
    model = load(Setting("a", lola, positions=9999), "float32")
    assert model.config.max_position_embeddings == 9999


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(EvalError, match="transformers cannot load it"):
        load(Setting("a", tmp_path), "float32")
