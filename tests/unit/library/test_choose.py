"""Keys that are kept apart, and the documents and places that a question reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lola_vllm.hf import LolaCache
from lola_vllm.hf.question import queries_of
from lola_vllm.library.choose import HEAD_TOKENS, choose, look, places
from lola_vllm.library.keys import DocumentKeys, KeysError, reading_heads, total_bytes
from lola_vllm.ops.int8 import quantize
from tools.support.tiny import make_tiny, random_prompts

LOLA = {
    "window_size": 16, "sparse_cache_size": [[90, 9], [80, 100]], "sink_size": 2,
    "update_interval": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = make_tiny(tmp_path_factory.mktemp("tiny"), LOLA, max_position_embeddings=256)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def read(model: Any, ids: list[int]) -> LolaCache:
    cache = LolaCache(model.config)
    model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
    return cache


def keys_of(model: Any, cache: LolaCache) -> DocumentKeys:
    n = cache.get_seq_length()
    return DocumentKeys.of_state(cache.sequence, cache.rows()[0], n, model.model.rope_table())


def test_heads_that_hold_many_pairs_are_kept(model: Any) -> None:
    cache = read(model, random_prompts([100])[0])
    heads = [(head.layer, head.kv_head) for head in reading_heads(cache.sequence)]
    assert heads == [(0, 0), (1, 0), (1, 1)]
    keys = keys_of(model, cache)
    # 90 pairs are full, and of 80 and 100 there are as many as have left the window.
    evicted = 100 // 8 * 8 - 16 - 2
    assert [len(x) for x in keys.positions] == [min(n, evicted) + 20 for n in (90, 80, 100)]
    assert keys.nbytes == sum(len(x) for x in keys.positions) * (16 + 8)
    assert total_bytes([keys, keys]) == 2 * keys.nbytes


def test_logits_are_those_of_the_model(model: Any) -> None:
    """Queries and keys meet as they do when the question is read after the document."""
    document, question = random_prompts([75, 6], seed=3)
    cache = read(model, document)
    seen: list[Tensor] = []
    cache.layers[1].query_hook = seen.append
    queries = queries_of(model, cache, question)
    assert not seen and cache.get_seq_length() == 75  # a copy of it has read the question
    keys = keys_of(model, cache)
    with torch.no_grad():
        model(input_ids=torch.tensor([question]), past_key_values=cache, use_cache=True)
    q = seen[0][0, :, 2:4]  # of KV head 1
    layer = read(model, document).layers[1]
    page = layer.layout.pages[1]
    views = page.views(layer.layout.split(layer.pages)[1])
    m = int(page.num_sparse(torch.tensor(75)))
    window = torch.arange(int(page.window_start(torch.tensor(75))), 75)
    k = torch.cat([views.sparse_k[1, 0, :m], views.exact_k[1, 0, page.row(window)]])
    where = torch.cat([views.positions[1, 0, :m].long(), window])
    expected = (q @ k.mT / 4).masked_fill(where < HEAD_TOKENS, -torch.inf)
    found = look(queries, keys)
    # A byte a number: keys are rounded to 1/127 of their largest.
    torch.testing.assert_close(found.lse[2], expected.logsumexp(-1), rtol=0, atol=0.05)
    torch.testing.assert_close(found.largest[2], expected.amax(-1), rtol=0, atol=0.05)


def test_keys_are_written_and_read(model: Any, tmp_path: Path) -> None:
    keys = keys_of(model, read(model, random_prompts([100])[0]))
    file = tmp_path / "keys"
    assert keys.write(file) == file.stat().st_size
    assert file.stat().st_mode & 0o077 == 0
    found = DocumentKeys.read(file)
    assert found.num_tokens == 100
    for one, other in zip(keys.keys, found.keys, strict=True):
        assert torch.equal(one.numbers, other.numbers) and torch.equal(one.scale, other.scale)
    assert all(map(torch.equal, keys.positions, found.positions))
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(KeysError, match="keys: not the keys of a document"):
        DocumentKeys.read(file)
    with pytest.raises(KeysError, match="gone"):
        DocumentKeys.read(tmp_path / "gone")


def test_what_cannot_be_chosen_from_is_refused(model: Any) -> None:
    long = read(model, random_prompts([260])[0])
    with pytest.raises(KeysError, match="260 tokens: at most 256"):
        keys_of(model, long)
    near = read(model, random_prompts([250])[0])
    with pytest.raises(ValueError, match="250 tokens and a question of 7"):
        queries_of(model, near, list(range(7)))
    with pytest.raises(ValueError, match="no tokens"):
        queries_of(model, near, [])
    with pytest.raises(ValueError, match="no documents"):
        choose([torch.zeros(1, 1, 4)], [torch.zeros(1, 1, 4)], [])
    keys = made({})
    with pytest.raises(ValueError, match="score = 'best'"):
        choose([torch.zeros(1, 1, 4)], [torch.zeros(1, 1, 4)], [keys], score="best")  # type: ignore[arg-type]


# ---- documents that are made by hand: one head, keys of four numbers

WHAT, DRAWS = torch.tensor([9.0, 0, 0, 0]), torch.tensor([0, 9.0, 0, 0])


def made(at: dict[int, Tensor], tokens: int = 300) -> DocumentKeys:
    """A document with a key at every position: small ones but for those that are named."""
    gen = torch.Generator().manual_seed(tokens)
    keys = 0.1 * torch.randn(tokens, 4, generator=gen)
    for position, key in at.items():
        keys[position] = key
    return DocumentKeys(tokens, (quantize(keys),), (torch.arange(tokens),))


def test_the_document_that_a_question_reads_is_first_and_its_place_is_told() -> None:
    question = [torch.stack([WHAT, DRAWS / 3])[:, None] / 2]  # [2 tokens, 1 head, 4]
    neutral = [torch.stack([DRAWS, DRAWS])[:, None] / 2]
    documents = [
        made({}, 300),
        made({200: 1.2 * DRAWS, 205: 1.2 * DRAWS, 210: 1.2 * DRAWS}, 301),  # draws any question
        made({120: WHAT, 260: 0.8 * WHAT, 10: 3 * WHAT}, 302),
        made({3: 3 * WHAT}, 303),  # among the first tokens, which do not count
    ]
    best = choose(question, neutral, documents, top=2)
    assert best[0].document == 2
    assert best[0].places[0].first <= 120 < best[0].places[0].last
    assert sum(place.share for place in best[0].places) <= 1 + 1e-5
    assert best[0].score > best[1].score
    shares = choose(question, neutral, documents, top=4, score="share")
    assert shares[0].document == 2
    assert sum(choice.share for choice in shares) == pytest.approx(1)


def test_what_draws_every_question_does_not_count() -> None:
    question = [torch.stack([WHAT / 2, DRAWS])[:, None]]
    neutral = [torch.stack([DRAWS, DRAWS])[:, None]]
    documents = [made({200: 2 * DRAWS, 100: WHAT / 3}), made({100: WHAT / 2})]
    assert choose(question, neutral, documents, top=1, score="share")[0].document == 0
    assert choose(question, neutral, documents, top=1)[0].document == 1


def test_places_do_not_overlap_and_end_with_the_document() -> None:
    question, neutral = [(WHAT / 2)[None, None]], [(DRAWS / 2)[None, None]]
    document = made({60: WHAT, 80: WHAT, 100: WHAT, 299: WHAT})
    found = sorted(places(question, neutral, document))
    assert [(place.first, place.last) for place in found] == [(28, 93), (93, 133), (267, 300)]
