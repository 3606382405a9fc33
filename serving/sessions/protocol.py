"""Bodies and answers of the routes under /v1/lola/sessions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from lola_vllm.memory.sessions.names import MAX_SOURCES, check_name, check_new_name, parse_reference
from lola_vllm.serving.protocol import MAX_MESSAGES, Prompt, PromptRequest

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
TurnNumber = Annotated[int, Field(ge=0, lt=10**9)]
TurnTokens = Annotated[int, Field(ge=1, lt=2**31)]
NewSession = Annotated[str, AfterValidator(check_new_name)]


class SessionSummary(BaseModel):
    """A session.

    Attributes:
        session: its name. turn: the number of its last turn. turns: those that are kept.
        tokens: that its last turn covers. bytes: of all its states.
        made_of: the sessions and turns of which it was composed, in order.
        created, used: seconds since 1970.
        segments, segment_bytes: of its text, which were read apart to come back for questions; they
            go with the session.
    """

    session: str
    turn: int
    turns: list[int]
    tokens: int
    bytes: int
    made_of: list[str]
    created: float
    used: float
    segments: int
    segment_bytes: int


class StoredState(BaseModel):
    """A stored state of a session.

    Attributes:
        id: 32 hex digits. turn: of the session. kind: "prompt" or "answer": where it was taken.
        tokens: that it covers. bytes: of all ranks. tiers: "memory", "disk".
        unwritten: why it is in memory only, where it should be on the disk too; null: it is not.
        expires: seconds since 1970. superseded: whether the session has gone on from it.
        adapter: name of a LoRA adapter. parent: id of the state that it continues.
    """

    id: str
    turn: int
    kind: str
    tokens: int
    bytes: int
    tiers: list[str]
    unwritten: str | None
    created: float
    used: float
    expires: float | None
    superseded: bool
    adapter: str
    parent: str | None


class SessionDetail(SessionSummary):
    """A session with its states, oldest first."""

    states: list[StoredState]


class SessionList(BaseModel):
    """Answer of `GET /v1/lola/sessions`: the last used first."""

    sessions: list[SessionSummary]


class SessionTokens(BaseModel):
    """Answer of `GET /v1/lola/sessions/{session}/tokens`.

    Attributes:
        turn: which it is. tokens: ids of all that was said.
    """

    session: str
    turn: int
    tokens: list[int]


class Deleted(BaseModel):
    """Answer of `DELETE /v1/lola/sessions/{session}`.

    Attributes:
        deleted: states that are gone. composed: sessions that were composed of it, and stay.
    """

    deleted: int
    composed: list[str] = []


class ChangeRequest(BaseModel):
    """Body of `PATCH /v1/lola/sessions/{session}`.

    Attributes:
        session: another name.
    """

    model_config = ConfigDict(extra="forbid")

    session: NewSession


class ForkRequest(BaseModel):
    """Body of `POST /v1/lola/sessions/{session}/fork`.

    Attributes:
        to: name of the new session.
    """

    model_config = ConfigDict(extra="forbid")

    to: Annotated[str, AfterValidator(lambda name: check_new_name(name, "to"))]


class ComposeRequest(BaseModel):
    """Body of `POST /v1/lola/sessions/{session}/compose`.

    Attributes:
        sources: `from`, sessions or turns of them, in the order of their texts.
        ttl: seconds that the new session is kept; no longer than any of them.
    """

    model_config = ConfigDict(extra="forbid")

    sources: list[Annotated[str, AfterValidator(lambda name: str(parse_reference(name)))]] = Field(
        alias="from", min_length=1, max_length=MAX_SOURCES
    )
    ttl: Seconds | None = None


class AppendRequest(PromptRequest):
    """Body of `POST /v1/lola/sessions/{session}/append`: text, token ids or messages to read.

    Attributes:
        ttl: seconds that the turn is kept. turn: the number of the turn that this one follows, 0
            for a new session; without it, whatever is there. tokens: that the turn covers.
    """

    ttl: Seconds | None = None
    turn: TurnNumber | None = None
    tokens: TurnTokens | None = None


class AppendResponse(BaseModel):
    """Answer of `POST /v1/lola/sessions/{session}/append`.

    Attributes:
        turn: its number. tokens: of the session. new_tokens: those of this turn.
        bytes: of its state. restored_tokens: that were not computed again.
        reason: why they are not all that came before; null if they are.
        unsaved: why nothing is stored; null if it is.
        unwritten: why it is in memory only, where it should be on the disk too; null if it is not.
    """

    session: str
    turn: int | None
    tokens: int
    new_tokens: int
    bytes: int
    restored_tokens: int
    reason: str | None
    unsaved: str | None
    unwritten: str | None


_ONE_ANSWER = "a session goes on with one answer; fork it to have several"
_NAMED = "the address names the session; leave it out"
# Field of vLLM's requests -> its only value here, and why.
_REFUSED: dict[str, tuple[Any, str]] = {
    "n": (1, _ONE_ANSWER),
    "use_beam_search": (False, _ONE_ANSWER),
    "stop": ([], "a text may end within a token, where no session can go on; use stop_token_ids"),
    "echo": (False, "what was said before is not sent back"),
    "truncate_prompt_tokens": (None, "what was said before is not cut"),
    "session_id": (None, _NAMED),
    "kv_transfer_params": (None, _NAMED),
    "suffix": (None, "a session goes on at its end"),
    "prompt_embeds": (None, "a session keeps token ids"),
    "add_generation_prompt": (True, "an answer begins a turn; to read without one, use append"),
    "continue_final_message": (False, "an answer begins a turn"),
}


class _Goes(BaseModel):
    """What the requests for an answer add to vLLM's."""

    ttl: Seconds | None = Field(default=None, description="Seconds that the turn is kept.")
    turn: TurnNumber | None = Field(
        default=None,
        description="Number of the turn that this one follows, 0 for a new session.",
    )
    tokens: TurnTokens | None = Field(
        default=None,
        description="Tokens that the session covers, as the answer of its last turn said.",
    )
    recall: Literal["segments"] | None = Field(
        default=None,
        description="Whether a segment of the session's own text comes back for the answer.",
    )

    library: str | None = Field(
        default=None,
        description="A library, of which a part that the question reads is read for the answer.",
    )

    @model_validator(mode="before")
    @classmethod
    def _objects(cls, data: Any) -> Any:
        # vLLM compares each message with its models of all kinds of messages, which is slow.
        messages = data.get("messages") if isinstance(data, dict) else None
        if isinstance(messages, list):
            contents = [m.get("content") for m in messages if isinstance(m, dict)]
            parts = sum(len(c) for c in contents if isinstance(c, list))
            if max(len(messages), parts) > MAX_MESSAGES:
                raise ValueError(
                    f"messages: {len(messages)}, with {parts} parts in them; at most "
                    f"{MAX_MESSAGES} are read"
                )
        # vLLM 0.32 reads keys of it before it has checked that it is an object.
        value = data.get("structured_outputs") if isinstance(data, dict) else None
        if isinstance(value, list | str | int | float):
            raise ValueError(f"structured_outputs = {value!r:.80}: must be an object")
        return data

    @model_validator(mode="after")
    def _one_continuation(self) -> Self:
        for name, (only, why) in _REFUSED.items():
            value = getattr(self, name, only)
            if value not in (only, None) and value != []:
                raise ValueError(f"{name} = {value!r:.80}: {why}")
        if self.library is not None:
            check_name(self.library, "library")
            if self.recall is not None:
                raise ValueError("library, recall: a question is asked of one of them")
        return self


class SessionChatRequest(_Goes, ChatCompletionRequest):
    """Body of `POST /v1/lola/sessions/{session}/chat`: that of `/v1/chat/completions`, with the new
    messages only."""


class SessionCompletionRequest(_Goes, CompletionRequest):
    """Body of `POST /v1/lola/sessions/{session}/complete`: that of `/v1/completions`, with the new
    text or token ids only."""

    prompt: Prompt
