"""What a worker does for libraries: it hears a question, and finds the documents that it reads.

A question is heard while it is read as a request. Finding takes a while and needs no device, so it
runs in a thread, from the moment at which the question is known. Who asks looks again until it is
over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import nn
from vllm.distributed.kv_transfer import get_kv_transfer_group

from lola_vllm.engine.vllm.attention import LolaAttention, rope_of
from lola_vllm.engine.vllm.connector import LolaStateConnector
from lola_vllm.memory.documents.choose import Choice, choose
from lola_vllm.memory.documents.keys import DocumentKeys, Fetched, queries_in
from lola_vllm.serving.library.queries import QueryRecorder
from lola_vllm.serving.pages import StepRow

# A question that nobody has asked about for so long is forgotten: who asked it is gone.
KEPT_S = 120.0

Answer = dict[str, Any]


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
            (its index), `score`, `share`, `own` and `places`, each first, last, share and peak.

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
        choices = [
            {
                "document": choice.document,
                "score": choice.score,
                "share": choice.share,
                "own": choice.own,
                "places": [list(place) for place in choice.places],
            }
            for choice in question.search.result()
        ]
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

    def keys(index: int) -> DocumentKeys:
        if index == len(parts) and rest is not None:
            return transfer.newest_keys(*rest)
        return transfer.document_keys(*parts[index])

    return Fetched(len(parts) + (rest is not None), keys)
