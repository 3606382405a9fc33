"""How well one model predicts a long text, block by block, when nothing is forgotten on purpose.

A LoLA model reads the whole stream with one state. A softmax model, whose positions end, sees some
thousand tokens before each block and is started anew for it. So its curve says how hard the text
is at each place, and the ratio of the two what the length of the stream adds.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lola_vllm.core.cli_options import option
from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.models import Emit, Prediction, Tokenizer, prefix_of
from lola_vllm.evaluation.plan import Plan, at_least
from lola_vllm.evaluation.results import RESAMPLES, Record, Row, column, markdown, paired
from lola_vllm.evaluation.settings import read_held_out

if TYPE_CHECKING:
    from lola_vllm.evaluation.reader import Reader

LEAST_BLOCKS = 2  # one block has no curve


class Stream(NamedTuple):
    """A long text.

    Attributes:
        kind: of text. ids: tokens, whole blocks.
        begins: where in `ids` each of its documents begins, ascending.
    """

    kind: str
    ids: list[int]
    begins: list[int]


@dataclass(frozen=True)
class StreamPlan(Plan):
    """The streams that every setting reads; JSON values only."""

    name: ClassVar[str] = "stream"
    command: ClassVar[str | None] = "perplexity --stream"
    read_in_pieces: ClassVar[bool] = True

    texts: str
    stream_length: int = option("tokens of a stream, at most", 131_072, part="stream")
    block: int = option(
        "tokens of a block, which is a point of the curve", 2048, part="stream", type=at_least(8)
    )
    context: int = option(
        "tokens before each block that a softmax model sees; it reads them again for each block",
        4096,
        part="stream",
        type=at_least(1),
    )
    every: int = option(
        "measure one block of so many, the last of them; a state reads the others as well, and a "
        "softmax model leaves them out",
        1,
        part="stream",
        type=at_least(1),
    )

    @property
    def asked(self) -> str:
        """See `Plan`."""
        return f"a stream of each text ({self.stream_length:,} tokens)"

    @property
    def max_length(self) -> int:
        """See `Plan`; with a prefix."""
        return self.stream_length + 1

    @property
    def softmax_length(self) -> int:
        """See `Plan`; with a prefix."""
        return self.context + self.block + 1

    @property
    def tokens(self) -> int:
        """See `Plan`."""
        return len(read_held_out(Path(self.texts))) * self.stream_length

    @property
    def _stride(self) -> int:
        """Tokens from one measured block to the next."""
        return self.block * self.every

    def check(self) -> None:
        """See `Plan`."""
        least = LEAST_BLOCKS * self._stride
        if self.stream_length < least:
            raise EvalError(f"--stream-length {self.stream_length}: must be at least {least}")

    def cost(self, sample: Row) -> int:
        """See `Plan`."""
        return self._stride

    def run(self, model: Reader, emit: Emit, done: Collection[tuple[Any, ...]] = ()) -> None:
        """Let `model` read all streams; see `Plan`. A state sees what is done all the same."""
        prefix = prefix_of(model.tokenizer)
        streams = list(self.streams(model.tokenizer))
        if not streams:
            raise EvalError(
                f"--block {self.block}: no kind of text at --texts {self.texts} has the "
                f"{LEAST_BLOCKS * self._stride} held-out tokens of {LEAST_BLOCKS} measured blocks; "
                "ask for shorter blocks or give more text"
            )
        for stream in streams:
            blocks = range(self.every - 1, len(stream.ids) // self.block, self.every)
            wanted = [index for index in blocks if (stream.kind, index) not in done]
            if not wanted:
                continue
            read = model.read_blocks(prefix, stream.ids, self.block, wanted)
            for index, values in read:
                row = self._row(stream, index, values, model.tokenizer)
                emit({"event": "samples", "samples": [row]})

    def _row(
        self, stream: Stream, index: int, values: list[Prediction], tokenizer: Tokenizer
    ) -> Row:
        """A block's line in the results."""
        start, stop = index * self.block, (index + 1) * self.block
        ids = stream.ids[start:stop]
        return {
            "kind": stream.kind,
            "index": index,
            "stop": stop,
            "documents": sum(begin < stop for begin in stream.begins),
            "tokens": len(values),
            "bytes": len(tokenizer.decode(ids[-len(values) :]).encode("utf-8")),
            "nats": -sum(value.logprob for value in values),
            # Settings are compared block by block: they must be the same.
            "checksum": zlib.crc32(repr(ids).encode()),
        }

    def streams(self, tokenizer: Tokenizer) -> Iterator[Stream]:
        """Each kind's held-out documents one after the other, an empty line between them.

        A stream ends with a measured block. Kinds with less than `LEAST_BLOCKS` of them are left
        out.
        """
        for kind, documents in read_held_out(Path(self.texts)).items():
            ids: list[int] = []
            begins = []
            for document in documents:
                if len(ids) >= self.stream_length:
                    break
                begins.append(len(ids))
                ids += tokenizer.encode(document + "\n\n", special=False)
            blocks = min(len(ids), self.stream_length) // self._stride
            if blocks >= LEAST_BLOCKS:
                ids = ids[: blocks * self._stride]
                yield Stream(kind, ids, [begin for begin in begins if begin < len(ids)])

    def numbers(self, record: Record, reference: Record | None) -> Row:
        """See `Plan`."""
        return {
            "streams": {
                kind: {
                    "documents": curve.documents,
                    "trend": curve.trend(),
                    "points": curve.points(),
                }
                for kind, curve in curves(record, reference).items()
            }
        }

    def table(self, records: Sequence[Record], reference: Record | None) -> str:
        """A table of each kind of text: settings by tokens of the stream, and the trend."""
        found = [curves(record, reference) for record in records]
        blocks = []
        for kind in dict.fromkeys(kind for by_kind in found for kind in by_kind):
            lines = [(r, c[kind]) for r, c in zip(records, found, strict=True) if kind in c]
            longest = max((curve for _, curve in lines), key=lambda curve: len(curve.nats))
            stops = [point["stop"] for point in longest.points(COLUMNS)]
            rows = [["setting", *(f"{s:,}" for s in stops), "last quarter / first", "per doubling"]]
            for record, curve in lines:
                shown = [_show_point(point) for point in curve.points(COLUMNS)]
                shown += [""] * (len(stops) - len(shown))
                rows.append([record.setting.name, *shown, *_show_trend(curve.trend())])
            documents = f"{longest.documents} documents, one after the other"
            blocks.append(f"### {kind}\n\n{markdown(rows)}\n\nComposed of {documents}.")
        note = (
            "Perplexity by tokens of the stream up to the column's end"
            + ("" if reference is None else ", and times the reference's on the same tokens")
            + f", blocks of {self.block:,}"
            + (f", one of {self.every} measured" if self.every > 1 else "")
            + ". The trend is of "
            + ("perplexity" if reference is None else "that ratio, where there is one")
            + f". A softmax model sees the {self.context:,} tokens before each block, read again "
            "for it; a LoLA model has one state from the first token on."
        )
        return "\n\n".join([*blocks, note])


