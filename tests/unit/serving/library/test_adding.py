"""A document's text in parts: as many tokens as were asked for, and no work for a client that has
left."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from lola_vllm.serving.library.adding import cut
from lola_vllm.serving.library.protocol import AddRequest

BOS = 1


class Tokenizer:
    """A token is a character, after one that begins a text."""

    def __init__(self) -> None:
        self.calls, self.began, self.goes_on = 0, threading.Event(), threading.Event()
        self.goes_on.set()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.calls += 1
        self.began.set()
        assert self.goes_on.wait(20)
        return [BOS] * add_special_tokens + list(map(ord, text))


def engine_with(tokenizer: Tokenizer) -> Any:
    model = SimpleNamespace(
        hf_config=SimpleNamespace(max_position_embeddings=4096), max_model_len=4096
    )
    return SimpleNamespace(
        client=SimpleNamespace(renderer=SimpleNamespace(tokenizer=tokenizer)),
        config=SimpleNamespace(model_config=model),
        page=SimpleNamespace(update_interval=16, sink_size=4),
    )


@pytest.mark.parametrize("most", [160, 400])
def test_no_part_has_more_tokens_than_were_asked_for(most):
    """Those count that a tokenizer begins each text with."""
    text = "".join(f"Line {i} of a text{'.' * (i % 7)}\n" for i in range(300))
    body = AddRequest(document="d", text=text, part_tokens=most)
    parts = asyncio.run(cut(engine_with(Tokenizer()), body))
    assert len(parts) > 3 and all(part[0] == BOS and len(part) <= most for part in parts)


def test_a_client_that_leaves_stops_the_work():
    tokenizer = Tokenizer()
    tokenizer.goes_on.clear()
    body = AddRequest(document="d", text="line\n" * 2000, part_tokens=160)

    async def leave() -> None:
        task = asyncio.ensure_future(cut(engine_with(tokenizer), body))
        assert await asyncio.to_thread(tokenizer.began.wait, 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        tokenizer.goes_on.set()

    asyncio.run(leave())  # which waits for its threads
    assert tokenizer.calls == 1
