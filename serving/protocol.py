"""Bodies and answers of the routes under /v1/lola."""

from __future__ import annotations

import difflib
import functools
import reprlib
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
    with_config,
)
from typing_extensions import NotRequired, Self, TypedDict

# A page has a fixed size for prompts of any length. These bound the answer and the waiting time.
MAX_PROMPT_TOKENS = 65_536
MAX_PROMPT_CHARS = 1_000_000
MAX_MESSAGES = 1_000  # and parts of messages, all together
MAX_BODY_BYTES = 4 * 2**20  # the characters as UTF-8, and the JSON around them


class States(BaseModel):
    """States of one engine.

    Attributes:
        total: in the pool. per_sequence: held by a running sequence (2 while prefix caching is on).
        used: held now; null where the server runs without statistics (--disable-log-stats).
        sequences: how many sequences fit.
    """

    total: int
    per_sequence: int
    used: int | None
    sequences: int


class Memory(BaseModel):
    """Memory of a state on one rank, in bytes.

    Attributes:
        parts: of one state, by part; they sum to `bytes_per_state`.
        bytes_per_state: one state, all layers. bytes_per_sequence: all states of a running
            sequence.
        break_even_tokens: context beyond which a full KV cache would be larger.
        full_kv_bytes_per_token: what a full KV cache of the same layers takes for a token.
    """

    parts: dict[str, int]
    bytes_per_state: int
    bytes_per_sequence: int
    break_even_tokens: int
    full_kv_bytes_per_token: int


class InfoResponse(BaseModel):
    """Answer of `GET /v1/lola/info`.

    Attributes:
        lola_config: the parameters in use. backend: the ops in use, null where a user's own worker
            extension hides them. block_size: tokens between two cached states, null while prefix
            caching is off.
    """

    model: str
    lola_config: dict[str, Any]
    num_layers: int
    memory: Memory
    states: States
    block_size: int | None
    max_model_len: int
    tensor_parallel_size: int
    backend: str | None
    versions: dict[str, str]


def _kind(value: Any) -> str | None:
    return "(text)" if isinstance(value, str) else "(list)" if isinstance(value, list) else None


def _text_or_list(of: str) -> Discriminator:
    """Choose between the two types before the check, so that faults are of one type only."""
    return Discriminator(
        _kind,
        custom_error_type="text_or_list",
        custom_error_message=f"Input should be text or a list of {of}",
    )


# The check of a list stops at its first fault or at its bound, because millions would be slow.
Prompt = Annotated[
    Annotated[str, Tag("(text)")]
    | Annotated[list[int], Field(max_length=MAX_PROMPT_TOKENS, fail_fast=True), Tag("(list)")],
    _text_or_list("token ids"),
]


@with_config(ConfigDict(extra="allow"))
class MessagePart(TypedDict):
    """A part of a message, with the fields that are checked here."""

    type: str
    text: NotRequired[str]


Content = Annotated[
    Annotated[str, Tag("(text)")]
    | Annotated[list[MessagePart], Field(max_length=MAX_MESSAGES, fail_fast=True), Tag("(list)")],
    _text_or_list("parts"),
]


@with_config(ConfigDict(extra="allow"))
class Message(TypedDict):
    """A chat's message, with the fields that are checked here; vLLM checks the rest."""

    role: str
    content: NotRequired[Content | None]


