"""API keys are told apart by a salt that the server makes."""

import asyncio
from argparse import Namespace
from types import SimpleNamespace

import pytest
from fastapi import HTTPException
from vllm.entrypoints.generate.base.protocol import validate_cache_salt

from lola_vllm.memory.sessions.names import Reference
from lola_vllm.memory.sessions.owner import engine_salt, owner_of
from lola_vllm.memory.sessions.prefix_hash import salt_hash
from lola_vllm.serving import plugin
from lola_vllm.serving.sessions import owners
from lola_vllm.serving.sessions.management import lock_session
from lola_vllm.serving.sessions.owners import NO_KEY, OwnerMiddleware, Owners, owned
from lola_vllm.serving.sessions.wrappers import reported, wrap_generate

PARAMS = SimpleNamespace(extra_args=None)


class Client:
    """An engine client that gives back what it is asked."""

    def __init__(self):
        self.closed, self.params = 0, None

    async def generate(self, prompt, params, request_id):
        self.params = params
        try:
            for part in (None, {"lola": {"restored_tokens": 3}}):
                yield SimpleNamespace(prompt=prompt, kv_transfer_params=part)
        finally:
            self.closed += 1


def ask(app_state, authorization, prompt="x"):
    """The prompt as the engine sees it, in a request with this header."""
    client = Client()
    wrap_generate(client)
    return through(client, app_state, authorization, prompt).prompt


def through(client, app_state, authorization, prompt, params=PARAMS):
    """The last output for a request with this header, of a client whose `generate` is wrapped."""
    found = []

    async def app(scope, receive, send):
        async for output in client.generate(prompt, params, "id"):
            found.append(output)

    headers = [] if authorization is None else [(b"authorization", authorization.encode())]
    scope = {"type": "http", "headers": headers, "app": SimpleNamespace(state=app_state)}
    asyncio.run(OwnerMiddleware(app)(scope, None, None))
    return found[-1]


def with_keys(*keys):
    return SimpleNamespace(lola_owners=Owners(keys))


@pytest.mark.parametrize(
    "state", [with_keys(), with_keys(""), SimpleNamespace(lola_owners=None), SimpleNamespace()]
)
def test_without_a_key_nothing_changes(state):
    prompt = {"prompt_token_ids": [1], "cache_salt": "s"}
    assert ask(state, "Bearer a", prompt) is prompt
    # But for a salt that looks like an owner's.
    forged = {"prompt_token_ids": [1], "cache_salt": engine_salt(owner_of("a"), None)}
    seen = ask(state, None, forged)
    assert not salt_hash(seen["cache_salt"]).startswith(owner_of("a"))


def test_every_key_and_salt_gives_another_salt():
    state, salts = with_keys("a", "b"), set()
    for key in ("a", "b"):
        for own in ({}, {"cache_salt": ""}, {"cache_salt": "s"}, {"cache_salt": "t"}):
            seen = ask(state, f"bearer {key}", {"prompt_token_ids": [1], **own})
            assert seen["prompt_token_ids"] == [1]
            salts.add(seen["cache_salt"])
            assert ask(state, f"Bearer {key}", {"prompt_token_ids": [1], **own}) == seen
            assert salt_hash(seen["cache_salt"]).startswith(f"{owner_of(key)}:")
            validate_cache_salt(seen["cache_salt"])
    assert len(salts) == len(set(map(salt_hash, salts))) == 8


def test_an_owner_follows_from_the_key_and_not_from_the_other_keys():
    """Else a second key, or the first alone again, would orphan all sessions."""
    prompt = {"prompt_token_ids": [1], "cache_salt": "s"}
    seen = [ask(with_keys(*keys), "Bearer a", prompt) for keys in ("a", "aa", "ab", "cab")]
    assert seen[0] != prompt and seen == [seen[0]] * 4


@pytest.mark.parametrize("header", [None, "Bearer c", "Basic a", "Bearer"])
@pytest.mark.parametrize("keys", ["a", "ab"])
def test_a_request_without_a_key_has_no_states_where_there_are_keys(keys, header):
    """vLLM refuses it on most routes, and answers it on /invocations."""
    asked = {"from": "agent-7", "save": "agent-7"}
    params = SimpleNamespace(extra_args={"kv_transfer_params": {"lola": asked}, "more": 1})
    client, prompt = Client(), {"prompt_token_ids": [1]}
    wrap_generate(client, stores=True)
    output = through(client, with_keys(*keys), header, prompt, params)
    seen = client.params.extra_args
    assert seen == {"kv_transfer_params": {"lola": {"from": False, "save": False}}, "more": 1}
    assert params.extra_args["kv_transfer_params"] == {"lola": asked}
    told = output.kv_transfer_params["lola"]
    assert told["reason"] == told["unsaved"] == NO_KEY and "Authorization" in NO_KEY
    headers = (header, "Bearer a", "Bearer b")
    salts = {ask(with_keys(*keys), one, prompt)["cache_salt"] for one in headers}
    assert len(salts) == 1 + len(keys)


def test_keys_have_cached_prefixes_of_their_own_where_nothing_is_stored(monkeypatch):
    """vLLM's prefix cache is on there, and would tell one key what another has said."""
    monkeypatch.setattr(
        plugin, "LolaEngine", lambda client, _: SimpleNamespace(is_lola=True, config=config)
    )
    monkeypatch.setattr(plugin, "LolaMetrics", lambda engine: None)
    config = SimpleNamespace(kv_transfer_config=None, additional_config={})
    client, state = Client(), SimpleNamespace()
    client.model_config = SimpleNamespace(served_model_name="model")
    args = Namespace(
        api_key=["a", "b"], host=None, port=8000, uds=None, ssl_certfile=None, root_path=None
    )
    asyncio.run(plugin.LolaEndpoints().init_state(client, state, args))
    salts = set()
    for header in ("Bearer a", "Bearer b", None):
        salts.add(through(client, state, header, {"prompt_token_ids": [1]}).prompt["cache_salt"])
        assert client.params is PARAMS  # nothing is asked of a store that is not there
    assert len(salts) == 3


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
    wrap_generate(client)

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
            held.append(await lock_session(engine, reference, None))
            held.append(await lock_session(engine, reference, "salt"))
        with pytest.raises(HTTPException, match="is being written by another request"):
            await lock_session(engine, reference, None)
        for one in held:
            one.__exit__(None, None, None)
        (await lock_session(engine, reference, None)).__exit__(None, None, None)

    asyncio.run(run())
