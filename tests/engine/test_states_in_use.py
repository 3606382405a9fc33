"""States that the block manager and vLLM's gauge count, while sequences run and after."""

import pytest
from vllm import SamplingParams, TokensPrompt

from tests.support.engine import GREEDY, engine, metric, state_manager
from tools.support.tiny import random_prompts

BLOCK = 32
LOLA = {"window_size": 16, "sparse_cache_size": 24}


@pytest.mark.parametrize(
    ("options", "per_sequence"),
    [({}, 1), ({"enable_prefix_caching": True, "block_size": BLOCK}, 2)],
    ids=["plain", "prefix-caching"],
)
def test_states_are_in_use_while_sequences_run_and_free_after(tiny, options, per_sequence):
    prompts = random_prompts([2 * BLOCK + 5] * 3, seed=1)
    with engine(tiny, max_num_batched_tokens=256, max_num_seqs=8, **options) as llm:
        manager, core = state_manager(llm), llm.llm_engine
        assert manager.num_states_in_use == 0 < manager.num_states
        for i, prompt in enumerate(prompts):
            params = SamplingParams(max_tokens=4 + i, **GREEDY)
            core.add_request(str(i), TokensPrompt(prompt_token_ids=prompt), params)
        seen = []
        while core.has_unfinished_requests():
            core.step()
            held, running = manager.num_states_in_use, core.get_num_unfinished_requests()
            assert running <= held <= running * per_sequence
            # The gauge behind lola:states_used is of the same moment.
            assert held == round(metric(llm, "vllm:kv_cache_usage_perc") * manager.num_states)
            seen.append(held)
        assert max(seen) == 3 * per_sequence
        assert seen[-1] == 0
