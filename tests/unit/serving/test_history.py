"""When tokens entered and left sparse caches: the reference's choices for every shorter prompt."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fastapi import HTTPException

from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops import Backend, portable
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.serving import engine, history
from lola_vllm.serving.engine import LolaEngine
from lola_vllm.serving.history import residencies, stop_interval
from lola_vllm.serving.keys import PromptPairs
from tests.support.problem import with_a_trend

SHIFTING = ShiftSchedule(32, 8)
KINDS = {
    "interval-is-window": ({}, None, 256),
    "paper": ({"update_interval": 1}, SHIFTING, 10),
    "sinks": ({"update_interval": 3, "sink_size": 2}, SHIFTING, 256),
    "importance": ({}, None, 10),
    "no-cache": ({"sparse_cache_size": 0}, None, 256),
}


@pytest.mark.parametrize("kind", KINDS)
def test_residencies_are_the_references_choices(kind, monkeypatch):
    fields, schedule, stops = KINDS[kind]
    monkeypatch.setattr(history, "MAX_STOPS", stops)
    n = 75
    config = LolaConfig(**{"window_size": 8, "sparse_cache_size": 12, **fields})
    problem = with_a_trend(n, config, F=6, importance=kind == "importance", schedule=schedule)
    state = problem.state()
    untouched = state.pages.clone()
    ops = Backend("torch", portable.decode, portable.prefill)
    found = residencies(ops, state, PromptPairs(problem.k, problem.v))
    assert torch.equal(state.pages, untouched)
    step = stop_interval(config.update_interval, n)
    assert step % config.update_interval == 0 and n / step <= stops
    for read in [*range(step, n, step), n]:
        cut = replace(problem, **{name: getattr(problem, name)[:read] for name in "qkv"})
        _, expected = cut.reference()
        for head, positions in enumerate(expected.sparse_positions):
            held = [
                stay.position
                for stay in found[head]
                if stay.entered <= read and (stay.left is None or read < stay.left)
            ]
            assert held == positions, (read, head)
    if config.sparse_pairs:
        assert any(stay.left is not None for stay in found[0])


def test_what_would_take_too_much_memory_is_refused(monkeypatch):
    monkeypatch.setattr(engine, "MAX_RECORD_BYTES", 1000)
    fake = SimpleNamespace(
        sequence=SimpleNamespace(full_kv_bytes_per_token=10), schedule=ShiftSchedule(64, 16)
    )
    with pytest.raises(HTTPException, match="101 tokens; the keys and values of at most 100 are"):
        LolaEngine._check_record(fake, 101, False)
    LolaEngine._check_record(fake, 100, False)
    limit = r"forgotten = true: .* 65 tokens, .*max_position_embeddings = 64 "
    with pytest.raises(HTTPException, match=limit):
        LolaEngine._check_record(fake, 65, True)
    LolaEngine._check_record(fake, 64, True)
