"""Layers whose heads have a page each: sizes, weights, training, and what is copied."""

from dataclasses import replace

import pytest
import torch

from lola_vllm.core.layers import SequenceLayout
from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops import portable
from lola_vllm.core.ops.differentiable import lola_attention_parallel
from lola_vllm.core.state import LayerLayout
from tests.support.backends import TOLERANCE
from tests.support.layers import BASE, bind, layer
from tests.support.problem import feed


@pytest.mark.parametrize("kind", ["plain", "as the demo model", "shared sets"])
def test_training_sees_what_is_served(kind):
    problem, _ = layer(kind, torch.float64)
    problem = replace(problem, rotation=None)
    config = problem.config.model_copy(update={"context_shift": 0})
    out = lola_attention_parallel(
        *(x[None] for x in (problem.q, problem.k, problem.v)),
        problem.feature_map_q, problem.feature_map_k, problem.window_factors, config,
        importance=problem.importance,
    )[0]  # fmt: skip
    state = bind(replace(problem, config=config))
    served = feed(portable, problem, state)
    torch.testing.assert_close(out, served, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("kind", ["as the demo model", "shifts alone"])
def test_other_weights_reach_every_head(kind):
    problem, _ = layer(kind)
    other, _ = layer(kind, seed=5)
    state = bind(problem).with_weights(other.weights())
    fresh = bind(replace(problem.of_layer(other)))
    outs = [feed(portable, problem, x) for x in (state, fresh)]
    assert torch.equal(*outs)


def test_a_layer_of_equal_heads_has_one_page():
    config = LolaConfig(**BASE, sparse_cache_size=[[5, 5, 5], [5, 5, 6], 5])
    layouts = [
        LayerLayout.from_config(config.for_layer(i), 3, 3, 16, 6, torch.float32) for i in range(3)
    ]
    assert [len(layout.pages) for layout in layouts] == [1, 3, 1]
    assert layouts[0] == layouts[2] and layouts[1].sizes == [5, 5, 6]
    assert layouts[1].page_bytes == sum(page.page_bytes for page in layouts[1].pages)
    sequence = SequenceLayout(tuple(layouts))
    assert sequence.row_bytes == sum(page.page_bytes for page in sequence.layouts)
    rank = LayerLayout.from_config(config.for_layer(1), 1, 1, 16, 6, torch.float32, first_kv_head=2)
    assert rank.sizes == [6]
