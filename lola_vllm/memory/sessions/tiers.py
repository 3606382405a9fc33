"""A budget of bytes, and who leaves first when it is spent.

Superseded states go first, the least recently used before the others. Then whole sessions go, again
the least recently used first: half a conversation is of no use.

Owners share a budget equally: those who have an API key, however many salts they use, and without
keys those who have a salt of their own. An owner within its share loses nothing to the others
unless it was idle for a day. So nobody can push everybody else out.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from lola_vllm.memory.sessions.file import StateHeader
from lola_vllm.memory.sessions.names import SHARED
from lola_vllm.memory.sessions.owner import salt_owner

SessionKey = tuple[str, str]  # hash of the salt, name

# After so many seconds without use an owner's states make room for others.
IDLE_S = 86_400.0


@dataclass(eq=False)
class Stored:
    """A state that the store knows.

    Attributes:
        tiers: where it is, or will be once the orders for it are carried out.
        nbytes: of all ranks together, pages and token ids. used: seconds since 1970.
        superseded: whether its session has gone on from it.
        written: ranks whose files are complete. unwritten: why it has no file, where it should
            have one; None: it has, will have one, or should not.
        nameless: whether it is composed of text that nobody named and that stays in memory.
    """

    header: StateHeader
    nbytes: int
    used: float
    superseded: bool = False
    tiers: set[str] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    unwritten: str | None = None
    nameless: bool = False

    @property
    def id(self) -> str:
        """32 hex digits."""
        return self.header.id

    @property
    def owner(self) -> str:
        """Whose share of a budget it takes."""
        return salt_owner(self.header.salt)

    @property
    def prefix_for_others(self) -> str | None:
        """The hash of the shared prefix of a state that goes on from it; None: none."""
        shared = self.header.session.startswith(SHARED)
        return self.header.prefix_hash if shared else self.header.shared_prefix

    @property
    def session(self) -> SessionKey:
        """The session it belongs to."""
        return (self.header.salt, self.header.session)


class Tier:
    """States in one place, within a budget.

    Args:
        name: "memory" or "disk". budget: bytes.
    """

    def __init__(self, name: str, budget: int) -> None:
        self.name = name
        self.budget = budget
        self.nbytes = 0
        self.states: dict[str, Stored] = {}
        self._superseded: OrderedDict[str, Stored] = OrderedDict()
        self._sessions: OrderedDict[SessionKey, dict[str, Stored]] = OrderedDict()
        self._owned: Counter[str] = Counter()  # bytes by owner
        self._used: dict[str, float] = {}  # when an owner's states were last used
        self._now = 0.0  # the newest of these

    @property
    def owners(self) -> int:
        """Owners that have states here."""
        return len(self._owned)

    def fits(self, nbytes: int) -> bool:
        """Whether a state of this size can be here at all."""
        return nbytes <= self.budget

    def add(self, state: Stored) -> None:
        """Count a state; it is the most recently used."""
        if state.id in self.states:
            return
        self.states[state.id] = state
        state.tiers.add(self.name)
        self.nbytes += state.nbytes
        self._owned[state.owner] += state.nbytes
        self._sessions.setdefault(state.session, {})[state.id] = state
        self.touch(state)

    def remove(self, state: Stored) -> bool:
        """Stop counting a state; False if it was not here."""
        if self.states.get(state.id) is not state:
            return False
        del self.states[state.id]
        state.tiers.discard(self.name)
        self.nbytes -= state.nbytes
        owner = state.owner
        self._owned[owner] -= state.nbytes
        if not self._owned[owner]:
            del self._owned[owner], self._used[owner]
        self._superseded.pop(state.id, None)
        session = self._sessions[state.session]
        del session[state.id]
        if not session:
            del self._sessions[state.session]
        return True

    def touch(self, state: Stored) -> None:
        """A state was used, or superseded."""
        if state.id not in self.states:
            return
        self._sessions.move_to_end(state.session)
        owner = state.owner
        self._used[owner] = max(state.used, self._used.get(owner, 0.0))
        self._now = max(self._now, state.used)
        if state.superseded:
            self._superseded[state.id] = state
            self._superseded.move_to_end(state.id)
        else:
            self._superseded.pop(state.id, None)

    def excess(self, keep: SessionKey | None = None) -> Iterator[Stored]:
        """States that must leave for the budget to hold; remove each before asking for the next.

        Args:
            keep: the session that is just being stored; it leaves last.
        """
        while self.nbytes > self.budget:
            leaving = self._next(keep)
            if not leaving:
                return
            yield from leaving

    def _next(self, keep: SessionKey | None) -> list[Stored]:
        for leaves in (self._is_over_share, lambda owner: True):
            found = self._first(keep, [owner for owner in self._owned if leaves(owner)])
            if found:
                return found
        return []

    def _is_over_share(self, owner: str) -> bool:
        idle = self._now - self._used[owner] > IDLE_S
        return idle or self._owned[owner] * len(self._owned) > self.budget

    def _first(self, keep: SessionKey | None, owners: Iterable[str]) -> list[Stored]:
        leaving = frozenset(owners)
        for state in self._superseded.values():
            if state.owner in leaving:
                return [state]
        last = []
        for session, states in self._sessions.items():
            if salt_owner(session[0]) not in leaving:
                continue
            if session != keep:
                return list(states.values())
            last = sorted(states.values(), key=lambda state: state.used)[:1]
        return last
