"""What a file says of its state, and what of it is believed.

A checksum says that a header is as it was written, and not that it makes sense: files come from
other releases, from other servers and by upload. So every field is checked when a header is read.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from lola_vllm.memory.sessions.fingerprint import Fingerprint
from lola_vllm.memory.sessions.names import NAME

_INT32 = 2**31 - 1
_YEAR_10000 = 253_402_300_800.0  # seconds since 1970; no calendar goes on

_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
# Texts that are shown in logs and terminals, where control characters would act.
_Shown = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$", max_length=1024)]
_Count = Annotated[int, Field(ge=0, le=_INT32)]
_Rank = Annotated[int, Field(ge=0, le=9999)]  # as `file_name` writes it
# Fields that files of before them do not have.
_LATER = {"origin", "sources", "until"}


@dataclass(frozen=True)
class StateHeader:
    """What a file says of its state.

    Attributes:
        id: 32 hex digits. session, turn: whose turn it is. kind: "prompt" or "answer": the text at
            whose end it was taken.
        num_tokens: n. prefix_hash, block_hash: hex, as in `prefix_hash.py`.
        fingerprint: as `Fingerprint.to_dict`. adapter: empty where none was used. salt: as
            `salt_hash` has it.
        created, expires: seconds since 1970. parent: id of the state it continues.
        shared_prefix: `prefix_hash` of the shared prefix that its text goes on from
            (`shared_prefixes.py`); None: none.
        pinned: of earlier releases; nothing is made of it.
        tail: tokens that were said after the n: the last one of an answer is sampled, and the model
            does not read it unless the text goes on.
        composed: id of the composed state that it is or goes on from; None: there is none.
        made_of: the sessions and turns of which that was composed, in order, as they were called.
        sources: of each of them, its `session_id`. until: when the first of them expires; what
            goes on from it is kept no longer.
        origin: id of the first state of its session; None: it is this one.
        library, document: of which it is a part; empty: of none. part, parts: which, of how many.
        rank, ranks: which part of the state the file has, of how many.
    """

    # Of reading. A header that is made here holds what the types say.
    __pydantic_config__ = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    id: _Digest
    session: Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
    turn: Annotated[int, Field(ge=1, le=_INT32)]
    kind: Annotated[str, Field(pattern="^(prompt|answer)$")]
    num_tokens: _Count
    prefix_hash: _Digest
    block_hash: _Digest
    fingerprint: dict[str, _Shown] = field(repr=False)
    adapter: _Shown = ""
    salt: Annotated[str, Field(pattern=r"^([0-9a-f]{32}:)?([0-9a-f]{32})?$")] = ""
    created: Annotated[float, Field(ge=0, lt=_YEAR_10000)] = 0.0
    expires: float | None = None
    parent: _Digest | None = None
    shared_prefix: _Digest | None = None
    pinned: bool = False
    tail: list[_Count] = field(default_factory=list)
    composed: _Digest | None = None
    made_of: list[Annotated[str, Field(pattern=f"^{NAME.pattern}@[1-9][0-9]{{0,8}}$")]] = field(
        default_factory=list
    )
    sources: list[_Digest] = field(default_factory=list)
    until: float | None = None
    origin: _Digest | None = None
    library: Annotated[str, Field(pattern=f"^({NAME.pattern})?$")] = ""
    document: _Shown = ""
    part: _Count = 0
    parts: _Count = 0
    rank: _Rank = 0
    ranks: _Rank = 1

    @property
    def identity(self) -> tuple[str, str, str, int, int, int]:
        """What a file and who reads it agree in: the state, its owner, its text, the rank. The
        prefix hash covers model, adapter and salt too."""
        return (
            self.id, self.salt, self.prefix_hash, self.num_tokens, self.rank, self.ranks,
        )  # fmt: skip

    @property
    def session_id(self) -> str:
        """What its session is known by, whatever it is called: the id of its first state."""
        return self.origin or self.id

    def to_json(self) -> str:
        """As it is stored.

        Raises:
            ValueError: a field has a value that `from_json` refuses.
        """
        text = json.dumps(asdict(self), sort_keys=True, allow_nan=False)
        self.from_json(text)
        return text

    @classmethod
    def from_json(cls, text: str) -> StateHeader:
        """Read what `to_json` wrote.

        Raises:
            ValueError: a field is missing or unknown, or its value is none that a state can have.
        """
        values = from_json(text, allow_inf_nan=False)
        if not isinstance(values, dict) or set(values) | _LATER != {f.name for f in fields(cls)}:
            raise ValueError("the fields are not those of a state")
        try:
            header: StateHeader = _adapter().validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{where} = {str(first['input'])[:80]!r}: {first['msg']}") from None
        if set(header.fingerprint) != {f.name for f in fields(Fingerprint)}:
            raise ValueError("the parts of the fingerprint are not those of a state")
        if header.rank >= header.ranks:
            raise ValueError(f"rank = {header.rank}: there are {header.ranks}, from 0 on")
        return header


@cache
def _adapter() -> TypeAdapter[Any]:
    return TypeAdapter(StateHeader)
