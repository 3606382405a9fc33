"""What the store asks of the ranks, and what they report.

The store knows what is kept and decides. The ranks have the bytes. With several ranks these are
several processes, so orders and outcomes are plain data. A rank carries orders out one after the
other; only reading and writing files goes on in the background.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lola_vllm.memory.sessions.file import StateHeader
from lola_vllm.memory.sessions.prefix_hash import Tokens

MEMORY, DISK = "memory", "disk"

# Why a state could not be saved or loaded, in a word: a `StateFileError`, the operating system
# ("io"), a disk that takes longer than states come ("slow"), or a writer that was killed
# ("partial").
FAULTS = (
    "missing", "unreadable", "damaged", "version", "foreign", "key", "plain", "io", "slow",
    "partial",
)  # fmt: skip


@dataclass(frozen=True)
class Save:
    """Copy a state of the pool.

    Attributes:
        state_index: of it in the pool. memory, disk: where to keep it. request: whose end it is;
            empty while the request goes on. within: whether the step goes on after it, so that the
            rank has copied it when the order is carried out.
    """

    header: StateHeader
    tokens: Tokens = field(repr=False)
    state_index: int
    memory: bool
    disk: bool
    request: str = ""
    within: bool = False


@dataclass(frozen=True)
class Load:
    """Put a state into the pool, for a request that waits for it.

    Attributes:
        state_index: where to. keep: whether a state that is read from a file is to be kept in
            memory.
    """

    header: StateHeader
    state_index: int
    request: str
    keep: bool


@dataclass(frozen=True)
class Make:
    """Make a state of others: compose them, or keep one under another header too, as a fork does.

    Attributes:
        sources: headers of the states, in the order of their documents.
    """

    sources: tuple[StateHeader, ...]
    header: StateHeader
    tokens: Tokens = field(repr=False)
    memory: bool
    disk: bool

    @property
    def composes(self) -> bool:
        """Whether the states are composed; else there is one, which is copied."""
        return self.header.composed == self.header.id != self.sources[0].id


@dataclass(frozen=True)
class Drop:
    """Forget a state in one place."""

    state: str
    tier: str


Order = Save | Load | Make | Drop


@dataclass(frozen=True)
class Outcome:
    """What became of an order.

    Attributes:
        event: "saved" or "loaded", each with the tier; "save-failed", "load-failed",
            "drop-failed", or "read-failed": its file was read for another state, or for its keys.
        reason: why it failed, for people. fault: one of `FAULTS`, for counting.
        seconds: it took.
    """

    state: str
    event: str
    tier: str = MEMORY
    request: str = ""
    reason: str = ""
    fault: str = ""
    seconds: float = 0.0
