"""Who may ask the routes of this package on a server without API keys.

A page of another site can let its own name point to this machine (DNS rebinding). A browser then
treats this server as part of that site, and lets the page read answers. The request's header `Host`
has the site's name. So without keys, only requests are answered whose host is this machine, or is
allowed by the operator. With keys any host is: such a page has no key.
"""

from __future__ import annotations

import ipaddress
import reprlib
from collections.abc import Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

from lola_vllm.serving.inspector import ROUTE

if TYPE_CHECKING:
    from argparse import Namespace

    from starlette.types import ASGIApp, Receive, Scope, Send

    from lola_vllm.memory.sessions.settings import StoreSettings

GUARDED = ("/v1/lola", ROUTE)
ANY = "*"
_HERE = ("localhost", "127.0.0.1", "::1")
EVERYWHERE = (  # of --host: all addresses of the machine
    None,
    "",
    "0.0.0.0",
    "::",
)


class Access:
    """What a server answers to whom.

    Args:
        keys: the server's API keys. settings: of stored states and of the routes.
        args: the server's `host` and `uds`. A Unix socket is reached by no browser, so any host is
            allowed there, as it is where there are keys.

    Attributes:
        lists: whether the route that lists sessions answers.
    """

    def __init__(self, keys: Sequence[str], settings: StoreSettings, args: Namespace) -> None:
        keyed = any(keys)
        self.lists = keyed or settings.list_sessions
        self._any = keyed or bool(args.uds) or ANY in settings.allowed_hosts
        # An address cannot be pointed elsewhere, so any is fine where the server has all of them.
        self._addresses = args.host in EVERYWHERE
        hosts = [*_HERE, *settings.allowed_hosts, *([] if self._addresses else [args.host])]
        self._hosts = {name_of(host) for host in hosts}

    def allows(self, host: str) -> bool:
        """Whether the value of a header `Host` names this server. Its port does not matter."""
        if self._any:
            return True
        name = name_of(host)
        return name in self._hosts or (self._addresses and _is_address(name))


class AccessMiddleware:
    """Refuses requests for the routes of this package that do not name this server."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it with 421."""
        access: Access | None = None
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if path.startswith(GUARDED):
                access = getattr(scope["app"].state, "lola_access", None)
        host = "" if access is None else Headers(scope=scope).get("Host", "")
        if access is None or access.allows(host):
            await self.app(scope, receive, send)
            return
        message = (
            f"Host = {reprlib.repr(host)}: not this server's name, and it has no API keys; start "
            f"it with --lola-allowed-hosts {name_of(host)[:64] or 'NAME'}, or with --api-key"
        )
        answer = create_error_response(
            message, "MisdirectedRequest", HTTPStatus.MISDIRECTED_REQUEST, param="Host"
        )
        await JSONResponse(answer.model_dump(), answer.error.code)(scope, receive, send)


def name_of(host: str) -> str:
    """The host of `host:port`, in lower case and without the brackets of an IPv6 address."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    if host.count(":") == 1:
        host = host.partition(":")[0]
    return host.removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
