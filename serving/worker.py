"""Methods that vLLM's workers get for LoLA models, called through `collective_rpc`.

`config_hook.py` names the class as vLLM's worker extension. Its methods never raise, because with
several workers vLLM would leave answers unread. They return an error as `{"error": text}`.
Arguments and results are plain lists, dicts and numbers, which vLLM's messages carry without
pickling.
"""

from __future__ import annotations

import functools
import random
import statistics
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index

from lola_vllm.plugin import compat
from lola_vllm.plugin.attention import LolaAttention
from lola_vllm.plugin.cache import lola_hf_config, num_kv_heads
from lola_vllm.serving.pages import Copy, PageWatch, Row, Unreadable
from lola_vllm.serving.recall import Forecast, forecast, remembered

SAMPLE = "sample"  # the watch of `lola_sample`; request ids are longer

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
    def lola_watch(self, request_id: str, num_tokens: int) -> Answer:
        """Copy a request's state once it has seen `num_tokens` tokens; call before it is sent.

        Args:
            request_id: as given to `EngineClient.generate`; vLLM appends to it.
        """
        blocks_per_state = self.vllm_config.cache_config.mamba_cache_mode == "align"
        block_size = self.vllm_config.cache_config.mamba_block_size
        index = (num_tokens - 1) // block_size if blocks_per_state and block_size else 0

        def choose(rows: list[Row]) -> Row | None:
            blocks = compat.request_blocks(self.model_runner, request_id)
            if blocks is None or len(blocks) <= index:
                return None
            row = Row(blocks[index], num_tokens)
            return row if row in rows else None

        _, watch = self._lola()
        if not watch.add(request_id, choose):
            return {"error": "too many states are being read at once; try again"}
        return {}

    @_answering
    def lola_memory(self, request_id: str, layers: list[int] | None) -> Answer:
        """The sparse caches of a watched request: `{"layers": {index: {head: {...}}}}`.

        Indices are the model's, so that the answers of several workers can be put together. A head
        has `positions`, ascending, their `errors` and, where the model has one, their `saliency`.
        Layers of other workers are left out.
        """
        modules, watch = self._lola()
        copy = watch.take(request_id)
        if not isinstance(copy, Copy):
            reason = copy.reason if isinstance(copy, Unreadable) else "no step of it was seen"
            return {"error": f"the state could not be read: {reason}"}
        first_head = self._first_sparse_head()
        answer: dict[int, dict[int, Answer]] = {}
        for module, page in zip(modules, copy.pages, strict=True):
            index = extract_layer_index(module.prefix)
            if layers is None or index in layers:
                assert module.state is not None
                memory = remembered(page, module.layout, module.state.weights, copy.num_tokens)
                # Rounded in float64, so that they are printed with few decimals.
                errors = memory.errors.double().round(decimals=5).tolist()
                heads: list[Answer] = [
                    {"positions": positions, "errors": errors[i]}
                    for i, positions in enumerate(memory.positions.tolist())
                ]
                if memory.saliency is not None:
                    for head, saliency in zip(heads, memory.saliency.double(), strict=True):
                        head["saliency"] = saliency.round(decimals=5).tolist()
                answer[index] = {first_head + i: head for i, head in enumerate(heads)}
        return {"layers": answer}

    @_answering
    def lola_drop(self, request_id: str) -> Answer:
        """Forget a watch whose request failed."""
        self._lola()[1].take(request_id)
        return {}

    @_answering
    def lola_sample(self) -> Answer:
        """A sample of one running sequence, from the first step after the previous call.

        Returns:
            `{}` if there was no step, else `sequences`, their mean `sparse_fill` (0 to 1), and of
            one of them, chosen at random, the `Forecast`, averaged over the layers.
        """
        modules, watch = self._lola()
        copy = watch.take(SAMPLE)
        watch.add(SAMPLE, _any_row)
        if not isinstance(copy, Copy):
            return {}
        answer: Answer = {"sequences": len(copy.rows)}
        layouts = modules[0].sequence.layers
        num_tokens = torch.tensor([row.num_tokens for row in copy.rows])
        room = len(copy.rows) * sum(layout.sparse_cache_size for layout in layouts)
        if room:
            filled = sum(int(layout.num_sparse(num_tokens).sum()) for layout in layouts)
            answer["sparse_fill"] = filled / room
        forecasts = []
        for module, page in zip(modules, copy.pages, strict=True):
            assert module.state is not None
            forecasts.append(forecast(page, module.layout, module.state.weights, copy.num_tokens))
        for field in Forecast._fields:
            values = [value for f in forecasts if (value := getattr(f, field)) is not None]
            if values:
                answer[field] = statistics.fmean(values)
        return answer

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

    def _first_sparse_head(self) -> int:
        """Index in the whole model of this rank's first sparse set."""
        config = lola_hf_config(self.vllm_config)
        heads = config.lola.num_state_heads or config.num_attention_heads
        total = config.lola.num_sparse_heads(heads, num_kv_heads(config))
        ranks = self.vllm_config.parallel_config.tensor_parallel_size
        return get_tensor_model_parallel_rank() * total // ranks


def _any_row(rows: list[Row]) -> Row | None:
    return random.choice(rows) if rows else None
