"""States of shared prefixes: a system prompt, or a document that is asked about again.

The store has a state at the end of each prompt and of each answer. Two prompts with a prefix in
common share none of these. So the server remembers the recent prompts. The second prompt that
shares a prefix with an earlier one is read in two parts. The first ends where the two branch, and
its state is stored under the name `shared-...`. Prompts that follow start from it. Nothing is
computed twice.

This takes the place of vLLM's prefix caching, which would keep a second state for each running
sequence. The engine's `generate` is the one method that all routes which generate call, so prompts
are read in parts in front of it (`wrappers.py`).
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from lola_vllm.memory.sessions.names import SHARED
from lola_vllm.memory.sessions.prefix_hash import HASH_BLOCK, PrefixHashes, PrefixIndex, namespace
from lola_vllm.memory.sessions.request import FIELD, OWN_REQUEST, read_params
from lola_vllm.serving.sessions.reporting import told, transfer_params

if TYPE_CHECKING:
    from lola_vllm.serving.sessions.reporting import Generate

logger = logging.getLogger("vllm.lola")

# Tokens of the prompts that are remembered, 4 bytes each.
MAX_TOKENS = 2**21


class BranchPoint(NamedTuple):
    """Where prompts branch: a state is stored there, or is to be stored now.

    Attributes:
        num_tokens: before it. prefix_hash: of these tokens. new: nobody has stored it yet.
    """

    num_tokens: int
    prefix_hash: bytes
    new: bool


class RecentPrompts:
    """The recent prompts, and where in them states are stored.

    Args:
        max_tokens: of all prompts together; the oldest are forgotten.
    """

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self.max_tokens = max_tokens
        # By prefix hash; each text ends in a branch point.
        self._texts: OrderedDict[bytes, PrefixHashes] = OrderedDict()
        self._newest: dict[bytes, bytes] = {}  # block hash -> the newest text with this block
        self._branch_points = PrefixIndex()
        self._read: set[bytes] = set()  # texts that were read to their end
        self._tokens = 0

    def observe(self, hashes: PrefixHashes) -> BranchPoint | None:
        """Take a prompt in, and say from which branch point a state is of use.

        A new one pays if it saves `HASH_BLOCK` tokens or more. A prompt that was read before has
        none: the engine goes on from just before its end.
        """
        longest = min(self._common(hashes), len(hashes) - 1)
        known = next((int(n) for n in self._branch_points.prefixes(hashes, longest)), 0)
        if hashes.prefix_hash(len(hashes)) in self._read:
            known = longest
        point = None
        if longest - known >= HASH_BLOCK:
            self._add(hashes.prefix(longest))
            point = BranchPoint(longest, hashes.prefix_hash(longest), True)
        elif known:
            point = BranchPoint(known, hashes.prefix_hash(known), False)
        self._add(hashes)
        return point

    def end(self, hashes: PrefixHashes) -> None:
        """A prompt was read to its end."""
        key = hashes.prefix_hash(len(hashes))
        if key in self._texts:
            self._read.add(key)

    def forget(self, hashes: PrefixHashes, above: int, upto: int) -> None:
        """States of a text with more than `above` and at most `upto` tokens are not stored."""
        for n in map(int, list(self._branch_points.prefixes(hashes, upto))):
            if n > above:
                self._drop(hashes.prefix_hash(n))

    def _common(self, hashes: PrefixHashes) -> int:
        """Tokens that a prompt has in common with an earlier one, at least `HASH_BLOCK`, or 0."""
        for block in range(len(hashes) // HASH_BLOCK, 0, -1):
            text = self._newest.get(hashes.block_hash(block * HASH_BLOCK))
            if text is not None:
                theirs = self._texts[text].tokens
                start, stop = block * HASH_BLOCK, min(len(hashes), len(theirs))
                differ = np.flatnonzero(hashes.tokens[start:stop] != theirs[start:stop])
                return start + int(differ[0]) if len(differ) else stop
        return 0

    def _add(self, hashes: PrefixHashes) -> None:
        n = len(hashes)
        if n < HASH_BLOCK:
            return
        key = hashes.prefix_hash(n)
        read = key in self._read
        self._drop(key)
        if read:
            self._read.add(key)
        self._texts[key] = hashes
        self._tokens += n
        self._branch_points.add(hashes.block_hash(n), n, key, str(n))
        for block in range(1, n // HASH_BLOCK + 1):
            self._newest[hashes.block_hash(block * HASH_BLOCK)] = key
        while self._tokens > self.max_tokens:
            self._drop(next(iter(self._texts)))

    def _drop(self, key: bytes) -> None:
        hashes = self._texts.pop(key, None)
        if hashes is None:
            return
        self._read.discard(key)
        n = len(hashes)
        self._tokens -= n
        self._branch_points.remove(hashes.block_hash(n), n, key, str(n))
        for block in range(1, n // HASH_BLOCK + 1):
            block_hash = hashes.block_hash(block * HASH_BLOCK)
            if self._newest.get(block_hash) == key:
                del self._newest[block_hash]


class PrefixSharing:
    """Reads the common part of prompts first, where its state is not stored yet.

    Args:
        generate: the engine client's method.
    """

    def __init__(self, generate: Generate) -> None:
        self._generate = generate
        self._recent = RecentPrompts()
        self._reading: dict[bytes, asyncio.Task[int]] = {}

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any
    ) -> AsyncIterator[Any]:
        """Call the engine client's method, with the common part read before."""
        hashes = _prompt_hashes(prompt, sampling_params, kwargs.get("lora_request"))
        point = None if hashes is None else self._recent.observe(hashes)
        computed = 0  # for this request alone, so it is none that others had computed
        if point is not None:
            ttl = read_params(transfer_params(sampling_params)).ttl
            computed = await self._read(point, prompt, kwargs, ttl)
        # An async generator, which vLLM types as an iterator.
        outputs: Any = self._generate(prompt, sampling_params, request_id, **kwargs)
        async with aclosing(outputs):
            async for output in outputs:
                if hashes:
                    self._recent.end(hashes)
                restored = told(output).get("restored_tokens")
                if hashes and point and restored is not None and restored < point.num_tokens:
                    self._recent.forget(hashes, restored, point.num_tokens)
                if computed:
                    _count_out(output, computed)
                yield output

    async def _read(
        self,
        point: BranchPoint,
        prompt: Mapping[str, Any],
        options: dict[str, Any],
        ttl: float | None,
    ) -> int:
        """Wait until the state at a branch point is stored. If that fails, the request goes on
        without.

        Returns:
            Tokens that were computed for this request, and for no other that waits.
        """
        task = self._reading.get(point.prefix_hash)
        if task is not None:
            await asyncio.shield(task)
        elif point.new:
            task = asyncio.ensure_future(self._store(point, prompt, options, ttl))
            self._reading[point.prefix_hash] = task
            task.add_done_callback(lambda _: self._reading.pop(point.prefix_hash, None))
            return await asyncio.shield(task)  # others may wait for it too
        return 0

    async def _store(
        self,
        point: BranchPoint,
        prompt: Mapping[str, Any],
        options: dict[str, Any],
        ttl: float | None,
    ) -> int:
        """Store the state at a branch point, for as long as the request's own; tokens that it
        computed."""
        part = {k: v for k, v in prompt.items() if k != "prompt"}
        part["prompt_token_ids"] = list(prompt["prompt_token_ids"][: point.num_tokens])
        lola = {"save": SHARED + point.prefix_hash.hex()[:16], "answer": False}
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
            restored = 0
            name = OWN_REQUEST + uuid.uuid4().hex
            async for output in self._generate(part, params, name, **kept):
                restored = int(told(output).get("restored_tokens", 0))
        except Exception as error:
            logger.warning("LoLA sessions: the start of a prompt was not stored: %s", error)
            return 0
        return point.num_tokens - restored


