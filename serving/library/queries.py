"""The queries of a question, recorded while it is read as a request of its own.

Layers are asked to show them in the steps that compute this request, and in no others: who asks no
library pays a comparison for each layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lola_vllm.engine.vllm.attention import LolaAttention
from lola_vllm.memory.documents.keys import reading_heads
from lola_vllm.serving.keys import Span, span_of_step
from lola_vllm.serving.pages import StepRow

logger = logging.getLogger("vllm.lola")


class QueryRecorder:
    """Records the queries of a prompt's last tokens, in the layers that have reading heads.

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
