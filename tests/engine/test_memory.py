"""States read out of a running engine are those of the float64 recompute, whoever else runs."""

import pytest
from vllm import SamplingParams, TokensPrompt

from lola_vllm.core.ops.reference import feature_map, self_recall_error
from lola_vllm.engine.vllm.attention import LolaAttention
from lola_vllm.serving.engine import joined
from tests.support import oracle as oracle_module
from tests.support.engine import GREEDY, engine, metric, scheduler
from tests.support.oracle import Oracle
from tools.support.tiny import random_prompts

# The heads of the first layer have a page each.
LOLA = {
    "window_size": 16, "sparse_cache_size": [[24, 10], 24], "hidden_state": [[False, True], True],
    "sink_size": 2,
}  # fmt: skip


@pytest.fixture
def truth(tiny, monkeypatch):
    """Per layer and head, the positions in the sparse cache after a prompt."""
    attention = oracle_module.lola_attention

    def positions(prompt):
        for found in (positions.states, positions.keys, positions.values, positions.maps):
            found.clear()
        model.logprobs(prompt)
        return [state.sparse_positions for state in positions.states]

    # Of the last prompt, per layer.
    positions.states, positions.keys, positions.values, positions.maps = [], [], [], []

    def recorded(q, k, v, map_q, map_k, *rest):
        out, state = attention(q, k, v, map_q, map_k, *rest)
        positions.states.append(state)
        positions.keys.append(k)
        positions.values.append(v)
        positions.maps.append(map_k)
        return out, state

    monkeypatch.setattr(oracle_module, "lola_attention", recorded)
    model = Oracle(tiny)
    return positions


def ask(llm, method, *args):
    (answer,) = llm.collective_rpc(method, args=args)
    assert "error" not in answer, answer
    return answer


def send(llm, name, prompt, max_tokens=1, **sampling):
    params = SamplingParams(max_tokens=max_tokens, **GREEDY, **sampling)
    llm.llm_engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), params)


def run(llm):
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


def read(llm, name, layers=None):
    found = ask(llm, "lola_memory", name, layers)["layers"]
    return [[head["positions"] for head in found[layer].values()] for layer in sorted(found)]


SERVED = {
    "chunked": {"max_num_batched_tokens": 40},
    "preempting": {"enable_prefix_caching": True, "block_size": 32, "num_gpu_blocks_override": 7},
}


@pytest.mark.parametrize("name", SERVED)
def test_states_are_those_of_the_recompute(tiny, truth, name):
    with engine(tiny, max_num_seqs=6, **SERVED[name]) as llm:
        check_positions(llm, truth)
        if name == "preempting":
            assert metric(llm, "vllm:prefix_cache_hits") > 0
            assert metric(llm, "vllm:num_preemptions") > 0
        check_what_was_forgotten(llm, truth)


def check_positions(llm, truth):
    """Whoever else runs; the second time from the cache, where there is one."""
    shared, *others = random_prompts([64, 33, 100, 130, 41], seed=3)
    prompts = [shared + tail for tail in random_prompts([1, 30, 64, 96], seed=4)]
    for round_ in range(2):
        for i, prompt in enumerate(prompts):
            name = f"memory-{round_}-{i}"
            ask(llm, "lola_watch", name, len(prompt))
            for j, other in enumerate(others):
                send(llm, f"other-{round_}-{i}-{j}", other, max_tokens=20)
            send(llm, name, prompt)
            run(llm)
            assert read(llm, name) == truth(prompt)


