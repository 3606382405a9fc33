"""Bytes and flops of a small page, by hand."""

import numpy as np
import pytest
import torch

from lola_vllm.gpu_cost.work import (
    FOLDS,
    SCORES,
    SPARSE,
    STATE,
    TOKENS,
    WINDOW,
    attended,
    chunks_of,
    shift_work,
    updated,
)
from lola_vllm.state import StateLayout


def page(**changes: object) -> StateLayout:
    """One KV head of size 4, maps of 3 columns, two query heads."""
    fields = {
        "window_size": 4, "sparse_cache_size": 3, "update_interval": 2, "sink_size": 1,
        "num_kv_heads": 1, "num_state_heads": 1, "num_sparse_heads": 1, "head_dim": 4,
        "feature_dim": 3, "kv_dtype": torch.bfloat16, "state_dtype": torch.float32,
    }  # fmt: skip
    return StateLayout(**{**fields, **changes})  # type: ignore[arg-type]


PAIR = 2 * 4 * 2  # key and value of four numbers of two bytes
STATE_BYTES = (6 * 4 + 6) * 4
QUERY_STATE = 2 * 4 * 3 + 2 * 6 * 4 + 2 * 6  # q W, phi H, phi s


def test_a_step_by_hand():
    """Token 21 comes after 20: the window is 16 .. 19, and 15 pairs have left it."""
    works = attended(page(), 2, torch.tensor([20]), torch.tensor([1]))
    found = {name: (float(work.bytes), float(work.flops)) for name, work in works.items()}
    assert found == {
        TOKENS: ((2 * 2 + 4 * 1) * 4 * 2, 0),
        WINDOW: ((1 + 4) * PAIR, 2 * 16 * (1 + 4 + 1)),
        SPARSE: (3 * PAIR, 2 * 16 * 3),
        STATE: (STATE_BYTES, 2 * QUERY_STATE),
    }


def test_a_chunk_sees_itself_half():
    works = attended(page(), 2, torch.tensor([20]), torch.tensor([2]))
    assert float(works[WINDOW].flops) == 2 * 16 * (2 * 5 + 3)
    assert float(works[WINDOW].bytes) == 5 * PAIR  # read once for both


def test_nothing_is_in_the_hidden_state_of_a_short_sequence():
    """After 7 tokens 2 .. 6 are in the window and 1 is cached."""
    works = attended(page(), 2, torch.tensor([7]), torch.tensor([1]))
    assert float(works[SPARSE].bytes) == PAIR
    assert float(works[STATE].bytes) == float(works[STATE].flops) == 0


def test_an_update_by_hand():
    """Two pairs join three cached ones: five are scored and two are folded."""
    works = updated(page(), torch.tensor([19, 20]), skip_recent=False)
    error = QUERY_STATE + 3 * 4
    assert works[SCORES].flops.tolist() == [0, 5 * error]
    assert works[SCORES].bytes.tolist() == [0, 5 * PAIR + STATE_BYTES]
    assert works[FOLDS].flops.tolist() == [0, 2 * (2 * 4 * 3 + 2 * 6 * 4 + 6)]
    folds = 2 * PAIR + 2 * STATE_BYTES + 2 * 2 * PAIR + 8 * 5
    assert works[FOLDS].bytes.tolist() == [0, folds]


def test_an_update_without_overflow_scores_and_folds_nothing():
    works = updated(page(), torch.tensor([6, 8]), skip_recent=False)
    assert works[SCORES].flops.tolist() == works[FOLDS].flops.tolist() == [0, 0]
    assert (works[FOLDS].bytes > 0).all()  # pairs enter the cache


def test_recent_pairs_need_no_scores():
    own, n = page(sparse_cache_size=30, recent_size=20), torch.tensor([60])
    all_of, some = (float(updated(own, n, skip_recent=s)[SCORES].flops) for s in (False, True))
    assert some / all_of == pytest.approx(12 / 32)


def test_bounds_rule_out_most_scores():
    kinds = {"sparse_cache_size": 100, "update_interval": 1}
    n = torch.tensor([300])
    bounded = updated(page(**kinds), n, skip_recent=False)[SCORES]
    each = updated(page(**kinds, recent_size=1), n, skip_recent=False)[SCORES]
    assert float(each.flops / bounded.flops) == pytest.approx(101 / 16)


def test_int8_pairs_are_half_of_the_bytes_and_their_scales():
    works = attended(page(int8_pairs=True), 2, torch.tensor([20]), torch.tensor([1]))
    assert float(works[SPARSE].bytes) == 3 * (PAIR / 2 + 8)


def test_a_context_shift_moves_keys_and_sums_twice():
    own = page(has_score_weights=True)
    keys = (7 + 3) * 4
    nbytes, flops = shift_work(own)
    assert nbytes == 2 * (keys * 2 + STATE_BYTES + 3 * 4) + 3 * 4
    assert flops == 3 * keys + 6 * 4


@pytest.mark.parametrize("tokens", [1, 5, 6, 7, 40, 41])
def test_chunks_are_those_of_the_prefill_kernel(tokens: int):
    pytest.importorskip("triton")
    from lola_vllm.kernels.chunks import plan_chunks

    plan = plan_chunks(np.array([0, tokens]), np.array([0]), page())
    starts, lengths = chunks_of(page(), tokens)
    assert starts.tolist() == plan[1].tolist()
    assert lengths.tolist() == plan[2].tolist()
