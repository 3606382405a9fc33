"""Many clients ask a library at once."""

from __future__ import annotations

import asyncio
import time

import httpx

from lola_vllm.serving.library.turns import WAIT_S
from tests.serving.library.test_routes import BASE, GARDEN, ok
from tests.support.servers import KEY
from tools.support.server_process import Server

CLIENTS = 48


def test_every_client_is_answered_or_told_when_to_come_again(tiny: Server) -> None:
    for client in (tiny.client, tiny.other):
        for number in range(4):
            body = {"document": f"{number}.txt", "text": f"{number}. {GARDEN}", "part_tokens": 240}
            ok(client.post(f"{BASE}/crowd/documents", json=body))

    async def ask(client: httpx.AsyncClient, key: str, number: int) -> tuple[httpx.Response, float]:
        began = time.monotonic()
        answer = await client.post(
            f"{BASE}/crowd/find", json={"question": f"What grows in garden {number}?"},
            headers={"Authorization": f"Bearer {key}"},
        )  # fmt: skip
        return answer, time.monotonic() - began

    async def crowd() -> list[tuple[httpx.Response, float]]:
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=tiny.url, timeout=120, limits=limits) as client:
            first = await ask(client, KEY, 0)
            # One client of its own key beside all others.
            keys = [KEY] * (CLIENTS - 1) + [f"not-{KEY}"]
            found = await asyncio.gather(*(ask(client, key, i) for i, key in enumerate(keys)))
        return [first, *found]

    (first, alone), *answers = asyncio.run(crowd())
    assert ok(first)["sources"]
    for answer, took in answers:
        assert answer.status_code in (200, 429), answer.text
        assert took < WAIT_S + max(6.0, 6 * alone)
        if answer.status_code == 429:
            assert int(answer.headers["Retry-After"]) >= 1
            assert "ask again in" in answer.json()["error"]["message"]
        else:
            assert answer.json()["sources"]
    assert answers[-1][0].status_code == 200  # whose questions do not wait for all of the others'
