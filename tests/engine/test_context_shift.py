"""Contexts beyond the base's trained length: the float64 recompute, however they are served."""

import pytest
import torch
from vllm import SamplingParams, TokensPrompt

from lola_vllm.core.config import ENDLESS_LENGTH
from lola_vllm.engine.hf import LolaLlamaForCausalLM
from tests.support.engine import GREEDY, block_pool, engine, generate, metric, pages
from tests.support.oracle import Oracle, assert_obeys
from tools.support.tiny import make_tiny, random_prompts

LENGTH, INTERVAL = 64, 16
LOLA = {
    "window_size": 8, "sparse_cache_size": 20, "sink_size": 3, "context_shift": INTERVAL,
}  # fmt: skip
# Around context shifts, across none, one and many; the answers cross more.
LENGTHS = [1, 50, 63, 64, 65, 79, 80, 81, 96, 130, 200]
NEW = 40


def make(path, **lola):
    return make_tiny(path, {**LOLA, **lola}, max_position_embeddings=LENGTH)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make(tmp_path_factory.mktemp("tiny"))


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
    assert len({tuple(t) for t in expected}) == len(expected)


@pytest.mark.parametrize(
    "lola",
    [
        {"update_interval": 1},
        {"update_interval": 7},
        {"context_shift": 32},
    ],
    ids=["1", "7", "two shifts a length"],
)
def test_other_settings_obey_the_recompute(tmp_path, prompts, lola):
    model = make(tmp_path, **lola)
    with engine(model, max_num_batched_tokens=48, max_num_seqs=8) as llm:
        tokens = generate(llm, prompts, NEW)
    oracle = Oracle(model)
    for prompt, answer in zip(prompts, tokens, strict=True):
        assert_obeys(oracle, prompt, answer)


def test_nothing_is_as_without_context_shifts(tiny, prompts, expected):
    """The tests here would see it if there were none."""
    overrides = {"lola_config": {"context_shift": 0}, "max_position_embeddings": 4096}
    with engine(tiny, max_num_seqs=8, hf_overrides=overrides) as llm:
        plain = generate(llm, prompts, NEW)
    assert plain[0] == expected[0]  # 1 + 40 tokens
    assert all(a != b for a, b in zip(plain[1:], expected[1:], strict=True))
    assert plain[1][: LENGTH - LENGTHS[1] + 1] == expected[1][: LENGTH - LENGTHS[1] + 1]


@pytest.mark.parametrize("budget", [16, 37])
def test_chunks_and_company_change_nothing(tiny, prompts, expected, budget):
    with engine(tiny, max_num_batched_tokens=budget, max_num_seqs=6) as llm:
        assert generate(llm, prompts, NEW) == expected


def test_preemption_and_prefix_hits_change_nothing(tiny, prompts, expected):
    """Blocks end at context shifts and between them."""
    cached = {"enable_prefix_caching": True, "max_num_seqs": 12}
    for block in (16, 24):
        options = cached | {"block_size": block, "max_num_batched_tokens": 64}
        with engine(tiny, num_gpu_blocks_override=7, **options) as llm:
            assert generate(llm, prompts, NEW) == expected
            assert metric(llm, "vllm:num_preemptions") > 0
        with engine(tiny, **options) as llm:
            for _ in range(2):
                assert [generate(llm, [p], NEW)[0] for p in prompts] == expected
            assert metric(llm, "vllm:prefix_cache_hits") > 500
            longer = [p + tokens for p, tokens in zip(prompts, expected, strict=True)]
            again = generate(llm, longer, NEW)
    with engine(tiny, max_num_batched_tokens=2048, max_num_seqs=8) as llm:
        assert again == [generate(llm, [p], NEW)[0] for p in longer]


def test_a_poisoned_pool_changes_nothing(tiny, prompts, expected):
    """Every page that no running request holds is NaN before every step."""
    with engine(tiny, max_num_batched_tokens=48, max_num_seqs=6) as llm:
        core, pool, answers = llm.llm_engine, block_pool(llm), {}
        for i, prompt in enumerate(prompts):
            params = SamplingParams(max_tokens=NEW, **GREEDY)
            core.add_request(str(i), TokensPrompt(prompt_token_ids=prompt), params)
        while core.has_unfinished_requests():
            free = [b.block_id for b in pool.blocks if b.ref_cnt == 0 or b.is_null]
            for layer_pages in pages(llm):
                layer_pages[free] = -1
            for output in core.step():
                if output.finished:
                    answers[int(output.request_id)] = list(output.outputs[0].token_ids)
        assert [answers[i] for i in range(len(prompts))] == expected


@torch.no_grad()
def test_tokens_are_those_of_transformers(tiny, prompts, expected):
    model = LolaLlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    for prompt, tokens in zip(prompts, expected, strict=True):
        answer = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
        assert answer[0, len(prompt) :].tolist() == tokens


@pytest.mark.slow
def test_a_compiled_model_does_the_same(tiny, prompts, expected):
    with engine(tiny, max_num_seqs=6, max_num_batched_tokens=48, enforce_eager=False) as llm:
        assert generate(llm, prompts, NEW) == expected


def test_a_request_may_be_longer_than_the_base(tiny, caplog):
    with caplog.at_level("INFO", logger="vllm.lola"), engine(tiny, max_model_len=None) as llm:
        assert llm.llm_engine.model_config.max_model_len == ENDLESS_LENGTH
    assert "contexts without end: from 64 tokens on, they shift by 16" in caplog.text
    with engine(tiny, max_model_len=200_000, max_num_seqs=2) as llm:
        assert llm.llm_engine.model_config.max_model_len == 200_000


@pytest.mark.parametrize(
    ("overrides", "length", "words"),
    [
        ({}, 2**31, "--max-model-len = 2147483648 cannot be used.*at most 2147483647"),
        ({"context_shift": 0}, 128, r"max_model_len \(128\) is greater .*=64"),
        ({"context_shift": 24}, 128, "context_shift = 24: must divide max_position_embeddings"),
        ({"context_shift": 64}, 128, "context_shift = 64: .*and be less; use 16"),
        ({"sink_size": 49}, 128, "sink_size = 49: .*use at most 48 sinks"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tiny, overrides, length, words):
    with (
        pytest.raises(Exception, match=words),
        engine(tiny, max_model_len=length, hf_overrides={"lola_config": overrides}),
    ):
        pass
