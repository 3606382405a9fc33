"""Answers obey the float64 recompute, whatever a model has and however its prompts are served:
cut, batched, preempted, from a cached state, among old bytes."""

from functools import cache

import pytest
import torch
from vllm import SamplingParams, TokensPrompt
from vllm.compilation.counter import compilation_counter

from lola_vllm.engine.vllm.attention import OP
from tests.support.engine import (
    GREEDY,
    engine,
    generate,
    metric,
    store_options,
)
from tests.support.oracle import Oracle, assert_obeys
from tools.support.tiny import make_tiny, random_prompts

LOLA = {"window_size": 32, "sparse_cache_size": 48}
LENGTHS = [1, 2, 31, 32, 33, 64, 65, 100, 128, 150, 257, 300]
# A context shift every 16 tokens from 64 on: prompts around, across none, one and many.
SHIFTING = {"window_size": 8, "sparse_cache_size": 20, "sink_size": 3, "context_shift": 16}
SHIFTED_LENGTHS = [1, 50, 63, 64, 65, 79, 80, 81, 96, 130, 200]
SHORT = {"max_position_embeddings": 64}
WEIGHTED = {"importance": True}
NEW = 24
MODELS = {
    "plain": (LOLA, {}),
    "paper, sinks": (LOLA | {"update_interval": 1, "sink_size": 4}, {"state_heads": 4}),
    "interval 7, lolcats": (LOLA | {"update_interval": 7, "mixing": "lolcats"}, {}),
    "unlike layers": (
        LOLA | {"sparse_cache_size": [90, 0], "hidden_state": [False, True]},
        {"state_heads": 4},
    ),
    "shifting": (SHIFTING, SHORT),
    "shifting, 7": (SHIFTING | {"update_interval": 7}, SHORT),
    "two shifts a length": (SHIFTING | {"context_shift": 32}, SHORT),
    "importance, shared": (
        LOLA | {"window_size": 16, "update_interval": 7, "sparse_sharing": "kv_head"},
        WEIGHTED | {"state_heads": 4},
    ),
    "int8, shifting": (
        SHIFTING | {"window_size": 16, "update_interval": 4, "sparse_dtype": "int8"},
        SHORT,
    ),
}
# Rounding to 8 bits is a step function: keys that differ in their last bit may be stored one step
# apart, 1/127 of the largest. So is a choice between two scores that are nearly equal. Such steps
# stay below the margin, and other pairs do not.
MARGIN = 0.05


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """The directory of a model of `MODELS`, by its name."""

    @cache
    def made(name):
        lola, fields = MODELS[name]
        return make_tiny(tmp_path_factory.mktemp("tiny"), lola, **fields)

    return made


def prompts_of(name):
    return random_prompts(SHIFTED_LENGTHS if "shift" in name else LENGTHS)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("plain", "shifting")])
def test_answers_obey_the_recompute(make, name):
    """All at once, in pieces; the second time from cached states."""
    oracle, prompts = Oracle(make(name)), random_prompts([3, 40, 130, 222], seed=5)
    close = MARGIN if "int8" in name or "importance" in name else 1e-4
    params = SamplingParams(max_tokens=NEW, logprobs=5, **GREEDY)
    requests = [TokensPrompt(prompt_token_ids=p) for p in prompts]
    options = {"enable_prefix_caching": True, "block_size": 32, "max_num_batched_tokens": 64}
    with engine(make(name), max_num_seqs=8, **options) as llm:
        rounds = [llm.generate(requests, params, use_tqdm=False) for _ in range(2)]
        assert metric(llm, "vllm:prefix_cache_hits") > 300
    for cold, warm in zip(*rounds, strict=True):
        prompt, answers = cold.prompt_token_ids, [cold.outputs[0], warm.outputs[0]]
        one, two = (list(answer.token_ids) for answer in answers)
        truth = oracle.logprobs([*prompt, *one][:-1])[len(prompt) - 1 :]
        for answer in answers if one == two else answers[:1]:
            for row, entries in zip(truth, answer.logprobs, strict=True):
                got = torch.tensor([e.logprob for e in entries.values()], dtype=torch.float64)
                torch.testing.assert_close(got, row[list(entries)], rtol=0, atol=close)
        if "int8" not in name:
            assert one == two
            assert_obeys(oracle, prompt, one)


