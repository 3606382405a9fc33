"""Segments of a session's text in the store: which are its own, and where they go with it."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from lola_vllm.memory.sessions.catalog import NotStored
from lola_vllm.memory.sessions.names import PAST, Part, Reference
from lola_vllm.memory.sessions.prefix_hash import salt_hash
from tests.support.sessions import ROW, Server, names, size_of

TEXT, SIZE = list(range(100, 190)), 40


@pytest.fixture(params=["memory", "both"])
def server(request, tmp_path):
    server = Server(None if request.param == "memory" else tmp_path, memory=100 * ROW)
    server.say(TEXT, "chat")
    for number in (0, 1):
        keep(server, number, TEXT[number * SIZE : (number + 1) * SIZE])
    server.settle()
    return server


def keep(server: Server, number: int, tokens: list[int], session: str = "chat", **more: Any) -> Any:
    found = server.store.lookup(Reference(session), more.get("salt", ""))
    part = Part(PAST, found[-1].header.session_id, number + 1, number + 1)
    name = f"library-{session}-{number}-{len(server.store.states)}"
    return server.say(tokens, name, kind="prompt", part=part, **more)


def eventually(server: Server, what: Callable[[], bool]) -> bool:
    """Whether it is so soon: files are removed by a thread."""
    deadline = time.monotonic() + 20
    while not what() and time.monotonic() < deadline:
        time.sleep(0.01)
        server.step()
    return what()


def segments(server: Server, session: str = "chat", **more: Any) -> list[int]:
    found = server.ask("past", reference=session, size=SIZE, **more)
    server.settle()
    return [segment["segment"] for segment in found["segments"]]


def test_a_session_has_its_segments(server):
    found = server.ask("past", reference="chat", size=SIZE)
    assert found["tokens"] == len(TEXT) and found["id"] in server.store.states
    assert [one["session"] for one in found["segments"]] == ["library-chat-0-1", "library-chat-1-2"]
    assert server.ask("libraries") == []
    assert server.ask("past", reference="none", size=SIZE)["kind"] == "not-found"
    server.say(TEXT, "chat", salt=salt_hash("other"))
    assert segments(server, salt="other") == []


def test_segments_of_another_text_are_deleted(server):
    keep(server, 1, TEXT[1 : SIZE + 1])  # of no segment
    keep(server, 2, TEXT[-SIZE:])  # one that is not complete
    keep(server, 0, TEXT[: SIZE - 8])
    count = len(server.store.states)
    assert segments(server) == [0, 1]
    assert eventually(server, lambda: len(server.store.states) == count - 3)
    server.say([7, *TEXT], "chat")  # the session says something else now
    assert segments(server) == []
    assert eventually(
        server, lambda: all(s.header.library != PAST for s in server.store.states.values())
    )


@pytest.mark.parametrize("ttl", [None, 50.0])
def test_segments_stay_as_long_as_their_session(server, ttl):
    """Also one that is kept longer than it was to be when they were read."""
    server.say([*TEXT, 1], "brief", ttl=ttl)
    assert keep(server, 0, TEXT[:SIZE], session="brief", ttl=5.0).header.expires is None
    server.say([*TEXT, 1, 2], "brief", ttl=5000.0)
    server.clock.now += 100
    server.store.expire()
    assert segments(server, "brief") == [0]
    with pytest.raises(NotStored, match=f"the session {'0' * 32} is not kept"):
        server.say(TEXT[:SIZE], "library-gone", part=Part(PAST, "0" * 32))


def test_segments_go_when_their_session_is_evicted(tmp_path):
    server = Server(memory=size_of(len(TEXT)) + 2 * size_of(SIZE))
    server.say(TEXT, "chat")
    keep(server, 0, TEXT[:SIZE])
    keep(server, 1, TEXT[SIZE : 2 * SIZE])
    server.say(TEXT[::-1], "other")  # takes the place of the session that was used least
    assert {state.header.session for state in server.store.states.values()} == {"other"}
    server.settle()
    assert server.workers[0].num_states == 1


def test_a_killed_server_leaves_no_segment_without_its_session(tmp_path):
    server = Server(tmp_path)
    session = server.say(TEXT, "chat")
    segment = keep(server, 0, TEXT[:SIZE])
    server.settle()
    server.close()
    (file,), directory = server.store.directory.files(session.id), server.store.directory
    file.unlink()  # what it had done of a deletion, or of an eviction
    again = Server(tmp_path)
    assert not again.store.states
    again.settle()
    assert directory.gone(segment.id)


@pytest.fixture
def two(tmp_path):
    """Two servers on a directory, of which both know a session and a segment of it."""
    servers = Server(tmp_path), Server(tmp_path)
    servers[0].say(TEXT, "chat")
    keep(servers[0], 0, TEXT[:SIZE])
    servers[0].settle()
    servers[1].store.upkeep.refresh()
    return servers


def test_segments_are_in_the_directory_only_while_their_session_is(two):
    """A server that starts drops those whose session it does not know."""
    server, other = two
    (session,) = server.store.lookup(Reference("chat"))
    server.store._leave(session, server.store.disk)  # for others
    server.settle()
    assert list(server.store.directory.path.iterdir()) == []
    other.store.upkeep.refresh()
    assert not other.store.states
    keep(server, 1, TEXT[SIZE : 2 * SIZE])
    server.settle()
    assert segments(server) == [0, 1] and list(server.store.directory.path.iterdir()) == []


def test_segments_leave_the_directory_when_another_server_takes_their_session_out(two):
    server, other = two
    (session,) = other.store.lookup(Reference("chat"))
    other.store.directory.unlink([session.id])
    server.store.upkeep.refresh()
    server.settle()
    assert segments(server) == [0] and list(server.store.directory.path.iterdir()) == []


def test_segments_of_what_nobody_named_are_not_written(tmp_path):
    server = Server(tmp_path, store="named")
    unnamed = server.say(TEXT).header.session
    server.ask("compose", sources=[unnamed], to="chat")
    keep(server, 0, TEXT[:SIZE])
    keep(server, 0, TEXT[:SIZE], session=unnamed)
    server.settle()
    assert list(server.store.directory.path.iterdir()) == [] and segments(server) == [0]


def test_their_owner_sees_that_they_exist(server):
    nbytes = 2 * server.store.state_bytes(SIZE, True)
    (listed,) = server.ask("sessions")
    shown = server.ask("show", session="chat")
    for one in (listed, shown):
        assert (one["segments"], one["segment_bytes"]) == (2, nbytes)
    assert server.ask("sessions", salt="other") == []


def test_segments_are_renamed_and_deleted_with_their_session(server):
    made = server.ask("compose_parts", sources=["chat", "library-chat-0-1"])["session"]
    server.say(TEXT[:-1], "other")
    other = keep(server, 0, TEXT[:SIZE], session="other").header.session
    server.ask("rename", session="chat", to="talk")
    server.settle()
    assert segments(server, "talk") == [0, 1]
    server.say([*TEXT, 1], "talk")
    answer = server.ask("delete", reference="talk@1")  # one of two turns
    assert answer == {"deleted": 3}  # a turn and two segments, which may say what it said
    assert segments(server, "talk") == []
    keep(server, 0, TEXT[:SIZE], session="talk")
    assert server.ask("delete", reference="talk") == {"deleted": 2}
    left = names(server)
    assert left == {"other", other} and made not in left


def test_a_fork_has_none_yet(server):
    server.ask("fork", reference="chat", to="fork")
    server.settle()
    assert segments(server, "fork") == [] and segments(server) == [0, 1]
