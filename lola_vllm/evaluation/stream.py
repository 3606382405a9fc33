"""How well one model predicts a long text, block by block, when nothing is forgotten on purpose.

A LoLA model reads the whole stream with one state. A softmax model, whose positions end, sees some
thousand tokens before each block and is started anew for it. So its curve says how hard the text
is at each place, and the ratio of the two what the length of the stream adds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.held_out import read_held_out
from lola_vllm.evaluation.models import Tokenizer, prefix_of
from lola_vllm.evaluation.perplexity import reading
from lola_vllm.evaluation.plan import Plan
from lola_vllm.evaluation.results import RESAMPLES, Record, Row, Triple, column, markdown, paired

if TYPE_CHECKING:
    from lola_vllm.evaluation.reader import Reader

LEAST_BLOCKS = 2  # one block has no curve
COLUMNS = 8  # of a table, at most
QUARTER = 4
LEAST_RESAMPLED = 4  # blocks; an interval from fewer would say little


@dataclass(frozen=True)
class StreamPlan(Plan):
    """The streams that every setting reads.

    Attributes:
        texts: as `read_held_out` takes them. length: tokens of a stream, at most.
        every: one block of so many is measured. block: tokens of a block.
        context: tokens before each block that a softmax model sees.
    """

    name: ClassVar[str] = "stream"
    read_in_pieces: ClassVar[bool] = True

    texts: str
    length: int
    every: int = 1
    block: int = 2048
    context: int = 4096

    @property
    def max_length(self) -> int:
        return self.length + 1  # with a prefix

    @property
    def softmax_length(self) -> int:
        return self.context + self.block + 1  # with a prefix

    @property
    def _stride(self) -> int:
        """Tokens from one measured block to the next."""
        return self.block * self.every

    def check(self) -> None:
        least = LEAST_BLOCKS * self._stride
        if self.length < least:
            raise EvalError(f"--stream {self.length}: must be at least {least}")

    def run(self, model: Reader, done: Collection[tuple[Any, ...]] = ()) -> Iterator[list[Row]]:
        """Let `model` read all streams; see `Plan`. A state sees what is done all the same."""
        prefix = prefix_of(model.tokenizer)
        streams = self.streams(model.tokenizer)
        if not streams:
            raise EvalError(
                f"--stream {self.length}: no kind of text at --texts {self.texts} has the "
                f"{LEAST_BLOCKS * self._stride} held-out tokens of {LEAST_BLOCKS} measured blocks; "
                "give more text"
            )
        for kind, ids in streams.items():
            blocks = range(self.every - 1, len(ids) // self.block, self.every)
            wanted = [index for index in blocks if (kind, index) not in done]
            if not wanted:
                continue
            read = model.read_blocks(prefix, ids, self.block, self.context, wanted)
            for index, values in read:
                stop = (index + 1) * self.block
                of_block = ids[stop - self.block : stop]
                row = reading(kind, index, of_block, values, model.tokenizer)
                yield [row | {"stop": stop}]

    def streams(self, tokenizer: Tokenizer) -> dict[str, list[int]]:
        """Tokens by kind: its held-out documents one after the other, an empty line between them.

        A stream ends with a measured block. Kinds with less than `LEAST_BLOCKS` of them are left
        out.
        """
        found = {}
        for kind, documents in read_held_out(Path(self.texts)).items():
            ids: list[int] = []
            for document in documents:
                if len(ids) >= self.length:
                    break
                ids += tokenizer.encode(document + "\n\n", special=False)
            blocks = min(len(ids), self.length) // self._stride
            if blocks >= LEAST_BLOCKS:
                found[kind] = ids[: blocks * self._stride]
        return found

    def numbers(self, record: Record, reference: Record | None) -> Row:
        return {"streams": curves(record, reference)}

    def table(self, records: Sequence[Record], reference: Record | None) -> str:
        """A table of each kind of text: settings by tokens of the stream, and the trend."""
        found = [curves(record, reference) for record in records]
        blocks = []
        for kind in dict.fromkeys(kind for by_kind in found for kind in by_kind):
            lines = [(r, c[kind]) for r, c in zip(records, found, strict=True) if kind in c]
            longest = max((curve["points"] for _, curve in lines), key=len)
            size = -(-len(longest) // COLUMNS)
            stops = [point["stop"] for point in _joined(longest, size)]
            rows = [["setting", *(f"{stop:,}" for stop in stops), "last quarter / first"]]
            for record, curve in lines:
                shown = [_show(point) for point in _joined(curve["points"], size)]
                shown += [""] * (len(stops) - len(shown))
                rows.append([record.setting.name, *shown, _show_change(curve["change"])])
            blocks.append(f"### {kind}\n\n{markdown(rows)}")
        note = (
            "Perplexity by tokens of the stream up to the column's end"
            + ("" if reference is None else ", and times the reference's on the same tokens")
            + f", blocks of {self.block:,}"
            + (f", one of {self.every} measured" if self.every > 1 else "")
            + ". The last column is of "
            + ("perplexity" if reference is None else "that ratio, where there is one")
            + f". A softmax model sees the {self.context:,} tokens before each block, read again "
            "for it; a LoLA model has one state from the first token on."
        )
        return "\n\n".join([*blocks, note])


# --- curves along a stream


def curves(record: Record, reference: Record | None) -> dict[str, Row]:
    """What a setting makes of each kind's stream. One without its second block has no curve yet.

    Returns:
        change: of `_change`. points: a block each, with stop: tokens of the stream up to its end.
        tokens: that were predicted. perplexity: per token. ratio: over the reference's on the same
        tokens; None without one.

    Raises:
        EvalError: as `paired`.
    """
    pairs = paired(record, reference, StreamPlan.keys)
    found: dict[str, Row] = {}
    for kind in dict.fromkeys(row["kind"] for row, _ in pairs):
        of_kind = sorted((p for p in pairs if p[0]["kind"] == kind), key=lambda p: p[0]["index"])
        rows, others = [row for row, _ in of_kind], [other for _, other in of_kind if other]
        if len(rows) < LEAST_BLOCKS:
            continue
        levels = column(rows, "nats") - (column(others, "nats") if others else 0)
        levels /= column(rows, "tokens")
        points = [
            {
                "stop": row["stop"],
                "tokens": row["tokens"],
                "perplexity": math.exp(row["nats"] / row["tokens"]),
                "ratio": math.exp(level) if others else None,
            }
            for row, level in zip(rows, levels.tolist(), strict=True)
        ]
        found[kind] = {"change": _change(levels), "points": points}
    return found


def _change(levels: NDArray[np.float64]) -> Triple | tuple[float, None, None]:
    """The last quarter's geometric mean over the first quarter's, of the ratio or of perplexity.

    Its 95 % interval is a bootstrap over blocks; None where a quarter has few of them.
    """
    quarter = max(1, len(levels) // QUARTER)
    first, last = levels[:quarter], levels[-quarter:]
    change = math.exp(last.mean() - first.mean())
    if quarter < LEAST_RESAMPLED:
        return change, None, None
    rng = np.random.default_rng(0)
    ends = [
        part[rng.integers(0, quarter, size=(RESAMPLES, quarter))].mean(axis=1)
        for part in (last, first)
    ]
    low, high = np.exp(np.percentile(ends[0] - ends[1], [2.5, 97.5])).tolist()
    return change, low, high


def _joined(points: list[Row], size: int) -> Iterator[Row]:
    """The curve in points of `size` neighbouring blocks."""
    for at in range(0, len(points), size):
        part = points[at : at + size]
        means = {key: _mean(part, key) for key in ("perplexity", "ratio")}
        yield {"stop": part[-1]["stop"], **means}


def _mean(points: list[Row], key: str) -> float | None:
    """Geometric mean over tokens."""
    if points[0][key] is None:
        return None
    return math.exp(np.average(np.log(column(points, key)), weights=column(points, "tokens")))


def _show(point: Row) -> str:
    text = f"{point['perplexity']:,.1f}"
    return text if point["ratio"] is None else f"{text}, {point['ratio']:,.3f}x"


def _show_change(change: Triple | tuple[float, None, None]) -> str:
    value, low, high = change
    return f"{value:.3f}x" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")
