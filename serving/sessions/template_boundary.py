"""Where new messages meet what a session has already seen.

A session has token ids and no messages. So the chat template is applied to a short chat that ends
with an assistant's answer, followed by the new messages. What the template writes after that answer
is what the session goes on with: the end of the assistant's turn, and the new messages.

    <|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\nANSWER | <|im_end|>\n<|im_start|>user\n...

The session may have a part of the end already, because the model said `<|im_end|>` itself. Where it
ends with messages that were only read, the end of an answer is left out. Where nothing was kept of
an answer, its beginning is left out too, so that no empty answer stands between two messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple

from fastapi import HTTPException
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from lola_vllm.serving.prompt import text_tokens

if TYPE_CHECKING:
    from fastapi import Request
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

_ANSWER = "Zq7wLola3vXn"
_BEFORE = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _ANSWER}]


class Transcript(NamedTuple):
    """What a session has seen.

    Attributes:
        turn: its number. kind: "answer" if it ends with what was generated, else "prompt".
        tokens: that its state covers. tail: that were said after them.
    """

    turn: int
    kind: str
    tokens: list[int]
    tail: list[int]

    def before(self, special: Sequence[int]) -> list[int]:
        """All tokens, to be followed by new ones.

        Args:
            special: ids that stand for no text. The one that ended an answer is left out: a chat
                template writes it again where it belongs, and a text goes on without it.
        """
        ended = self.tail and self.tail[-1] in special
        return self.tokens + (self.tail[:-1] if ended else self.tail)


async def continuation(
    request: ChatCompletionRequest,
    transcript: Transcript,
    raw_request: Request,
    special: Sequence[int],
) -> list[int]:
    """The tokens of a session and of new messages.

    They begin with the session's, but for the beginning of an answer of which nothing was kept.

    Args:
        request: the new messages, and how to render them. special: as in `Transcript.before`.

    Raises:
        HTTPException: the template refuses the messages, or changes what an assistant says.
    """
    new = await _after_answer(request, raw_request, request.messages)
    end = await _after_answer(request, raw_request, [], prompt=False)
    if not new.startswith(end):
        raise HTTPException(
            HTTPStatus.NOT_IMPLEMENTED,
            "the chat template ends an assistant's turn differently when messages follow; send the "
            "whole chat to /v1/chat/completions with session_id",
        )
    before = transcript.before(special)
    if transcript.kind != "answer":
        new = new[len(end) :]
        opening = (await _after_answer(request, raw_request, []))[len(end) :]
        start = await text_tokens(opening, raw_request) if opening else []
        if start and before[-len(start) :] == start:
            before = before[: -len(start)]
    return before + await text_tokens(new, raw_request)


async def ending(request: ChatCompletionRequest, raw_request: Request) -> list[int]:
    """The tokens that the template writes where an assistant's turn ends."""
    text = await _after_answer(request, raw_request, [], prompt=False)
    return await text_tokens(text, raw_request) if text else []


async def _after_answer(
    request: ChatCompletionRequest,
    raw_request: Request,
    messages: Sequence[Any],
    prompt: bool | None = None,
) -> str:
    """What the template writes after an assistant's answer that messages follow.

    Args:
        prompt: whether an assistant's turn begins at the end; None: as the request says.
    """
    fields: dict[str, Any] = {"messages": [*_BEFORE, *messages], "kv_transfer_params": None}
    if prompt is not None:
        fields["add_generation_prompt"] = prompt
    elif not messages:
        fields["add_generation_prompt"] = True
    copy = request.model_copy(update=fields)
    rendered = await raw_request.app.state.openai_serving_chat.render_chat_request(copy)
    if isinstance(rendered, ErrorResponse):
        raise HTTPException(HTTPStatus(rendered.error.code), rendered.error.message)
    text = str(rendered[1][0].get("prompt") or "")
    _, found, after = text.partition(_ANSWER)
    if not found:
        raise HTTPException(
            HTTPStatus.NOT_IMPLEMENTED,
            "the chat template does not write what an assistant says as it is; send the whole "
            "chat to /v1/chat/completions with session_id",
        )
    return after