def check_what_was_forgotten(llm, truth):
    """Errors of folded tokens and stays in the caches are those of the recompute."""
    (prompt,) = random_prompts([149], seed=5)
    others = random_prompts([33, 100, 130, 41], seed=3)
    for round_ in range(2):
        name = f"forgotten-{round_}"
        ask(llm, "lola_watch", name, len(prompt), True)
        (busy,) = llm.collective_rpc("lola_watch", args=("other", 5, True))
        assert "another prompt" in busy["error"]
        for j, other in enumerate(others):
            send(llm, f"beside-{round_}-{j}", other, max_tokens=20)
        send(llm, name, prompt, skip_reading_prefix_cache=True)
        run(llm)
        found = ask(llm, "lola_memory", name, None, True, True)["layers"]
    expected = {stop: truth(prompt[:stop]) for stop in [*range(16, 149, 16), 149]}
    states = truth.states
    for layer, state in enumerate(states):
        for head, memory in found[layer].items():
            kept = expected[149][layer][head]
            folded = [p for p in range(2, 128) if p not in kept]
            phi = feature_map(truth.keys[layer][folded, head], truth.maps[layer][head])
            values = truth.values[layer][folded, head]
            errors = self_recall_error(phi, values, state.H[head], state.s[head])
            assert memory["forgotten"] == pytest.approx(errors.tolist(), rel=1e-3, abs=2e-5)
            stays = [*zip(kept, memory["entered"], [999] * len(kept), strict=True)]
            stays += memory["gone"]
            assert memory["gone"]
            for stop, positions in expected.items():
                held = sorted(p for p, entered, left in stays if entered <= stop < left)
                assert held == positions[layer][head]


def test_keys_that_were_not_seen_are_missed(tiny):
    """A cached prefix has none; and dropping a request ends its record."""
    (prompt,) = random_prompts([100], seed=5)
    with engine(tiny, max_num_seqs=4, enable_prefix_caching=True, block_size=32) as llm:
        send(llm, "first", prompt)
        run(llm)
        ask(llm, "lola_watch", "m", len(prompt), True)
        send(llm, "m", prompt)
        run(llm)
        (answer,) = llm.collective_rpc("lola_memory", args=("m", None, True, False))
        assert "the keys of 96 of 100 tokens were not seen" in answer["error"]
        ask(llm, "lola_watch", "dropped", 50, True)
        ask(llm, "lola_drop", "dropped")
        ask(llm, "lola_watch", "next", 50, True)
        ask(llm, "lola_drop", "next")
        model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
        assert not model._forward_pre_hooks and not model._forward_hooks
        layers = [m for m in model.modules() if isinstance(m, LolaAttention)]
        assert layers and all(layer.kv_hook is None for layer in layers)


def test_what_else_is_asked(tiny, truth):
    """Several at once, single layers; nothing changes an answer, and what is wrong is answered."""
    (prompt,) = random_prompts([70], seed=6)
    several = random_prompts([50, 50, 90], seed=9)
    with engine(tiny, max_num_seqs=6) as llm:
        params = SamplingParams(max_tokens=30, **GREEDY)
        request = TokensPrompt(prompt_token_ids=prompt)

        def tokens():
            (output,) = llm.generate([request], params, use_tqdm=False)
            return output.outputs[0].token_ids

        alone = tokens()
        free = scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks()
        ask(llm, "lola_watch", "never-sent", 5)
        assert tokens() == alone
        ask(llm, "lola_drop", "never-sent")
        assert scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks() == free
        for i, one in enumerate(several):
            ask(llm, "lola_watch", f"m{i}", len(one))
            send(llm, f"m{i}", one)
        run(llm)
        for i, one in enumerate(several):
            assert read(llm, f"m{i}", [1]) == truth(one)[1:]
        (answer,) = llm.collective_rpc("lola_memory", args=("unknown", None))
        assert "could not be read: no step of it was seen" in answer["error"]
        for i in range(9):
            (answer,) = llm.collective_rpc("lola_watch", args=(f"w{i}", 5))
        assert "too many states" in answer["error"]
        (answer,) = llm.collective_rpc("lola_watch", args=())
        assert "TypeError" in answer["error"]


def test_ranks_that_share_a_head_tell_of_it_once():
    head = {"sparse_cache_size": 128, "folded": 192, "positions": [3], "errors": [0.5]}
    (layer,) = joined([{7: {0: head}}, {7: {0: head, 1: head}}])
    assert layer.layer == 7 and len(layer.heads) == 2
