"""The keys and values of one prompt, recorded while its request runs.

A page keeps no key of a folded token. What its hidden state makes of such a token, and when each
token entered and left the sparse caches, follows from the keys and values that the layers saw. So
they are recorded, in host memory, in the steps that compute the prompt. Layers are asked to show
them only while a prompt is recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context

from lola_vllm.engine.vllm.attention import LolaAttention
from lola_vllm.engine.vllm.backend import LolaMetadata
from lola_vllm.serving.pages import StepRow, all_rows

logger = logging.getLogger("vllm.lola")


class PromptPairs(NamedTuple):
    """What a layer saw of a prompt, in host memory.

    Attributes:
        k, v: `[n, Hkv, d]` in the model's dtype; k after RoPE, at the RoPE positions of new tokens.
    """

    k: Tensor
    v: Tensor


class Span(NamedTuple):
    """The tokens of a step that belong to the prompt: which of the step, and their positions."""

    step: slice
    positions: slice


class KeyRecorder:
    """Records the pairs of one prompt.

    Args:
        model: its steps are watched from now until `stop`.
        layers: of the model on this rank.
        num_tokens: of the prompt, n.
        mine: whether a row of a step, with its state_index and its tokens after the step, is the
            prompt's.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[LolaAttention],
        num_tokens: int,
        mine: Callable[[StepRow], bool],
    ) -> None:
        self._layers = layers
        self._mine = mine
        self._span: Span | None = None
        self._seen = torch.zeros(num_tokens, dtype=torch.bool)
        self._fault: str | None = None
        self._pairs: list[PromptPairs] = []
        for layer in layers:
            shape = (num_tokens, layer.num_kv_heads, layer.head_dim)
            k, v = (torch.empty(shape, dtype=layer.layout.pages[0].kv_dtype) for _ in range(2))
            self._pairs.append(PromptPairs(k, v))
        self._hook: Any = model.register_forward_pre_hook(self._before_step)

    def stop(self) -> None:
        """Watch no more steps."""
        self._hook.remove()
        self._show(None)

    def pairs(self) -> list[PromptPairs]:
        """What each layer saw.

        Raises:
            ValueError: a part of the prompt was not seen.
        """
        if self._fault is not None:
            raise ValueError(self._fault)
        if not self._seen.all():
            missing = int((~self._seen).sum())
            raise ValueError(f"the keys of {missing} of {len(self._seen)} tokens were not seen")
        return self._pairs

    def _before_step(self, *_: Any) -> None:
        # An exception here would end the engine, and a failed record must not fail any request.
        try:
            self._show(self._span_of_step())
        except Exception as error:
            logger.warning("LoLA: keys could not be recorded: %s", error)
            self._fault = f"{type(error).__name__}: {error}"
            self._show(None)

    def _span_of_step(self) -> Span | None:
        return span_of_step(self._layers[0], len(self._seen), self._mine)

    def _show(self, span: Span | None) -> None:
        """Ask the layers for the pairs of a span; None: for nothing."""
        self._span = span
        for layer, pairs in zip(self._layers, self._pairs, strict=True):
            layer.kv_hook = None if span is None else self._writer(span, pairs)

    def _writer(self, span: Span, pairs: PromptPairs) -> Callable[[Tensor, Tensor], None]:
        last = pairs is self._pairs[-1]

        def write(k: Tensor, v: Tensor) -> None:
            pairs.k[span.positions] = k[span.step].to(pairs.k)
            pairs.v[span.positions] = v[span.step].to(pairs.v)
            if last:
                self._seen[span.positions] = True

        return write


def span_of_step(
    layer: LolaAttention, num_tokens: int, mine: Callable[[StepRow], bool]
) -> Span | None:
    """The tokens of the running step that belong to a prompt; None: there are none.

    Args:
        layer: any of the model. num_tokens: of the prompt. mine: as for `KeyRecorder`.
    """
    metadata = get_forward_context().attn_metadata
    if not isinstance(metadata, dict):  # profiling, or a batch cut in two
        return None
    step = cast(LolaMetadata, metadata[layer.pool_layer])
    decodes = step.query_start_loc_d_cpu
    if decodes is None:
        decodes = torch.arange(step.num_decodes + 1)
    starts, lengths = decodes[:-1].tolist(), decodes.diff().tolist()
    if step.num_prefills:
        assert step.query_start_loc_p_cpu is not None
        offsets = step.query_start_loc_p_cpu
        starts += (offsets[:-1] + step.num_decode_tokens).tolist()
        lengths += offsets.diff().tolist()
    for row, start, length in zip(all_rows(step), starts, lengths, strict=True):
        first = row.num_tokens - length
        length = min(length, num_tokens - first)  # an answer's tokens are not recorded
        if length > 0 and row.state_index > 0 and mine(row):
            return Span(slice(start, start + length), slice(first, first + length))
    return None
