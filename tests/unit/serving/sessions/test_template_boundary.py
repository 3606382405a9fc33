"""Where new messages meet what a session has seen, with a template of ChatML."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from lola_vllm.serving.sessions import template_boundary
from lola_vllm.serving.sessions.template_boundary import Transcript, continuation

OPENING = "<|im_start|>assistant\n"
SAID = "<|im_start|>user\nOne.<|im_end|>\n"
NEW = "<|im_start|>user\nTwo.<|im_end|>\n" + OPENING


class Request:
    """A chat completion, as far as it is looked at."""

    def __init__(self, messages, add_generation_prompt=True):
        self.messages, self.add_generation_prompt = messages, add_generation_prompt

    def model_copy(self, update):
        return Request(
            update["messages"], update.get("add_generation_prompt", self.add_generation_prompt)
        )


async def render(request):
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in request.messages)
    return None, [{"prompt": text + OPENING * request.add_generation_prompt}]


@pytest.fixture
def goes_on(monkeypatch):
    async def tokens(text, _):
        return list(text.encode())

    monkeypatch.setattr(template_boundary, "text_tokens", tokens)
    chat = SimpleNamespace(render_chat_request=render)
    raw = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(openai_serving_chat=chat)))

    def text(kind, said):
        seen = Transcript(1, kind, list(said.encode()), [])
        request = Request([{"role": "user", "content": "Two."}])
        return bytes(asyncio.run(continuation(request, seen, raw, []))).decode()

    return text


def test_an_answer_is_ended_before_new_messages(goes_on):
    said = f"{SAID}{OPENING}Yes."
    assert goes_on("answer", said) == f"{said}<|im_end|>\n{NEW}"


def test_messages_that_were_only_read_are_followed_by_new_ones(goes_on):
    assert goes_on("prompt", SAID) == SAID + NEW


def test_no_empty_answer_stays_of_one_that_was_broken_off(goes_on):
    assert goes_on("prompt", SAID + OPENING) == SAID + NEW
