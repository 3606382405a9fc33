"""Random arrivals, aborts, retries and preemption on a tiny engine, and admission at its limits."""

import pytest
from vllm import SamplingParams, TokensPrompt

from tests.support.effort import LONG
from tests.support.engine import GREEDY, block_pool, engine, generate, metric, state_manager
from tests.support.oracle import Oracle
from tests.support.storm import Storm
from tools.support.tiny import make_tiny, random_prompts

# Contexts shift from 128 tokens on, so that prompts and answers lie on both sides.
LOLA = {"window_size": 16, "sparse_cache_size": 24, "sink_size": 2, "context_shift": 32}
NEW = 24
STEPS = 5000 if LONG else 250
CACHED = {"enable_prefix_caching": True, "block_size": 32}
ENGINES = {
    "chunked": {"max_num_batched_tokens": 37, "max_num_seqs": 6, "num_gpu_blocks_override": 9},
    "two-blocks": {"max_num_batched_tokens": 64, "max_num_seqs": 8, "num_gpu_blocks_override": 3},
    "caching": {
        **CACHED, "max_num_batched_tokens": 64, "max_num_seqs": 8, "num_gpu_blocks_override": 30,
    },
    "preempting": {
        **CACHED, "max_num_batched_tokens": 64, "max_num_seqs": 12, "num_gpu_blocks_override": 7,
    },
    "priorities": {
        **CACHED, "max_num_batched_tokens": 64, "max_num_seqs": 12, "num_gpu_blocks_override": 7,
        "scheduling_policy": "priority",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"), LOLA, max_position_embeddings=128)


@pytest.fixture(scope="module")
def prompts():
    """Some alone, some that begin alike for one and for several blocks."""
    short, long = random_prompts([40, 150], seed=1)
    tails = random_prompts([3, 30, 64, 90, 1, 20, 70, 140], seed=2)
    others = random_prompts([1, 15, 16, 33, 64, 100, 222, 300], seed=3)
    return others + [short + tail for tail in tails[:4]] + [long + tail for tail in tails[4:]]


@pytest.fixture(scope="module")
def expected(tiny, prompts):
    """Each prompt alone, prefilled at once."""
    with engine(tiny, max_num_batched_tokens=2048, max_num_seqs=8) as llm:
        return [generate(llm, [p], NEW)[0] for p in prompts]


@pytest.fixture(scope="module")
def same(tiny, prompts):
    """Whether every token of an answer is the float64 recompute's choice, or ties with it."""
    oracle = Oracle(tiny)

    def tied(prompt, tokens):
        context = prompts[prompt]
        logprobs = oracle.logprobs(context + tokens[:-1])[len(context) - 1 :]
        chosen = logprobs[range(len(tokens)), tokens]
        return float((logprobs.max(-1).values - chosen).max()) < 1e-4

    return tied


@pytest.mark.slow
@pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES)
def test_a_storm_changes_no_answer_and_loses_no_state(tiny, prompts, expected, same, options):
    with engine(tiny, **options) as llm:
        report = Storm(llm, prompts, expected, seed=7, same=same).run(STEPS)
    print(report)
    seen = report.seen
    assert report.completed > STEPS // 10
    assert seen["ties"] <= report.completed // 100
    assert min(seen[f"aborted {when}"] for when in ("in prefill", "in decode", "while waiting")) > 0
    assert seen["retried"] > 0 and seen["pages poisoned"] > 0
    if "block_size" in options:
        assert seen["prefix hit tokens"] > 0
    if options.get("num_gpu_blocks_override") == 7:
        assert seen["preempted"] > 0
        assert seen["aborted while preempted"] > 0 or not LONG


@pytest.mark.parametrize("caching", [False, True], ids=["no-prefix-cache", "prefix-cache"])
def test_one_state_serves_a_crowd(tiny, prompts, expected, caching):
    """The smallest pool there can be: whoever is admitted gets to its end, in a bounded time."""
    blocks = 3 if caching else 2  # one of them is vLLM's null block
    options = {"num_gpu_blocks_override": blocks, **(CACHED if caching else {})}
    crowd, few = prompts[::-1], 6
    with engine(tiny, max_num_batched_tokens=64, max_num_seqs=16, **options) as llm:
        core = llm.llm_engine
        for i, prompt in enumerate(crowd):
            params = SamplingParams(max_tokens=few, **GREEDY)
            core.add_request(str(i), TokensPrompt(prompt_token_ids=prompt), params)
        answers, steps = {}, 0
        while core.has_unfinished_requests():
            for output in core.step():
                if output.finished:
                    answers[int(output.request_id)] = list(output.outputs[0].token_ids)
            steps += 1
        # One after the other: a step for each piece of a prompt and for each further token.
        assert steps <= sum(-(-len(p) // 32) + few for p in crowd)
        assert [answers[i] for i in range(len(crowd))] == [e[:few] for e in expected[::-1]]
        assert state_manager(llm).num_states_in_use == 0
        assert block_pool(llm).get_num_free_blocks() == blocks - 1


def test_an_abort_leaves_a_prefix_that_a_retry_may_start_from(tiny, prompts, expected):
    """Aborted at every step of its life in turn; the retry hits what was kept and answers right."""
    prompt, answer = prompts[-1], expected[-1]
    options = CACHED | {"max_num_batched_tokens": 64, "max_num_seqs": 4}
    with engine(tiny, **options) as llm:
        core, hits = llm.llm_engine, []
        for steps in range(1, 8):
            assert llm.reset_prefix_cache()
            params = SamplingParams(max_tokens=NEW, **GREEDY)
            core.add_request("gone", TokensPrompt(prompt_token_ids=prompt), params)
            for _ in range(steps):
                core.step()
            core.abort_request(["gone"])
            before = metric(llm, "vllm:prefix_cache_hits")
            assert generate(llm, [prompt], NEW) == [answer]
            hits.append(metric(llm, "vllm:prefix_cache_hits") - before)
            assert state_manager(llm).num_states_in_use == 0
        assert hits == sorted(hits) and hits[-1] == (len(prompt) - 1) // 32 * 32
        assert len(set(hits)) > 3
