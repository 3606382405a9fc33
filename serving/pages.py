"""Copies of running sequences' pages, taken in a worker at the end of a step.

A state changes with every token, and its block is reused when the sequence ends. So a state
must be copied in the step that made it. A watch makes this copy. It is a forward hook on the model,
which is registered only while a copy is requested. It reads the step's own metadata, which says
exactly which state_index holds how many tokens. It replaces nothing of vLLM.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from vllm.forward_context import get_forward_context

from lola_vllm.engine.vllm.attention import LolaAttention
from lola_vllm.engine.vllm.backend import LolaMetadata

logger = logging.getLogger("vllm.lola")

# Largest number of copies at a time, because each is a whole state on the device.
MAX_WATCHES = 4


class StepRow(NamedTuple):
    """A sequence of a step: its state index, and the tokens its state has seen after the step."""

    state_index: int
    num_tokens: int


class StateCopy(NamedTuple):
    """One sequence's state: a page `[page_bytes]` per layer, after `num_tokens` tokens."""

    num_tokens: int
    pages: list[Tensor]


class Unreadable(NamedTuple):
    """Why a copy could not be taken."""

    reason: str


Choose = Callable[[list[StepRow]], StepRow | None]


class PageWatch:
    """Takes one copy for each waiting key, in the first step that has its sequence."""

    def __init__(self, model: nn.Module, layers: Sequence[LolaAttention]) -> None:
        self._model = model
        self._layers = layers
        self._waiting: dict[str, Choose] = {}
        self._taken: dict[str, StateCopy | Unreadable] = {}
        self._hook: Any = None

    def add(self, key: str, choose: Choose) -> bool:
        """Wait for the step in which `choose` picks a row; False if too many copies wait."""
        if key not in self._waiting and len(self._waiting) + len(self._taken) >= MAX_WATCHES:
            return False
        self._waiting[key] = choose
        if self._hook is None:
            self._hook = self._model.register_forward_hook(self._after_step)
        return True

    def take(self, key: str) -> StateCopy | Unreadable | None:
        """Return the copy for a key and stop waiting for it; None if there was no such step."""
        self._waiting.pop(key, None)
        self._remove_idle_hook()
        return self._taken.pop(key, None)

    def _after_step(self, *_: Any) -> None:
        # An exception here would end the engine, and a failed copy must not fail any request.
        try:
            self._copy()
        except Exception as error:
            logger.warning("LoLA: a state could not be copied: %s", error)
            for key in self._waiting:
                self._taken[key] = Unreadable(f"{type(error).__name__}: {error}")
            self._waiting.clear()
        self._remove_idle_hook()

    def _copy(self) -> None:
        metadata = get_forward_context().attn_metadata
        if not isinstance(metadata, dict):  # profiling, or a batch cut in two
            return
        rows = step_rows(cast(LolaMetadata, metadata[self._layers[0].prefix]))
        for key, choose in list(self._waiting.items()):
            row = choose(rows)
            if row is not None:
                first = self._layers[0]
                state = first.kv_cache[0][row.state_index][None].clone()
                pages = [pages[0] for pages in first.sequence.pages(state)]
                del self._waiting[key]
                self._taken[key] = StateCopy(row.num_tokens, pages)

    def _remove_idle_hook(self) -> None:
        if self._hook is not None and not self._waiting:
            self._hook.remove()
            self._hook = None


def step_rows(metadata: LolaMetadata) -> list[StepRow]:
    """The sequences of a step, decodes first; padding left out. Waits for the device."""
    return [row for row in all_rows(metadata) if row.state_index > 0]


def all_rows(metadata: LolaMetadata) -> list[StepRow]:
    """The rows of `step_rows` with padding: rows can be told from their place in the step."""
    rows: list[StepRow] = []
    if metadata.num_decodes:
        assert metadata.state_indices_tensor_d is not None
        state_indices = metadata.state_indices_tensor_d[: metadata.num_decodes, 0].tolist()
        rows += map(StepRow, state_indices, metadata.seq_lens[: metadata.num_decodes].tolist())
    if metadata.num_prefills:
        assert metadata.state_indices_tensor_p is not None
        assert metadata.query_start_loc_p_cpu is not None
        assert metadata.context_lens_p_cpu is not None
        tokens = metadata.context_lens_p_cpu + metadata.query_start_loc_p_cpu.diff()
        rows += map(StepRow, metadata.state_indices_tensor_p.tolist(), tokens.tolist())
    return rows
