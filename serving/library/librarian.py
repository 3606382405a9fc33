"""What a worker does for libraries: it hears a question, and finds the documents that it reads.

A question is heard while it is read as a request. Finding takes a while and needs no device, so it
runs in a thread, from the moment at which the question is known. Who asks looks again until it is
over.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.kv_transfer import get_kv_transfer_group

from lola_vllm.engine.vllm.attention import LolaAttention, rope_of
from lola_vllm.engine.vllm.connector import LolaStateConnector
from lola_vllm.memory.documents.choose import Choice, choose
from lola_vllm.memory.documents.keys import DocumentKeys, Fetched, queries_in, reading_heads
from lola_vllm.serving.keys import Span, span_of_step
from lola_vllm.serving.pages import StepRow

logger = logging.getLogger("vllm.lola")

# A question that nobody has asked about for so long is forgotten: who asked it is gone.
KEPT_S = 120.0

Answer = dict[str, Any]


class QueryRecorder:
    """Records the queries of a prompt's last tokens, in the layers that have reading heads: who
    asks no library pays a comparison for each layer.

    Args:
        model: its steps are watched from now until `stop`.
        layers: of the model on this rank.
        first, num_tokens: positions of the tokens, and the prompt's length.
        mine: as for `keys.KeyRecorder`. complete: called once, when all are recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[LolaAttention],
        first: int,
        num_tokens: int,
        mine: Callable[[StepRow], bool],
        complete: Callable[[], object],
    ) -> None:
        self._layers = {
            index: layers[index]
            for index in dict.fromkeys(head.layer for head in reading_heads(layers[0].sequence))
        }
        self._first, self._num_tokens, self._mine = first, num_tokens, mine
        self._seen = torch.zeros(num_tokens - first, dtype=torch.bool)
        self._fault: str | None = None
        self._queries = {
            index: torch.empty(num_tokens - first, layer.num_heads, layer.head_dim)
            for index, layer in self._layers.items()
        }
        self._complete = complete
        self._hook: Any = model.register_forward_pre_hook(self._before_step)

    def stop(self) -> None:
        """Watch no more steps."""
        self._hook.remove()
        self._show(None)

    def queries(self) -> dict[int, Tensor]:
        """The queries of each layer with reading heads, `[T, Hq, d]` float32 on the CPU, after
        RoPE.

        Raises:
            ValueError: a token was not seen.
        """
        if self._fault is not None:
            raise ValueError(self._fault)
        if not self._seen.all():
            missing = int((~self._seen).sum())
            raise ValueError(f"the queries of {missing} of {len(self._seen)} tokens were not seen")
        return self._queries

    def _before_step(self, *_: Any) -> None:
        # An exception here would end the engine, and a failed record must not fail any request.
        if self._seen.all():
            self.stop()
            return
        try:
            span = span_of_step(next(iter(self._layers.values())), self._num_tokens, self._mine)
            self._show(None if span is None else self._asked(span))
        except Exception as error:
            logger.warning("LoLA: queries could not be recorded: %s", error)
            self._fault = f"{type(error).__name__}: {error}"
            self._show(None)

    def _asked(self, span: Span) -> Span | None:
        """What of a span belongs to the question, by its place in the question."""
        before = max(0, self._first - span.positions.start)
        if before >= span.positions.stop - span.positions.start:
            return None
        at = span.positions.start + before - self._first
        step = slice(span.step.start + before, span.step.stop)
        return Span(step, slice(at, at + step.stop - step.start))

    def _show(self, span: Span | None) -> None:
        for index, layer in self._layers.items():
            layer.query_hook = None if span is None else self._writer(span, index)

    def _writer(self, span: Span, index: int) -> Callable[[Tensor], None]:
        queries, last = self._queries[index], index == max(self._layers)

        def write(q: Tensor) -> None:
            queries[span.positions] = q[span.step].to(queries)
            if last:
                self._seen[span.positions] = True
                if self._seen.all():
                    self._complete()

        return write


@dataclass
class _Question:
    recorder: QueryRecorder
    since: float
    search: Future[list[Choice]] | None = None  # from the moment at which it is known


class Librarian:
    """The librarian of a model's only rank.

    Args:
        model, layers: of the worker.
    """

    def __init__(self, model: nn.Module, layers: Sequence[LolaAttention]) -> None:
        self._model, self._layers = model, layers
        self._rope = rope_of(layers[0])
        self._questions: dict[str, _Question] = {}  # by request
        self._thread = ThreadPoolExecutor(1, "lola-library")

    def hear(
        self,
        request_id: str,
        first: int,
        asked: int,
        mine: Callable[[StepRow], bool],
        top: int,
        parts: Sequence[tuple[str, int]],
        rest: tuple[str, int, int] | None,
        newest: int,
    ) -> Answer:
        """Record the queries of a request's last tokens, and look for the documents that they read;
        call before it is sent.

        Args:
            first, asked: tokens before the question, and of it. mine: whether a row of a step is
                the request's.
            top: how many documents to find. parts: id of the state and tokens of each.
            rest: one more document: id of a state, its tokens, and how many of the newest of these.
            newest: so many documents at the end are newer than the others.

        Returns:
            `{"busy": True}` while another question is heard, else `{}`.
        """
        for other, question in list(self._questions.items()):
            if time.monotonic() - question.since > KEPT_S:
                self.drop(other)
        if any(question.search is None for question in self._questions.values()):
            return {"busy": True}  # layers show their queries to one at a time

        def search() -> list[Choice]:
            queries = queries_in(self._layers[0].sequence, recorder.queries(), first, self._rope)
            return choose(queries, _fetched(parts, rest), top, newest)

        def begin() -> None:
            question.search = self._thread.submit(search)

        recorder = QueryRecorder(self._model, self._layers, first, first + asked, mine, begin)
        question = self._questions[request_id] = _Question(recorder, time.monotonic())
        return {}

    def found(self, request_id: str) -> Answer:
        """What is read by a question whose request is over.

        Returns:
            `{}` while it is looked for, else `{"choices": [...]}`, the most read first: `document`
            (its index), `score`, `share`, `own` and `peaks`.

        Raises:
            LookupError: it was not heard, or is forgotten. ValueError: not all of it was heard.
        """
        question = self._questions.get(request_id)
        if question is None:
            raise LookupError("the question was not heard; ask again")
        if question.search is None:
            self.drop(request_id)
            question.recorder.queries()  # says why
            raise ValueError("the question was not heard; ask again")
        if not question.search.done():
            return {}
        self.drop(request_id)
        choices = [asdict(choice) for choice in question.search.result()]
        return {"choices": choices}

    def drop(self, request_id: str) -> None:
        """Forget a question."""
        question = self._questions.pop(request_id, None)
        if question is not None:
            question.recorder.stop()
            if question.search is not None:
                question.search.cancel()


def _fetched(
    parts: Sequence[tuple[str, int]], rest: tuple[str, int, int] | None
) -> Fetched[DocumentKeys]:
    """Keys of documents, fetched one at a time; the last of a text's newest tokens."""
    connector = get_kv_transfer_group()
    assert isinstance(connector, LolaStateConnector) and connector.transfer is not None
    transfer = connector.transfer
    asked: list[tuple[Any, ...]] = [*parts, *([] if rest is None else [rest])]
    return Fetched(len(asked), lambda index: transfer.document_keys(*asked[index]))
