"""Methods that vLLM's workers get for LoLA models, called through `collective_rpc`.

`config_hook.py` names the class as vLLM's worker extension. Its methods never raise, because with
several workers vLLM would leave answers unread. They return an error as `{"error": text}`.
Arguments and results are plain lists, dicts and numbers, which vLLM's messages carry without
pickling.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index

from lola_vllm.core.ops.contract import HeadGroup
from lola_vllm.engine.vllm import compat
from lola_vllm.engine.vllm.attention import LolaAttention
from lola_vllm.engine.vllm.cache import lola_hf_config
from lola_vllm.serving.history import Residency, residencies
from lola_vllm.serving.keys import KeyRecorder, PromptPairs
from lola_vllm.serving.library.librarian import Librarian
from lola_vllm.serving.pages import PageWatch, StateCopy, StepRow, Unreadable
from lola_vllm.serving.protocol import Head
from lola_vllm.serving.recall import recalled, remembered

Answer = dict[str, Any]


def _answering(method: Callable[..., Answer]) -> Callable[..., Answer]:
    """Turn an exception of a method into an answer."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Answer:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}

    return call


class LolaWorkerExtension:
    """Mixed into vLLM's worker class by vLLM itself."""

    # Of the worker.
    vllm_config: VllmConfig
    model_runner: Any
    get_model: Callable[[], Any]

    @_answering
    def lola_describe(self) -> Answer:
        """The ops that serve on this worker: `{"backend"}`."""
        return {"backend": self._lola()[0][0].ops.name}

    @_answering
    def lola_watch(self, request_id: str, num_tokens: int, record: bool = False) -> Answer:
        """Copy a request's state once it has seen `num_tokens` tokens; call before it is sent.

        Args:
            request_id: as given to `EngineClient.generate`; vLLM appends to it.
            record: also its keys and values, for `forgotten` and `history` of `lola_memory`. Such
                a request must not start from a cached state.
        """

        def choose(rows: list[StepRow]) -> StepRow | None:
            found = self._state_index(request_id, num_tokens)
            row = None if found is None else StepRow(found, num_tokens)
            return row if row in rows else None

        modules, watch = self._lola()
        recorders = self._recorders()
        if record and recorders:
            return {"error": "the keys of another prompt are being recorded; try again"}
        if not watch.add(request_id, choose):
            return {"error": "too many states are being read at once; try again"}
        if record:
            recorders[request_id] = KeyRecorder(
                self.get_model(),
                modules,
                num_tokens,
                lambda row: self._is_of(request_id, row),
            )
        return {}

    @_answering
    def lola_memory(
        self,
        request_id: str,
        layers: list[int] | None,
        forgotten: bool = False,
        history: bool = False,
    ) -> Answer:
        """The sparse caches of a watched request: `{"layers": {index: {head: {...}}}}`.

        Indices are the model's, so that the answers of several workers can be put together. A head
        is a `protocol.Head`. Layers of other workers are left out.
        """
        modules, watch = self._lola()
        copy = watch.take(request_id)
        recorder = self._take_recorder(request_id)
        if not isinstance(copy, StateCopy):
            reason = copy.reason if isinstance(copy, Unreadable) else "no step of it was seen"
            return {"error": f"the state could not be read: {reason}"}
        first_head = self._first_sparse_head()
        recorded = recorder.pairs() if recorder is not None else [None] * len(modules)
        answer: dict[int, dict[int, Answer]] = {}
        for module, page, pairs in zip(modules, copy.pages, recorded, strict=True):
            index = extract_layer_index(module.prefix)
            if layers is None or index in layers:
                heads = _heads(module, page, copy.num_tokens, pairs, forgotten, history)
                answer[index] = {first_head + i: head for i, head in enumerate(heads)}
        return {"layers": answer}

    @_answering
    def lola_drop(self, request_id: str) -> Answer:
        """Forget a watch whose request failed."""
        self._lola()[1].take(request_id)
        self._take_recorder(request_id)
        return {}

    @_answering
    def lola_hear(
        self, request_id: str, first: int, asked: int, top: int, segments: dict[str, Any]
    ) -> Answer:
        """Call `Librarian.hear`."""

        def mine(row: StepRow) -> bool:
            return self._is_of(request_id, row)

        return self._librarian().hear(request_id, first, asked, mine, top, **segments)

    @_answering
    def lola_found(self, request_id: str) -> Answer:
        """Call `Librarian.found`."""
        return self._librarian().found(request_id)

    @_answering
    def lola_unhear(self, request_id: str) -> Answer:
        """Call `Librarian.drop`."""
        self._librarian().drop(request_id)
        return {}

    def _librarian(self) -> Librarian:
        found: Librarian | None = getattr(self, "_lola_librarian", None)
        if found is None:
            found = Librarian(self.get_model(), self._lola()[0])
            self._lola_librarian = found
        return found

    def _state_index(self, request_id: str, num_tokens: int) -> int | None:
        """Where a request's state is after so many tokens."""
        cache = self.vllm_config.cache_config
        index = 0
        if cache.mamba_cache_mode == "align" and cache.mamba_block_size:
            index = (num_tokens - 1) // cache.mamba_block_size
        blocks = compat.request_blocks(self.model_runner, request_id)
        return None if blocks is None or len(blocks) <= index else blocks[index]

    def _is_of(self, request_id: str, row: StepRow) -> bool:
        return self._state_index(request_id, row.num_tokens) == row.state_index

    def _lola(self) -> tuple[list[LolaAttention], PageWatch]:
        """This worker's layers, in order, and the watch over their pages."""
        found: tuple[list[LolaAttention], PageWatch] | None = getattr(self, "_lola_pages", None)
        if found is None:
            model = self.get_model()
            layers = [m for m in model.modules() if isinstance(m, LolaAttention)]
            if not layers:
                raise TypeError(f"{type(model).__name__} has no LoLA layers")
            found = (layers, PageWatch(model, layers))
            self._lola_pages = found
        return found

    def _recorders(self) -> dict[str, KeyRecorder]:
        """The recorder of the request whose keys are recorded, if there is one."""
        found: dict[str, KeyRecorder] | None = getattr(self, "_lola_recorders", None)
        if found is None:
            found = {}
            self._lola_recorders = found
        return found

    def _take_recorder(self, request_id: str) -> KeyRecorder | None:
        """A request's recorder, which records no more; None: it has none."""
        recorder = self._recorders().pop(request_id, None)
        if recorder is not None:
            recorder.stop()
        return recorder

    def _first_sparse_head(self) -> int:
        """Index in the whole model of this rank's first sparse set."""
        config = lola_hf_config(self.vllm_config)
        heads = config.facts.num_state_heads
        total = config.lola.num_sparse_heads(heads, config.num_key_value_heads)
        ranks = self.vllm_config.parallel_config.tensor_parallel_size
        return get_tensor_model_parallel_rank() * total // ranks


