"""What is known of states: which there are, whose, where each is, and who leaves for whom.

The catalog knows everything about states but their bytes. What leaves a place is an order to the
ranks (`orders.py`). The store (`store.py`) adds what requests need. The catalog is safe to use from
several threads.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field, replace

from lola_vllm.memory.sessions.directory import StateDirectory, model_directory
from lola_vllm.memory.sessions.fingerprint import Fingerprint
from lola_vllm.memory.sessions.names import PAST, Reference
from lola_vllm.memory.sessions.orders import DISK, MEMORY, Drop, Order
from lola_vllm.memory.sessions.prefix_hash import PrefixHashes, PrefixIndex, Tokens, namespace
from lola_vllm.memory.sessions.settings import StoreSettings
from lola_vllm.memory.sessions.tiers import SessionKey, Stored, Tier

TOKEN_BYTES = 4  # of a token id, in memory and in files


class SessionError(Exception):
    """A request that cannot be met.

    Attributes:
        kind: "bad" (a wrong argument), "not-found", "exists" or "unavailable".
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class NotStored(SessionError):
    """Why a state that was asked for is not there, in words."""

    def __init__(self, text: str) -> None:
        super().__init__("not-found", text)


def earliest(times: Iterable[float | None]) -> float | None:
    """The first of times of which None is never; None: all are never."""
    return min((time for time in times if time is not None), default=None)


def _no_composing(_lengths: Sequence[int]) -> Sequence[int]:
    raise ValueError("the states of this store are not composed")


@dataclass(eq=False)
class Session:
    """A conversation: its states, by id, and the number of its last turn."""

    states: dict[str, Stored] = field(default_factory=dict)
    last_turn: int = 0

    @property
    def id(self) -> str:
        """As `StateHeader.session_id` of its states."""
        return next(iter(self.states.values())).header.session_id


