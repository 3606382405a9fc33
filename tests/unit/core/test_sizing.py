"""How much of a machine's memory states may take, and how many sequences fit."""

import pytest

from lola_vllm.core.sizing import (
    Pool,
    weight_bytes,
)


def test_weights_grow_with_the_dtype():
    assert weight_bytes(100, {"dtype": "bfloat16"}, "float32") == 200
    assert weight_bytes(100, {"torch_dtype": "float32"}, "bfloat16") == 50
    assert weight_bytes(100, {"dtype": "bfloat16"}, "float16") == 100
    assert weight_bytes(100, {}, "float32") == 100
    quantized = {"dtype": "bfloat16", "quantization_config": {}}
    assert weight_bytes(100, quantized, "float32") == 100


@pytest.mark.parametrize(
    ("device", "caching", "states"),
    [("cpu", True, 3), ("cuda", True, 2), ("cpu", False, 1), ("cuda", False, 1)],
)
def test_sequences_that_fit_in_a_pool_take_no_more_than_its_bytes(device, caching, states):
    pool = Pool.of(1000, device, caching)
    assert pool.per_sequence == states
    assert pool.bytes_for(5) == (5 * states + 1) * 1000
    for spare in (0, states * 1000 - 1):
        assert pool.sequences_in(pool.bytes_for(5) + spare) == 5
    assert pool.sequences_in(pool.bytes_for(5) - 1) == 4
    assert pool.sequences_in(pool.bytes_for(1) - 1) < 1 and pool.sequences_in(0) < 1
