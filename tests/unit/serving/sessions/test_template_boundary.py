"""Where new messages meet what a session has seen, with a template of ChatML."""

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


@pytest.mark.parametrize(
    ("kind", "said", "whole"),
    [
        ("answer", f"{SAID}{OPENING}Yes.", f"{SAID}{OPENING}Yes.<|im_end|>\n{NEW}"),
        ("prompt", SAID, SAID + NEW),
        ("prompt", SAID + OPENING, SAID + NEW),  # no empty answer stays of one that was broken off
    ],
)
def test_new_messages_follow(goes_on, kind, said, whole):
    assert goes_on(kind, said) == whole
