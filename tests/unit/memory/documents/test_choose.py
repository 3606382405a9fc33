"""Keys that are kept apart, and the documents and places that a question reads."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.question import queries_of
from lola_vllm.core.layers import SequenceLayout
from lola_vllm.core.ops.int8 import quantize
from lola_vllm.engine.hf import LolaCache
from lola_vllm.memory.documents.choose import (
    BLOCK_TOKENS,
    CANDIDATES,
    FEWEST_ASKED,
    PLACE_TOKENS,
    POWER,
    SAMPLE,
    choose,
    flat,
    look,
)
from lola_vllm.memory.documents.keys import DocumentKeys, KeysError, reading_heads
from tools.support.tiny import make_tiny, random_prompts

LOLA = {
    "window_size": 16, "sparse_cache_size": [[90, 9], [80, 100]], "sink_size": 2,
    "update_interval": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = make_tiny(tmp_path_factory.mktemp("tiny"), LOLA, max_position_embeddings=256)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def read(model: Any, ids: Sequence[int]) -> LolaCache:
    cache = LolaCache(model.config)
    model(input_ids=torch.tensor([list(ids)]), past_key_values=cache, use_cache=True)
    return cache


def keys_of(model: Any, cache: LolaCache) -> DocumentKeys:
    n = cache.get_seq_length()
    return DocumentKeys.of_state(cache.sequence, cache.rows()[0], n, model.rope_table())


def test_heads_that_hold_many_pairs_are_kept(model):
    cache = read(model, random_prompts([100])[0])
    heads = [(head.layer, head.kv_head) for head in reading_heads(cache.sequence)]
    assert heads == [(0, 0), (1, 0), (1, 1)]
    keys = keys_of(model, cache)
    # 90 pairs are full, and of 80 and 100 there are as many as have left the window.
    evicted = 100 // 8 * 8 - 16 - 2
    assert [len(x) for x in keys.positions] == [min(n, evicted) + 20 for n in (90, 80, 100)]
    assert keys.nbytes == sum(len(x) for x in keys.positions) * (16 + 8)


def test_heads_of_the_last_third_of_the_layers_are_not_looked_at(model):
    layers = read(model, random_prompts([20])[0]).sequence.layers
    of = [reading_heads(SequenceLayout(tuple(layers[i] for i in of))) for of in ([0, 1, 1], [1])]
    assert [[(head.layer, head.kv_head, head.page) for head in heads] for heads in of] == [
        [(0, 0, 0), (1, 0, 2), (1, 1, 3)], [(0, 0, 0), (0, 1, 1)]
    ]  # fmt: skip


def test_logits_are_those_of_the_model(model):
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
    expected = (q @ k.mT / 4).amax(-1).flatten()
    # A byte a number: keys are rounded to 1/127 of their largest.
    found = look([flat(own) for own in queries], keys)[2]
    torch.testing.assert_close(found[: len(expected)], expected, rtol=0, atol=0.05)


def test_keys_are_written_and_read(model, tmp_path):
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
    file.write_bytes(save({"num_tokens": torch.tensor(3), "keys.0": torch.zeros(3, 4)}))
    with pytest.raises(KeysError, match="other tensors"):
        DocumentKeys.read(file)
    with pytest.raises(KeysError, match="gone"):
        DocumentKeys.read(tmp_path / "gone")


def test_what_cannot_be_chosen_from_is_refused(model):
    long = read(model, random_prompts([260])[0])
    with pytest.raises(KeysError, match="260 tokens: at most 256"):
        keys_of(model, long)
    near = read(model, random_prompts([250])[0])
    with pytest.raises(ValueError, match="250 tokens and a question of 7"):
        queries_of(model, near, list(range(7)))
    with pytest.raises(ValueError, match="no tokens"):
        queries_of(model, near, [])
    with pytest.raises(ValueError, match="no documents"):
        choose([torch.zeros(1, 1, 4)], [])


# ---- documents that are made by hand: one head, keys of four numbers

ONE, TWO, DRAWS = 9 * torch.eye(4)[:3]


def made(at: dict[int, Tensor], tokens: int = 300) -> DocumentKeys:
    """A document with a key at every position: small ones but for those that are named."""
    gen = torch.Generator().manual_seed(tokens)
    keys = 0.1 * torch.randn(tokens, 4, generator=gen)
    for position, key in at.items():
        keys[position] = key
    return DocumentKeys(tokens, (quantize(keys),), (torch.arange(tokens),))


def asked(*tokens: Tensor) -> list[Tensor]:
    """The queries of a question: `[tokens, 1 query head, 4]`."""
    return [torch.stack(tokens)[:, None] / 2]


def by_definition(queries: list[Tensor], documents: list[DocumentKeys]) -> list[float]:
    """Scores, pair by pair."""
    (q,) = queries
    logits = [(q @ keys.keys[0].to(torch.float32).mT / 2)[:, 0] for keys in documents]
    usual = torch.stack([x.amax(-1) for x in logits]).mean(0)

    def score(found: Tensor) -> float:
        excess = (found - usual).clamp(min=0)
        if len(excess) >= FEWEST_ASKED:
            excess = (excess - excess.median()).clamp(min=0)
        return float((excess**POWER).mean())

    return [
        max(
            score(x[:, at : at + PLACE_TOKENS].amax(-1))
            for at in range(0, max(1, x.shape[-1] - BLOCK_TOKENS), BLOCK_TOKENS)
        )
        for x in logits
    ]


def test_the_document_that_a_question_reads_is_first_and_its_place_is_told():
    question = asked(ONE, TWO)
    documents = [
        made({}, 300),
        made({200: ONE, 40: TWO}, 301),  # what is asked for, but not in one place
        made({120: ONE, 126: 0.9 * TWO}, 302),
        made({10: TWO}, 303),
    ]
    best = choose(question, documents, top=2)
    assert [choice.document for choice in best] == [2, 1]
    assert best[0].peaks[0] == 120
    assert best[0].score > best[1].score
    assert sum(choice.share for choice in best) == pytest.approx(1)


@pytest.mark.parametrize("many", [0, CANDIDATES])
def test_scores_are_those_of_the_definition(many):
    """Of one head, and of few documents or many. Only those that may be among the first are looked
    at place by place; none is missed."""
    gen = torch.Generator().manual_seed(1)
    documents = [
        made({at: 9 * torch.randn(4, generator=gen) for at in range(3, size, 13)}, size)
        for size in (7, 16, 33, *range(200, 229 + many))
    ]
    queries = asked(*(3 * torch.randn(5, 4, generator=gen)))
    scores = by_definition(queries, documents)
    order = sorted(range(len(documents)), key=lambda i: -scores[i])
    found = choose(queries, iter(documents), top=5)
    assert [choice.document for choice in found] == order[:5]
    assert [choice.score for choice in found] == pytest.approx(
        [scores[i] for i in order[:5]], rel=1e-4
    )


@pytest.mark.parametrize("many", [CANDIDATES - 4, 2 * CANDIDATES])
@pytest.mark.parametrize(
    ("newer", "own"),
    [({}, 1), ({9: 2 * TWO}, 0.5), ({9: ONE, 80: TWO}, 0), ({9: ONE / 2, 80: TWO / 2}, 0.14)],
    ids=["nothing", "one word", "both", "both, less"],
)
def test_what_a_document_has_that_newer_ones_lack(newer, own, many):
    documents = [made({200: ONE, 190: TWO}), *[made({}, 290)] * many, made(newer, 310)]
    best = next(x for x in choose(asked(ONE, TWO), documents, 4, 1) if x.document == 0)
    assert best.own == pytest.approx(own, abs=0.09)
    # Neither without newer ones, nor of the newest itself.
    assert all(choice.own == 1 for choice in choose(asked(ONE, TWO), documents, 4))
    last = [documents[-1], *documents[1:-1], documents[0]]
    newest = choose(asked(ONE, TWO), last, 4, 1)
    assert all(choice.own == 1 for choice in newest if choice.document == len(last) - 1)


def test_of_many_documents_those_that_lead_in_a_few_heads_are_candidates():
    """Four heads, of which the third and the fourth find what is asked for."""
    dull = [made({}, 150)] * (4 * CANDIDATES)
    right = {5: made({50: ONE, 55: TWO}, 150), 90: made({50: 0.8 * ONE, 55: TWO}, 150)}
    documents = [
        DocumentKeys(
            one.num_tokens,
            (*2 * dull[0].keys, *2 * right.get(i, one).keys),
            (*2 * dull[0].positions, *2 * right.get(i, one).positions),
        )
        for i, one in enumerate(dull)
    ]
    seen = list[int]()

    class Counted(list[DocumentKeys]):
        def __getitem__(self, index: Any) -> Any:
            seen.append(index)
            return super().__getitem__(index)

    found = choose(4 * asked(ONE, TWO), Counted(documents), top=2)
    assert [choice.document for choice in found] == [5, 90]
    assert len(seen) <= CANDIDATES + SAMPLE  # of which all heads are looked at


def test_a_document_alone_is_compared_with_itself():
    (only,) = choose(
        asked(ONE, DRAWS), [made({120: ONE, **dict.fromkeys(range(0, 300, 9), DRAWS)})]
    )
    assert (only.document, only.share) == (0, 1) and only.peaks[0] == 120
    (only,) = choose(asked(ONE), [made({}, 5)])
    assert only.document == 0 and only.share == 1
    # So are documents of which none has more than the other.
    pair = choose(asked(ONE), [made({120: ONE})] * 2)
    assert [choice.score for choice in pair] == [0, 0] and sum(choice.share for choice in pair) == 1
    assert [choice.peaks[0] for choice in pair] == [120, 120]


def test_peaks_are_of_places_that_do_not_overlap():
    (only,) = choose(asked(ONE), [made({60: ONE, 80: ONE, 100: ONE, 299: ONE})])
    assert only.peaks == (60, 100, 299)
