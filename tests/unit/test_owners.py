"""API keys are told apart by a salt that the server makes."""

import asyncio
from types import SimpleNamespace

import pytest

from lola_vllm.serving.engine import Unavailable
from lola_vllm.serving.sessions import owners
from lola_vllm.serving.sessions.held import hold
from lola_vllm.serving.sessions.owners import OwnerMiddleware, Owners, listen, owned, reported
from lola_vllm.sessions import Reference


class Client:
    """An engine client that gives back what it is asked."""

    def __init__(self):
        self.closed = 0

    async def generate(self, prompt, params, request_id):
        try:
            for part in (None, {"lola": {"restored_tokens": 3}}):
                yield SimpleNamespace(prompt=prompt, kv_transfer_params=part)
        finally:
            self.closed += 1


def ask(app_state, authorization, prompt="x"):
    """The prompt as the engine sees it, in a request with this header."""
    client = Client()
    listen(client)
    found = []

    async def app(scope, receive, send):
        async for output in client.generate(prompt, None, "id"):
            found.append(output.prompt)

    headers = [] if authorization is None else [(b"authorization", authorization.encode())]
    scope = {"type": "http", "headers": headers, "app": SimpleNamespace(state=app_state)}
    asyncio.run(OwnerMiddleware(app)(scope, None, None))
    return found[-1]


def with_keys(*keys):
    return SimpleNamespace(lola_owners=Owners(keys))


@pytest.mark.parametrize(
    "state",
    [
        with_keys(),
        with_keys("a"),
        with_keys("a", "a"),
        SimpleNamespace(lola_owners=None),
        SimpleNamespace(),
    ],
)
def test_with_one_key_or_none_nothing_changes(state):
    prompt = {"prompt_token_ids": [1], "cache_salt": "s"}
    assert ask(state, "Bearer a", prompt) is prompt


def test_every_key_and_salt_gives_another_salt():
    state, salts = with_keys("a", "b"), set()
    for key in ("a", "b"):
        for own in ({}, {"cache_salt": ""}, {"cache_salt": "s"}, {"cache_salt": "t"}):
            seen = ask(state, f"bearer {key}", {"prompt_token_ids": [1], **own})
            assert seen["prompt_token_ids"] == [1]
            salts.add(seen["cache_salt"])
            assert ask(state, f"Bearer {key}", {"prompt_token_ids": [1], **own}) == seen
    assert len(salts) == 8 and all(len(salt) == 32 for salt in salts)
    # vLLM refuses these elsewhere; here nobody is given another's salt.
    for header in (None, "Bearer c", "Basic a", "Bearer"):
        assert ask(state, header, {"prompt_token_ids": [1]}) == {"prompt_token_ids": [1]}


def test_prompts_of_every_kind_are_salted():
    state = with_keys("a", "b")
    salt = ask(state, "Bearer a", {"prompt": "x"})["cache_salt"]
    assert ask(state, "Bearer a", "x") == {"prompt": "x", "cache_salt": salt}
    assert ask(state, "Bearer a", [5]) == {"prompt_token_ids": [5], "cache_salt": salt}
    assert ask(state, "Bearer a", SimpleNamespace(cache_salt=None)).cache_salt == salt
    with pytest.raises(ValueError, match="cannot be given a cache salt"):
        ask(state, "Bearer a", object())


def test_a_route_is_told_what_the_store_said():
    client = Client()
    listen(client)

    async def read(all_of_it):
        found = reported()
        outputs = client.generate("x", None, "id")
        async for _ in outputs:
            if not all_of_it:
                break
        await outputs.aclose()
        return found

    assert asyncio.run(read(True)) == {"lola": {"restored_tokens": 3}}
    assert asyncio.run(read(False)) == {}
    assert client.closed == 2
    assert owned("s") == "s" and owners._owner.get() is None


def test_owners_hold_sessions_of_one_name_at_once_and_an_owner_once():
    engine = SimpleNamespace(store_id=lambda: asyncio.sleep(0, "test-owners"))
    reference = Reference("agent-7")

    async def run():
        held = []
        for owner in (b"a", b"b"):
            owners._owner.set(owner)
            held.append(await hold(engine, reference, None))
            held.append(await hold(engine, reference, "salt"))
        with pytest.raises(Unavailable, match="is being written by another request"):
            await hold(engine, reference, None)
        for one in held:
            one.__exit__(None, None, None)
        (await hold(engine, reference, None)).__exit__(None, None, None)

    asyncio.run(run())
