"""A budget of bytes, and who leaves first when it is spent.

Superseded states go first, the least recently used before the others. Then whole sessions go, again
the least recently used first: half a conversation is of no use. What is pinned stays.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from lola_vllm.sessions.file import StateHeader

SessionKey = tuple[str, str]  # hash of the salt, name


@dataclass(eq=False)
class Stored:
    """A state that the store knows.

    Attributes:
        tiers: where it is, or will be once the orders for it are carried out.
        nbytes: of all ranks together. used: seconds since 1970.
        superseded: whether its session has gone on from it.
        written: ranks whose files are complete.
    """

    header: StateHeader
    nbytes: int
    used: float
    superseded: bool = False
    tiers: set[str] = field(default_factory=set)
    written: set[int] = field(default_factory=set)

    @property
    def id(self) -> str:
        """32 hex digits."""
        return self.header.id

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
        self._sessions.setdefault(state.session, {})[state.id] = state
        self.touch(state)

    def remove(self, state: Stored) -> bool:
        """Stop counting a state; False if it was not here."""
        if self.states.pop(state.id, None) is None:
            return False
        state.tiers.discard(self.name)
        self.nbytes -= state.nbytes
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
        for state in self._superseded.values():
            if not state.header.pinned:
                return [state]
        last = []
        for session, states in self._sessions.items():
            free = [state for state in states.values() if not state.header.pinned]
            if free and session == keep:
                last = sorted(free, key=lambda state: state.used)[:1]
            elif free:
                return free
        return last
