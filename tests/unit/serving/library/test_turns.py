"""Who asks a library next, and who is told to come again."""

import asyncio

import pytest
from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient

from lola_vllm.serving.bodies import LolaRoute
from lola_vllm.serving.library.turns import Turns


async def ask(turns, client, order, until=None):
    """A question that has its turn until an event, or not longer than a moment."""
    async with turns.turn(client):
        order.append(client)
        if until is not None:
            await until.wait()


async def started(*questions):
    """Questions that have come, one after the other."""
    tasks = []
    for question in questions:
        tasks.append(asyncio.ensure_future(question))
        await asyncio.sleep(0)
    return tasks


def test_a_client_with_one_question_does_not_wait_for_all_of_another_one():
    async def run():
        turns, order, go = Turns(at_once=1), [], asyncio.Event()
        tasks = await started(*(ask(turns, "many", order, go) for _ in range(20)))
        tasks += await started(ask(turns, "one", order), ask(turns, "two", order))
        assert turns.waiting == 21
        go.set()
        await asyncio.gather(*tasks)
        return turns, order

    turns, order = asyncio.run(run())
    assert order[:4] == ["many", "many", "one", "two"] and order.count("many") == 20
    assert turns.waiting == 0 and not turns._free.locked()


def test_who_would_wait_too_long_is_told_when_to_come_again():
    async def run():
        turns, order, go = Turns(at_once=1, wait_s=8), [], asyncio.Event()
        turns.seconds = 3.0  # a turn
        tasks = await started(*(ask(turns, "many", order, go) for _ in range(3)))
        with pytest.raises(HTTPException) as refused:
            await ask(turns, "many", order)  # a third that waits: 9 s
        assert refused.value.status_code == 429
        assert refused.value.headers == {"Retry-After": "1"}
        assert "ask again in 1 s" in refused.value.detail
        turns.check("one")  # after one of the other's, 6 s
        go.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())


def test_nobody_waits_longer_and_who_leaves_is_passed_over():
    async def run():
        turns, order, go = Turns(at_once=1, wait_s=0.05), [], asyncio.Event()
        (running,) = await started(ask(turns, "first", order, go))
        late, gone = await started(ask(turns, "late", order), ask(turns, "gone", order))
        gone.cancel()
        (refused,) = await asyncio.gather(late, return_exceptions=True)
        assert isinstance(refused, HTTPException) and refused.headers["Retry-After"] == "1"
        assert not running.done() and turns.waiting == 0
        go.set()
        await running
        await ask(turns, "next", order)
        return order

    assert asyncio.run(run()) == ["first", "next"]


def test_a_refusal_keeps_its_headers():
    app = FastAPI()
    app.router.route_class = LolaRoute

    @app.get("/")
    async def refuse():
        raise HTTPException(429, "later", headers={"Retry-After": "3"})

    answer = TestClient(app).get("/")
    assert answer.status_code == 429 and answer.headers["Retry-After"] == "3"
    assert answer.json()["error"]["message"] == "later"
