"""Which of many documents a question reads, and where.

The tokens of the question attend to the pairs of all documents, each document as if it stood just
before the question. What draws every question, such as the strangest token, draws it in every
document. So what counts is the **excess**: by how much the logit of a pair is above the largest one
of a document, as a mean over all documents. Cubes of excesses are summed, so a few query heads that
find what a token asks for outweigh many that read anything. The tokens have to find it in one
place: a score is that of the best `PLACE_TOKENS` neighbours of a document (`docs/library.md`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lola_vllm.core.ops.int8 import Int8Rows
from lola_vllm.memory.documents.keys import DocumentKeys

BLOCK_TOKENS = 16
PLACE_TOKENS = 2 * BLOCK_TOKENS  # two neighbouring blocks
POWER = 3  # of an excess
VECTOR = 16  # numbers
PEAKS = 3  # of a document that are told
# More documents than these are looked at in a few heads first: those that have most in some
# documents of all.
CANDIDATES = 32
SAMPLE = 8
LEADING = 2
FEWEST_ASKED = 4  # tokens of a question, of which half are more than one
FOUND = 3  # documents whose passages stand before a question


@dataclass(frozen=True)
class Choice:
    """A document that a question reads.

    Attributes:
        document: its index. score: of its best place, 0 or more. share: of the scores of all
            documents that were chosen. peaks: its tokens that are read most, each of another
            place, the first the most. own: the
            share of its score that is left where only what is above the logits of newer documents
            counts; 1 where none is newer.
    """

    document: int
    score: float
    share: float
    peaks: tuple[int, ...]
    own: float = 1.0


def look(
    queries: Sequence[Tensor], keys: DocumentKeys, heads: Sequence[int] | None = None
) -> Tensor:
    """The largest logit `[N, n]` that each of n queries (`flat`) gives to a pair of a document, in
    each of N reading heads.

    Args:
        heads: those that are looked at; None: all.
    """
    heads = range(len(queries)) if heads is None else heads
    return torch.stack(
        [(keys.keys[head].to(queries[head].dtype) @ queries[head].mT).amax(0) for head in heads]
    )


def flat(q: Tensor) -> Tensor:
    """Queries `[T, G, d]` of a head, one behind the other and scaled as logits are: `[n, d]`.

    n is T G and as many queries of zeros, which find nothing, as make it a multiple of 16: a
    product with whole vectors takes three quarters of the time.
    """
    rows = q.flatten(0, 1) * q.shape[-1] ** -0.5
    return torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % VECTOR))


def choose(
    queries: Sequence[Tensor],
    documents: Iterable[DocumentKeys],
    top: int = FOUND,
    newest: int = 0,
) -> list[Choice]:
    """The documents that a question reads most, the most first. Equal ones in their order.

    Args:
        queries: of the question, `[T, G, d]` in each reading head.
        documents: where there are many, the best of them are gone through once more.
        top: how many. newest: so many, at the end and in this order, are newer than the others.

    Raises:
        ValueError: no document.
    """
    documents = documents if isinstance(documents, Sequence) else list(documents)
    if not documents:
        raise ValueError("no documents to choose from; add some")
    asked = queries[0].shape[:2]
    queries, count = [flat(q) for q in queries], asked.numel()
    indices: Sequence[int] = range(len(documents))
    usual: Tensor | None = None
    if len(indices) > max(CANDIDATES, top):
        indices, usual = _candidates(queries, documents, max(CANDIDATES, top))
    few = [documents[index] for index in indices]
    blocks = [_by_block(queries, keys) for keys in few]
    largest = torch.stack([found.amax(1) for found in blocks])
    if usual is None:
        usual = largest.mean(0) if len(few) > 1 else _own(blocks[0])
    # No place of a document has more than the best pairs of each query, wherever they are.
    bounds = _cubes(largest - usual).mean(1).sum(1) / count
    found: list[tuple[float, int]] = []
    for index in bounds.argsort(descending=True, stable=True).tolist():
        if len(found) >= top and float(bounds[index]) < found[top - 1][0]:
            break
        found.append((_score(blocks[index], usual, asked) / count, index))
        found.sort(key=lambda scored: (-scored[0], scored[1]))
    del found[top:]
    total = sum(score for score, _ in found)
    newer = {i: look(queries, documents[i]) for i in range(len(documents) - newest, len(documents))}

    def own(score: float, index: int) -> float:
        others = [found for i, found in newer.items() if i > indices[index]]
        if not others or not score:
            return 1.0
        above = torch.stack([usual, *others]).amax(0)
        return _score(blocks[index], above, asked) / count / score

    return [
        Choice(
            indices[index],
            score,
            score / total if total else 1 / len(found),
            _peaks(queries, usual, few[index], blocks[index], asked),
            own(score, index),
        )
        for score, index in found
    ]


def _candidates(
    queries: Sequence[Tensor], documents: Sequence[DocumentKeys], count: int
) -> tuple[Sequence[int], Tensor]:
    """The documents that have most in the heads in which this question finds most, in order, and
    what is usual `[N, T, G]`: in these heads of all documents, in the others of the sample.

    The candidates do not say what is usual: they are those that have the question's words.
    """
    every = -(-len(documents) // SAMPLE)
    sample = torch.stack([look(queries, documents[i]) for i in range(0, len(documents), every)])
    by_head = _cubes(sample - sample.mean(0)).mean((0, 2))
    heads = by_head.topk(min(LEADING, len(by_head))).indices.tolist()
    largest = torch.stack([look(queries, keys, heads) for keys in documents])
    usual = sample.mean(0)
    usual[heads] = largest.mean(0)
    bounds = _cubes(largest - usual[heads]).mean((1, 2))
    return sorted(bounds.argsort(descending=True, stable=True)[:count].tolist()), usual


def _cubes(excess: Tensor) -> Tensor:
    return excess.clamp_(min=0).pow_(POWER)


def _by_block(queries: Sequence[Tensor], keys: DocumentKeys) -> Tensor:
    """The largest logit of each block of a document, `[N, blocks, n]`; minus infinity where a head
    has no pair. There are two blocks or more."""
    blocks, n = max(2, -(-keys.num_tokens // BLOCK_TOKENS)), len(queries[0])
    logits = queries[0].new_empty(blocks * BLOCK_TOKENS, n)
    found = queries[0].new_empty(len(queries), blocks, n)
    for head, q in enumerate(queries):
        at, own = keys.positions[head], keys.keys[head].to(q.dtype)
        first, end = (int(at[0]), int(at[-1]) + 1) if len(at) else (0, 0)
        if end - first == len(at):  # of a text without gaps, products lie where they belong
            logits[:first] = logits[end:] = -torch.inf
            torch.mm(own, q.mT, out=logits[first:end])
        else:
            logits.fill_(-torch.inf).index_copy_(0, at, own @ q.mT)
        torch.amax(logits.unflatten(0, (blocks, BLOCK_TOKENS)), 1, out=found[head])
    return found


def _own(blocks: Tensor) -> Tensor:
    """What is usual `[N, n]` where there is nothing else to compare a document with: the largest
    logit of its blocks, as a mean over them."""
    return blocks.where(blocks.isfinite(), torch.nan).nanmean(1)


def _score(blocks: Tensor, usual: Tensor, asked: Sequence[int]) -> float:
    """The score of the best place of a document, as a mean over heads and a sum over queries."""
    pairs = torch.maximum(blocks[:, 1:], blocks[:, :-1])
    excess = _of_few(pairs.sub_(usual.unsqueeze(1)), asked)
    return float(_cubes(excess).sum((0, 2)).amax()) / len(blocks)


def _of_few(excess: Tensor, asked: Sequence[int]) -> Tensor:
    """Excesses `[..., n]` above what half of a question's tokens have in the same place, of a query
    head: that is no answer to any of them. Beginnings of documents have most of it.

    Args:
        asked: T tokens and G query heads, the first T G queries of n.
    """
    tokens, heads = asked
    if tokens < FEWEST_ASKED:
        return excess
    own = excess[..., : tokens * heads].clamp(min=0).unflatten(-1, (tokens, heads))
    return (own - own.median(-2, keepdim=True).values).flatten(-2)


def _peaks(
    queries: Sequence[Tensor],
    usual: Tensor,
    keys: DocumentKeys,
    blocks: Tensor,
    asked: Sequence[int],
) -> tuple[int, ...]:
    """The tokens of a document that a question reads more than it usually reads anything; where
    there are none, more than it reads the rest of the document.

    Args:
        queries: `flat`. usual: `[N, n]`, the largest logit of a document, as a mean over documents.
        blocks: `_by_block`. asked: tokens and query heads of the question.
    """
    weights = _excesses(queries, usual, keys, blocks, asked)
    if not bool((weights > 0).any()):
        weights = _excesses(queries, _own(blocks), keys, blocks, asked)
    found: list[tuple[float, int]] = []
    while len(found) < PEAKS and bool((weights > 0).any()):
        peak = int(weights.argmax())
        near = weights[max(0, peak - PLACE_TOKENS) : peak + PLACE_TOKENS + 1]
        found.append((float(near.sum()), peak))
        near.zero_()
    return tuple(peak for _, peak in sorted(found, key=lambda one: -one[0]))


def _excesses(
    queries: Sequence[Tensor],
    usual: Tensor,
    keys: DocumentKeys,
    blocks: Tensor,
    asked: Sequence[int],
) -> Tensor:
    """Cubes of excesses at each token of a document, `[num_tokens]`, summed over queries."""
    found = torch.zeros(keys.num_tokens, dtype=queries[0].dtype)
    for head, q in enumerate(queries):
        positions = keys.positions[head]
        exceeds = (blocks[head] > usual[head]).any(1)  # few blocks do
        rows = exceeds[positions // BLOCK_TOKENS].nonzero().squeeze(1)
        few = Int8Rows(*(x.index_select(0, rows) for x in keys.keys[head]))
        excess = _cubes(_of_few((few.to(q.dtype) @ q.mT).sub_(usual[head]), asked)).sum(1)
        found.index_add_(0, positions.index_select(0, rows), excess)
    return found
