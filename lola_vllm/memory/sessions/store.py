"""What is stored: sessions, their turns, and where the state of each is.

The store knows everything about states but their bytes. It decides what is kept and gives orders to
the ranks (`orders.py`), which have the bytes (`transfer.py`). It is safe to use from several
threads.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from lola_vllm.memory.sessions.directory import StateDirectory
from lola_vllm.memory.sessions.encrypting import KEY_FAULTS, plain_writer, unread_words
from lola_vllm.memory.sessions.expiry import Expiries, earliest
from lola_vllm.memory.sessions.failure_log import FailureLog
from lola_vllm.memory.sessions.file import StateHeader
from lola_vllm.memory.sessions.fingerprint import Fingerprint
from lola_vllm.memory.sessions.names import AUTOMATIC, PAST, Part, Reference, automatic_name
from lola_vllm.memory.sessions.orders import (
    DISK,
    MEMORY,
    Compose,
    Copy,
    Drop,
    Load,
    Order,
    Outcome,
    Save,
)
from lola_vllm.memory.sessions.prefix_hash import PrefixHashes, PrefixIndex, Tokens, namespace
from lola_vllm.memory.sessions.settings import StoreSettings
from lola_vllm.memory.sessions.shared_prefixes import shared_prefix_of
from lola_vllm.memory.sessions.tiers import SessionKey, Stored, Tier
from lola_vllm.memory.sessions.upkeep import Operation, Upkeep

TOKEN_BYTES = 4  # of a token id, in memory and in files


class NotStored(LookupError):
    """Why a state that was asked for is not there, in words."""


class Turn(NamedTuple):
    """Where the states of one request are stored."""

    session: SessionKey
    number: int


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


class SessionStore:
    """States by session and by the tokens that they cover.

    Args:
        fingerprint: of the model. rank_bytes: of a state on one rank. ranks: how many share it.
        settings: budgets and the directory. clock: seconds since 1970.
        key_bytes: of the keys of a document of so many tokens (`memory/documents/keys.py`).

    Raises:
        OSError: the directory cannot be used.
        StoreSettingsError: the key cannot be read.
    """

    def __init__(
        self,
        fingerprint: Fingerprint,
        rank_bytes: int,
        settings: StoreSettings,
        ranks: int = 1,
        clock: Callable[[], float] = time.time,
        key_bytes: Callable[[int], int] = lambda _: 0,
    ) -> None:
        self.fingerprint = fingerprint
        self.settings = settings
        self.ranks = ranks
        self.rank_bytes = rank_bytes
        self.max_waiting = settings.max_waiting(rank_bytes * ranks)
        self.clock = clock
        self.key_bytes = key_bytes
        self.lock = threading.RLock()
        self.memory = Tier(MEMORY, settings.memory)
        on_disk = settings.directory is not None
        self.disk = Tier(DISK, settings.disk if on_disk else 0)
        self.states: dict[str, Stored] = {}
        self.sessions: dict[SessionKey, Session] = {}
        # Of a session, by id: segments of its text (`past.py`), which go with it.
        self.segments: dict[SessionKey, dict[str, Stored]] = defaultdict(dict)
        self.counts: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self._failure_log = FailureLog()
        self.seconds: dict[str, float] = defaultdict(float)
        self.version = 0  # of what can be found
        self.id = secrets.token_hex(8)  # of this store, among those of a machine
        self._tokens: dict[str, Tokens] = {}
        self.index = PrefixIndex()
        self._orders: list[Order] = []
        self._expiries = Expiries(self.states)
        self._waiting: set[str] = set()  # states that are yet to be written by a rank
        self.dropped: set[str] = set()  # whose files are about to go
        self._asked = False  # for outcomes
        self.wake: Callable[[], object] = lambda: None  # has an idle engine take the orders
        # Where documents of so many tokens begin when they are composed (`composing.py`).
        self.offsets: Callable[[Sequence[int]], Sequence[int]] = _no_composing
        self.directory: StateDirectory | None = None
        self._held = ExitStack()  # until the store is closed
        if settings.directory is not None:
            self.directory = StateDirectory(settings.directory, fingerprint, ranks, settings.key())
            if self.directory.key is None:
                self._held.enter_context(plain_writer(self.directory.path))
        self.upkeep = Upkeep(self)

    def close(self) -> None:
        """Finish what waits, and stop looking at the directory."""
        self.upkeep.close()
        self._held.close()

    def unread(self) -> list[str]:
        """Which states of the directory its key does not fit, and the remedy, in words."""
        if self.directory is None or self.settings.directory is None:
            return []
        counts = {reason: self.failures[reason] for reason in KEY_FAULTS if self.failures[reason]}
        return unread_words(counts, self.directory.key is not None, self.settings.directory)

    # What a request needs.

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

    def resolve(
        self,
        reference: Reference,
        hashes: PrefixHashes,
        longest: int,
        adapter: str = "",
        salt: str = "",
    ) -> Stored:
        """The state of a session, or of one of its turns, that covers most of a text.

        Raises:
            NotStored: says what is missing or what does not fit.
        """
        with self.lock:
            states = [s for s in self.lookup(reference, salt) if s.header.adapter == adapter]
            if not states:
                raise NotStored(f"{reference} was stored with another adapter")
            for state in sorted(states, key=lambda s: -s.header.num_tokens):
                n, composed = state.header.num_tokens, state.header.composed
                if n > longest:
                    continue
                own = hashes
                if composed is not None:  # it is found by its session's name alone
                    own = self.prefix_hashes(hashes.tokens[:n], adapter, salt, composed)
                if own.prefix_hash(n).hex() == state.header.prefix_hash:
                    return state
            fewest = min(s.header.num_tokens for s in states)
            if fewest > longest:
                raise NotStored(
                    f"{reference} covers {fewest} tokens, and the prompt has only {longest + 1}"
                )
            raise NotStored(f"the prompt does not begin with the {fewest} tokens of {reference}")

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

    def open_turn(self, name: str | None, parent: Stored | None, salt: str = "") -> Turn:
        """Where a request's states go: the next turn of a session.

        Args:
            name: None for a request that names none. It goes on with the conversation of `parent`,
                if that has no name either and has not gone on already; else it starts a new one.
        """
        with self.lock:
            if name is None:
                name = automatic_name()
                if parent is not None and not parent.superseded:
                    theirs = parent.header.session
                    name = theirs if theirs.startswith(AUTOMATIC) else name
            key = (salt, name)
            session = self.sessions.get(key)
            return Turn(key, session.last_turn + 1 if session else 1)

    def save(
        self,
        turn: Turn,
        hashes: PrefixHashes,
        num_tokens: int,
        kind: str,
        state_index: int,
        *,
        adapter: str = "",
        parent: Stored | None = None,
        ttl: float | None = None,
        request: str = "",
        tail: Sequence[int] = (),
        part: Part | None = None,
        within: bool = False,
        tiers: Sequence[Tier] | None = None,
    ) -> tuple[Stored, bool]:
        """Store a state of the pool, which covers the first `num_tokens` of a text.

        Args:
            kind: "prompt" or "answer". state_index: in the pool of every rank. ttl: seconds.
            request, within: as in `Save`. tail: as in `StateHeader`. part: of a library's document.
            tiers: where it may be; None: as for others of its session.

        Returns:
            The state, and whether it is new: it is then copied in the step that takes the
            orders, and an outcome for `request` follows. Else it was there already.

        Raises:
            NotStored: there is no room.
        """
        with self.lock:
            prefix_hash = hashes.prefix_hash(num_tokens)
            named = not turn.session[1].startswith(AUTOMATIC)
            for there in map(self.states.__getitem__, reversed(self.index.with_hash(prefix_hash))):
                if not named or there.session == turn.session:
                    self._use(there)
                    if tail and there.session == turn.session:
                        # What was said is so, also where the file cannot be told of it.
                        self.rewrite([there], undo=False, kind=kind, tail=list(tail))
                    return there, False
            nbytes = self.state_bytes(num_tokens, part is not None)
            nameless = parent is not None and parent.nameless
            if tiers is None:
                tiers = self.tiers_for(turn.session[1], nameless)
            tiers = [tier for tier in tiers if tier.fits(nbytes)]
            if not tiers and self.disk.fits(nbytes):
                raise NotStored(
                    "there is no room in memory, and texts without a session's name are not "
                    "written to the disk; give a name, or start the server with --lola-store all"
                )
            if not tiers:
                raise NotStored(
                    f"a state takes {nbytes} bytes, and the budgets are {self.memory.budget} "
                    f"bytes of memory and {self.disk.budget} of disk"
                )
            slow = None
            if self.disk in tiers and len(self._waiting) >= self.max_waiting:
                slow = f"{len(self._waiting)} states wait to be written: the disk is too slow"
                self.failures["slow"] += 1
                tiers.remove(self.disk)
                if not tiers:
                    raise NotStored(slow)
            now = self.clock()
            ttl = self.settings.ttl if ttl is None else ttl
            until = parent.header.until if parent else None
            session = self.sessions.get(turn.session)
            expires = None if ttl is None else now + ttl
            if part is not None and part.library == PAST:
                expires = self._newest((turn.session[0], part.document)).header.expires
            header = StateHeader(
                id=secrets.token_hex(16),
                session=turn.session[1],
                turn=turn.number,
                kind=kind,
                num_tokens=num_tokens,
                prefix_hash=prefix_hash.hex(),
                block_hash=hashes.block_hash(num_tokens).hex(),
                fingerprint=self.fingerprint.to_dict(),
                adapter=adapter,
                salt=turn.session[0],
                created=now,
                expires=earliest([until, expires]),
                parent=parent.id if parent else None,
                shared_prefix=shared_prefix_of(parent),
                tail=list(tail),
                composed=parent.header.composed if parent else None,
                made_of=list(parent.header.made_of) if parent else [],
                sources=list(parent.header.sources) if parent else [],
                until=until,
                origin=session.id if session else None,
                **({} if part is None else part._asdict()),
                ranks=self.ranks,
            )
            state = Stored(header, nbytes, now, unwritten=slow, nameless=nameless)
            tokens = hashes.tokens[:num_tokens]
            self.add(state, tiers, tokens)
            if not state.tiers:
                raise NotStored("all that is stored is pinned, and the budgets are spent")
            self._orders.append(
                Save(
                    header,
                    tokens,
                    state_index,
                    MEMORY in state.tiers,
                    DISK in state.tiers,
                    request,
                    within,
                )
            )
            if DISK in state.tiers:
                self._waiting.add(state.id)
            self.counts["saved"] += 1
            return state, True

    def load(self, state: Stored, state_index: int, request: str) -> None:
        """Put a state into the pool; an outcome for `request` follows."""
        with self.lock:
            keep = state.id in self.states and self.memory.fits(state.nbytes)
            self._use(state)
            if keep and MEMORY not in state.tiers:
                self.memory.add(state)
                self._make_room(self.memory, state.session)
                keep = MEMORY in state.tiers
            self._orders.append(Load(state.header, state_index, request, keep))

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

    # Between the store and the ranks.

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

    def take_orders(self) -> list[Order]:
        """The orders since the last call, for every rank to carry out in this order."""
        with self.lock:
            self.expire()
            self._asked = False
            orders, self._orders = self._orders, []
            return orders

    def order(self, order: Order) -> None:
        """Add an order."""
        with self.lock:
            self._orders.append(order)
            # Above the limit the ranks copy the source's file, which takes no memory meanwhile.
            room = len(self._waiting) < self.max_waiting
            if isinstance(order, Copy | Compose) and order.disk and room:
                self._waiting.add(order.header.id)

    def apply(self, outcomes: Iterable[tuple[int, Outcome]]) -> None:
        """Take note of what the ranks report: (rank, outcome)."""
        with self.lock:
            for rank, outcome in outcomes:
                state = self.states.get(outcome.state)
                if outcome.event in ("saved", "loaded"):
                    self.seconds[f"{outcome.event}-{outcome.tier}"] += outcome.seconds
                    self.counts[f"{outcome.event}-{outcome.tier}"] += 1
                    if state and outcome.event == "saved" and outcome.tier == DISK:
                        state.written.add(rank)
                        if len(state.written) == self.ranks:
                            state.unwritten = None
                            self._waiting.discard(state.id)
                        self._release_tokens(state)
                    continue
                self.failures[outcome.fault] += 1
                self._failure_log.take(outcome)
                if outcome.event == "drop-failed":
                    self.upkeep.remove_later(outcome.state)
                elif state is None:
                    continue
                elif outcome.event == "save-failed" and outcome.tier == DISK:
                    state.unwritten = outcome.reason
                    self._leave(state, self.disk)
                else:
                    # A file that cannot be read may be another server's business, or come back.
                    keep_file = outcome.fault not in ("damaged", "missing")
                    self.forget(state, keep_file=keep_file)

    # Changes.

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
            if header.library == PAST:
                self.segments[(header.salt, header.document)][state.id] = state
            if tokens is not None:
                self._tokens[state.id] = tokens
            self.index.add(
                bytes.fromhex(header.block_hash), header.num_tokens,
                bytes.fromhex(header.prefix_hash), state.id,
            )  # fmt: skip
            self._expiries.add(state)
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

    def rewrite(
        self,
        states: list[Stored],
        undo: bool = True,
        answer: Callable[[], object] = dict,
        **fields: object,
    ) -> Operation:
        """`change`, also in the states' files, soon.

        Args:
            undo: whether a change that the files cannot take is taken back.
            answer: what is to be told at the end.
        """
        with self.lock:
            before = {state.id: state.header for state in states}
            operation = Operation(states, answer, before, dict(fields), undo)
            for state in states:
                self.change(state, **fields)
            self.upkeep.submit(operation, any(DISK in state.tiers for state in states))
            return operation

    def write(self, state: Stored) -> None:
        """Write a state that is in memory only to the directory too, soon."""
        with self.lock:
            self.disk.add(state)
            self._make_room(self.disk, state.session)
            if DISK in state.tiers:
                tokens = self._tokens.get(state.id)
                self.order(Copy(state.id, state.header, tokens, memory=False, disk=True))

    def delete(self, states: list[Stored], answer: Callable[[], object]) -> Operation:
        """Drop states everywhere and for good, those with files once these are gone."""
        with self.lock:
            there = [state for state in states if DISK in state.tiers]
            for state in states:
                if DISK not in state.tiers:
                    self.forget(state)
            operation = Operation(there, answer)
            self.upkeep.submit(operation, bool(there))
            return operation

    def forget(self, state: Stored, keep_file: bool = False) -> None:
        """Drop a state everywhere."""
        with self.lock:
            for tier in (self.memory, self.disk):
                if state.id in tier.states:
                    if tier is self.disk and keep_file:
                        tier.remove(state)
                    else:
                        self._leave(state, tier, last=False)
            self._waiting.discard(state.id)
            self.unlist(state)

    def tokens(self, state: Stored) -> Tokens | None:
        """The tokens of a state that is not yet in a file; None where only its file has them."""
        return self._tokens.get(state.id)

    def count_failure(self, fault: str) -> None:
        """Count a failure that no outcome tells of."""
        with self.lock:
            self.failures[fault] += 1

    def _use(self, state: Stored) -> None:
        state.used = self.clock()
        for tier in (self.memory, self.disk):
            tier.touch(state)
        if self.directory is not None and DISK in state.tiers:
            self.directory.use(state.id)

    def supersede(self, state: Stored) -> None:
        """Let a state leave before those that are not superseded."""
        if not state.superseded:
            state.superseded = True
            for tier in (self.memory, self.disk):
                if state.id in tier.states:
                    tier.touch(state)

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
        if last and not state.tiers:
            self.unlist(state)
        else:
            self._release_tokens(state)

    def _release_tokens(self, state: Stored) -> None:
        if MEMORY not in state.tiers and len(state.written) == self.ranks:
            self._tokens.pop(state.id, None)

    def unlist(self, state: Stored) -> None:
        """A state has no place any more. With the last one of a session its segments go."""
        self._unlist(state)
        if state.session not in self.sessions:
            self._forget_segments(state.session)

    def forget_orphans(self) -> None:
        """Drop segments that a killed server left without their session."""
        with self.lock:
            for key in [key for key in self.segments if key not in self.sessions]:
                self._forget_segments(key)

    def _forget_segments(self, session: SessionKey) -> None:
        for segment in list(self.segments.get(session, {}).values()):
            self.forget(segment)

    def _newest(self, key: SessionKey) -> Stored:
        """The longest state of a session's last turn.

        Raises:
            NotStored: there is no such session.
        """
        if key not in self.sessions:
            raise NotStored(f"nothing is stored under {key[1]!r}")
        states = self.sessions[key].states.values()
        return max(states, key=lambda s: (s.header.turn, s.header.num_tokens))

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
        if header.library == PAST:
            own = self.segments[(header.salt, header.document)]
            del own[state.id]
            if not own:
                del self.segments[(header.salt, header.document)]
        session = self.sessions[state.session]
        del session.states[state.id]
        if not session.states:
            del self.sessions[state.session]
        self.version += 1

    def expire(self) -> list[str]:
        """Let states go whose time is over; those of them that had a file."""
        with self.lock:
            over = self._expiries.take(self.clock())
            with_file = [state.id for state in over if DISK in state.tiers]
            for state in over:
                self.counts["expired"] += 1
                self.forget(state)
            return with_file
