"""Requests and the store of states: the half of the connector that vLLM's scheduler calls."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

from lola_vllm.checkpoint.files import CheckpointError
from lola_vllm.sessions.chain import salt_hash
from lola_vllm.sessions.fingerprint import adapter_fingerprint
from lola_vllm.sessions.manage import SessionManager
from lola_vllm.sessions.orders import Outcome
from lola_vllm.sessions.request import OWN_REQUEST, Ticket, read_wish
from lola_vllm.sessions.store import NotStored, SessionStore
from lola_vllm.sessions.tiers import SessionKey, Stored

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = init_logger("vllm.lola")


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
    """

    def __init__(self, store: SessionStore, block_size: int, trained_length: int) -> None:
        self.store = store
        self.trained_length = trained_length
        self.manager = SessionManager(store)
        self.block_size = block_size
        self.tickets: dict[str, Ticket] = {}
        self._prompts: dict[str, Request] = {}  # whose end has not been stored
        # Requests that go on with a session, in the order in which they came.
        self._queues: dict[SessionKey, deque[str]] = {}

    @_harmless(None)
    def arrive(self, request: Request) -> None:
        """Read what a request wants."""
        own = request.request_id.startswith(OWN_REQUEST)
        wish = read_wish(request.kv_transfer_params, request.session_id, own)
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
        ticket = Ticket(wish, adapter, salt, self.store.chain(tokens or (), adapter, salt))
        for fault in (*wish.faults, *([problem] if problem else [])):
            ticket.explain(fault)
            ticket.unsaved = fault
        if problem:
            ticket.wish = read_wish({"lola": {"from": False, "save": False}})
        elif wish.faults:
            pass
        elif not wish.restore:
            ticket.explain("not asked for")
        elif request.skip_reading_prefix_cache:
            ticket.explain("the log-probabilities of all of the prompt were asked for")
        self.tickets[request.request_id] = ticket
        self._prompts[request.request_id] = request
        if ticket.session is not None:
            self._queues.setdefault(ticket.session, deque()).append(request.request_id)

    @_harmless(0)
    def match(self, request: Request, computed: int) -> int | None:
        """Tokens that a stored state has beyond `computed`; None while another request goes on
        with the same session."""
        ticket = self.tickets.get(request.request_id)
        if ticket is None:
            return 0
        if ticket.session and self._queues[ticket.session][0] != request.request_id:
            ticket.explain(
                f"waited for another request of session {ticket.wish.session!r}: one at a time "
                "goes on with a session; requests that may run together need sessions of their own"
            )
            return None
        if ticket.version != self.store.version:
            self._look_up(ticket, request)
        found = ticket.found
        if found is None or not ticket.wish.restore or request.skip_reading_prefix_cache:
            return 0
        if found.header.num_tokens <= computed:
            ticket.missed = f"the prefix cache has {computed} tokens, which is no less than stored"
            return 0
        return found.header.num_tokens - computed

    def load(self, request: Request, slot: int) -> None:
        """Order the load of the state that was found."""
        ticket = self.tickets[request.request_id]
        assert ticket.found is not None
        ticket.restored = ticket.found.header.num_tokens
        self.store.load(ticket.found, slot, request.request_id)
        self.store.counts["hits"] += 1
        self.store.counts["restored-tokens"] += ticket.restored

    @_harmless(None)
    def end_prompts(self, scheduled: dict[str, int], block_ids: Any) -> None:
        """Store the states at the ends of prompts whose last piece runs in this step.

        Args:
            scheduled: tokens of each request in the step. block_ids: of a request by its id.
        """
        for name in self._prompts.keys() & scheduled.keys():
            request = self._prompts[name]
            n = request.num_computed_tokens + scheduled[name]
            if n >= request.num_prompt_tokens:
                del self._prompts[name]
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
        ticket = self.tickets.pop(name, None)
        if ticket is None:
            return False, None
        if ticket.session is not None:
            queue = self._queues[ticket.session]
            queue.remove(name)
            if not queue:
                del self._queues[ticket.session]
        copying = False
        n = request.num_computed_tokens
        ticket.beyond = max(0, request.num_tokens - self.trained_length)
        if request.status not in (
            RequestStatus.FINISHED_STOPPED,
            RequestStatus.FINISHED_LENGTH_CAPPED,
            RequestStatus.FINISHED_REPETITION,
        ):
            ticket.unsaved = ticket.unsaved or "the request did not come to its end"
        elif n > request.num_tokens:
            ticket.unsaved = ticket.unsaved or "its last tokens are not known"
        elif ticket.wish.answer:
            copying = self._save(request, n, "answer", blocks, ticket)
        return copying, ticket.answer()

    @_harmless(None)
    def note(self, outcomes: list[tuple[int, Outcome]]) -> None:
        """Take note of what the ranks report."""
        for _, outcome in outcomes:
            if outcome.event == "load-failed" and outcome.request in self.tickets:
                ticket = self.tickets[outcome.request]
                ticket.restored = 0
                ticket.explain(f"a stored state could not be used: {outcome.reason}")
        self.store.apply(outcomes)

    def _look_up(self, ticket: Ticket, request: Request) -> None:
        """Find the state to start from, and the conversation that the request goes on with."""
        ticket.version = self.store.version
        ticket.found = ticket.missed = None
        longest = len(ticket.chain) - 1
        ticket.parent = self.store.find(ticket.chain, longest)
        source = ticket.wish.source
        ticket.found = ticket.parent
        if ticket.found is None and ticket.wish.restore:
            ticket.missed = "no stored state is of a beginning of this prompt"
        if source is None:
            return
        try:
            ticket.found = self.store.resolve(
                source, ticket.chain, longest, ticket.adapter, ticket.salt
            )
            ticket.parent = ticket.found
        except NotStored as error:
            ticket.missed = str(error.args[0])

    def _save(
        self,
        request: Request,
        n: int,
        kind: str,
        blocks: list[int],
        ticket: Ticket | None = None,
    ) -> bool:
        """Order a copy of the state after n tokens; whether one is made."""
        ticket = ticket or self.tickets[request.request_id]
        if not ticket.wish.save:
            ticket.unsaved = ticket.unsaved or "not asked for"
            return False
        if ticket.wish.session is None and n < self.store.settings.min_tokens:
            ticket.unsaved = f"{n} tokens are computed again sooner than they are read"
            return False
        index = (n - 1) // self.block_size
        if not 0 <= index < len(blocks) or blocks[index] == 0:
            ticket.unsaved = f"no slot holds the state after {n} tokens"
            return False
        chain = ticket.chain
        tail = request.all_token_ids[n:] if kind == "answer" else ()
        if kind == "answer" or n > len(chain):
            tokens = request.all_token_ids[:n]
            chain = self.store.chain(tokens, ticket.adapter, ticket.salt)
        if ticket.turn is None:
            ticket.turn = self.store.open_turn(ticket.wish.session, ticket.parent, ticket.salt)
        parent: Stored | None = ticket.parent if ticket.stored is None else ticket.stored
        try:
            ticket.stored, new = self.store.save(
                ticket.turn, chain, n, kind, blocks[index],
                adapter=ticket.adapter, parent=parent, ttl=ticket.wish.ttl,
                request=request.request_id if kind == "answer" else "", tail=tail,
            )  # fmt: skip
        except NotStored as error:
            ticket.unsaved = str(error.args[0])
            return False
        ticket.unsaved = None
        return new
