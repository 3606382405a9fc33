"""States where prompts begin alike: a system prompt, or a document that is asked about again.

The store has a state at the end of each prompt and of each answer. Two prompts that begin alike and
end differently share none of these. So the server remembers the prompts of late. The second prompt
that begins like an earlier one is read in two parts. The first ends where the two part, and its
state is stored under the name `shared-...`. Prompts that follow start from it. Nothing is computed
twice.

This takes the place of vLLM's prefix caching, which would keep a second state for each running
sequence. The engine's `generate` is the one method that all routes which generate call, so the
parting is done in front of it (`owners.listen`).
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any, NamedTuple

import numpy as np
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from lola_vllm.serving.sessions.wishes import transfer_params
from lola_vllm.sessions.chain import SPAN, Chain, PrefixIndex, namespace
from lola_vllm.sessions.names import SHARED
from lola_vllm.sessions.request import FIELD, OWN_REQUEST, read_wish

logger = logging.getLogger("vllm.lola")

# Tokens of the prompts that are remembered, 4 bytes each.
MAX_TOKENS = 2**21

Generate = Callable[..., AsyncIterator[Any]]


class Point(NamedTuple):
    """A place in a prompt where a state is stored, or is to be stored now.

    Attributes:
        num_tokens: before it. key: of these tokens. new: nobody has stored it yet.
    """

    num_tokens: int
    key: bytes
    new: bool


class Beginnings:
    """The prompts of late, and the places in them where states are stored.

    Args:
        max_tokens: of all prompts together; the oldest are forgotten.
    """

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self.max_tokens = max_tokens
        self._texts: OrderedDict[bytes, Chain] = OrderedDict()  # by key; each ends in a point
        self._through: dict[bytes, bytes] = {}  # boundary -> the newest text that goes through it
        self._points = PrefixIndex()
        self._tokens = 0

    def meet(self, chain: Chain) -> Point | None:
        """Take a prompt in, and say from which place in it a state is of use.

        A new place pays if it saves `SPAN` tokens or more.
        """
        longest = min(self._common(chain), len(chain) - 1)
        known = next((int(n) for n in self._points.prefixes(chain, longest)), 0)
        point = None
        if longest - known >= SPAN:
            self._add(chain.prefix(longest))
            point = Point(longest, chain.key(longest), True)
        elif known:
            point = Point(known, chain.key(known), False)
        self._add(chain)
        return point

    def forget(self, chain: Chain, above: int, upto: int) -> None:
        """States of a text with more than `above` and at most `upto` tokens are not stored."""
        for n in map(int, list(self._points.prefixes(chain, upto))):
            if n > above:
                self._drop(chain.key(n))

    def _common(self, chain: Chain) -> int:
        """Tokens that a prompt has in common with an earlier one, at least `SPAN`, or 0."""
        for link in range(len(chain) // SPAN, 0, -1):
            text = self._through.get(chain.boundary(link * SPAN))
            if text is not None:
                theirs = self._texts[text].tokens
                start, stop = link * SPAN, min(len(chain), len(theirs))
                differ = np.flatnonzero(chain.tokens[start:stop] != theirs[start:stop])
                return start + int(differ[0]) if len(differ) else stop
        return 0

    def _add(self, chain: Chain) -> None:
        n = len(chain)
        if n < SPAN:
            return
        key = chain.key(n)
        self._drop(key)
        self._texts[key] = chain
        self._tokens += n
        self._points.add(chain.boundary(n), n, key, str(n))
        for link in range(1, n // SPAN + 1):
            self._through[chain.boundary(link * SPAN)] = key
        while self._tokens > self.max_tokens:
            self._drop(next(iter(self._texts)))

    def _drop(self, key: bytes) -> None:
        chain = self._texts.pop(key, None)
        if chain is None:
            return
        n = len(chain)
        self._tokens -= n
        self._points.remove(chain.boundary(n), n, key, str(n))
        for link in range(1, n // SPAN + 1):
            boundary = chain.boundary(link * SPAN)
            if self._through.get(boundary) == key:
                del self._through[boundary]


class SharedStates:
    """Reads the common part of prompts first, where its state is not stored yet.

    Args:
        generate: the engine client's method.
    """

    def __init__(self, generate: Generate) -> None:
        self._generate = generate
        self._beginnings = Beginnings()
        self._reading: dict[bytes, asyncio.Task[int]] = {}

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any
    ) -> AsyncIterator[Any]:
        """As the engine client's method, with the common part read before."""
        chain = _chain(prompt, sampling_params, kwargs.get("lora_request"))
        point = None if chain is None else self._beginnings.meet(chain)
        computed = 0  # for this request alone, so it is none that others had computed
        if point is not None:
            ttl = read_wish(transfer_params(sampling_params)).ttl
            computed = await self._read(point, prompt, kwargs, ttl)
        outputs = self._generate(prompt, sampling_params, request_id, **kwargs)
        async with aclosing(outputs):  # type: ignore[type-var]
            async for output in outputs:
                told = (output.kv_transfer_params or {}).get(FIELD, {})
                restored = told.get("restored_tokens")
                if chain and point and restored is not None and restored < point.num_tokens:
                    self._beginnings.forget(chain, restored, point.num_tokens)
                if computed:
                    _count_out(output, computed)
                yield output

    async def _read(
        self, point: Point, prompt: Mapping[str, Any], options: dict[str, Any], ttl: float | None
    ) -> int:
        """Wait until the state at a place is stored. If that fails, the request goes on without.

        Returns:
            Tokens that were computed for this request, and for no other that waits.
        """
        task = self._reading.get(point.key)
        if task is not None:
            await asyncio.shield(task)
        elif point.new:
            task = asyncio.ensure_future(self._store(point, prompt, options, ttl))
            self._reading[point.key] = task
            task.add_done_callback(lambda _: self._reading.pop(point.key, None))
            return await asyncio.shield(task)  # others may wait for it too
        return 0

    async def _store(
        self, point: Point, prompt: Mapping[str, Any], options: dict[str, Any], ttl: float | None
    ) -> int:
        """Store the state at a place, for as long as the request's own; tokens that it computed."""
        part = {k: v for k, v in prompt.items() if k != "prompt"}
        part["prompt_token_ids"] = list(prompt["prompt_token_ids"][: point.num_tokens])
        lola = {"save": SHARED + point.key.hex()[:16], "answer": False}
        if ttl is not None:
            lola["ttl"] = ttl
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"kv_transfer_params": {FIELD: lola}},
        )
        kept = {name: options[name] for name in ("lora_request", "priority") if name in options}
        try:
            told: dict[str, Any] = {}
            name = OWN_REQUEST + uuid.uuid4().hex
            async for output in self._generate(part, params, name, **kept):
                told = (output.kv_transfer_params or {}).get(FIELD, {})
        except Exception as error:
            logger.warning("LoLA sessions: the start of a prompt was not stored: %s", error)
            return 0
        return point.num_tokens - int(told.get("restored_tokens", 0))


