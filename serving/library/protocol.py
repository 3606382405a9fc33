"""Bodies and answers of the routes under /v1/lola/libraries."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

from lola_vllm.memory.documents.choose import FOUND
from lola_vllm.memory.documents.parts import SHARED_TOKENS
from lola_vllm.memory.sessions.names import check_title
from lola_vllm.serving.protocol import MAX_PROMPT_CHARS, CacheSalt, utf8
from lola_vllm.serving.sessions.protocol import (
    NewSession,
    Seconds,
    SessionChatRequest,
    SessionCompletionRequest,
)

MAX_TOP = 16  # parts that a question may read


class _Library(BaseModel):
    library: str
    parts: int
    tokens: int
    bytes: int
    created: float
    used: float


class LibrarySummary(_Library):
    """A library.

    Attributes:
        documents, parts: how many. tokens, bytes: of all states, with their keys.
        created, used: seconds since 1970.
    """

    documents: int


class LibraryList(BaseModel):
    """Answer of `GET /v1/lola/libraries`: by name."""

    libraries: list[LibrarySummary]


class DocumentPart(BaseModel):
    """A part of a document: which, the session that is its state, and the tokens it was read
    with."""

    part: int
    session: str
    tokens: int


class Document(BaseModel):
    """A document of a library.

    Attributes:
        document: its title. complete: whether all of its parts are still kept.
        created, expires: seconds since 1970.
    """

    document: str
    complete: bool
    tokens: int
    bytes: int
    created: float
    expires: float | None
    parts: list[DocumentPart]


class LibraryDetail(_Library):
    """A library with its documents, by title; the rest as in `LibrarySummary`."""

    documents: list[Document]


class AddRequest(BaseModel):
    """Body of `POST /v1/lola/libraries/{library}/documents`.

    Attributes:
        document: its title. text: of it. part_tokens: of each part, at most; default: 2,000, or as
            many as the server's --max-model-len has room for.
        ttl: seconds for which it is kept. cache_salt: as of requests. replace: a document of this
            title.
        stream: answer with an event for each part that was read.
    """

    model_config = ConfigDict(extra="forbid")

    document: Annotated[str, AfterValidator(check_title)]
    text: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARS), utf8("text")]
    part_tokens: int | None = Field(default=None, ge=4 * SHARED_TOKENS)
    ttl: Seconds | None = None
    cache_salt: CacheSalt | None = None
    replace: bool = False
    stream: bool = False


class Source(BaseModel):
    """A part of a document that an answer is made of.

    Attributes:
        part, parts: which, of how many. session: its state. tokens: of it.
        score: of what the question reads of it; 0 where its words alone were found. share: of the
            scores of all parts that were found.
        sentence: that the question is about. passage: it and its neighbours.
    """

    document: str
    part: int
    parts: int
    session: str
    tokens: int
    score: float
    share: float
    sentence: str
    passage: str


class Found(BaseModel):
    """Answer of `POST /v1/lola/libraries/{library}/find`: what a question reads, the most first."""

    sources: list[Source]


class FindRequest(BaseModel):
    """Body of `POST /v1/lola/libraries/{library}/find`.

    Attributes:
        question: what to look for. top: parts to find.
    """

    model_config = ConfigDict(extra="forbid")

    question: Annotated[str, Field(min_length=1, max_length=10_000), utf8("question")]
    top: int = Field(default=FOUND, ge=1, le=MAX_TOP)
    cache_salt: CacheSalt | None = None


class _Asks(BaseModel):
    """What questions add to the requests of sessions."""

    question: Annotated[str, Field(max_length=10_000)] | None = Field(
        default=None, description="What to look for; default: the last message, or the prompt."
    )
    session: NewSession | None = Field(
        default=None, description="A new session that goes on from the answer."
    )

    @model_validator(mode="after")
    def _new(self) -> Self:
        for name in ("turn", "tokens", "recall", "library"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: a question to a library begins a session; leave it out")
        return self


class LibraryChatRequest(_Asks, SessionChatRequest):
    """Body of `POST /v1/lola/libraries/{library}/chat`: that of `/v1/chat/completions`."""


class LibraryCompletionRequest(_Asks, SessionCompletionRequest):
    """Body of `POST /v1/lola/libraries/{library}/complete`: that of `/v1/completions`."""
