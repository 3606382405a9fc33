"""Prefix caching: what is hit, what is missed, and that a hit never changes a token."""

from tests.support.engine import engine, generate, metric, state_manager
from tools.support.tiny import random_prompts

LOLA = {"window_size": 16, "sparse_cache_size": 24, "sink_size": 2}
BLOCK, NEW = 32, 20
CACHED = {
    "enable_prefix_caching": True,
    "block_size": BLOCK,
    "max_num_batched_tokens": 128,
    "max_num_seqs": 8,
}


def conversation(llm):
    """Prompts and answers of a chat whose every turn repeats all turns before it."""
    text, turns = [], []
    for said in random_prompts([70, 41, 5, 90, 33, 12], seed=2):
        text = text + said
        answer = generate(llm, [text], NEW)[0]
        turns.append((text, answer))
        text = text + answer
    return turns


def hits(llm):
    return metric(llm, "vllm:prefix_cache_hits")


def boundary(num_tokens):
    """The last block boundary whose state a prompt can start from: its last token is computed."""
    return (num_tokens - 1) // BLOCK * BLOCK


def test_a_growing_chat_reuses_its_earlier_turns(tiny):
    with engine(tiny, max_num_seqs=8) as llm:
        expected = conversation(llm)
    with engine(tiny, **CACHED) as llm:
        turns = conversation(llm)
        assert turns == expected
        prompts = [prompt for prompt, _ in turns]
        # States are kept in answers too; the last token of an answer has not been computed.
        assert hits(llm) == sum(boundary(len(p) + NEW) for p in prompts[:-1])
        assert metric(llm, "vllm:prefix_cache_queries") == sum(map(len, prompts))


def test_prompts_with_a_common_prefix_share_what_was_kept(tiny):
    """Each goes on for blocks of its own, where vLLM's default policy would find nothing.

    A state exists where a step ended: of a prompt alone, at each multiple of the step's budget and
    at its last boundary, which no interval forgets.
    """
    (shared,) = random_prompts([100], seed=3)
    prompts = [shared + tail for tail in random_prompts([120, 130, 7, 140], seed=4)]
    with engine(tiny, max_num_seqs=8) as llm:
        expected = generate(llm, prompts, NEW)
    for budget, interval, kept in (
        (64, 0, [0, 64, 64, 96]),
        (32, 0, [0, 96, 96, 96]),
        (32, 64, [0, 64, 64, 96]),
    ):
        options = CACHED | {"max_num_batched_tokens": budget, "max_num_seqs": 1}
        with engine(tiny, prefix_cache_retention_interval=interval, **options) as llm:
            found, answers = [], []
            for prompt in prompts:
                before = hits(llm)
                answers += generate(llm, [prompt], NEW)
                found.append(hits(llm) - before)
            assert (found, answers) == (kept, expected)


def test_the_default_block_is_1024_tokens_and_the_log_says_so(tiny, caplog):
    (prompt,) = random_prompts([1500], seed=7)
    with (
        caplog.at_level("INFO", logger="vllm.lola"),
        engine(tiny, enable_prefix_caching=True) as llm,
    ):
        generate(llm, [prompt], 4)
        generate(llm, [prompt], 4)
        assert hits(llm) == 1024
        assert state_manager(llm).spec.states_per_sequence == 2
    assert "a state is kept every 1024 tokens at most" in caplog.text