@dataclass(eq=False)
class Catalog:
    """States by session and by the tokens that they cover.

    Attributes:
        fingerprint: of the model. rank_bytes: of a state on one rank. ranks: how many share it.
        settings: budgets and the directory. clock: seconds since 1970.
        key_bytes: of the keys of a document of so many tokens (`memory/documents/keys.py`).
        offsets: where documents of so many tokens begin when they are composed (`composing.py`).

    Raises:
        OSError: the directory cannot be used.
        StoreSettingsError: the key cannot be read.
    """

    fingerprint: Fingerprint
    rank_bytes: int
    settings: StoreSettings
    ranks: int = 1
    clock: Callable[[], float] = time.time
    key_bytes: Callable[[int], int] = lambda _: 0
    offsets: Callable[[Sequence[int]], Sequence[int]] = _no_composing

    def __post_init__(self) -> None:
        settings = self.settings
        self.lock = threading.RLock()
        self.memory = Tier(MEMORY, settings.memory)
        on_disk = settings.directory is not None
        self.disk = Tier(DISK, settings.disk if on_disk else 0)
        self.states: dict[str, Stored] = {}
        self.sessions: dict[SessionKey, Session] = {}
        # By the id of a session, which stays when it is renamed: its states, and segments of its
        # text (`past.py`), which go with it.
        self.members: dict[str, dict[str, Stored]] = defaultdict(dict)
        self.segments: dict[str, dict[str, Stored]] = defaultdict(dict)
        self.counts: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.version = 0  # of what can be found
        self.id = secrets.token_hex(8)  # of this store, among those of a machine
        self._tokens: dict[str, Tokens] = {}
        self.index = PrefixIndex()
        self._orders: list[Order] = []
        self._expires = math.inf  # no state does before
        self._waiting: set[str] = set()  # states that are yet to be written by a rank
        self.dropped: set[str] = set()  # whose files are about to go
        self._asked = False  # for outcomes
        self.wake: Callable[[], object] = lambda: None  # has an idle engine take the orders
        self.directory: StateDirectory | None = None
        if settings.directory is not None:
            path = model_directory(settings.directory, self.fingerprint)
            self.directory = StateDirectory(path, self.fingerprint, self.ranks, settings.key())

    # What is there.

    def prefix_hashes(
        self,
        tokens: Sequence[int] | Tokens,
        adapter: str = "",
        salt: str = "",
        composed: str | None = None,
    ) -> PrefixHashes:
        """The hashes of a text, for an adapter, the hash of a salt, and a composed state."""
        return PrefixHashes(namespace(self.fingerprint.key, adapter, salt, composed), tokens)

    def find(self, hashes: PrefixHashes, longest: int) -> Stored | None:
        """The stored state that covers most of the first `longest` tokens of a text."""
        with self.lock:
            self.expire()
            for state in self.index.prefixes(hashes, longest):
                return self.states[state]
        return None

    def lookup(self, reference: Reference, salt: str = "") -> list[Stored]:
        """The states of a session, or of one of its turns, oldest first.

        Raises:
            NotStored: there is no such session or turn.
        """
        with self.lock:
            self.expire()
            session = self.sessions.get((salt, reference.session))
            if session is None:
                raise NotStored(f"nothing is stored under {reference.session!r}")
            found = [s for s in session.states.values() if reference.turn in (None, s.header.turn)]
            if not found:
                kept = sorted({s.header.turn for s in session.states.values()})
                raise NotStored(
                    f"turn {reference.turn} of {reference.session!r} is not kept, these are: "
                    f"{', '.join(map(str, kept))}"
                )
            return sorted(found, key=lambda s: (s.header.turn, s.header.num_tokens))

    def check_new(self, session: SessionKey, field: str) -> None:
        """Refuse to make a session that is there.

        Args:
            field: what the error calls its name.

        Raises:
            SessionError: says so.
        """
        with self.lock:
            if session in self.sessions:
                raise SessionError(
                    "exists", f"{field} = {session[1]!r}: there is such a session already"
                )

    def on_disk(self, session: str) -> bool:
        """Whether a session, by its id, has a state that has a file or will have one."""
        return any(DISK in state.tiers for state in self.members.get(session, {}).values())

    def segments_of(self, sessions: Iterable[str]) -> list[Stored]:
        """The segments of sessions, by their ids."""
        with self.lock:
            return [s for one in sessions for s in self.segments.get(one, {}).values()]

    def made_of(self, sessions: Set[str]) -> list[Stored]:
        """What was composed of sessions, or goes on from that; by their ids, as they may have been
        renamed meanwhile."""
        with self.lock:
            return [s for s in self.states.values() if not sessions.isdisjoint(s.header.sources)]

    def tiers_for(self, session: str, nameless: bool = False) -> list[Tier]:
        """Where states of a session may be: texts that nobody named stay in memory.

        Args:
            nameless: as in `Stored`.
        """
        written = self.settings.may_write(session) and not nameless
        return [self.memory, self.disk] if written else [self.memory]

    def state_bytes(self, num_tokens: int, document: bool = False) -> int:
        """Bytes of a state after n tokens: pages and token ids, of all ranks.

        Args:
            document: whether it is of a library, whose keys are kept beside it.
        """
        keys = self.key_bytes(num_tokens) if document else 0
        return self.ranks * (self.rank_bytes + TOKEN_BYTES * num_tokens) + keys

    @property
    def has_orders(self) -> bool:
        """Whether orders wait for the ranks, or their outcomes are asked for."""
        return bool(self._orders) or self._asked

    @property
    def waits_for_disk(self) -> bool:
        """Whether a state is yet to be written, as far as the ranks have reported."""
        return bool(self._waiting)

    def ask_for_outcomes(self) -> None:
        """Have the ranks report soon, though there is nothing else to do."""
        self._asked = True
        self.wake()

    def add(self, state: Stored, tiers: Sequence[Tier], tokens: Tokens | None = None) -> None:
        """Make a state known, and let others leave for it. It may have no place afterwards."""
        header = state.header
        with self.lock:
            session = self.sessions.setdefault(state.session, Session())
            if header.turn > session.last_turn:
                session.last_turn = header.turn
                for older in session.states.values():
                    self.supersede(older)
            state.superseded = header.turn < session.last_turn
            session.states[state.id] = state
            self.states[state.id] = state
            self.members[header.session_id][state.id] = state
            if header.library == PAST:
                self.segments[header.document][state.id] = state
            if tokens is not None:
                self._tokens[state.id] = tokens
            self.index.add(
                bytes.fromhex(header.block_hash), header.num_tokens,
                bytes.fromhex(header.prefix_hash), state.id,
            )  # fmt: skip
            if header.expires is not None:
                self._expires = min(self._expires, header.expires)
            self.version += 1
            for tier in tiers:
                tier.add(state)
            for tier in tiers:
                self._make_room(tier, state.session)

    def change(self, state: Stored, **fields: object) -> None:
        """Give a state another header, keeping its place among the others."""
        with self.lock:
            tokens = self._tokens.get(state.id)
            tiers = [tier for tier in (self.memory, self.disk) if tier.remove(state)]
            self._unlist(state)
            state.header = replace(state.header, **fields)  # type: ignore[arg-type]
            self.add(state, tiers, tokens)

    def forget(self, state: Stored, keep_file: bool = False) -> None:
        """Drop a state everywhere."""
        with self.lock:
            # An order may still hold a state that has left, and whose file has been found since.
            state = self.states.get(state.id, state)
            for tier in (self.memory, self.disk):
                if state.id in tier.states:
                    if tier is self.disk and keep_file:
                        tier.remove(state)
                    else:
                        self._leave(state, tier, last=False)
            self._waiting.discard(state.id)
            self.unlist(state)

    def count_failure(self, fault: str) -> None:
        """Count a failure that no outcome tells of."""
        with self.lock:
            self.failures[fault] += 1

    def supersede(self, state: Stored) -> None:
        """Let a state leave before those that are not superseded."""
        if not state.superseded:
            state.superseded = True
            for tier in (self.memory, self.disk):
                if state.id in tier.states:
                    tier.touch(state)

    def expire(self) -> list[str]:
        """Let states go whose time is over; those of them that had a file."""
        with self.lock:
            now = self.clock()
            if now < self._expires:
                return []
            ends = [(s.header.expires, s) for s in self.states.values()]
            over = [state for end, state in ends if end is not None and end <= now]
            later = earliest(end for end, _ in ends if end is not None and end > now)
            self._expires = math.inf if later is None else later
            with_file = [state.id for state in over if DISK in state.tiers]
            for state in over:
                self.forget(state)
            return with_file

    def lose_file(self, state: Stored) -> None:
        """Another server removed a state's file, to have room."""
        with self.lock:
            if self.disk.remove(state):
                self._take_segments_along(state)
                if not state.tiers:
                    self.unlist(state)

    def _take_segments_along(self, state: Stored) -> None:
        """Segments of a session whose last state left the disk leave it too."""
        session = state.header.session_id
        for segment in self.segments_of([session]) if not self.on_disk(session) else ():
            if DISK in segment.tiers:
                self._leave(segment, self.disk)

    def unlist(self, state: Stored) -> None:
        """A state has no place any more. With the last one of a session its segments go."""
        self._unlist(state)
        session = state.header.session_id
        for segment in self.segments_of([session]) if session not in self.members else ():
            self.forget(segment)

    def forget_orphans(self) -> None:
        """Drop segments that a killed server left without their session."""
        with self.lock:
            for segment in self.segments_of(self.segments.keys() - self.members.keys()):
                self.forget(segment)

    def _use(self, state: Stored) -> None:
        state.used = self.clock()
        for tier in (self.memory, self.disk):
            tier.touch(state)
        if self.directory is not None and DISK in state.tiers:
            self.directory.use(state.id)

    def _make_room(self, tier: Tier, keep: SessionKey) -> None:
        for leaving in tier.excess(keep):
            self.counts[f"evicted-{tier.name}"] += 1
            self._leave(leaving, tier)

    def _leave(self, state: Stored, tier: Tier, last: bool = True) -> None:
        """A state leaves a tier, and the store if it has no other place."""
        if tier.remove(state):
            self._orders.append(Drop(state.id, tier.name))
            if tier is self.disk:
                self.dropped.add(state.id)
                self._waiting.discard(state.id)
                self._take_segments_along(state)
        if last and not state.tiers:
            self.unlist(state)
        else:
            self._release_tokens(state)

    def _release_tokens(self, state: Stored) -> None:
        if MEMORY not in state.tiers and len(state.written) == self.ranks:
            self._tokens.pop(state.id, None)

    def _unlist(self, state: Stored) -> None:
        if self.states.pop(state.id, None) is None:
            return
        header = state.header
        self._tokens.pop(state.id, None)
        self.index.remove(
            bytes.fromhex(header.block_hash),
            header.num_tokens,
            bytes.fromhex(header.prefix_hash),
            state.id,
        )
        _remove(self.members, header.session_id, state.id)
        if header.library == PAST:
            _remove(self.segments, header.document, state.id)
        session = self.sessions[state.session]
        del session.states[state.id]
        if not session.states:
            del self.sessions[state.session]
        self.version += 1


def _remove(found: dict[str, dict[str, Stored]], session: str, state: str) -> None:
    del found[session][state]
    if not found[session]:
        del found[session]
