"""Answers do not depend on how prompts are split, on the batch, on preemption or on old bytes."""

import pytest
import torch
from vllm import SamplingParams, TokensPrompt

from tests.support.engine import (
    block_pool,
    engine,
    generate,
    metric,
    pages,
    scheduler,
    state_manager,
)
from tests.support.oracle import Oracle, assert_obeys
from tools.support.tiny import make_tiny, random_prompts

LOLA = {"window_size": 32, "sparse_cache_size": 48}
LENGTHS = [1, 2, 31, 32, 33, 64, 65, 100, 128, 150, 257, 300]
NEW = 24


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"), LOLA)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(LENGTHS)


@pytest.fixture(scope="module")
def expected(tiny, prompts):
    """Each prompt alone, prefilled at once."""
    with engine(tiny, max_num_batched_tokens=2048, max_num_seqs=8) as llm:
        return [generate(llm, [p], NEW)[0] for p in prompts]


def test_tokens_are_those_of_the_float64_recompute(tiny, prompts, expected):
    oracle = Oracle(tiny)
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert_obeys(oracle, prompt, tokens)
    assert len({tuple(t) for t in expected}) == len(expected)  # not one constant answer


@pytest.mark.parametrize(
    "lola",
    [
        {"update_interval": 1, "sink_size": 4},
        {"update_interval": 7, "mixing": "lolcats"},
        {"sparse_cache_size": 0},
        {"sparse_cache_size": [90, 5]},
    ],
    ids=["paper-sinks", "interval-7-lolcats", "no-cache", "a-size-per-layer"],
)
@pytest.mark.parametrize("state_heads", [2, 4])
def test_configurations_obey_the_recompute(tmp_path, lola, state_heads):
    model = make_tiny(tmp_path, {**LOLA, **lola}, state_heads=state_heads)
    prompts = random_prompts([3, 40, 130, 222], seed=5)
    with engine(model, max_num_batched_tokens=64, max_num_seqs=8) as llm:
        tokens = generate(llm, prompts, NEW)
    oracle = Oracle(model)
    for prompt, answer in zip(prompts, tokens, strict=True):
        assert_obeys(oracle, prompt, answer)


@pytest.mark.parametrize("budget", [16, 37, 64])
def test_scheduler_chunks_change_nothing(tiny, prompts, expected, budget):
    with engine(
        tiny, max_num_batched_tokens=budget, max_num_seqs=8, enable_chunked_prefill=True
    ) as llm:
        assert [generate(llm, [p], NEW)[0] for p in prompts] == expected
        assert generate(llm, prompts, NEW) == expected


def test_company_changes_nothing(tiny, prompts, expected):
    """Among 24 others that come and go, with fewer states than requests."""
    others = random_prompts([5 + 13 * i for i in range(24)], seed=9)
    with engine(tiny, max_num_batched_tokens=128, max_num_seqs=12) as llm:
        core = llm.llm_engine
        answers = {}
        queue = [(f"p{i}", p, NEW) for i, p in enumerate(prompts)]
        for i, other in enumerate(others):
            queue.insert(2 * i % len(queue), (f"o{i}", other, 3 + 5 * i % 40))
        step = 0
        while queue or core.has_unfinished_requests():
            for _ in range(3 if step % 4 == 0 else 0):
                if queue:
                    name, prompt, count = queue.pop(0)
                    params = SamplingParams(
                        max_tokens=count, temperature=0.0, ignore_eos=True, detokenize=False
                    )
                    core.add_request(name, TokensPrompt(prompt_token_ids=prompt), params)
            if step == 9:
                core.abort_request(["o3", "o6"])
            for output in core.step():
                if output.finished:
                    answers[output.request_id] = list(output.outputs[0].token_ids)
            step += 1
        assert [answers[f"p{i}"] for i in range(len(prompts))] == expected
        assert state_manager(llm).num_states_in_use == 0


def test_forced_preemption_changes_nothing(tiny, prompts, expected):
    with engine(
        tiny,
        max_num_batched_tokens=64,
        max_num_seqs=12,
        enable_prefix_caching=True,
        block_size=32,
        num_gpu_blocks_override=7,
    ) as llm:
        assert generate(llm, prompts, NEW) == expected
        assert metric(llm, "vllm:num_preemptions") > 0


def test_prefix_hits_change_nothing(tiny, prompts, expected):
    with engine(
        tiny, max_num_batched_tokens=128, max_num_seqs=8, enable_prefix_caching=True, block_size=32
    ) as llm:
        for _ in range(2):
            assert [generate(llm, [p], NEW)[0] for p in prompts] == expected
        assert metric(llm, "vllm:prefix_cache_hits") > 500


def test_a_poisoned_pool_changes_nothing(tiny, prompts, expected):
    """Every page that no running request holds is NaN before every step."""
    with engine(tiny, max_num_batched_tokens=64, max_num_seqs=6) as llm:
        core, pool = llm.llm_engine, block_pool(llm)
        for i, prompt in enumerate(prompts):
            params = SamplingParams(
                max_tokens=NEW, temperature=0.0, ignore_eos=True, detokenize=False
            )
            core.add_request(str(i), TokensPrompt(prompt_token_ids=prompt), params)
        answers, poisoned = {}, 0
        while core.has_unfinished_requests():
            free = [b.block_id for b in pool.blocks if b.ref_cnt == 0 or b.is_null]
            for layer_pages in pages(llm):
                layer_pages[free] = -1  # all bits set: NaN in every float type
            poisoned += len(free)
            for output in core.step():
                if output.finished:
                    answers[int(output.request_id)] = list(output.outputs[0].token_ids)
        assert poisoned
        assert [answers[i] for i in range(len(prompts))] == expected


def test_reused_states_equal_fresh_ones(tiny, prompts, expected):
    """The same few states serve everyone, twice over."""
    with engine(tiny, max_num_batched_tokens=64, max_num_seqs=8, num_gpu_blocks_override=3) as llm:
        for _ in range(2):
            assert generate(llm, prompts, NEW) == expected
        assert state_manager(llm).num_states == 2
        assert scheduler(llm).get_num_unfinished_requests() == 0


def test_logprobs_are_close_to_the_recompute(tiny, prompts):
    oracle = Oracle(tiny)
    with engine(tiny, max_num_batched_tokens=64, max_num_seqs=8) as llm:
        params = SamplingParams(
            max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=5, detokenize=False
        )
        for output in llm.generate(
            [TokensPrompt(prompt_token_ids=p) for p in prompts], params, use_tqdm=False
        ):
            answer = output.outputs[0]
            tokens = list(output.prompt_token_ids) + list(answer.token_ids)
            truth = oracle.logprobs(tokens[:-1])[len(output.prompt_token_ids) - 1 :]
            for row, entries in zip(truth, answer.logprobs, strict=True):
                got = torch.tensor([e.logprob for e in entries.values()], dtype=torch.float64)
                torch.testing.assert_close(got, row[list(entries)], rtol=0, atol=1e-4)