def check_utf8(field: str, text: str) -> str:
    """A text, unless it cannot be written as UTF-8.

    Raises:
        ValueError: names the field and the character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{field}: character {error.start} is half of a surrogate pair; send text that can be "
            "written as UTF-8"
        ) from None
    return text


def utf8(field: str) -> AfterValidator:
    """What checks a field with `check_utf8`."""
    return AfterValidator(functools.partial(check_utf8, field))


CacheSalt = Annotated[str, utf8("cache_salt")]


class PromptRequest(BaseModel):
    """A text to read: one of `prompt` and `messages`.

    Attributes:
        model: a served name; default: the server's own.
        prompt: text or token ids. messages: a chat, rendered by the model's template.
        cache_salt: cached prefixes and stored states are shared only with requests of the same
            salt, as for vLLM's own routes.
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(default=None, max_length=1_000)
    prompt: Prompt | None = None
    messages: list[Message] | None = Field(
        default=None, min_length=1, max_length=MAX_MESSAGES, fail_fast=True
    )
    cache_salt: CacheSalt | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        for name in data if isinstance(data, dict) else ():
            if name not in cls.model_fields:
                shown = reprlib.repr(name)[1:-1]
                near = difflib.get_close_matches(shown, cls.model_fields, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"{shown}: unknown field; nearest valid name: {near!r}; "
                    f"all: {', '.join(cls.model_fields)}"
                )
        return data

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give one of 'prompt' (text or token ids) and 'messages'")
        if self.prompt is not None and not self.prompt:
            raise ValueError("prompt is empty; give text or token ids")
        # vLLM validates each part against its models of all kinds of parts, which is slow.
        lists = [v for m in self.messages or () for v in m.values() if isinstance(v, list)]
        parts = sum(map(len, lists))
        if parts > MAX_MESSAGES:
            raise ValueError(f"messages: {parts} parts; at most {MAX_MESSAGES} are read")
        for text in self._texts():
            check_utf8(self.source, text)
        characters = sum(map(len, self._texts()))
        if characters > MAX_PROMPT_CHARS:
            raise ValueError(
                f"{self.source}: {characters} characters; at most {MAX_PROMPT_CHARS} are read"
            )
        return self

    @property
    def source(self) -> str:
        """The field that holds the prompt."""
        return "prompt" if self.messages is None else "messages"

    def _texts(self) -> Iterator[str]:
        if isinstance(self.prompt, str):
            yield self.prompt
        for message in self.messages or ():
            content = message.get("content")
            if isinstance(content, str):
                yield content
            else:
                yield from (part.get("text", "") for part in content or ())


class MemoryRequest(PromptRequest):
    """Body of `POST /v1/lola/memory`.

    Attributes:
        add_generation_prompt: end a chat with the start of the assistant's turn.
        layers: which to answer for; default: all.
        forgotten: answer with the recall errors of folded tokens too.
        history: answer with when each token entered and left the sparse caches.
    """

    add_generation_prompt: bool = True
    layers: list[int] | None = Field(default=None, min_length=1, max_length=1_000, fail_fast=True)
    forgotten: bool = False
    history: bool = False


class Head(BaseModel):
    """What one sparse set holds, and how full it is.

    Attributes:
        sparse_cache_size: pairs that it can hold. folded: tokens in its hidden state, if any.
        positions: of the tokens that it holds, ascending. errors: their self-recall errors.
        score_weights: importance times decay, which multiply each error in the choice; null where
            nothing does.
        forgotten: recall errors of the tokens between sinks and window that are not in the set, in
            order; null unless asked for.
        entered: tokens that were read when each of `positions` entered; null unless the history was
            asked for.
        gone: of each token that was in the set and was folded later: its position, and how many
            tokens were read when it entered and when it left; null as `entered`.
    """

    sparse_cache_size: int
    folded: int
    positions: list[int]
    errors: list[float]
    score_weights: list[float] | None = None
    forgotten: list[float] | None = None
    entered: list[int] | None = None
    gone: list[tuple[int, int, int]] | None = None


class Layer(BaseModel):
    """The sparse sets of a layer, in order."""

    layer: int
    heads: list[Head]


class MemoryResponse(BaseModel):
    """Answer of `POST /v1/lola/memory`: where each token of a prompt is kept.

    A token before `window_start` that is no sink lies, in every head, in the sparse cache if its
    position is listed there and in the hidden state if not.

    Attributes:
        tokens: ids. texts: what each adds to the text; empty where it only starts a character, and
            null for a server without a tokenizer.
        sinks: first positions that stay exact. window_start: first position of the window.
        window_size, update_interval: the model's: after n tokens the window starts at
            n // update_interval * update_interval - window_size, or at the last sink.
        history_interval: tokens between two looks at the sparse caches for `entered` and `gone`: a
            multiple of the update interval; null unless the history was asked for.
        shifted_by: positions by which the context has been shifted; 0 where none was.
        rope_positions: of each token, in the exact memories, after the last one; null while they
            are the positions.
        error: "sre", or "relative" where state heads share a sparse set (their mean of
            SRE / ||v||).
    """

    model: str
    num_tokens: int
    tokens: list[int]
    texts: list[str] | None
    sinks: int
    window_start: int
    window_size: int
    update_interval: int
    history_interval: int | None
    shifted_by: int
    rope_positions: list[int] | None
    error: str
    layers: list[Layer]
