"""Whose sessions are whose: each API key has its own.

States and cached prefixes are parted by vLLM's `cache_salt`, which a caller chooses. So where a
server has keys, the salt that the engine sees is made here, of the key that a request came with and
of the caller's own salt. A state of one key is then never found by another, whatever route is used.
It does not depend on how many keys there are: a second one takes nothing from the first. Without
keys, salts stay as they are.

The salt also parts what vLLM's prefix cache has, so it is made where nothing is stored too.

vLLM checks the key on some of its routes only. A request on another one, such as `/invocations`,
may come without a key where there are keys. It is nobody's: it neither restores nor stores.

A middleware notes the key, because vLLM passes no key on to the code that handles a request. The
salt is put in in front of the engine client's `generate` (`wrappers.py`).
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers

from lola_vllm.memory.sessions.owner import engine_salt, owner_of, plain_salt

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

NOBODY = "nobody"  # a request without a key, where there are keys
NO_KEY = (
    "the request came without one of the server's API keys, so it has no stored states; send "
    "'Authorization: Bearer KEY'"
)

_owner: ContextVar[str | None] = ContextVar("lola_owner", default=None)
_address: ContextVar[str] = ContextVar("lola_address", default="")


class Owners:
    """The API keys of a server.

    Args:
        keys: all of them. Without any, no owners are told apart.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._owners = {owner_of(key) for key in keys if key}

    def of(self, authorization: str | None) -> str | None:
        """The owner that a header `Authorization` names.

        Returns:
            32 hex digits; `NOBODY` where there are keys and it has none of them; None where there
            are no keys.
        """
        if not self._owners:
            return None
        scheme, _, key = (authorization or "").partition(" ")
        found = owner_of(key)
        known = any([hmac.compare_digest(found, owner) for owner in self._owners])
        return found if scheme.lower() == "bearer" and known else NOBODY


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
            _address.set((scope.get("client") or ("",))[0])
        if owners is not None:
            _owner.set(owners.of(Headers(scope=scope).get("Authorization")))
        await self.app(scope, receive, send)


def owned(salt: str | None) -> str | None:
    """The salt that the engine sees, for the caller's own salt and the owner of this request."""
    owner = _owner.get()
    return plain_salt(salt) if owner is None else engine_salt(owner, salt)


def caller() -> str:
    """Who sent this request: the owner of its API key, or where there are no keys its address."""
    return _owner.get() or _address.get()


def is_nobody() -> bool:
    """Whether this request has none of the server's keys, where there are keys."""
    return _owner.get() == NOBODY


def salted(prompt: Any) -> Any:
    """A prompt with the owner's salt.

    Raises:
        ValueError: it has no place for one.
    """
    if _owner.get() is None and not _names_an_owner(prompt):
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


def _names_an_owner(prompt: Any) -> bool:
    found = prompt.get("cache_salt") if isinstance(prompt, dict) else None
    found = found or getattr(prompt, "cache_salt", None)
    return plain_salt(found) != found
