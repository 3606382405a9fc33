"""What a request wants of the store, and what it is told in the end.

    kv_transfer_params: {"lola": {"from": "agent-7@3", "save": "agent-7", "ttl": 86400}}

`from`: a session or a turn to start from; `false`: start from nothing. Without it any stored state
that covers a part of the prompt is used. `save`: the session to go on with, `false`: none.
Without it a session id of the request names the session. `ttl`: seconds. `answer`: `false` stores
what was read only, and not what was generated after it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lola_vllm.memory.sessions.names import (
    Part,
    Reference,
    SessionNameError,
    check_name,
    check_new_name,
    parse_reference,
    shown,
)
from lola_vllm.memory.sessions.prefix_hash import PrefixHashes
from lola_vllm.memory.sessions.store import Turn
from lola_vllm.memory.sessions.tiers import SessionKey, Stored

FIELD = "lola"
_KEYS = ("from", "save", "ttl", "answer")
_OWN_KEYS = (*_KEYS, "part")  # of the requests that the server makes itself
MAX_FAULTS = 3  # that are told; what follows is not looked at
# Ids of the requests that the server makes to read documents. Routes put another word before what a
# client chooses.
LIBRARY_REQUEST = "lola-library-"


@dataclass(frozen=True)
class RequestParams:
    """What a request asked for.

    Attributes:
        restore: whether to start from a stored state. source: the one it names.
        save: whether to store its states. session: under which name, None: nobody's.
        ttl: seconds. answer: whether what is generated belongs to the session.
        part: of a library's document, which is read.
        faults: what of it could not be understood.
    """

    restore: bool = True
    source: Reference | None = None
    save: bool = True
    session: str | None = None
    ttl: float | None = None
    answer: bool = True
    part: Part | None = None
    faults: tuple[str, ...] = ()


def read_params(params: object, session_id: str | None = None, own: bool = False) -> RequestParams:
    """Read the `kv_transfer_params` of a request. What is wrong is told in its answer.

    A request with a fault in them neither restores nor stores: it must not do something else than
    was meant. The work does not depend on how much was sent.

    Args:
        own: whether the request is the server's, which may use names of its own.
    """
    where = f"kv_transfer_params.{FIELD}"
    lola = params.get(FIELD, {}) if isinstance(params, Mapping) else {}
    faults = []
    if not isinstance(lola, Mapping):
        faults.append(f"{where} = {shown(lola)}: must be an object")
        lola = {}
    for key in _unknown(lola, _OWN_KEYS if own else _KEYS):
        near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.0)[0]
        faults.append(f"{where}.{key}: unknown key; nearest valid name: {near!r}")
        if len(faults) == MAX_FAULTS:
            return RequestParams(restore=False, save=False, faults=tuple(faults))
    source, session, ttl = lola.get("from"), lola.get("save"), lola.get("ttl")
    check = check_name if own else check_new_name
    reference = None
    try:
        if isinstance(source, list):
            faults.append(
                f"{where}.from = {shown(source)}: a request starts from one session; make one of "
                "several with POST /v1/lola/sessions/{new}/compose, and name that"
            )
        elif source not in (None, True, False):
            reference = parse_reference(source, f"{where}.from")
        if session in (None, True):
            session = None if session_id is None else check(session_id, "session_id")
        elif session is not False:
            check(session, f"{where}.save")
    except SessionNameError as error:
        faults.append(str(error))
    if ttl is not None and not _is_time(ttl):
        faults.append(f"{where}.ttl = {shown(ttl)}: must be a finite number of seconds above 0")
    answer = lola.get("answer", True)
    if not isinstance(answer, bool):
        faults.append(f"{where}.answer = {shown(answer)}: must be true or false")
    if faults:
        return RequestParams(restore=False, save=False, faults=tuple(faults[:MAX_FAULTS]))
    save = session is not False
    ttl = None if ttl is None else float(ttl)
    part = Part(*lola["part"]) if own and "part" in lola else None
    return RequestParams(
        source is not False, reference, save, session if save else None, ttl, answer, part
    )


def _unknown(lola: Mapping[Any, Any], known: tuple[str, ...]) -> Iterator[str]:
    """Keys that mean nothing, each cut to a length that can be shown and compared."""
    for key in lola:
        if key not in known:
            yield shown(key)[1:-1] if isinstance(key, str) else shown(key)


def _is_time(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        seconds = float(value)
    except OverflowError:
        return False
    return math.isfinite(seconds) and seconds > 0


@dataclass(eq=False)
class RequestState:
    """A running request, as the store sees it.

    Attributes:
        adapter, salt: of its states; `salt` is a hash. hashes: of its prompt.
        found: the state to start from, as of `version` of the store.
        parent: the state that its conversation goes on from. turn: where its states go.
        restored: tokens that it did not compute. missed: why nothing was found, as of `version`.
        reasons: what else there is to say, once each.
        stored: its longest stored state. unsaved: why it has none.
        beyond: tokens that it has beyond the length to which the model was trained.
        waypoints: token counts of its prompt at which states are kept; None: not known yet.
        branch: tokens after which its prompt branches from others; 0: nowhere. number: of requests
            that came before it.
    """

    params: RequestParams
    adapter: str
    salt: str
    hashes: PrefixHashes
    version: int = -1
    found: Stored | None = None
    parent: Stored | None = None
    turn: Turn | None = None
    restored: int = 0
    missed: str | None = None
    reasons: dict[str, None] = field(default_factory=dict)
    stored: Stored | None = None
    unsaved: str | None = None
    beyond: int = 0
    waypoints: list[int] | None = None
    branch: int = 0
    number: int = 0

    @property
    def covered(self) -> int:
        """Tokens that need not be computed after the state that was found is restored: all but one
        of the prompt, at most."""
        tokens = 0 if self.found is None else self.found.header.num_tokens
        return min(tokens, len(self.hashes) - 1)

    @property
    def session(self) -> SessionKey | None:
        """The session that only one request at a time goes on with."""
        return None if self.params.session is None else (self.salt, self.params.session)

    def explain(self, reason: str) -> None:
        """Add something that the client should know."""
        self.reasons[reason] = None

    def answer(self) -> dict[str, Any]:
        """What the client is told, as `kv_transfer_params` of the answer."""
        state = self.stored
        name = state.header.session if state else self.params.session
        missed = [self.missed] if self.missed else []
        told = {
            "session": name,
            "turn": state.header.turn if state else None,
            "tokens": state.header.num_tokens if state else 0,
            "bytes": state.nbytes if state else 0,
            "restored_tokens": self.restored,
            "beyond_trained_length": self.beyond,
            "reason": "; ".join([*self.reasons, *missed]) or None,
        }
        if state is not None and state.unwritten:
            told["unwritten"] = state.unwritten
        if state is None or self.unsaved:  # the prompt's end may be stored and the answer's not
            told["unsaved"] = self.unsaved
        return {FIELD: told}