def test_what_the_recompute_would_not_see(make, tmp_path):
    """It knows of context shifts, and other pairs are outside of the margin of 8 bits."""
    oracle = Oracle(make("int8, shifting"))
    assert [oracle.rope_position(p) for p in (63, 64, 79, 80)] == [63, 48, 63, 48]
    (prompt,) = random_prompts([200])
    own = oracle.logprobs(prompt)  # before another one replaces its attention
    lola, fields = MODELS["int8, shifting"]
    other = Oracle(make_tiny(tmp_path, lola | {"sparse_cache_size": 2}, **fields))
    assert (own - other.logprobs(prompt)).abs().max() > 2 * MARGIN


# ---- however they are served

WHOLE = pytest.mark.parametrize("name", ["plain", "shifting"])


@pytest.fixture(scope="module")
def expected(make):
    """Each prompt alone, prefilled at once, and the prompt with its answer gone on with."""

    @cache
    def answers(name):
        with engine(make(name), max_num_batched_tokens=2048, max_num_seqs=8) as llm:
            prompts = prompts_of(name)
            tokens = [generate(llm, [p], NEW)[0] for p in prompts]
            longer = [p + new for p, new in zip(prompts, tokens, strict=True)]
            return tokens, [generate(llm, [p], NEW)[0] for p in longer]

    return answers


@WHOLE
def test_expected_answers_obey_the_recompute(make, expected, name):
    oracle, (tokens, _) = Oracle(make(name)), expected(name)
    for prompt, answer in zip(prompts_of(name), tokens, strict=True):
        assert_obeys(oracle, prompt, answer)
    assert len({tuple(answer) for answer in tokens}) == len(tokens)  # not one constant answer


CACHED = {"enable_prefix_caching": True, "max_num_seqs": 12, "max_num_batched_tokens": 64}
HITS, PREEMPTIONS = "vllm:prefix_cache_hits", "vllm:num_preemptions"


@WHOLE
@pytest.mark.parametrize(
    ("options", "happens"),
    [
        ({"max_num_batched_tokens": 37, "max_num_seqs": 8}, None),
        (CACHED | {"block_size": 32, "num_gpu_blocks_override": 7}, PREEMPTIONS),
        (CACHED | {"block_size": 24}, HITS),  # blocks end at context shifts and between them
    ],
    ids=["pieces", "preempted", "cached"],
)
def test_serving_changes_nothing(make, expected, name, options, happens):
    """Alone, all at once, and both with what was answered."""
    prompts, (tokens, after) = prompts_of(name), expected(name)
    longer = [p + new for p, new in zip(prompts, tokens, strict=True)]
    with engine(make(name), **options) as llm:
        assert generate(llm, prompts, NEW) == tokens
        assert [generate(llm, [p], NEW)[0] for p in prompts] == tokens
        assert generate(llm, longer, NEW) == after
        assert happens is None or metric(llm, happens) > (500 if happens == HITS else 0)


@pytest.mark.slow
def test_a_compiled_model_does_the_same(make, expected, monkeypatch, tmp_path):
    """And so does what the next start loads, wherever that stores states."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    wanted = expected("shifting")[0]
    options = {"max_num_seqs": 6, "max_num_batched_tokens": 48, "enforce_eager": False}
    for loaded, directory in enumerate((None, tmp_path / "states")):
        before = compilation_counter.num_aot_artifacts_loaded
        with engine(make("shifting"), **options, **store_options(directory)) as llm:
            assert OP in llm.llm_engine.vllm_config.compilation_config.splitting_ops
            assert generate(llm, prompts_of("shifting"), NEW) == wanted
        assert compilation_counter.num_aot_artifacts_loaded == before + loaded