def _count_out(output: Any, computed: int) -> None:
    """What was computed for a request just before it is not cached and not restored."""
    if output.num_cached_tokens is not None:
        output.num_cached_tokens = max(0, output.num_cached_tokens - computed)
    told = (output.kv_transfer_params or {}).get(FIELD, {})
    if told.get("restored_tokens"):
        restored = max(0, told["restored_tokens"] - computed)
        output.kv_transfer_params = {
            **output.kv_transfer_params, FIELD: {**told, "restored_tokens": restored},
        }  # fmt: skip


def _chain(prompt: Any, params: Any, adapter: Any) -> Chain | None:
    """The digests of a request's prompt; None where nothing is to be stored or restored."""
    if not isinstance(prompt, Mapping) or not isinstance(params, SamplingParams):
        return None
    tokens = prompt.get("prompt_token_ids")
    if not tokens or params.prompt_logprobs is not None or "multi_modal_kwargs" in prompt:
        return None
    transfer = transfer_params(params)
    wish = transfer.get(FIELD) or {} if isinstance(transfer, Mapping) else {}
    if not isinstance(wish, Mapping) or "from" in wish or wish.get("save") is False:
        return None
    name = "" if adapter is None else adapter.lora_name
    return Chain(namespace("", name, prompt.get("cache_salt") or ""), tokens)
