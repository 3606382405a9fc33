"""The engine for routes and metrics: facts from its config and answers of its workers."""

from __future__ import annotations

import asyncio
import platform
import uuid
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import torch
from fastapi import HTTPException
from vllm import SamplingParams
from vllm import __version__ as vllm_version
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.metrics.prometheus import get_prometheus_registry

from lola_vllm import __version__
from lola_vllm.core.model_types import MODEL_TYPE
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.engine.estimate import parts_of
from lola_vllm.engine.vllm.cache import lola_hf_config, row_bytes, sequence_layout
from lola_vllm.engine.vllm.config_hook import WORKER_EXTENSION
from lola_vllm.engine.vllm.connectors import has_store
from lola_vllm.memory.sessions.request import FIELD
from lola_vllm.serving.library.turns import Turns
from lola_vllm.serving.library.words import LibraryWords
from lola_vllm.serving.protocol import (
    Head,
    InfoResponse,
    Layer,
    Memory,
    States,
)

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.outputs import RequestOutput

    from lola_vllm.core.state import StateLayout

# A worker answers between two steps, and a step may be a long prefill.
ANSWER_LIMIT_S = 60

# Between two looks whether a change of files is over.
RESULT_POLL_S = 0.01

# Host memory on each rank for the keys and values of a prompt (`keys.py`).
MAX_RECORD_BYTES = 2**30

# The status for each kind of `SessionError`.
SESSION_STATUS = {
    "bad": HTTPStatus.BAD_REQUEST,
    "not-found": HTTPStatus.NOT_FOUND,
    "exists": HTTPStatus.CONFLICT,
    "unavailable": HTTPStatus.SERVICE_UNAVAILABLE,
}


