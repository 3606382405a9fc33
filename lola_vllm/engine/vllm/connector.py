"""The store of states in vLLM: a KV connector whose blocks are whole states.

The scheduler's half looks a prompt up, gives orders, and answers (`session_requests.py`). The
workers' half has the pool and carries the orders out (`memory/sessions/transfer.py`). Orders travel
with each step's metadata, outcomes with its output.

* A state is loaded asynchronously, into the last block of a request that waits for it: in align
  mode vLLM copies blocks before a synchronous load would start.
* The state at the end of a prompt is copied after the step that ran the prompt's last piece and
  before the next step, whose decode changes it. vLLM calls `wait_for_save` there, outside of CUDA
  graphs, and a copy on the device keeps the order of its stream.
* The state at a waypoint, inside of a step, is copied by the layers themselves (`waypoints.py`).
* The state at the end of a request is copied in the step after its last one; vLLM keeps its block
  until the copy is reported.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.logger import init_logger

from lola_vllm.core.layers import SequenceLayout
from lola_vllm.core.ops import LayerState
from lola_vllm.core.ops.compose import Composer
from lola_vllm.core.ops.composition import Composition
from lola_vllm.core.ops.rope_table import RopeTable
from lola_vllm.core.ops.shift_schedule import MAX_LENGTH, ShiftSchedule
from lola_vllm.engine.vllm import compat
from lola_vllm.engine.vllm.attention import LolaAttention, composer_of, rope_of
from lola_vllm.engine.vllm.backend import LolaMetadata
from lola_vllm.engine.vllm.cache import layer_layouts, lola_hf_config, row_bytes, sequence_layout
from lola_vllm.engine.vllm.questions import Questions
from lola_vllm.engine.vllm.session_requests import SchedulerHalf
from lola_vllm.engine.vllm.waypoints import Waypoint, WaypointPlan
from lola_vllm.memory.documents.keys import DocumentKeys, key_bytes
from lola_vllm.memory.documents.shelf import KeyShelf
from lola_vllm.memory.sessions.directory import model_directory
from lola_vllm.memory.sessions.fingerprint import Fingerprint, model_fingerprint
from lola_vllm.memory.sessions.host_copy import staging_bytes
from lola_vllm.memory.sessions.orders import Order, Outcome, Save
from lola_vllm.memory.sessions.settings import StoreSettings
from lola_vllm.memory.sessions.store import SessionStore
from lola_vllm.memory.sessions.transfer import TransferWorker

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.lola")


@dataclass
class SessionMetadata(KVConnectorMetadata):
    """Orders for a step."""

    orders: list[Order] = field(default_factory=list)


@dataclass
class SessionOutcomes(KVConnectorWorkerMetadata):
    """What the ranks report after a step."""

    outcomes: list[tuple[int, Outcome]]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> SessionOutcomes:
        """Join the outcomes of two ranks."""
        assert isinstance(other, SessionOutcomes)
        return SessionOutcomes(self.outcomes + other.outcomes)


class LolaStateConnector(KVConnectorBase_V1, SupportsHMA):
    """Both halves; vLLM makes one of each role."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.half: SchedulerHalf | None = None
        self.transfer: TransferWorker | None = None
        self._arrived: set[str] = set()
        self._failed: set[str] = set()
        self._copied: set[str] = set()
        self._waypoints: dict[str, Waypoint] = {}  # of the step, by the id of the state
        self._outcomes: list[Outcome] = []
        # Made when it is first needed, and anew when the layers took new weights into use.
        self._composer: Composer | None = None
        self._bound: list[LayerState | None] = []
        self._rope: RopeTable | None = None
        if role == KVConnectorRole.SCHEDULER:
            block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
            config = lola_hf_config(vllm_config)
            # With prefix caching there are states at block boundaries.
            plan = WaypointPlan(
                sequence_layout(vllm_config).page.update_interval,
                ShiftSchedule.of(config),
                keeps=not vllm_config.cache_config.enable_prefix_caching,
            )
            trained = config.max_position_embeddings
            self.half = SchedulerHalf(open_store(vllm_config), block_size, trained, plan)
            _local[0] = weakref.ref(self.half)
            compat.add_engine_method("lola_sessions", answer_engine)

    @property
    def requires_kv_delivery(self) -> bool:
        """Whether a preempted request must keep its state: no, it is computed again."""
        return False

    # The workers' half.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take the rank's pool: `[num_blocks, 1, 1, rank_bytes]` of bytes, of one layer."""
        (cache,) = kv_caches.values()
        pool = cache[0] if isinstance(cache, list | tuple) else cache
        settings, parallel = store_settings(self._vllm_config), self._vllm_config.parallel_config
        fingerprint = fingerprint_of(self._vllm_config)
        stage = get_pp_group().rank_in_group
        rank = stage * parallel.tensor_parallel_size + get_tensor_model_parallel_rank()
        directory, rank_bytes = settings.directory, pool[0].numel()
        self.transfer = TransferWorker(
            pool.flatten(1),
            fingerprint,
            None if directory is None else model_directory(directory, fingerprint),
            rank,
            parallel.world_size,
            sequence_layout(self._vllm_config, get_tensor_model_parallel_rank()).cleaned,
            settings.max_waiting(rank_bytes * parallel.world_size),
            settings.key(),
            self._composed,
            KeyShelf(
                self._keys_of,
                None if directory is None else model_directory(directory, fingerprint),
                settings.key(),
            ),
        )

    def _keys_of(
        self, row: torch.Tensor, num_tokens: int, newest: int | None = None
    ) -> DocumentKeys:
        """The keys of a library's document, of a state of this rank; or of the newest tokens."""
        layer = self._layers()[0]
        if self._rope is None:
            self._rope = rope_of(layer)
        schedule = ShiftSchedule.of(lola_hf_config(self._vllm_config))
        return DocumentKeys.of_state(layer.sequence, row, num_tokens, self._rope, newest, schedule)

    def _layers(self) -> list[LolaAttention]:
        modules = self._vllm_config.compilation_config.static_forward_context.values()
        return [module for module in modules if isinstance(module, LolaAttention)]

    def _composed(self, states: Sequence[torch.Tensor], lengths: Sequence[int]) -> torch.Tensor:
        """The state of documents one behind the other, with the model's weights as they are."""
        layers = self._layers()
        bound = [layer.state for layer in layers]
        if self._composer is None or any(
            x is not y for x, y in zip(bound, self._bound, strict=True)
        ):
            self._bound, self._composer = bound, composer_of(layers)
        return self._composer.compose(states, lengths)[0]

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Take a step's orders, before it runs, and have the layers look out for its waypoints."""
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, SessionMetadata) and self.transfer is not None
        pool = self.transfer.pool
        self._waypoints = {
            order.header.id: Waypoint(
                order.state_index,
                order.header.num_tokens,
                torch.empty_like(pool[order.state_index]),
                sequence_layout(self._vllm_config, get_tensor_model_parallel_rank()),
            )
            for order in connector_metadata.orders
            if isinstance(order, Save) and order.within
        }
        if self._waypoints and is_forward_context_available():
            metadata = get_forward_context().attn_metadata
            for step in metadata.values() if isinstance(metadata, dict) else ():
                assert isinstance(step, LolaMetadata)
                step.waypoints = list(self._waypoints.values())

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing: loads are orders."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: no request runs before its state is loaded."""

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: a state is complete after the step only."""

    def wait_for_save(self) -> None:
        """Carry out the step's orders; vLLM calls this after the step's work was given out."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, SessionMetadata)
        self._execute(metadata.orders)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Requests whose states were loaded, could not be loaded, or are copied."""
        results = KVConnectorTransferResults(self._copied, self._arrived, self._failed)
        self._copied, self._arrived, self._failed = set(), set(), set()
        return results

    def build_connector_worker_meta(self) -> SessionOutcomes | None:
        """The rank's outcomes, for the scheduler's half."""
        outcomes, self._outcomes = self._outcomes, []
        assert self.transfer is not None
        return SessionOutcomes([(self.transfer.rank, o) for o in outcomes]) if outcomes else None

    def _execute(self, orders: Iterable[Order]) -> None:
        assert self.transfer is not None
        for order in orders:
            row = None
            if isinstance(order, Save) and order.within:
                waypoint = self._waypoints.pop(order.header.id, None)
                row = waypoint.row if waypoint is not None and waypoint.complete else None
            self.transfer.execute(order, row)
        self.transfer.finish_loads()
        for outcome in self.transfer.take_outcomes():
            self._outcomes.append(outcome)
            if outcome.event == "loaded":
                self._arrived.add(outcome.request)
            elif outcome.event == "load-failed":
                self._arrived.add(outcome.request)
                self._failed.add(outcome.request)
            elif outcome.request:
                self._copied.add(outcome.request)

    def shutdown(self) -> None:
        """Write what waits to be written."""
        if self.transfer is not None:
            half = _local[0]() if _local[0] is not None else None
            if half is not None:  # in one process: no step delivers the last orders
                self._execute(half.store.take_orders())
            self.transfer.close()
            self.transfer = None
        if self.half is not None:
            self.half.store.close()

    # The scheduler's half.

    @property
    def scheduling(self) -> SchedulerHalf:
        """The scheduler's half, in the scheduler's process."""
        assert self.half is not None
        return self.half

    def on_new_request(self, request: Request) -> None:
        """A request arrives."""
        self.scheduling.arrive(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens of a stored state beyond those that vLLM has; None: the request has to wait."""
        found = self.scheduling.match(request, num_computed_tokens)
        return found, bool(found)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Order the load, into the last block."""
        if num_external_tokens:
            self.scheduling.load(request, blocks.get_block_ids()[0][-1])

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> SessionMetadata:
        """The step's orders: those of requests, of management, and of prompts that end in it."""
        assert self._kv_cache_manager is not None
        self.scheduling.end_prompts(
            scheduler_output.num_scheduled_tokens,
            lambda request: self._kv_cache_manager.get_block_ids(request)[0],
        )
        return SessionMetadata(self.scheduling.store.take_orders())

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take note of what the ranks report."""
        outcomes = connector_output.kv_connector_worker_meta
        if isinstance(outcomes, SessionOutcomes):
            self.scheduling.note(outcomes.outcomes)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Store the state of a request that ends, and answer it."""
        return self.scheduling.finish(request, block_ids[0])

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Store and answer, where there is one group of blocks."""
        return self.scheduling.finish(request, block_ids)

    def has_pending_push_work(self) -> bool:
        """Whether a step is needed, because management gave orders while nothing runs."""
        return self.scheduling.store.has_orders

    def reset_cache(self) -> bool:
        """Forget all states: vLLM asks for it when the weights have changed."""
        self.scheduling.manager.clear()
        return True


def answer_engine(engine: Any, method: str, arguments: dict[str, Any]) -> Any:
    """The method `lola_sessions` of vLLM's engine core: a call of `SessionManager` or `Questions`.

    Routes in the API server's process call it as a utility of the engine. The first call, which
    `serving/plugin.py` makes at the start, also tells the store how to wake this engine.
    """
    connector = engine.scheduler.get_kv_connector()
    if not isinstance(connector, LolaStateConnector):
        return {"error": "no states are stored", "kind": "unavailable"}
    connector.scheduling.store.wake = functools.partial(compat.wake, engine)
    manager = connector.scheduling.manager
    if method not in Questions.METHODS:
        return manager.call(method, arguments)

    def ask_worker(name: str, *args: Any) -> dict[str, Any]:
        answer: dict[str, Any] = engine.model_executor.collective_rpc(name, args=args)[0]
        return answer

    return getattr(Questions(manager, ask_worker), method)(**arguments)


# The scheduler's half, where it is in the same process as a worker's.
_local: list[weakref.ref[SchedulerHalf] | None] = [None]


def store_settings(vllm_config: VllmConfig) -> StoreSettings:
    """The settings that `config_hook` wrote into the connector's configuration."""
    transfer = vllm_config.kv_transfer_config
    assert transfer is not None
    return StoreSettings.from_mapping(
        transfer.kv_connector_extra_config, "kv_connector_extra_config"
    )