def _count_out(output: Any, computed: int) -> None:
    """What was computed for a request just before it is not cached and not restored."""
    if output.num_cached_tokens is not None:
        output.num_cached_tokens = max(0, output.num_cached_tokens - computed)
    said = told(output)
    if said.get("restored_tokens"):
        restored = max(0, said["restored_tokens"] - computed)
        output.kv_transfer_params = {
            **output.kv_transfer_params, FIELD: {**said, "restored_tokens": restored},
        }  # fmt: skip


def _prompt_hashes(prompt: Any, params: Any, adapter: Any) -> PrefixHashes | None:
    """The hashes of a request's prompt; None where nothing is to be stored or restored."""
    if not isinstance(prompt, Mapping) or not isinstance(params, SamplingParams):
        return None
    tokens = prompt.get("prompt_token_ids")
    if not tokens or params.prompt_logprobs is not None or "multi_modal_kwargs" in prompt:
        return None
    transfer = transfer_params(params)
    lola = transfer.get(FIELD) or {} if isinstance(transfer, Mapping) else {}
    if not isinstance(lola, Mapping) or "from" in lola or lola.get("save") is False:
        return None
    name = "" if adapter is None else adapter.lora_name
    return PrefixHashes(namespace("", name, prompt.get("cache_salt") or ""), tokens)
