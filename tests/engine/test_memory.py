"""States read out of a running engine are those of the float64 recompute, whoever else runs."""

import pytest
import torch
from vllm import SamplingParams, TokensPrompt

from lola_vllm.config import LolaConfig
from lola_vllm.plugin.cache import page_layouts
from lola_vllm.serving.engine import joined
from lola_vllm.state import StateLayout
from tests.support import oracle as oracle_module
from tests.support.engine import GREEDY, engine, metric, scheduler
from tests.support.oracle import Oracle
from tests.support.tiny import make_tiny, random_prompts

LOLA = {"window_size": 16, "sparse_cache_size": 24, "sink_size": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"), LOLA)


@pytest.fixture
def truth(tiny, monkeypatch):
    """Per layer and head, the positions in the sparse cache after a prompt."""
    states = []
    attention = oracle_module.lola_attention

    def recorded(*args):
        out, state = attention(*args)
        states.append(state)
        return out, state

    monkeypatch.setattr(oracle_module, "lola_attention", recorded)
    model = Oracle(tiny)

    def positions(prompt):
        states.clear()
        model.logprobs(prompt)
        return [state.sparse_positions for state in states]

    return positions


def ask(llm, method, *args):
    (answer,) = llm.collective_rpc(method, args=args)
    assert "error" not in answer, answer
    return answer


def send(llm, name, prompt, max_tokens=1):
    params = SamplingParams(max_tokens=max_tokens, **GREEDY)
    llm.llm_engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), params)


def run(llm):
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


def read(llm, name, layers=None):
    found = ask(llm, "lola_memory", name, layers)["layers"]
    return [[head["positions"] for head in found[layer].values()] for layer in sorted(found)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 40},
        {"enable_prefix_caching": True, "block_size": 32},
        {"enable_prefix_caching": True, "block_size": 32, "num_gpu_blocks_override": 7},
    ],
    ids=["plain", "chunked", "prefix-caching", "preempting"],
)
def test_states_are_those_of_the_recompute(tiny, truth, options):
    shared, *others = random_prompts([64, 33, 100, 130, 41], seed=3)
    prompts = [shared + tail for tail in random_prompts([1, 30, 64, 96], seed=4)]
    with engine(tiny, max_num_seqs=6, **options) as llm:
        for round_ in range(2):  # the second time from the cache, where there is one
            for i, prompt in enumerate(prompts):
                name = f"memory-{round_}-{i}"
                ask(llm, "lola_watch", name, len(prompt))
                for j, other in enumerate(others):
                    send(llm, f"other-{round_}-{i}-{j}", other, max_tokens=20)
                send(llm, name, prompt)
                run(llm)
                assert read(llm, name) == truth(prompt)
        if options.get("enable_prefix_caching"):
            assert metric(llm, "vllm:prefix_cache_hits") > 0
        if "num_gpu_blocks_override" in options:
            assert metric(llm, "vllm:num_preemptions") > 0


def test_several_at_once_and_single_layers(tiny, truth):
    prompts = random_prompts([50, 50, 90], seed=9)
    with engine(tiny, max_num_seqs=6) as llm:
        for i, prompt in enumerate(prompts):
            ask(llm, "lola_watch", f"m{i}", len(prompt))
            send(llm, f"m{i}", prompt)
        run(llm)
        for i, prompt in enumerate(prompts):
            assert read(llm, f"m{i}", [1]) == truth(prompt)[1:]


def test_watching_changes_no_answer_and_leaves_nothing_behind(tiny):
    (prompt,) = random_prompts([70], seed=6)
    with engine(tiny, max_num_seqs=4) as llm:
        params = SamplingParams(max_tokens=30, **GREEDY)
        request = TokensPrompt(prompt_token_ids=prompt)

        def tokens():
            (output,) = llm.generate([request], params, use_tqdm=False)
            return output.outputs[0].token_ids

        alone = tokens()
        free = scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks()
        ask(llm, "lola_watch", "never-sent", 5)
        ask(llm, "lola_sample")
        assert tokens() == alone
        ask(llm, "lola_drop", "never-sent")
        sample = ask(llm, "lola_sample")
        assert sample["sequences"] == 1
        assert 0 < sample["sparse_fill"] <= 1
        assert 0 <= sample["swapped"] <= 1
        assert sample["kept_error"] > 0 and sample["folded_error"] > 0
        assert scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks() == free


def test_what_is_wrong_is_answered_not_raised(tiny):
    with engine(tiny, max_num_seqs=4) as llm:
        (answer,) = llm.collective_rpc("lola_memory", args=("unknown", None))
        assert "could not be read: no step of it was seen" in answer["error"]
        for i in range(9):
            (answer,) = llm.collective_rpc("lola_watch", args=(f"w{i}", 5))
        assert "too many states" in answer["error"]
        (answer,) = llm.collective_rpc("lola_watch", args=())
        assert "TypeError" in answer["error"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2, "enforce_eager": False}],
    ids=["heads-on-two-ranks", "layers-on-two-stages-compiled"],
)
def test_answers_of_several_workers_make_one(tiny, truth, options):
    (prompt,) = random_prompts([90], seed=7)
    with engine(tiny, max_num_seqs=4, **options) as llm:
        assert llm.collective_rpc("lola_watch", args=("m", len(prompt))) == [{}, {}]
        send(llm, "m", prompt)
        run(llm)
        answers = llm.collective_rpc("lola_memory", args=("m", None))
        layouts = page_layouts(llm.llm_engine.vllm_config)
        layers = joined([answer["layers"] for answer in answers], layouts, len(prompt))
    assert [layer.layer for layer in layers] == [0, 1]
    assert [[head.positions for head in layer.heads] for layer in layers] == truth(prompt)


def test_ranks_that_share_a_head_tell_of_it_once():
    head = {"positions": [3], "errors": [0.5]}
    page = StateLayout.from_config(LolaConfig(), 2, 2, 8, torch.float32)
    (layer,) = joined([{7: {0: head}}, {7: {0: head, 1: head}}], [page] * 8, 400)
    assert (layer.sparse_cache_size, layer.folded) == (128, 400 // 64 * 64 - 64 - 128)
    assert layer.layer == 7 and len(layer.heads) == 2