def open_store(vllm_config: VllmConfig) -> SessionStore:
    """The store of an engine.

    Raises:
        OSError: its directory cannot be used.
        StoreSettingsError: its memory is too little for copies from a device.
    """
    settings, size = store_settings(vllm_config), row_bytes(vllm_config)
    ranks = vllm_config.parallel_config.world_size
    if vllm_config.device_config.device_type != "cpu":
        settings = settings.without(ranks * staging_bytes(size))
    sequence = sequence_layout(vllm_config)
    config, page = lola_hf_config(vllm_config), sequence.page
    schedule = ShiftSchedule.of(config)
    longest = MAX_LENGTH if schedule is not None else config.max_position_embeddings

    def offsets(lengths: Sequence[int]) -> Sequence[int]:
        return Composition.of(page, lengths, schedule, longest).offsets

    store = SessionStore(
        fingerprint_of(vllm_config),
        size,
        settings,
        ranks,
        key_bytes=functools.partial(key_bytes, sequence),
        offsets=offsets,
    )
    logger.info("LoLA sessions: %s", describe_store(store))
    return store


def describe_store(store: SessionStore) -> str:
    """What is kept, where, and how to keep less, in words."""
    settings, directory = store.settings, store.directory
    size = store.rank_bytes * store.ranks / 2**20
    kept = f"states of {size:.2f} MiB, which hold what was said, are kept"
    if settings.store == "none":
        return "nothing is kept, as --lola-store none says"
    places = []
    if store.memory.budget:
        places.append(f"of all conversations in {store.memory.budget >> 20} MiB of memory")
    if directory is not None and store.disk.budget:
        which = "of all conversations" if settings.store == "all" else "of those with a name"
        sealed = "encrypted" if directory.key else "not encrypted"
        budget = store.disk.budget >> 20
        places.append(f"{which} for the next start in {directory.path} ({budget} MiB, {sealed})")
    else:
        places.append("nothing for the next start")
    off = "--lola-store none keeps nothing, docs/privacy.md has more"
    return f"{kept}: {', '.join(places)}; {len(store.states)} are there; {off}"


def fingerprint_of(vllm_config: VllmConfig) -> Fingerprint:
    """What the states of an engine belong to."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    config = lola_hf_config(vllm_config)
    stored_so = getattr(config, "quantization_config", None) is not None
    pages = SequenceLayout(layer_layouts(vllm_config)).layouts
    return model_fingerprint(
        config,
        model.model,
        pages,
        tensor_parallel=parallel.tensor_parallel_size,
        pipeline_parallel=parallel.pipeline_parallel_size,
        quantization=None if stored_so or model.quantization is None else str(model.quantization),
    )
