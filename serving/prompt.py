"""Prompts to token ids, as the server makes them, and token ids to the text of each token."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException
from pydantic import ValidationError
from vllm.config import ModelConfig
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.tokenize.protocol import (
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from vllm.exceptions import VLLMValidationError
from vllm.renderers import TokenizeParams

from lola_vllm.serving.bodies import refusal
from lola_vllm.serving.engine import LolaEngine
from lola_vllm.serving.protocol import MAX_PROMPT_TOKENS, PromptRequest

if TYPE_CHECKING:
    from fastapi import Request

# A decoder writes this for bytes that are not yet a whole character.
INCOMPLETE = "�"
# A character has at most four bytes, so never more tokens than this wait for its end.
MAX_PENDING = 8


class _Bounded:
    """A request to vLLM's tokenizer that is refused if a completion of it would be refused.

    vLLM counts characters before it tokenizes: no prompt has fewer tokens than its characters
    divided by those of the longest token.
    """

    add_special_tokens: bool

    def build_tok_params(self, model_config: ModelConfig) -> TokenizeParams:
        return TokenizeParams(
            max_total_tokens=min(MAX_PROMPT_TOKENS, model_config.max_model_len),
            add_special_tokens=self.add_special_tokens,
        )


class _Text(_Bounded, TokenizeCompletionRequest):
    pass


class _Chat(_Bounded, TokenizeChatRequest):
    pass


async def prompt_tokens(
    body: PromptRequest,
    raw_request: Request,
    engine: LolaEngine,
    *,
    begins: bool = True,
    adapters: bool = False,
) -> list[int]:
    """Token ids of a request's prompt.

    Args:
        begins: whether nothing comes before it; else it gets no token that starts a text.
        adapters: whether the model may be the name of an adapter.

    Raises:
        HTTPException: an unknown model, no tokenizer, a chat that the template refuses, token ids
            that are no ids, or a prompt that is empty or too long.
    """
    models = raw_request.app.state.openai_serving_models
    known = body.model is None or models.is_base_model(body.model)
    if not known and not (adapters and body.model in models.lora_requests):
        raise HTTPException(
            HTTPStatus.NOT_FOUND,
            f"model = {body.model!r} is not served; leave it out or use {engine.model!r}",
        )
    limit = min(MAX_PROMPT_TOKENS, engine.config.model_config.max_model_len - 1)
    ids = body.prompt if isinstance(body.prompt, list) else None
    try:
        tokens = ids or await _tokenized(body, raw_request, engine, begins)
    except VLLMValidationError as error:
        units = {"input_text": "characters", "input_tokens": "tokens or more"}
        if error.parameter not in units:
            raise
        raise _wrong_length(body, f"{error.value} {units[error.parameter]}", limit) from None
    if not 1 <= len(tokens) <= limit:
        raise _wrong_length(body, f"{len(tokens)} tokens", limit)
    _check_ids(ids or (), engine)
    return tokens


def _check_ids(tokens: Sequence[int], engine: LolaEngine) -> None:
    vocabulary = engine.config.model_config.get_vocab_size()
    for token in tokens:  # an invalid id would be an index out of range in the engine
        if not 0 <= token < vocabulary:
            raise HTTPException(
                HTTPStatus.BAD_REQUEST,
                f"prompt: token id {token} is none of 0 to {vocabulary - 1}",
            )


def _wrong_length(body: PromptRequest, length: str, limit: int) -> HTTPException:
    return HTTPException(
        HTTPStatus.BAD_REQUEST,
        f"{body.source}: {length}; from 1 to {limit} tokens can be read",
    )


async def _tokenized(
    body: PromptRequest, raw_request: Request, engine: LolaEngine, begins: bool
) -> list[int]:
    if engine.client.renderer.tokenizer is None:
        raise HTTPException(
            HTTPStatus.BAD_REQUEST,
            "the server has no tokenizer (--skip-tokenizer-init); give token ids as prompt",
        )
    serving = raw_request.app.state.serving_tokenization
    request: _Text | _Chat
    try:
        if body.messages is None:
            assert isinstance(body.prompt, str)
            request = _Text(model=body.model, prompt=body.prompt, add_special_tokens=begins)
        else:
            request = _Chat(
                model=body.model,
                messages=list(body.messages),
                add_generation_prompt=getattr(body, "add_generation_prompt", False),
            )
        # Parts of messages are checked only here.
        answer = await serving.create_tokenize(request, raw_request)
    except ValidationError as error:
        message = refusal(error.errors())[0]
        if not message.startswith(body.source):
            message = f"{body.source}: {message}"
        raise HTTPException(HTTPStatus.BAD_REQUEST, message) from None
    if isinstance(answer, ErrorResponse):
        raise HTTPException(HTTPStatus(answer.error.code), answer.error.message)
    tokens: list[int] = answer.tokens
    return tokens


async def text_tokens(text: str, raw_request: Request) -> list[int]:
    """Token ids of a text that goes on with another one.

    Raises:
        HTTPException: it is too long.
    """
    request = _Text(prompt=text, add_special_tokens=False)
    answer = await raw_request.app.state.serving_tokenization.create_tokenize(request, raw_request)
    if isinstance(answer, ErrorResponse):
        raise HTTPException(HTTPStatus(answer.error.code), answer.error.message)
    tokens: list[int] = answer.tokens
    return tokens


def token_texts(tokenizer: Any, tokens: list[int]) -> list[str]:
    """What each token adds to the text; together they are the text.

    A token that only starts a character adds nothing, and the one that ends it adds the character.
    """

    def decode(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=False)
        return text

    texts: list[str] = []
    before: list[int] = []  # kept, because some tokenizers drop the space of a first word
    pending: list[int] = []
    for index, token in enumerate(tokens, start=1):
        pending.append(token)
        text = decode(before + pending)[len(decode(before)) :] if before else decode(pending)
        waits = len(pending) < MAX_PENDING and index < len(tokens)
        if waits and text.endswith(INCOMPLETE):
            texts.append("")
        else:
            texts.append(text)
            before, pending = pending, []
    return texts


def check_length(tokens: list[int], engine: LolaEngine) -> None:
    """Refuse token ids that are too many for the model, or that are none of it.

    Raises:
        HTTPException: 400.
    """
    limit = int(engine.config.model_config.max_model_len)
    if len(tokens) >= limit:
        raise HTTPException(
            HTTPStatus.BAD_REQUEST,
            f"the session would have {len(tokens)} tokens, and fewer than {limit} "
            "(--max-model-len) are served; send less, or start another session",
        )
    _check_ids(tokens, engine)
