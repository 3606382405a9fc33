"""Which KV heads copy passages, and how many recent pairs they have."""

from __future__ import annotations

import random

import pytest
import torch

from lola_vllm.calibrate.copying import (
    GIVEN,
    LEAST_DISTANCE,
    PASSAGE,
    PASSAGES,
    CopyingAttention,
    class_end,
    distance_class,
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


def test_classes_of_distance_double() -> None:
    assert [distance_class(d) for d in (0, 150, 299, 301, 599, 601, 4799, 4801)] == [
        *(0, 0, 0, 1, 1, 2, 4, 5)
    ]
    assert [class_end(i) for i in range(3)] == [300, 600, 1200]


def test_attention_to_the_first_place_by_distance() -> None:
    """Two KV heads of two query heads: one query head of the second copies half the time what
    stands less than 300 tokens before the end."""
    ids = list(range(1000))
    prompts = [repeat_passages(ids, random.Random(seed)) for seed in range(2)]
    recorder = CopyingAttention([starts for _, starts in prompts], 1000, num_layers=2)
    k = torch.zeros(2, len(prompts[0][0]), 4)
    for found, starts in prompts:
        queries = recorder.begin(found)
        assert len(queries) == PASSAGES * (PASSAGE - GIVEN)
        weights = torch.zeros(4, len(queries), len(found))
        for row, query in enumerate(queries.tolist()):
            passage, token = divmod(query - len(ids), PASSAGE)
            assert token >= GIVEN
            if starts[passage] > 1000 - 300:
                weights[3, row, starts[passage] + token] = 0.5
            weights[:, row, 0] += 0.25
        for layer in range(2):
            recorder.add(layer, k, k, weights if layer else torch.zeros_like(weights))
    nothing, found = recorder.attention
    assert found.shape == (3, 2) and not nothing.any()
    near, middle, far = found.tolist()
    assert near == [0, 0.5] and middle == [0, 0]
    of_far = [at for _, starts in prompts for at in starts if 1000 - at >= 600]
    expected = 0.25 * sum(at == 0 for at in of_far) / len(of_far)
    assert far == pytest.approx([expected] * 2)


def test_heads_have_recent_pairs_as_far_as_they_are_needed() -> None:
    attention = [
        torch.tensor([[400.0, 10], [400, 10], [490, 0], [500, 0], [0, 0]]),
        torch.tensor([[300.0, 290], [380, 210], [260, 50], [300, 0], [0, 0]]),
    ]
    assert divide_recent(attention, 0) == [[0, 0], [0, 0]]
    # R = 400. For the near share, the last head is needed up to 300 tokens, and two more up to R.
    # For the far share, up to 2 R, the third is needed up to 600 only.
    assert divide_recent(attention, 425) == [[800, 0], [600, 300]]
    # There is no more to give beyond what was asked for.
    assert divide_recent(attention, 10**6) == [[2400, 0], [2400, 300]]
    assert divide_recent([torch.tensor([[1.0]])], 7) == [[6]]  # R is whole, and doubled
