"""Whose sessions are whose: where a server has several API keys, each has its own.

States and cached prefixes are parted by vLLM's `cache_salt`, which a caller chooses. So with
several keys the salt that the engine sees is made here, of the key that a request came with and of
the caller's own salt. A state of one key is then never found by another, whatever route is used.
With one key, or with none, salts stay as they are.

A middleware notes the key, because vLLM passes no key on to the code that handles a request. The
engine client's `generate` is the one method that all routes which generate call, so the salt is put
in there. It also tells a route what the store said in the end, which vLLM leaves out of streams.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers

from lola_vllm.serving.sessions.shared import SharedStates
from lola_vllm.serving.sessions.wishes import refusing
from lola_vllm.sessions.chain import digest

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send
    from vllm.engine.protocol import EngineClient

_owner: ContextVar[bytes | None] = ContextVar("lola_owner", default=None)
_report: ContextVar[dict[str, Any] | None] = ContextVar("lola_report", default=None)


class Owners:
    """The API keys of a server.

    Args:
        keys: all of them. One key, or none, has no owners to tell apart.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        digests = {_digest(key) for key in keys if key}
        self._keys = digests if len(digests) > 1 else set()

    def of(self, authorization: str | None) -> bytes | None:
        """The owner that a header `Authorization` names; None: nobody that is told apart."""
        scheme, _, key = (authorization or "").partition(" ")
        found = _digest(key)
        return found if scheme.lower() == "bearer" and found in self._keys else None


class OwnerMiddleware:
    """Notes the owner of each request. vLLM's own middleware has checked the key by then, or
    checks it next."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        owners: Owners | None = None
        if scope["type"] in ("http", "websocket"):
            owners = getattr(scope["app"].state, "lola_owners", None)
        if owners is not None:
            _owner.set(owners.of(Headers(scope=scope).get("Authorization")))
        await self.app(scope, receive, send)


def owned(salt: str | None) -> str | None:
    """The salt that the engine sees, for the caller's own salt and the owner of this request."""
    owner = _owner.get()
    if owner is None:
        return salt
    return digest(b"lola owner", owner, b"" if salt is None else b"+" + salt.encode()).hex()


def reported() -> dict[str, Any]:
    """A dict that gets the `kv_transfer_params` of the answer to this request."""
    found: dict[str, Any] = {}
    _report.set(found)
    return found


def listen(client: EngineClient, shares: bool = False, stores: bool = False) -> None:
    """Let `client.generate` use the owner's salt, and report what the store says.

    Args:
        shares: whether prompts that begin alike share stored states (`shared.py`).
        stores: whether there is a store, of which requests can ask what it refuses (`wishes.py`).
    """
    generate: Callable[..., AsyncIterator[Any]] = client.generate
    if shares:
        generate = SharedStates(generate).generate
    if stores:
        generate = refusing(generate)

    def generate_owned(prompt: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        outputs = generate(_salted(prompt), *args, **kwargs)
        report = _report.get()
        return outputs if report is None else _reporting(outputs, report)

    client.generate = generate_owned  # type: ignore[method-assign,assignment]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _salted(prompt: Any) -> Any:
    if _owner.get() is None:
        return prompt
    if isinstance(prompt, str):
        prompt = {"prompt": prompt}
    elif isinstance(prompt, list):
        prompt = {"prompt_token_ids": prompt}
    if isinstance(prompt, dict):
        return {**prompt, "cache_salt": owned(prompt.get("cache_salt"))}
    if not hasattr(prompt, "cache_salt"):  # it would be shared among owners
        raise ValueError(f"a prompt of type {type(prompt).__name__} cannot be given a cache salt")
    prompt.cache_salt = owned(prompt.cache_salt)
    return prompt


async def _reporting(outputs: Any, report: dict[str, Any]) -> AsyncIterator[Any]:
    async with aclosing(outputs):
        async for output in outputs:
            report.update(output.kv_transfer_params or {})
            yield output
