"""Requests and the store of states: the half of the connector that vLLM's scheduler calls."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

from lola_vllm.engine.vllm.waypoints import WaypointPlan
from lola_vllm.memory.sessions.catalog import NotStored
from lola_vllm.memory.sessions.fingerprint import adapter_fingerprint
from lola_vllm.memory.sessions.manager import SessionManager
from lola_vllm.memory.sessions.orders import Outcome
from lola_vllm.memory.sessions.prefix_hash import salt_hash
from lola_vllm.memory.sessions.request import LIBRARY_REQUEST, RequestState, read_params
from lola_vllm.memory.sessions.shared_prefixes import RecentPrompts, Waypoints
from lola_vllm.memory.sessions.store import SessionStore
from lola_vllm.memory.sessions.tiers import SessionKey, Stored
from lola_vllm.models.files import CheckpointError

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = init_logger("vllm.lola")

MIN_TOKENS = 64  # a shorter text that nobody named is computed again sooner than it is read


def _harmless(default: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A method whose exceptions are logged: in the scheduler they would end the engine."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            except Exception:
                logger.exception("LoLA sessions: %s failed; the request goes on", method.__name__)
                return default

        return call

    return decorate


class SchedulerHalf:
    """What becomes of requests.

    Args:
        store: of this engine. block_size: tokens between two blocks of a request.
        trained_length: tokens to which the model was trained.
        plan: where prompts have waypoints; None: nowhere.
    """

    def __init__(
        self,
        store: SessionStore,
        block_size: int,
        trained_length: int,
        plan: WaypointPlan | None = None,
    ) -> None:
        self.store = store
        self.plan = plan or WaypointPlan()
        self._waypoints = Waypoints(store)
        self._recent = RecentPrompts()
        self._branching: dict[bytes, str] = {}  # prefix hash -> who is to store the state
        self._numbers = itertools.count()
        self.trained_length = trained_length
        self.manager = SessionManager(store)
        self.block_size = block_size
        self.request_states: dict[str, RequestState] = {}
        self._prompts: dict[str, Request] = {}  # whose end has not been stored
        # Requests that go on with a session, in the order in which they came.
        self._queues: dict[SessionKey, deque[str]] = {}

    @_harmless(None)
    def arrive(self, request: Request) -> None:
        """Read what a request wants."""
        own = request.request_id.startswith(LIBRARY_REQUEST)
        params = read_params(request.kv_transfer_params, request.session_id, own)
        adapter = ""
        lora = request.lora_request
        tokens = request.prompt_token_ids
        problem = None
        if lora is not None:
            try:
                adapter = adapter_fingerprint(lora.lora_name, lora.lora_path)
            except (CheckpointError, OSError) as error:
                problem = f"the adapter's weights cannot be read: {error}"
        if tokens is None:
            problem = "the prompt is given as embeddings, which no tokens name"
        salt = salt_hash(request.cache_salt)
        hashes = self.store.prefix_hashes(tokens or (), adapter, salt)
        req_state = RequestState(params, adapter, salt, hashes, number=next(self._numbers))
        for fault in (*params.faults, *([problem] if problem else [])):
            req_state.explain(fault)
            req_state.unsaved = fault
        if problem:
            req_state.params = read_params({"lola": {"from": False, "save": False}})
        elif params.faults:
            pass
        elif not params.restore:
            req_state.explain("not asked for")
        elif request.skip_reading_prefix_cache:
            req_state.explain("the log-probabilities of all of the prompt were asked for")
        elif self.plan.keeps and params.source is None and params.save and params.answer:
            req_state.branch = self._recent.observe(hashes)
        self.request_states[request.request_id] = req_state
        self._prompts[request.request_id] = request
        if req_state.session is not None:
            self._queues.setdefault(req_state.session, deque()).append(request.request_id)

    @_harmless(0)
    def match(self, request: Request, computed: int) -> int | None:
        """Tokens that a stored state has beyond `computed`; None while another request goes on
        with the same session."""
        req_state = self.request_states.get(request.request_id)
        if req_state is None:
            return 0
        if req_state.session and self._queues[req_state.session][0] != request.request_id:
            req_state.explain(
                f"waited for another request of session {req_state.params.session!r}: one at a "
                "time goes on with a session; requests that may run together need a session each"
            )
            return None
        if req_state.version != self.store.version:
            self._look_up(req_state, request)
        if self._waits_for_branch(req_state, request.request_id):
            return None
        found = req_state.found
        if found is None or not req_state.params.restore or request.skip_reading_prefix_cache:
            return 0
        if req_state.covered <= computed:
            req_state.missed = (
                f"the prefix cache has {computed} tokens, which is no less than stored"
            )
            return 0
        return req_state.covered - computed

    def load(self, request: Request, state_index: int) -> None:
        """Order the load of the state that was found."""
        req_state = self.request_states[request.request_id]
        assert req_state.found is not None
        req_state.restored = req_state.covered
        self.store.load(req_state.found, state_index, request.request_id)
        self.store.counts["hits"] += 1
        self.store.counts["restored-tokens"] += req_state.restored

    @_harmless(None)
    def end_prompts(self, scheduled: dict[str, int], block_ids: Any) -> None:
        """Store the states at the ends of prompts whose last piece runs in this step, and at the
        waypoints that it comes past.

        Args:
            scheduled: tokens of each request in the step. block_ids: of a request by its id.
        """
        for name in self._prompts.keys() & scheduled.keys():
            request = self._prompts[name]
            n = request.num_computed_tokens + scheduled[name]
            self._pass(request, n, block_ids)
            if n >= request.num_prompt_tokens:
                del self._prompts[name]
                self._recent.end(self.request_states[name].hashes)
                if n == request.num_prompt_tokens:
                    self._save(request, n, "prompt", block_ids(name))

    @_harmless((False, None))
    def finish(self, request: Request, blocks: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Store the state of a request that ends.

        Returns:
            Whether its blocks are to be kept until it is copied, and what the client is told.
        """
        name = request.request_id
        self._prompts.pop(name, None)
        req_state = self.request_states.pop(name, None)
        if req_state is None:
            return False, None
        self._leave_branch(req_state, name)
        if req_state.session is not None:
            queue = self._queues[req_state.session]
            queue.remove(name)
            if not queue:
                del self._queues[req_state.session]
        copying = False
        n = request.num_computed_tokens
        req_state.beyond = max(0, request.num_tokens - self.trained_length)
        if request.status not in (
            RequestStatus.FINISHED_STOPPED,
            RequestStatus.FINISHED_LENGTH_CAPPED,
            RequestStatus.FINISHED_REPETITION,
        ):
            req_state.unsaved = req_state.unsaved or "the request did not come to its end"
        elif n > request.num_tokens:
            req_state.unsaved = req_state.unsaved or "its last tokens are not known"
        elif req_state.params.answer:
            copying = self._save(request, n, "answer", blocks, req_state)
        return copying, req_state.answer()

    @_harmless(None)
    def note(self, outcomes: list[tuple[int, Outcome]]) -> None:
        """Take note of what the ranks report."""
        for _, outcome in outcomes:
            if outcome.event == "load-failed" and outcome.request in self.request_states:
                req_state = self.request_states[outcome.request]
                req_state.restored = 0
                req_state.explain(f"a stored state could not be used: {outcome.reason}")
        self.store.apply(outcomes)

    def _look_up(self, req_state: RequestState, request: Request) -> None:
        """Find the state to start from, and the conversation that the request goes on with."""
        req_state.version = self.store.version
        req_state.found = req_state.missed = None
        n = len(req_state.hashes)
        longest = n - 1  # a token is always computed
        reach = n if self.plan.covers_one_less(n) else longest
        req_state.parent = self.store.find(req_state.hashes, reach)
        source = req_state.params.source
        req_state.found = req_state.parent
        if req_state.found is None and req_state.params.restore:
            req_state.missed = "no stored state is of a prefix of this prompt"
        if source is None:
            return
        try:
            req_state.found = self.store.resolve(
                source, req_state.hashes, longest, req_state.adapter, req_state.salt
            )
            req_state.parent, req_state.missed = req_state.found, None
        except NotStored as error:
            req_state.missed = str(error.args[0])

    def _waits_for_branch(self, req_state: RequestState, name: str) -> bool:
        """Whether an earlier request is about to store the state at which this one branches from
        others. If nobody is, and there is none, this one stores it."""
        if req_state.branch <= req_state.covered or req_state.waypoints is not None:
            return False
        other = self._branching.setdefault(req_state.hashes.prefix_hash(req_state.branch), name)
        return self.request_states[other].number < req_state.number

    def _leave_branch(self, req_state: RequestState, name: str) -> None:
        """A request has stored the state that others wait for, or will not."""
        key = req_state.hashes.prefix_hash(req_state.branch)
        if self._branching.get(key) == name:
            del self._branching[key]

    def _pass(self, request: Request, end: int, block_ids: Any) -> None:
        """Order copies of the states at a prompt's waypoints in a step.

        Args:
            end: tokens after the step. block_ids: of a request by its id.
        """
        name, start = request.request_id, request.num_computed_tokens
        req_state = self.request_states[name]
        params, branch = req_state.params, req_state.branch
        if req_state.waypoints is None:
            # What is only read is gone on with at its end, and what was composed by its name.
            parent = req_state.parent
            apart = not params.answer or (parent is not None and parent.header.composed is not None)
            wanted = params.save and not apart
            n = request.num_prompt_tokens
            waypoints = set(self.plan.waypoints(start, n) if wanted else ())
            if self._branching.get(req_state.hashes.prefix_hash(branch)) == name:
                waypoints.add(branch)
            req_state.waypoints = sorted(waypoints)
        index = (end - 1) // self.block_size
        for n in req_state.waypoints:
            if not start < n <= end:
                continue
            blocks = block_ids(name)
            if index >= len(blocks) or blocks[index] == 0:
                break
            stored = self._waypoints.save(
                req_state.hashes, n, blocks[index], n < end, branches=n == branch, ttl=params.ttl,
                adapter=req_state.adapter, salt=req_state.salt, parent=req_state.parent,
            )  # fmt: skip
            if n == branch and stored is not None:
                # The request goes on from it, in the conversation that it would go on with.
                req_state.turn = req_state.turn or self.store.open_turn(
                    params.session, req_state.parent, req_state.salt
                )
                req_state.parent = stored
        if end >= branch:
            self._leave_branch(req_state, name)

    def _save(
        self,
        request: Request,
        n: int,
        kind: str,
        blocks: list[int],
        req_state: RequestState | None = None,
    ) -> bool:
        """Order a copy of the state after n tokens; whether one is made."""
        req_state = req_state or self.request_states[request.request_id]
        if not req_state.params.save:
            req_state.unsaved = req_state.unsaved or "not asked for"
            return False
        if req_state.params.session is None and n < MIN_TOKENS:
            req_state.unsaved = f"{n} tokens are computed again sooner than they are read"
            return False
        index = (n - 1) // self.block_size
        if not 0 <= index < len(blocks) or blocks[index] == 0:
            req_state.unsaved = f"the pool no longer has the state after {n} tokens"
            return False
        hashes = req_state.hashes
        composed = req_state.parent.header.composed if req_state.parent else None
        tail = request.all_token_ids[n:] if kind == "answer" else ()
        if kind == "answer" or n > len(hashes) or composed is not None:
            tokens = request.all_token_ids[:n]
            hashes = self.store.prefix_hashes(tokens, req_state.adapter, req_state.salt, composed)
        if req_state.turn is None:
            req_state.turn = self.store.open_turn(
                req_state.params.session, req_state.parent, req_state.salt
            )
        parent: Stored | None = req_state.parent if req_state.stored is None else req_state.stored
        try:
            req_state.stored, new = self.store.save(
                req_state.turn, hashes, n, kind, blocks[index],
                adapter=req_state.adapter, parent=parent, ttl=req_state.params.ttl,
                request=request.request_id if kind == "answer" else "", tail=tail,
                part=req_state.params.part,
            )  # fmt: skip
        except NotStored as error:
            req_state.unsaved = str(error.args[0])
            return False
        req_state.unsaved = None
        return new
