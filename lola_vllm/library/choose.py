"""Which of many documents a question reads, and where.

The tokens of the question attend to the pairs of all documents at once, each document as if it
stood just before the question. Two scores say how much they read of one (`docs/library.md`):

- `share`: the part of their attention that it gets, as a mean over tokens and heads;
- `contrast`: the largest attention that one of its pairs gets, over the one that a neutral question
  gives to any of its pairs, as a logarithm, summed over heads. What draws every question, such as
  the newest or the strangest token, does not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lola_vllm.library.keys import DocumentKeys

# First tokens of a document that no question is meant to read: all documents begin with a few that
# draw attention whatever is asked.
HEAD_TOKENS = 40
NEUTRAL = "\nWhat is mentioned in the provided text? The thing that is mentioned in the text is"
PLACES = 3  # of a document that are told
PLACE_TOKENS = 32  # on both sides of what is read most, that belong to a place

ScoreName = Literal["contrast", "share"]


class Place(NamedTuple):
    """Tokens `first` to `last - 1` of a document, the share of attention that they get of what the
    document gets, and the one of them that gets most."""

    first: int
    last: int
    share: float
    peak: int


@dataclass(frozen=True)
class Choice:
    """A document that a question reads.

    Attributes:
        document: its index. score: as `choose` was told. share: of the attention that all documents
            get. places: that are read most, the first the most.
    """

    document: int
    score: float
    share: float
    places: tuple[Place, ...]


class Look(NamedTuple):
    """What a question's tokens see of a document in each reading head.

    Attributes:
        lse: `[N, T, G]`, logarithms of the sums of exp(logits). largest: `[N, T, G]`, logits.
    """

    lse: Tensor
    largest: Tensor


def look(queries: Sequence[Tensor], keys: DocumentKeys) -> Look:
    """See a document with the queries of a question (`question.queries_of`)."""
    pairs = [_logits(q, keys, head) for head, q in enumerate(queries)]
    return Look(
        torch.stack([logits.logsumexp(-1) for logits in pairs]),
        torch.stack([logits.amax(-1) for logits in pairs]),
    )


def _logits(q: Tensor, keys: DocumentKeys, head: int) -> Tensor:
    """Logits `[T, G, m]` of a question's queries `[T, G, d]` to the keys of a head; minus infinity
    for a document's first tokens, unless it has no others."""
    k = keys.keys[head].to(q.dtype)
    logits = q @ k.mT * q.shape[-1] ** -0.5
    hidden = keys.positions[head] < HEAD_TOKENS
    return logits if bool(hidden.all()) else logits.masked_fill(hidden, -torch.inf)


def choose(
    queries: Sequence[Tensor],
    neutral: Sequence[Tensor],
    documents: Iterable[DocumentKeys],
    top: int = 3,
    score: ScoreName = "contrast",
) -> list[Choice]:
    """The documents that a question reads most, the most first. Equal ones in their order.

    Args:
        queries: of the question. neutral: of a question about nothing (`NEUTRAL`), read after the
            same document. documents: gone through once where it is a sequence, else kept.
        top: how many.

    Raises:
        ValueError: no document, or an unknown score.
    """
    if score not in ("contrast", "share"):
        raise ValueError(f"score = {score!r}: must be 'contrast' or 'share'")
    documents = documents if isinstance(documents, Sequence) else list(documents)
    if not documents:
        raise ValueError("no documents to choose from; add some")
    looks = [(look(queries, keys), look(neutral, keys)) for keys in documents]
    asked, idle = ([pair[i] for pair in looks] for i in range(2))
    total = torch.stack([x.lse for x in asked]).logsumexp(0)
    shares = torch.stack([(x.lse - total).exp().mean() for x in asked])
    scores = shares
    if score == "contrast":
        idle_total = torch.stack([x.lse for x in idle]).logsumexp(0)
        scores = torch.stack(
            [
                (_peaks(x.largest, total) / _peaks(y.largest, idle_total)).log().sum()
                for x, y in zip(asked, idle, strict=True)
            ]
        )
    order = scores.argsort(descending=True, stable=True)[:top].tolist()
    return [
        Choice(i, float(scores[i]), float(shares[i]), places(queries, neutral, documents[i]))
        for i in order
    ]


def _peaks(largest: Tensor, total: Tensor) -> Tensor:
    """The largest attention that a pair gets in each head `[N]`, of the token that gives most, as a
    mean over the query heads."""
    tiny = torch.finfo(largest.dtype).tiny
    return (largest - total).exp().amax(1).mean(-1).clamp(min=tiny)


def places(
    queries: Sequence[Tensor], neutral: Sequence[Tensor], keys: DocumentKeys
) -> tuple[Place, ...]:
    """The places of a document that a question reads more than a neutral one does.

    Attention within the document, summed over heads and tokens, less that of the neutral question.
    """
    weights = torch.zeros(keys.num_tokens, dtype=queries[0].dtype)
    for head, (q, other) in enumerate(zip(queries, neutral, strict=True)):
        more = _logits(q, keys, head).softmax(-1).mean((0, 1))
        more = more - _logits(other, keys, head).softmax(-1).mean((0, 1))
        weights.index_add_(0, keys.positions[head], more.clamp(min=0))
    whole = float(weights.sum())
    found: list[Place] = []
    while whole > 0 and len(found) < PLACES and bool((weights > 0).any()):
        peak = int(weights.argmax())
        # Up to the neighbours: a token belongs to one place.
        ends = [place.last for place in found if place.last <= peak]
        starts = [place.first for place in found if place.first > peak]
        first = max(0, peak - PLACE_TOKENS, *ends)
        last = min(keys.num_tokens, peak + PLACE_TOKENS + 1, *starts)
        found.append(Place(first, last, float(weights[first:last].sum()) / whole, peak))
        weights[first:last] = 0
    return tuple(sorted(found, key=lambda place: -place.share))
