"""A text that is read on and on, and the segments of it that come back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lola_vllm.engine.hf import LolaCache, LolaModelError
from lola_vllm.engine.hf import past as past_module
from lola_vllm.engine.hf.past import STATES, Past
from lola_vllm.memory.documents.choose import Choice, flat, look
from lola_vllm.memory.documents.keys import DocumentKeys, queries_in, reading_heads
from lola_vllm.memory.documents.past import OWN
from tests.unit.memory.documents.test_choose import read
from tools.support.tiny import make_tiny, random_prompts

LOLA = {
    "window_size": 16, "sparse_cache_size": [[90, 9], [80, 100]], "sink_size": 2,
    "recent_size": [[60, 0], [60, 60]], "update_interval": 8, "context_shift": 64,
}  # fmt: skip
SEGMENT = 48
TEXT, QUESTION = random_prompts([SEGMENT * 7 + 20, 6], seed=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = make_tiny(tmp_path_factory.mktemp("tiny"), LOLA, max_position_embeddings=256)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def bytes_of(cache: LolaCache) -> Tensor:
    """What is valid of a cache of one row."""
    return cache.sequence.cleaned(cache.rows()[0], cache.get_seq_length())


def finds(
    monkeypatch: pytest.MonkeyPatch, *read: tuple[int, float, float]
) -> list[Sequence[DocumentKeys]]:
    """Every question finds segments of these scores from now on, of which a share is their own;
    what they were found among."""
    seen: list[Sequence[DocumentKeys]] = []

    def choose(
        queries: Any, documents: Sequence[DocumentKeys], top: int, newest: int
    ) -> list[Choice]:
        seen.append(documents)
        assert newest == (2 if len(documents) == 8 else 1)
        return [Choice(segment, score, score, (), own) for segment, score, own in read[:top]]

    monkeypatch.setattr(past_module, "choose", choose)
    return seen


@pytest.mark.parametrize("tokens", [200, 256, 300, 330])
def test_keys_of_the_newest_tokens_meet_a_question_as_in_the_model(model: Any, tokens: int) -> None:
    """Also where contexts have shifted, or are to shift before the question."""
    cache, newest, rope = read(model, TEXT[:tokens]), 40, model.model.rope_table()
    schedule = model.model.schedule
    keys = DocumentKeys.of_state(cache.sequence, cache.rows()[0], tokens, rope, newest, schedule)
    assert keys.num_tokens == newest
    assert all(x.tolist() == list(range(newest)) for x in keys.positions)  # recent pairs have all
    seen: dict[int, Tensor] = {}
    cache.layers[0].query_hook = lambda q: seen.update({0: q[0]})
    cache.layers[1].query_hook = lambda q: seen.update({1: q[0]})
    with torch.no_grad():
        model(input_ids=torch.tensor([QUESTION]), past_key_values=cache, use_cache=True)
    before = int(schedule.rope_position(torch.tensor(tokens)))
    queries = [flat(q) for q in queries_in(cache.sequence, seen, before, rope)]
    found = look(queries, keys)
    heads = reading_heads(cache.sequence)
    assert len(heads) == 3
    # The question's own pairs, and the state's as the question met them.
    after = tokens + len(QUESTION)
    pages = cache.sequence.split(cache.rows())
    for i, head in enumerate(heads):
        page = cache.sequence.layouts[head.page]
        views = page.views(pages[head.page])
        m = int(page.num_sparse(torch.tensor(after)))
        window = torch.arange(int(page.window_start(torch.tensor(after))), tokens)
        where = torch.cat([views.positions[0, 0, :m].long(), window])
        k = torch.cat([views.sparse_k[0, 0, :m], views.exact_k[0, 0, page.row(window)]])
        k = k[(where >= tokens - newest) & (where < tokens)]
        assert len(k) == newest
        q = seen[head.layer][:, 2 * head.kv_head : 2 * head.kv_head + 2]
        expected = (q @ k.mT / 4).amax(-1).flatten()
        torch.testing.assert_close(found[i][: len(expected)], expected, rtol=0, atol=0.05)


def test_a_text_is_the_same_however_it_is_read(model: Any) -> None:
    whole, pieces = Past(model, SEGMENT), Past(model, SEGMENT)
    logits = whole.read(TEXT)
    for first in range(0, len(TEXT), 37):
        last = pieces.read(TEXT[first : first + 37])
    assert whole.tokens == pieces.tokens == TEXT
    torch.testing.assert_close(logits, last)
    assert [keys.num_tokens for keys in pieces.keys] == [SEGMENT] * 7
    for one, other in zip(whole.keys, pieces.keys, strict=True):
        assert all(map(torch.equal, one.positions, other.positions))
        assert all(
            torch.allclose(x.numbers * x.scale[:, None], y.numbers * y.scale[:, None], atol=0.02)
            for x, y in zip(one.keys, other.keys, strict=True)
        )
    assert whole.first is not None and whole.first.get_seq_length() == SEGMENT


def test_a_segment_comes_back_behind_the_present(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    past = Past(model, SEGMENT)
    past.read(TEXT)
    before = bytes_of(past.cache)
    seen = finds(monkeypatch, (7, 4.0, 1.0), (2, 3.0, OWN))
    recalled = past.recall(QUESTION)
    assert [keys.num_tokens for keys in seen[0]] == [SEGMENT] * 7 + [20]
    assert (recalled.first, recalled.last) == (2 * SEGMENT, 3 * SEGMENT)
    apart = read(model, TEXT[2 * SEGMENT : 3 * SEGMENT])
    expected = LolaCache.compose([read(model, TEXT), apart], model)
    assert recalled.cache.get_seq_length() == expected.get_seq_length()
    torch.testing.assert_close(
        logits_behind(model, recalled.cache), logits_behind(model, expected), atol=1e-4, rtol=1e-4
    )
    # It is no part of the text, and what is asked is not either.
    assert torch.equal(bytes_of(past.cache), before) and past.tokens == TEXT


@torch.no_grad()
def logits_behind(model: Any, cache: LolaCache) -> Tensor:
    ids = torch.tensor([QUESTION])
    logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    return logits


@pytest.mark.parametrize(
    "found", [[(2, 4.0, OWN / 2), (7, 3.0, 1.0)], [(7, 4.0, 1.0), (2, 1.0, 1.0)]]
)
def test_the_present_is_asked_alone_where_newer_text_has_what_is_asked(
    model: Any, monkeypatch: pytest.MonkeyPatch, found: list[tuple[int, float, float]]
) -> None:
    past = Past(model, SEGMENT)
    past.read(TEXT)
    finds(monkeypatch, *found)
    best = past.find(QUESTION)
    assert best is not None and best.document == 2
    recalled = past.recall(QUESTION)
    assert recalled.first is recalled.last is recalled.choice is None
    assert torch.equal(bytes_of(recalled.cache), bytes_of(past.cache))


def test_before_a_segment_is_complete_the_present_is_asked_alone(model: Any) -> None:
    past = Past(model, SEGMENT)
    past.read(TEXT[:20])
    assert past.find(QUESTION) is None
    recalled = past.recall(QUESTION)
    assert recalled.first is recalled.last is recalled.choice is None
    assert torch.equal(bytes_of(recalled.cache), bytes_of(past.cache))
    logits_behind(model, recalled.cache)
    assert past.cache.get_seq_length() == 20  # the answer is the caller's


def test_segments_that_came_back_are_kept_for_a_while(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    past = Past(model, SEGMENT)
    past.read(TEXT)
    for segment in [*range(STATES), 0, STATES]:
        finds(monkeypatch, (segment, 1.0, 1.0))
        past.recall(QUESTION)
    assert list(past._apart) == [*range(2, STATES), 0, STATES]


def test_the_length_of_segments(model: Any) -> None:
    assert Past(model).segment_tokens == 128  # half of what the model was trained on
    for wrong in (SEGMENT + 4, 0, 256):
        with pytest.raises(LolaModelError, match=f"segment_tokens = {wrong}: must be a multiple"):
            Past(model, wrong)


def test_there_is_something_to_read_and_to_ask(model: Any) -> None:
    past = Past(model, SEGMENT)
    with pytest.raises(LolaModelError, match="nothing was read yet"):
        past.recall(QUESTION)
    with pytest.raises(LolaModelError, match="no tokens to read"):
        past.read([])
    past.read(TEXT[:SEGMENT])
    with pytest.raises(ValueError, match="the question has no tokens"):
        past.recall([])