def _parts_of(
    module: LolaAttention, page: Tensor, pairs: PromptPairs | None
) -> Iterator[tuple[HeadGroup, Tensor, PromptPairs | None]]:
    """The head groups of a layer, each with its part of the layer's bytes and what it saw."""
    assert module.state is not None
    groups, parts = module.state.groups, module.layout.split(page)
    share = module.num_kv_heads // len(groups)
    for i, (group, part) in enumerate(zip(groups, parts, strict=True)):
        own = slice(i * share, (i + 1) * share)
        yield group, part, None if pairs is None else PromptPairs(pairs.k[:, own], pairs.v[:, own])


def _heads(
    module: LolaAttention,
    page: Tensor,
    num_tokens: int,
    pairs: PromptPairs | None,
    forgotten: bool,
    history: bool,
) -> list[Answer]:
    """What each sparse set of a layer holds, as `protocol.Head` has it, in order."""
    heads: list[Head] = []
    for group, part, seen in _parts_of(module, page, pairs):
        memory, layout = remembered(group, part, num_tokens), group.layout
        folded = int(layout.num_folded(torch.tensor(num_tokens)))
        found = [
            Head(
                sparse_cache_size=layout.sparse_cache_size,
                folded=folded,
                positions=positions,
                errors=errors,
            )
            for positions, errors in zip(
                memory.positions.tolist(), _rounded(memory.errors), strict=True
            )
        ]
        if memory.score_weights is not None:
            for head, weights in zip(found, _rounded(memory.score_weights), strict=True):
                head.score_weights = weights
        if forgotten and seen is not None:
            errors = _rounded(recalled(group, part, num_tokens, seen))
            for head, row in zip(found, errors, strict=True):
                kept = set(head.positions)
                of = enumerate(row, start=layout.sink_size)
                head.forgotten = [error for position, error in of if position not in kept]
        heads += found
    if history and pairs is not None:
        assert module.state is not None
        for head, ever in zip(heads, residencies(module.ops, module.state, pairs), strict=True):
            _add_history(head, ever)
    return [head.model_dump() for head in heads]


def _rounded(x: Tensor) -> list[list[float]]:
    """In float64, so that they are printed with few decimals."""
    rows: list[list[float]] = x.double().round(decimals=5).tolist()
    return rows


def _add_history(head: Head, ever: list[Residency]) -> None:
    """`entered`, of the tokens that a head holds, and `gone`: those that left."""
    entered = {stay.position: stay.entered for stay in ever if stay.left is None}
    if list(entered) != head.positions:
        raise ValueError(
            "history: the choices that were made again are not those of the state; leave it out"
        )
    head.entered = [entered[position] for position in head.positions]
    head.gone = [(stay.position, stay.entered, stay.left) for stay in ever if stay.left is not None]
