"""Which hosts a server without API keys answers to, and whether it lists its sessions."""

from argparse import Namespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from lola_vllm.memory.sessions.settings import StoreSettings
from lola_vllm.serving.access import Access, AccessMiddleware
from lola_vllm.serving.inspector import ROUTE
from lola_vllm.serving.plugin import ROUTERS
from lola_vllm.serving.routes import page

SESSIONS = "/v1/lola/sessions"
FOREIGN = ["evil.example", "evil.example:8000", "localhost.evil.example", "", "[::2]", "10.0.0.9"]
HERE = ["localhost", "LocalHost:8000", "127.0.0.1:8000", "[::1]:8000", "[::1]", "localhost."]


def access(host="127.0.0.1", keys=(), uds=None, **settings):
    args = Namespace(host=host, uds=uds)
    return Access(keys, StoreSettings.from_mapping(settings), args)


@pytest.mark.parametrize("host", FOREIGN)
def test_another_sites_name_is_refused(host):
    assert not access().allows(host)
    assert not access(host="lola.lan").allows(host)


@pytest.mark.parametrize("host", HERE)
def test_this_machine_is_answered(host):
    assert access().allows(host) and access(host="0.0.0.0").allows(host)


@pytest.mark.parametrize("host", [*FOREIGN, *HERE])
def test_with_a_key_or_a_socket_any_host_is_answered(host):
    assert access(keys=("", "a")).allows(host)
    assert access(uds="/run/lola").allows(host)
    assert access(allowed_hosts="*").allows(host)


def test_what_the_operator_names_is_answered():
    assert access(host="lola.lan").allows("lola.lan:80")
    assert access(host="fd00::1").allows("[fd00::1]:8000")
    for given in ("a.example, b.example", ["A.example", "b.example"]):
        found = access(allowed_hosts=given)
        assert [found.allows(f"{c}.example:1") for c in "abc"] == [True, True, False]


@pytest.mark.parametrize("host", [None, "", "0.0.0.0", "::"])
def test_a_server_on_all_addresses_answers_to_addresses_and_not_to_names(host):
    found = access(host=host)
    assert found.allows("10.0.0.9:8000") and found.allows("[fd00::1]:8000")
    assert not found.allows("evil.example:8000")


def client(found, **options):
    app = FastAPI()
    for routes in (page, *ROUTERS):
        app.include_router(routes)
    app.add_middleware(AccessMiddleware)

    @app.get("/health")
    async def health():
        return "well"

    app.state.lola_access = found
    return TestClient(app, raise_server_exceptions=False, **options)


@pytest.mark.parametrize("root", ["", "/lola-1"])
def test_every_route_of_ours_looks_at_the_host(root):
    asked = client(access(), root_path=root)
    paths = ["/v1/lola/info", SESSIONS, f"{SESSIONS}/a", f"{SESSIONS}/a/tokens", ROUTE]
    paths += [f"{ROUTE}/x.js", "/v1/lola/none"]
    for method in ("GET", "POST", "PATCH", "DELETE", "PUT", "OPTIONS"):
        for path in paths:
            answer = asked.request(method, root + path, headers={"Host": "evil.example:80"})
            assert answer.status_code == 421, (method, path)
            error = answer.json()["error"]
            assert error["param"] == "Host" and "'evil.example:80'" in error["message"]
            assert "--lola-allowed-hosts evil.example" in error["message"]
            here = asked.request(method, root + path, headers={"Host": "localhost:80"})
            assert here.status_code != 421, (method, path)
    assert asked.get(f"{root}/health", headers={"Host": "evil.example"}).status_code == 200


def test_sessions_are_listed_with_a_key_or_where_the_operator_says_so():
    asked = client(access(allowed_hosts="*")).get(SESSIONS)
    assert asked.status_code == 403
    assert "--lola-list-sessions" in asked.json()["detail"]
    for found in (access(keys=("a",)), access(allowed_hosts="*", list_sessions=True)):
        assert found.lists and client(found).get(SESSIONS).status_code == 500  # there is no engine
    # By its name a session is looked up.
    assert client(access(allowed_hosts="*")).get(f"{SESSIONS}/a").status_code == 500
