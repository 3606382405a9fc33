"""The store: a catalog of states, what requests need of it, and what goes to and from the ranks.

It decides what is kept and gives orders to the ranks (`orders.py`), which have the bytes
(`transfer.py`).
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from lola_vllm.memory.sessions.catalog import Catalog, NotStored, earliest
from lola_vllm.memory.sessions.file import StateFileError, StateHeader, read_tokens
from lola_vllm.memory.sessions.inventory import KEY_FAULTS, plain_writer, unread_words
from lola_vllm.memory.sessions.names import AUTOMATIC, PAST, Part, Reference, automatic_name
from lola_vllm.memory.sessions.orders import (
    DISK,
    MEMORY,
    Load,
    Make,
    Order,
    Outcome,
    Save,
)
from lola_vllm.memory.sessions.prefix_hash import PrefixHashes, Tokens
from lola_vllm.memory.sessions.tiers import SessionKey, Stored, Tier
from lola_vllm.memory.sessions.upkeep import Upkeep

logger = logging.getLogger("vllm.lola")

WARN_S = 60.0  # between two lines about one kind of failure; the metrics count all of it


class Turn(NamedTuple):
    """Where the states of one request are stored."""

    session: SessionKey
    number: int


class SessionStore(Catalog):
    """What is stored for requests. It is made as its `Catalog`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.max_waiting = self.settings.max_waiting(self.rank_bytes * self.ranks)
        self._warned: dict[str, float] = {}  # when, by fault
        self.seconds: dict[str, float] = defaultdict(float)
        self._held = ExitStack()  # until the store is closed
        if self.directory is not None and self.directory.key is None:
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
            named = not turn.session[1].startswith(AUTOMATIC)
            for there in map(self.states.__getitem__, reversed(self.index.of(hashes, num_tokens))):
                if not named or there.session == turn.session:
                    self._use(there)
                    if tail and there.session == turn.session:
                        # What was said is so, also where the file cannot be told of it.
                        self.upkeep.rewrite([there], undo=False, kind=kind, tail=list(tail))
                    return there, False
            nbytes = self.state_bytes(num_tokens, part is not None)
            nameless = parent is not None and parent.nameless
            if tiers is None:
                tiers = self.tiers_for(turn.session[1], nameless)
            past = part.document if part is not None and part.library == PAST else None
            if past is not None and past not in self.members:
                raise NotStored(f"the session {past} is not kept any more")
            if past is not None and not self.on_disk(past):
                tiers = [self.memory]  # a session's text is nowhere that the session is not
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
            # What is of a session's text goes with the session.
            expires = None if ttl is None or past is not None else now + ttl
            header = StateHeader(
                id=secrets.token_hex(16),
                session=turn.session[1],
                turn=turn.number,
                kind=kind,
                num_tokens=num_tokens,
                prefix_hash=hashes.prefix_hash(num_tokens).hex(),
                block_hash=hashes.block_hash(num_tokens).hex(),
                fingerprint=self.fingerprint.to_dict(),
                adapter=adapter,
                salt=turn.session[0],
                created=now,
                expires=earliest([until, expires]),
                parent=parent.id if parent else None,
                shared_prefix=parent.prefix_for_others if parent else None,
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
                raise NotStored("the budgets are spent for states that are newer")
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

    def tokens_of(self, state: Stored) -> Tokens:
        """The tokens of a state, from memory or its file.

        Raises:
            NotStored: they are in neither, or the file cannot be used.
        """
        tokens, directory = self._tokens.get(state.id), self.directory
        if tokens is None and directory is not None:
            try:
                tokens = read_tokens(directory.files(state.id)[0], directory.key, state.header)
            except StateFileError as error:
                if error.reason != "missing":
                    raise self.unusable(state, error) from None
        if tokens is None:
            raise NotStored(f"the tokens of {state.header.session!r} are not kept")
        return tokens

    def unusable(self, state: Stored, error: StateFileError) -> NotStored:
        """What to raise for a state whose file cannot be used; it counts as on a rank."""
        failed = Outcome(state.id, "read-failed", DISK, reason=error.text, fault=error.reason)
        self.apply([(0, failed)])
        return NotStored(f"the file of {state.header.session!r} cannot be used: {error.text}")

    # Between the store and the ranks.

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
            if isinstance(order, Make) and order.disk and room:
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
                self._warn(outcome)
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

    def _warn(self, outcome: Outcome) -> None:
        now = time.monotonic()
        if now - self._warned.get(outcome.fault, -WARN_S) < WARN_S:
            return
        self._warned[outcome.fault] = now
        logger.warning(
            "LoLA sessions: %s of state %s (%s): %s",
            outcome.event, outcome.state, outcome.tier, outcome.reason,
        )  # fmt: skip

    # Changes.

    def is_due(self, state: Stored, name: str) -> bool:
        """Whether a state is to be written under a name: nobody had named it, so it was not."""
        unwritten = DISK not in state.tiers and self.disk.fits(state.nbytes)
        may_write = self.settings.may_write
        named = may_write(name) > may_write(state.header.session)
        return unwritten and named and not state.nameless

    def write(self, state: Stored) -> None:
        """Write a state that is in memory only to the directory too, soon."""
        with self.lock:
            header, tokens = state.header, self._tokens.get(state.id)
            if tokens is None:  # only a file had them, which is gone
                return
            self.disk.add(state)
            self._make_room(self.disk, state.session)
            if DISK in state.tiers:
                self.order(Make((header,), header, tokens, memory=False, disk=True))