# --- curves along a stream

QUARTER = 4
LEAST_RESAMPLED = 4  # blocks; an interval from fewer would say little
COLUMNS = 8
TOGETHER = "all"


@dataclass(frozen=True)
class Curve:
    """What one setting makes of one kind's stream, or of the longest kinds' together.

    Attributes:
        block: tokens of a block. documents: that the stream is composed of.
        nats: `[N]`, per block. others: `[N]`, the reference's; None without one.
        tokens: `[N]`, predicted in each block. stops: `[N]`, tokens of one stream up to its end.
    """

    block: int
    documents: int
    nats: NDArray[np.float64]
    others: NDArray[np.float64] | None
    tokens: NDArray[np.float64]
    stops: NDArray[np.float64]

    def points(self, most: int | None = None) -> list[Row]:
        """The curve, in at most so many points of equally many neighbouring blocks.

        Returns:
            stop: tokens of the stream up to their end. tokens: that were predicted. perplexity: per
            token. ratio: over the reference's on the same tokens; None without one.
        """
        size = 1 if most is None else -(-len(self.nats) // most)
        found = []
        for at in range(0, len(self.nats), size):
            part = slice(at, at + size)
            nats, tokens = self.nats[part].sum(), self.tokens[part].sum()
            ratio = None
            if self.others is not None:
                ratio = math.exp((nats - self.others[part].sum()) / tokens)
            point = {"stop": int(self.stops[part][-1]), "tokens": int(tokens)}
            found.append({**point, "perplexity": math.exp(nats / tokens), "ratio": ratio})
        return found

    def trend(self) -> Row:
        """How the ratio to the reference goes on, or perplexity without one.

        Returns:
            change: the last quarter's geometric mean over the first quarter's. low, high: its 95 %
            bootstrap interval over blocks; None where a quarter has few of them. per_doubling: the
            factor for every doubling of the tokens before, by least squares.
        """
        levels = (self.nats - (0 if self.others is None else self.others)) / self.tokens
        quarter = max(1, len(levels) // QUARTER)
        first, last = levels[:quarter], levels[-quarter:]
        low = high = None
        if quarter >= LEAST_RESAMPLED:
            rng = np.random.default_rng(0)
            ends = [
                part[rng.integers(0, quarter, size=(RESAMPLES, quarter))].mean(axis=1)
                for part in (last, first)
            ]
            low, high = map(float, np.exp(np.percentile(ends[0] - ends[1], [2.5, 97.5])))
        slope = np.polyfit(np.log2(self.stops - self.block / 2), levels, 1)[0]
        change = math.exp(last.mean() - first.mean())
        return {"change": change, "low": low, "high": high, "per_doubling": math.exp(slope)}


def curves(record: Record, reference: Record | None) -> dict[str, Curve]:
    """Curves by kind of text, and of the longest streams together as "all" if there are several.

    A stream without its second block has no curve yet.

    Raises:
        EvalError: as `paired`.
    """
    pairs = paired(record, reference, StreamPlan.keys)
    found = {}
    for kind in dict.fromkeys(row["kind"] for row, _ in pairs):
        of_kind = sorted((p for p in pairs if p[0]["kind"] == kind), key=lambda p: p[0]["index"])
        rows, others = [row for row, _ in of_kind], [other for _, other in of_kind if other]
        if len(rows) < LEAST_BLOCKS:
            continue
        found[kind] = Curve(
            block=rows[1]["tokens"],
            documents=rows[-1]["documents"],
            nats=column(rows, "nats"),
            others=column(others, "nats") if others else None,
            tokens=column(rows, "tokens"),
            stops=column(rows, "stop"),
        )
    longest = max((len(curve.nats) for curve in found.values()), default=0)
    full = [curve for curve in found.values() if len(curve.nats) == longest]
    if len(full) > 1:
        paired_ones = [curve.others for curve in full if curve.others is not None]
        found[TOGETHER] = Curve(
            block=full[0].block,
            documents=sum(curve.documents for curve in full),
            nats=np.sum([curve.nats for curve in full], axis=0),
            others=np.sum(paired_ones, axis=0) if paired_ones else None,
            tokens=np.sum([curve.tokens for curve in full], axis=0),
            stops=full[0].stops,
        )
    return found


def _show_point(point: Row) -> str:
    text = f"{point['perplexity']:,.1f}"
    return text if point["ratio"] is None else f"{text}, {point['ratio']:,.3f}x"


def _show_trend(trend: Row) -> list[str]:
    change = f"{trend['change']:.3f}x"
    if trend["low"] is not None:
        change += f" [{trend['low']:.3f}, {trend['high']:.3f}]"
    return [change, f"{trend['per_doubling']:.3f}x"]
