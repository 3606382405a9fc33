"""Which KV heads copy passages, and how many recent pairs they have."""

from __future__ import annotations

import random

import torch

from lola_vllm.calibrate.copying import (
    GIVEN,
    LEAST_DISTANCE,
    PASSAGE,
    PASSAGES,
    CopyingAttention,
    divide_recent,
    repeat_passages,
)


def test_passages_stand_in_the_text_and_again_at_its_end() -> None:
    ids = list(range(2000))
    found, starts = repeat_passages(ids, random.Random(0))
    assert found[:2000] == ids and len(found) == 2000 + PASSAGES * PASSAGE
    for i, at in enumerate(starts):
        again = found[2000 + i * PASSAGE :][:PASSAGE]
        assert again == ids[at : at + PASSAGE]
    distances = [2000 - at for at in starts]
    assert min(distances) >= LEAST_DISTANCE and max(distances) > 1000


def test_shares_are_the_attention_to_the_first_place() -> None:
    """Two KV heads of two query heads: one query head of the second copies half the time."""
    ids = list(range(600))
    prompts = [repeat_passages(ids, random.Random(seed)) for seed in range(2)]
    recorder = CopyingAttention([starts for _, starts in prompts], num_layers=2)
    k = torch.zeros(2, len(prompts[0][0]), 4)
    for found, starts in prompts:
        queries = recorder.begin(found)
        assert len(queries) == PASSAGES * (PASSAGE - GIVEN)
        weights = torch.zeros(4, len(queries), len(found))
        for row, query in enumerate(queries.tolist()):
            passage, token = divmod(query - len(ids), PASSAGE)
            assert token >= GIVEN
            weights[3, row, starts[passage] + token] = 0.5
            weights[:, row, 0] += 0.25
        for layer in range(2):
            recorder.add(layer, k, k, weights if layer else torch.zeros_like(weights))
    assert not recorder.shares[0].any()
    first = sum(at == 0 for _, starts in prompts for at in starts) / (2 * PASSAGES)
    expected = torch.tensor([0.25 * first, 0.5 + 0.25 * first])
    torch.testing.assert_close(recorder.shares[1], expected)


def test_heads_that_copy_have_equally_many_recent_pairs() -> None:
    shares = [torch.tensor([0.4, 0.01]), torch.tensor([0.02, 0.4]), torch.tensor([0.07, 0.1])]
    assert divide_recent(shares, 100) == [[300, 0], [0, 300], [0, 0]]
    assert divide_recent([torch.tensor([1.0])], 7) == [[7]]