class LolaEngine:
    """Questions to the engine about LoLA's states.

    Raises:
        HTTPException: (every method) this engine cannot answer; vLLM gives it the form of its
        errors.
    """

    def __init__(self, client: EngineClient, model: str) -> None:
        self.client = client
        self.model = model
        self.config = client.vllm_config
        self._backend: str | None = None
        self._store_id: str | None = None
        # One state at a time, because each copy takes memory outside of vLLM's pool.
        self._reading = asyncio.Lock()
        self.questions = Turns()  # to libraries
        self.hearing = asyncio.Lock()  # layers show their queries of one request at a time
        self._cleanups: set[asyncio.Task[Any]] = set()
        self.words = LibraryWords()
        self.is_lola = getattr(self.config.model_config.hf_config, "model_type", "") == MODEL_TYPE
        if self.is_lola:
            self.lola = lola_hf_config(self.config).lola
            self.sequence = sequence_layout(self.config)
            self.schedule = ShiftSchedule.of(lola_hf_config(self.config))
            self.num_layers = int(self.config.model_config.hf_config.num_hidden_layers)
            self.states_per_sequence = (
                2 if self.config.cache_config.mamba_cache_mode == "align" else 1
            )

    @property
    def page(self) -> StateLayout:
        """Of the first rank; see `SequenceLayout.page`."""
        return self.sequence.page

    @property
    def num_states(self) -> int:
        """States that fit in one engine; vLLM keeps a block as its null block."""
        blocks = self.config.cache_config.num_gpu_blocks or 0  # the sum over all engines
        return max(0, blocks // self.config.parallel_config.data_parallel_size - 1)

    @property
    def bytes_per_state(self) -> int:
        """One state on the first rank."""
        return row_bytes(self.config)

    def num_states_used(self) -> int | None:
        """States that running sequences hold, from vLLM's gauge; None without statistics."""
        # With several API servers the engine reports to one only, so all gauges are read.
        usage = get_prometheus_registry().get_sample_value(
            "vllm:kv_cache_usage_perc", {"model_name": self.model, "engine": "0"}
        )
        return None if usage is None else round(usage * self.num_states)

    async def info(self) -> InfoResponse:
        """What `GET /v1/lola/info` answers."""
        self.check()
        per_sequence = self.states_per_sequence
        if self._backend is None and self.readable() is None:
            self._backend = (await self.ask_workers("lola_describe"))[0]["backend"]
        cache = self.config.cache_config
        return InfoResponse(
            model=self.model,
            lola_config=self.lola.model_dump(),
            num_layers=self.num_layers,
            memory=Memory(
                parts=parts_of(self.sequence),
                bytes_per_state=self.bytes_per_state,
                bytes_per_sequence=per_sequence * self.bytes_per_state,
                break_even_tokens=self.sequence.break_even_tokens(per_sequence),
                full_kv_bytes_per_token=self.sequence.full_kv_bytes_per_token,
            ),
            states=States(
                total=self.num_states,
                per_sequence=per_sequence,
                used=self.num_states_used(),
                sequences=self.num_states // per_sequence,
            ),
            block_size=cache.block_size if cache.enable_prefix_caching else None,
            max_model_len=self.config.model_config.max_model_len,
            tensor_parallel_size=self.config.parallel_config.tensor_parallel_size,
            backend=self._backend,
            versions={
                "lola_vllm": __version__,
                "vllm": vllm_version,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        )

    async def memory(
        self,
        tokens: list[int],
        layers: list[int] | None,
        cache_salt: str | None = None,
        *,
        forgotten: bool = False,
        history: bool = False,
    ) -> list[Layer]:
        """The sparse caches after a prompt, which runs as an ordinary request of one token.

        Args:
            tokens: ids, fewer than the model's length. layers: indices, None for all.
            cache_salt: of the cached prefixes to start from and to leave behind.
            forgotten, history: as in `MemoryRequest`. The prompt then starts from no cached prefix.
        """
        self.check()
        reason = self.readable()
        if reason:
            raise HTTPException(HTTPStatus.NOT_IMPLEMENTED, reason)
        record = forgotten or history
        if record:
            self._check_record(len(tokens), forgotten)
        lola = {"save": False, "from": False} if record else {"save": False}
        async with self._reading:
            request_id = f"lola-memory-{uuid.uuid4().hex}"
            try:
                await self.ask_workers("lola_watch", request_id, len(tokens), record)
                # Nobody goes on from here.
                params = lola if has_store(self.config) else None
                await self.read(
                    tokens, request_id, params, cache_salt, skip_reading_prefix_cache=record
                )
                answers = await self.ask_workers(
                    "lola_memory", request_id, layers, forgotten, history
                )
            except BaseException:  # a disconnected client cancels this; the copy must not stay
                self.later(self.ask_workers("lola_drop", request_id))
                raise
        return joined([answer["layers"] for answer in answers])

    async def read(
        self,
        tokens: list[int],
        request_id: str,
        params: dict[str, Any] | None,
        cache_salt: str | None = None,
        skip_reading_prefix_cache: bool | None = None,
        **options: Any,
    ) -> RequestOutput | None:
        """Read a prompt, as a request of one token that nobody sees, and return its output.

        Args:
            tokens: ids of the prompt. params: of the store, None: nothing is asked of it.
            cache_salt, skip_reading_prefix_cache: as vLLM has them. options: of `generate`.
        """
        final = None
        async for output in self.client.generate(
            tokens_input(tokens, cache_salt=cache_salt),
            SamplingParams(
                max_tokens=1,
                temperature=0.0,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                skip_reading_prefix_cache=skip_reading_prefix_cache,
                extra_args=None if params is None else {"kv_transfer_params": {FIELD: params}},
            ),
            request_id,
            **options,
        ):
            final = output
        return final

    def _check_record(self, num_tokens: int, forgotten: bool) -> None:
        """Refuse what cannot be answered from the keys and values of a prompt."""
        size = num_tokens * self.sequence.full_kv_bytes_per_token
        if size > MAX_RECORD_BYTES:
            most = MAX_RECORD_BYTES // self.sequence.full_kv_bytes_per_token
            raise HTTPException(
                HTTPStatus.BAD_REQUEST,
                f"forgotten, history: {num_tokens} tokens; the keys and values of at most {most} "
                "are kept for them; give a shorter prompt, or leave the two out",
            )
        if forgotten and self.schedule is not None and self.schedule.shifted_by(num_tokens):
            raise HTTPException(
                HTTPStatus.BAD_REQUEST,
                f"forgotten = true: the prompt has {num_tokens} tokens, and errors of folded "
                f"tokens are known up to max_position_embeddings = {self.schedule.length} only, as "
                "contexts shift then; leave forgotten out, or give a shorter prompt",
            )

    async def sessions(self, method: str, **arguments: Any) -> Any:
        """What a method of `sessions.SessionManager` returns, in the engine's process.

        Raises:
            HTTPException: there is no store, or the request cannot be met; with the status that
            fits.
        """
        self.check()
        if not has_store(self.config):
            raise HTTPException(
                HTTPStatus.NOT_IMPLEMENTED,
                "this server stores no states; start it with lola-vllm serve, or with "
                """--additional-config '{"lola": {"state_ram": "1GiB"}}'""",
            )
        if self.config.parallel_config.data_parallel_size > 1:
            raise HTTPException(
                HTTPStatus.NOT_IMPLEMENTED,
                f"--data-parallel-size = {self.config.parallel_config.data_parallel_size}: each "
                "engine has sessions of its own; ask a server with one",
            )
        client: Any = self.client

        async def answered() -> Any:
            call = client.engine_core.call_utility_async
            answer = await call("lola_sessions", method, arguments)
            while isinstance(answer, dict) and "operation" in answer:  # files are changed
                await asyncio.sleep(RESULT_POLL_S)
                answer = await call("lola_sessions", "result", answer)
            return answer

        try:
            answer = await asyncio.wait_for(answered(), ANSWER_LIMIT_S)
        except TimeoutError:
            raise HTTPException(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"the engine did not answer within {ANSWER_LIMIT_S} s; try again when it has less "
                "to do",
            ) from None
        if isinstance(answer, dict) and "error" in answer:
            status = SESSION_STATUS[answer.get("kind", "unavailable")]
            raise HTTPException(status, answer["error"])
        return answer

    async def store_id(self) -> str:
        """What tells the store of this server from those of others on the machine.

        Raises:
            HTTPException: as `sessions` does.
        """
        if self._store_id is None:
            self._store_id = str((await self.sessions("stats"))["store"])
        return self._store_id

    def check(self) -> None:
        """Raise `HTTPException` unless the served model is a LoLA model."""
        if not self.is_lola:
            raise HTTPException(
                HTTPStatus.NOT_IMPLEMENTED,
                f"{self.model} is not a LoLA model; serve one to use /v1/lola "
                "(lola-vllm init makes one from a Llama)",
            )

    def readable(self) -> str | None:
        """Why states cannot be looked at in the workers, or None."""
        parallel = self.config.parallel_config
        if parallel.worker_extension_cls != WORKER_EXTENSION:
            return (
                f"--worker-extension-cls = {parallel.worker_extension_cls!r} takes the place of "
                "LoLA's own; start the server without the option"
            )
        if parallel.data_parallel_size > 1:
            return (
                f"--data-parallel-size = {parallel.data_parallel_size}: states are read from one "
                "engine only; ask a server with one"
            )
        return None

    async def ask_workers(self, method: str, *args: Any) -> list[dict[str, Any]]:
        """Every worker's answer to a method of `LolaWorkerExtension`."""
        try:
            answers = await asyncio.wait_for(
                self.client.collective_rpc(method, args=args), ANSWER_LIMIT_S
            )
        except TimeoutError:
            raise HTTPException(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"the engine did not answer {method} within {ANSWER_LIMIT_S} s; try again when it "
                "has less to do",
            ) from None
        for answer in answers:
            if "error" in answer:
                raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, answer["error"])
        return answers

    def later(self, work: Any) -> None:
        """Run a coroutine in the background."""
        task = asyncio.ensure_future(work)
        self._cleanups.add(task)
        task.add_done_callback(self._cleaned)

    def _cleaned(self, task: asyncio.Task[Any]) -> None:
        self._cleanups.discard(task)
        if not task.cancelled():
            task.exception()  # the request has reported its error; this one is dropped


def joined(answers: list[dict[Any, Any]]) -> list[Layer]:
    """One list of layers from the layers and heads of several workers."""
    heads: dict[int, dict[int, Head]] = {}
    for answer in answers:
        for layer, found in answer.items():
            heads.setdefault(int(layer), {}).update(
                {int(head): Head(**memory) for head, memory in found.items()}
            )
    return [
        Layer(layer=layer, heads=[heads[layer][head] for head in sorted(heads[layer])])
        for layer in sorted(heads)
    ]
