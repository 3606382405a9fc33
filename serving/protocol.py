"""What the routes under /v1/lola take and give."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

# A page is of fixed size however long its prompt, so these bound only the answer and the wait.
MAX_PROMPT_TOKENS = 65_536
MAX_PROMPT_CHARS = 1_000_000
MAX_MESSAGES = 1_000


class Slots(BaseModel):
    """State slots of one engine.

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
    """What a state costs on one rank, in bytes.

    Attributes:
        parts: of one state, by part; they sum to `bytes_per_slot`.
        bytes_per_slot: one state, all layers. bytes_per_sequence: all slots of a running sequence.
        break_even_tokens: context beyond which a full KV cache would be larger.
    """

    parts: dict[str, int]
    bytes_per_slot: int
    bytes_per_sequence: int
    break_even_tokens: int


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
    slots: Slots
    block_size: int | None
    max_model_len: int
    tensor_parallel_size: int
    backend: str | None
    versions: dict[str, str]


class MemoryRequest(BaseModel):
    """Body of `POST /v1/lola/memory`: one of `prompt` and `messages`.

    Attributes:
        model: a served name; default: the server's own.
        prompt: text or token ids. messages: a chat, rendered by the model's template.
        add_generation_prompt: end a chat with the start of the assistant's turn.
        layers: which to answer for; default: all.
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = Field(
        default=None, min_length=1, max_length=MAX_MESSAGES
    )
    add_generation_prompt: bool = True
    layers: list[int] | None = Field(default=None, min_length=1, max_length=1_000)

    @model_validator(mode="after")
    def _one_prompt(self) -> MemoryRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give one of 'prompt' (text or token ids) and 'messages'")
        if self.prompt is not None and not self.prompt:
            raise ValueError("prompt is empty; give text or token ids")
        if isinstance(self.prompt, str) and len(self.prompt) > MAX_PROMPT_CHARS:
            raise ValueError(
                f"prompt has {len(self.prompt)} characters; at most {MAX_PROMPT_CHARS} are read"
            )
        return self


class Head(BaseModel):
    """One sparse set: positions of its tokens, ascending, and their self-recall errors."""

    positions: list[int]
    errors: list[float]


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
        folded: tokens in the hidden state of every head.
        sparse_cache_size: what a head can hold. error: "sre", or "relative" where state heads share
            a sparse set (their mean of SRE / ||v||).
    """

    model: str
    num_tokens: int
    tokens: list[int]
    texts: list[str] | None
    sinks: int
    window_start: int
    folded: int
    sparse_cache_size: int
    error: str
    layers: list[Layer]
