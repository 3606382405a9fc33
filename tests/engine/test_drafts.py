"""Speculative decoding: drafts change no token and no stored state, whatever is rejected."""

import numpy as np
import pytest
from vllm import SamplingParams, TokensPrompt

from lola_vllm.memory.sessions.file import read_state
from tests.support.drafts import DRAFTS, NGRAM, PLANNED, Planned
from tests.support.engine import GREEDY, engine, generate, metric, state_manager
from tools.support.tiny import make_tiny, random_prompts

LOLA = {"window_size": 16, "sparse_cache_size": 12, "sink_size": 2, "update_interval": 8}
SHIFTS = {**LOLA, "context_shift": 16}
BASE = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
# Blocks of 20 end where no update is.
CACHED = {"max_num_seqs": 4, "enable_prefix_caching": True, "block_size": 20}
NEW = 90
PROMPTS = [[*p, *p] for p in random_prompts([8, 9, 12, 20, 31], seed=3)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model, another whose contexts shift, and what both answer."""
    made = {}
    for name, lola, length in (("plain", LOLA, 4096), ("shifts", SHIFTS, 64)):
        path = make_tiny(
            tmp_path_factory.mktemp(name) / "tiny", lola, max_position_embeddings=length
        )
        with engine(path, **BASE) as llm:
            made[name] = path, generate(llm, PROMPTS, NEW)
    return made


def plan(prompts, answers):
    """The drafts to come."""
    Planned.texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    Planned.sizes = []


def counts(llm):
    """Drafts that were checked, and those that were accepted, in this process."""
    names = ("draft_tokens", "accepted_tokens")
    return np.array([metric(llm, f"vllm:spec_decode_num_{name}") for name in names])


@pytest.mark.parametrize(
    ("name", "drafts", "options"),
    [
        ("plain", NGRAM, {}),
        ("plain", PLANNED, CACHED),
        ("shifts", PLANNED, CACHED),
        ("shifts", PLANNED, {"enforce_eager": False}),
    ],
    ids=["ngram", "prefix-caching", "shifts-prefix-caching", "shifts-compiled"],
)
def test_drafts_change_no_token(models, name, drafts, options):
    """Alone and in a batch, across updates, blocks and context shifts."""
    path, answers = models[name]
    plan(PROMPTS, answers)
    with engine(path, **BASE | options, speculative_config=drafts) as llm:
        before = counts(llm)
        assert state_manager(llm).spec.num_speculative_blocks == 0
        for _ in range(2):  # from a prefix, the second time
            assert generate(llm, PROMPTS, NEW) == answers
        assert generate(llm, PROMPTS[-1:], NEW) == answers[-1:]
        drafted, accepted = counts(llm) - before
        assert 0 < accepted < drafted
        if drafts is PLANNED:
            assert 0 in Planned.sizes and accepted > 200
            assert drafted < sum(Planned.sizes)  # some were cut


def test_drafts_that_are_never_right_become_rare(models, monkeypatch):
    """Of an answer of 90 tokens at most nine steps have drafts, and all but the first have one."""
    path, answers = models["plain"]
    plan(PROMPTS, answers)
    monkeypatch.setattr(Planned, "wrong", True)
    with engine(path, **BASE, speculative_config=PLANNED) as llm:
        for prompt, answer in zip(PROMPTS[:2], answers, strict=False):
            before = counts(llm)
            assert generate(llm, [prompt], NEW) == [answer]
            drafted, accepted = counts(llm) - before
            assert 5 <= drafted <= DRAFTS + 8 and accepted == 0


def ask(llm, prompt, **params):
    """Tokens of one prompt, and what is told of the store."""
    (output,) = llm.generate(
        [TokensPrompt(prompt_token_ids=prompt)],
        SamplingParams(max_tokens=NEW, **GREEDY | params),
        use_tqdm=False,
    )
    told = output.kv_transfer_params["lola"]
    return list(output.outputs[0].token_ids), told["tokens"], told["restored_tokens"]


def stored(directory):
    """The stored states by what they are of."""
    states = map(read_state, directory.rglob("*.safetensors"))
    return {(state.header.kind, *state.tokens.tolist()): state.data for state in states}


def test_stored_states_are_those_without_drafts(models, tmp_path):
    """Of answers that end by length or by a token among accepted drafts, and of what goes on."""
    path, answers = models["plain"]
    plan(PROMPTS, answers)
    stops = [next(t for t in answer[50:] if t not in answer[:50]) for answer in answers]
    found = []
    for name, drafts in (("none", {}), ("drafts", {"speculative_config": PLANNED})):
        lola = {"state_ram": "64MiB", "store": "all", "state_dir": str(tmp_path / name)}
        with engine(path, **BASE | CACHED, **drafts, additional_config={"lola": lola}) as llm:
            told, before = [], counts(llm)
            for prompt, answer, stop in zip(PROMPTS, answers, stops, strict=True):
                told.append(ask(llm, prompt, stop_token_ids=[stop]))
                assert told[-1][0] == answer[: answer.index(stop) + 1]
                # The whole answer, whose prompt is restored but for its last token at most.
                told.append(ask(llm, prompt))
                assert told[-1] == (answer, len(prompt) + NEW - 1, told[-1][2])
            drafted, accepted = counts(llm) - before
            assert not drafts or 0 < accepted < drafted
        found.append((told, stored(tmp_path / name)))
    (told, states), (told_drafts, states_drafts) = found
    assert told_drafts == told
    assert states.keys() == states_drafts.keys() and len(states) == 2 * len(PROMPTS)
    for of, state in states.items():
        assert np.array_equal(states_drafts[of], state), of[0]
