"""How well one model predicts a long text, block by block, when nothing is forgotten on purpose.

A LoLA model reads the whole stream with one state. A softmax model, whose positions end, sees some
thousand tokens before each block and is started anew for it. So its curve says how hard the text
is at each place, and the ratio of the two what the length of the stream adds.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from lola_vllm.core.cli_options import option
from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.models import Emit, Prediction, Tokenizer, prefix_of
from lola_vllm.evaluation.settings import read_held_out

LEAST_BLOCKS = 2  # one block has no curve
MIXED = "mixed"


class StreamModel(Protocol):
    """A model that reads a stream in pieces.

    Attributes:
        tokenizer: the model's.
    """

    @property
    def tokenizer(self) -> Tokenizer: ...

    def read_blocks(
        self, prefix: list[int], ids: list[int], block: int, wanted: Collection[int]
    ) -> Iterator[tuple[int, list[Prediction]]]:
        """How well the tokens of some blocks are predicted.

        Args:
            prefix: tokens before the stream, which are not predicted.
            ids: of the stream, a multiple of `block` tokens. wanted: numbers of blocks.

        Yields:
            Each wanted block's number and a prediction per token, in order. Without a prefix the
            stream's first token has none.
        """


def check_reader(engine_args: Mapping[str, Any]) -> None:
    """Refuse what vLLM's engine takes and `reader.py` does not.

    Raises:
        EvalError: arguments other than dtype.
    """
    for name in engine_args:
        if name != "dtype":
            raise EvalError(
                f"--engine-args: {name} is of vLLM's engine, and this text is read in "
                "transformers, which takes dtype alone; leave it out"
            )


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
class StreamPlan:
    """The streams that every setting reads; JSON values only."""

    name: ClassVar[str] = "stream"

    texts: str
    stream_length: int = option("tokens of a stream, at most", 131_072, part="stream")
    block: int = option("tokens of a block, which is a point of the curve", 2048, part="stream")
    context: int = option(
        "tokens before each block that a softmax model sees; it reads them again for each block",
        4096,
        part="stream",
    )
    every: int = option(
        "measure one block of so many, the last of them; a state reads the others as well, and a "
        "softmax model leaves them out",
        1,
        part="stream",
    )
    mixed: bool = option(
        "one stream of all kinds, their documents interleaved, for more tokens than one kind has",
        False,
        part="stream",
    )

    @property
    def max_length(self) -> int:
        """Longest sequence of a LoLA model in tokens, with a prefix."""
        return self.stream_length + 1

    @property
    def softmax_length(self) -> int:
        """Longest sequence of a softmax model in tokens, with a prefix."""
        return self.context + self.block + 1

    @property
    def tokens(self) -> int:
        """Tokens of all streams, at most."""
        streams = 1 if self.mixed else len(read_held_out(Path(self.texts)))
        return streams * self.stream_length

    @property
    def _stride(self) -> int:
        """Tokens from one measured block to the next."""
        return self.block * self.every

    def cost(self, sample: dict[str, Any]) -> int:
        """Tokens that a sample of `run` counts for in `tokens`."""
        return self._stride

    def done(self, samples: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
        """Blocks that `run` need not measure again, given samples of an earlier call."""
        return {(row["kind"], row["index"]) for row in samples}

    def run(self, model: StreamModel, emit: Emit, done: Collection[tuple[Any, ...]] = ()) -> None:
        """Let `model` read all streams.

        Args:
            model: reads. emit: is given `{"event": "samples", "samples": [...]}` after every block.
            done: see the method of that name. A state must see their tokens all the same.

        Raises:
            EvalError: no kind of text fills two blocks.
        """
        prefix = prefix_of(model.tokenizer)
        streams = list(self.streams(model.tokenizer))
        if not streams:
            raise EvalError(
                f"--block {self.block}: no kind of text at --texts {self.texts} has the "
                f"{LEAST_BLOCKS * self._stride} held-out tokens of {LEAST_BLOCKS} measured blocks; "
                "ask for shorter blocks, give more text, or join the kinds with --mixed"
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
    ) -> dict[str, Any]:
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
        kinds = read_held_out(Path(self.texts))
        if self.mixed:
            kinds = {MIXED: in_turn(list(kinds.values()))}
        for kind, documents in kinds.items():
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


def in_turn(kinds: list[list[str]]) -> list[str]:
    """The documents of all kinds, one of each kind after the other until none is left."""
    most = max(map(len, kinds), default=0)
    return [documents[i] for i in range(most) for documents in kinds if i < len(documents)]
