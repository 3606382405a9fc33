"""Which segment of a text comes back."""

from __future__ import annotations

import pytest

from lola_vllm.memory.documents.past import OUTDOES, OWN, FoundSegment, comes_back

LITTLE = OWN / 2


@pytest.mark.parametrize(
    ("found", "index"),
    [
        ([(2, 8.0, OWN), (1, 7.9, 1.0), (5, 1.9, 1.0)], 0),
        ([(2, 8.0, LITTLE), (5, 4.0, 1.0)], None),  # newer text has the same
        ([(5, 8.0, 1.0), (1, 7.0, OWN)], 1),  # it has more, and not the same
        ([(5, 8.0, 1.0), (1, 7.0, LITTLE)], None),
        ([(5, 8.0, 1.0), (1, 8.0 / OUTDOES, 1.0)], None),  # it has most by far
        ([(4, 8.0, 1.0), (1, 8.0 / OUTDOES, 1.0)], 0),  # the last segment does, and comes back
        ([(5, 8.0, 1.0), (4, 7.9, LITTLE), (1, 0.5, 1.0)], None),
        ([(3, 8.0, 1.0), (2, 7.9, LITTLE)], 0),
        ([(0, 0.0, 1.0), (1, 0.0, 1.0)], None),  # nothing has anything
    ],
)
def test_a_segment_comes_back_where_newer_text_has_not_the_same(
    found: list[tuple[int, float, float]], index: int | None
) -> None:
    assert comes_back([FoundSegment(*one) for one in found], 5) == index
