"""Which segment of a text's own past comes back for a question.

A segment that comes back stands next to the question, and what stands there wins where two texts
answer it. What is newer should: it may have another word on what an old segment tells. So the
segment that is read most is compared with what is newest of the text, the last segment and what
follows it (`docs/library.md`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

TOP = 4  # documents that are looked for
# A segment comes back where so much of its score is its own: else the text has the same anew.
OWN = 0.4
# None does where what is newest has so many times its score.
OUTDOES = 2.0


class FoundSegment(NamedTuple):
    """A document of a text that a question reads, as `choose.Choice` has it.

    Attributes:
        document: a segment's number, or one past the last: what follows it.
    """

    document: int
    score: float
    own: float


def newest(rest: bool) -> int:
    """How many documents at the end of a text are newer than the others: the last segment, and the
    `rest` that follows it."""
    return 2 if rest else 1


def comes_back(found: Sequence[FoundSegment], segments: int) -> int | None:
    """The index in what was found of the segment that comes back; None: none does.

    Args:
        found: the most read first, one a segment or more. segments: how many there are.
    """
    index = next(i for i, one in enumerate(found) if one.document < segments)
    segment, score, own = found[index]
    newer = [x.score for x in found if x.document > segment and x.document >= segments - 1]
    outdone = max(newer, default=0.0) >= OUTDOES * score
    return None if outdone or own < OWN else index
