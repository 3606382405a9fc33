"""What a worker does for libraries: it hears a question, and finds the documents that it reads.

Finding takes a while and needs no device, so it runs in a thread, and who asks looks again until it
is over.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from torch import Tensor, nn
from vllm.distributed.kv_transfer import get_kv_transfer_group

from lola_vllm.engine.vllm.attention import LolaAttention, rope_of
from lola_vllm.engine.vllm.connector import LolaStateConnector
from lola_vllm.memory.documents.choose import Choice, choose
from lola_vllm.memory.documents.keys import DocumentKeys, Fetched, queries_in
from lola_vllm.memory.sessions.transfer import TransferWorker
from lola_vllm.serving.library.queries import QueryRecorder
from lola_vllm.serving.pages import StepRow

# Questions that documents are found for at once, and whose queries are kept.
MAX_AT_ONCE = 8
MAX_HEARD = 64
# No question is listened to for longer.
LISTEN_S = 120.0

Answer = dict[str, Any]


class _Listening(NamedTuple):
    recorder: QueryRecorder
    name: str
    first: int
    since: float


class Librarian:
    """Of a model's only rank.

    Args:
        model, layers: of the worker.
    """

    def __init__(self, model: nn.Module, layers: Sequence[LolaAttention]) -> None:
        self._model, self._layers = model, layers
        self._rope = rope_of(layers[0])
        self._listening: dict[str, _Listening] = {}
        self._heard: OrderedDict[str, list[Tensor]] = OrderedDict()
        self._finding: dict[str, Future[list[Choice]]] = {}
        self._thread = ThreadPoolExecutor(1, "lola-library")

    def hear(
        self,
        request_id: str,
        name: str,
        first: int,
        num_tokens: int,
        mine: Callable[[StepRow], bool],
    ) -> Answer:
        """Record the queries of a request's tokens from `first` on; call before it is sent.

        Args:
            name: under which they are kept. mine: whether a row of a step is the request's.
        """
        for other, listening in list(self._listening.items()):
            if time.monotonic() - listening.since > LISTEN_S:  # who asked for it is gone
                self.drop(other)
        if self._listening:  # layers show their queries to one at a time
            return {"busy": True}
        recorder = QueryRecorder(self._model, self._layers, first, num_tokens, mine)
        self._listening[request_id] = _Listening(recorder, name, first, time.monotonic())
        return {}

    def heard(self, request_id: str) -> Answer:
        """Keep the queries of a request that is over."""
        listening = self._listening.pop(request_id, None)
        if listening is None:
            return {"error": f"{request_id} was not listened to"}
        recorder, name, first, _ = listening
        recorder.stop()
        sequence = self._layers[0].sequence
        self._heard[name] = queries_in(sequence, recorder.queries(), first, self._rope)
        while len(self._heard) > MAX_HEARD:
            self._heard.popitem(last=False)
        return {}

    def find(
        self,
        question: str,
        documents: Sequence[tuple[str, int]],
        top: int,
        rest: tuple[str, int, int] | None = None,
        newest: int = 0,
    ) -> Answer:
        """Start to look for the documents that a question reads.

        Args:
            question: name of queries that are kept. documents: id of the state and tokens of each
                part. top: how many to find. rest: one more document: id of a state, its tokens,
                and how many of the newest of these. newest: so many documents at the end are newer
                than the others.
        """
        if len(self._finding) >= MAX_AT_ONCE:
            return {"error": "too many questions are asked at once; try again"}
        asked = self._heard.pop(question, None)
        if asked is None:
            return {"error": "the question was not heard; ask again"}
        shelf = _fetched(documents, rest)
        self._finding[question] = self._thread.submit(choose, asked, shelf, top, newest)
        return {}

    def found(self, question: str) -> Answer:
        """`{}` while it is looked for, else `{"choices": [...]}`, the most read first: `document`
        (its index), `score`, `share`, `own` and `places`, each first, last, share and peak."""
        future = self._finding.get(question)
        if future is None:
            return {"error": "nothing is looked for"}
        if not future.done():
            return {}
        del self._finding[question]
        choices = [
            {
                "document": choice.document,
                "score": choice.score,
                "share": choice.share,
                "own": choice.own,
                "places": [list(place) for place in choice.places],
            }
            for choice in future.result()
        ]
        return {"choices": choices}

    def drop(self, name: str) -> None:
        """Forget a request that is listened to, or a question that was heard."""
        listening = self._listening.pop(name, None)
        if listening is not None:
            listening.recorder.stop()
        self._heard.pop(name, None)
        future = self._finding.pop(name, None)
        if future is not None:
            future.cancel()


def _fetched(
    parts: Sequence[tuple[str, int]], rest: tuple[str, int, int] | None
) -> Fetched[DocumentKeys]:
    """Keys of documents, fetched one at a time; the last of a text's newest tokens."""
    connector = get_kv_transfer_group()
    assert isinstance(connector, LolaStateConnector) and connector.transfer is not None
    transfer: TransferWorker = connector.transfer

    def keys(index: int) -> DocumentKeys:
        if index == len(parts) and rest is not None:
            found = transfer.newest_keys(*rest)
        else:
            found = transfer.document_keys(*parts[index])
        assert isinstance(found, DocumentKeys)
        return found

    return Fetched(len(parts) + (rest is not None), keys)
