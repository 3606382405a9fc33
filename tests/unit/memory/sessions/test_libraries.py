"""Libraries in the store: what is listed, composed once, expired and deleted."""

import os
from typing import Any

import pytest

from lola_vllm.memory.documents.shelf import KeyShelf
from lola_vllm.memory.sessions.file import KEYS_SUFFIX, StateFileError, keys_file
from lola_vllm.memory.sessions.manager import COMPOSED_TTL
from lola_vllm.memory.sessions.names import Part, part_session
from lola_vllm.memory.sessions.prefix_hash import salt_hash
from tests.support.sessions import ROW, Server, names, row_of, size_of
from tests.unit.memory.documents.test_shelf import same
from tests.unit.memory.sessions.test_swapped import keys_of

ONE, TWO, THREE = list(range(100, 140)), list(range(500, 541)), list(range(700, 760))


@pytest.fixture(params=["memory", "both"])
def server(request, tmp_path):
    server = Server(None if request.param == "memory" else tmp_path)
    read(server, "library-1", ONE, Part("pumps", "a.md", 1, 2))
    read(server, "library-2", TWO, Part("pumps", "a.md", 2, 2))
    read(server, "library-3", THREE, Part("pumps", "b.md"))
    server.settle()
    return server


def read(server: Server, session: str, tokens: list[int], part: Part, **options: Any) -> None:
    server.say(tokens, session, kind="prompt", part=part, **options)


def test_a_library_is_its_parts(server):
    (summary,) = server.ask("libraries")
    assert (summary["library"], summary["documents"], summary["parts"]) == ("pumps", 2, 3)
    assert summary["tokens"] == len(ONE) + len(TWO) + len(THREE)
    one, two = server.ask("library", library="pumps")["documents"]
    assert [(p["part"], p["session"]) for p in one["parts"]] == [(1, "library-1"), (2, "library-2")]
    assert one["complete"] and two["complete"] and two["document"] == "b.md"
    assert server.ask("sessions") == [] and len(names(server)) == 3
    server.ask("delete", reference="library-1")
    one, _ = server.ask("library", library="pumps")["documents"]
    assert not one["complete"]
    assert server.ask("library", library="valves")["kind"] == "not-found"


def test_parts_are_composed(server):
    made = server.ask("compose_parts", sources=["library-1", "library-3"])
    assert server.ask("show", session=made["session"])["made_of"] == ["library-1@1", "library-3@1"]
    one, two = server.ask("texts", sessions=["library-1", "library-3"])
    assert made["tokens"] == one + two
    turned = server.ask("compose_parts", sources=["library-3", "library-1"])
    assert turned["session"] != made["session"] and turned["tokens"][:40] == two[:40]
    (state,) = server.ask("show", session=turned["session"])["states"]
    assert 0 < state["expires"] - server.clock.now <= COMPOSED_TTL


def test_a_deleted_document_takes_the_answers_along(server):
    made = server.ask("compose_parts", sources=["library-2", "library-3"])["session"]
    other = server.ask("compose_parts", sources=["library-3"])["session"]
    server.ask("compose", sources=["library-1"], to="mine")
    server.settle()
    directory = server.store.directory
    ids = {name: s.id for s in server.store.states.values() for name in [s.header.session]}
    if directory is not None:
        keys_file(directory.path, ids["library-1"]).write_bytes(b"keys")
    gone = server.ask("remove_documents", library="pumps", document="a.md")
    assert gone == {"deleted": 2, "composed": ["mine"]}
    left = names(server)
    assert left == {"library-3", "mine", other} and made not in left
    server.settle()
    if directory is not None:
        assert not [p for p in directory.path.iterdir() if p.name.endswith(KEYS_SUFFIX)]
        assert not any(path.exists() for path in directory.files(ids["library-1"]))
    assert server.ask("remove_documents", library="pumps", document="a.md")["kind"] == "not-found"
    server.ask("remove_documents", library="pumps")
    assert server.ask("libraries") == []


def test_a_document_is_replaced_when_the_new_one_is_whole(server):
    """Until then the old one is asked, and afterwards nothing of it is left."""
    add = lambda addition, number, tokens: read(  # noqa: E731
        server, part_session(addition * 24, number), tokens, Part("pumps", "c.md", number, 2)
    )

    def shown() -> list[int]:
        (document,) = (
            one for one in server.ask("library", library="pumps")["documents"]
            if one["document"] == "c.md"
        )  # fmt: skip
        assert document["complete"]
        return [part["tokens"] for part in document["parts"]]

    add("a", 1, ONE)
    add("a", 2, TWO)
    made = server.ask("compose_parts", sources=[part_session("a" * 24, 2)])["session"]
    server.settle()
    add("b", 1, TWO[:20])
    assert shown() == [len(ONE), len(TWO)]
    # An addition that is given up leaves the document that is there.
    gone = {"library": "pumps", "document": "c.md", "addition": "b" * 24}
    assert server.ask("remove_documents", **gone) == {"deleted": 1}
    assert server.ask("remove_documents", **gone) == {"deleted": 0}
    add("c", 1, THREE[:30])
    assert shown() == [len(ONE), len(TWO)]
    add("c", 2, THREE[30:])
    assert server.ask("libraries")[0]["parts"] == 5
    assert shown() == [30, len(THREE) - 30]
    server.settle()
    left = names(server)
    parts = {part_session("c" * 24, number) for number in (1, 2)}
    assert left == {"library-1", "library-2", "library-3", *parts} and made not in left


def test_two_additions_of_a_title_do_not_mix_their_parts(server):
    for number, one, other in ((1, ONE, TWO), (2, THREE[:40], THREE[40:])):
        for addition, tokens in (("a", one), ("b", other)):
            name = part_session(addition * 24, number)
            read(server, name, tokens[::-1], Part("pumps", "d.md", number, 2))
    *_, document = server.ask("library", library="pumps")["documents"]
    assert [part["tokens"] for part in document["parts"]] == [len(TWO), len(THREE[40:])]
    assert document["complete"] and server.ask("libraries")[0]["documents"] == 3


def test_owners_see_their_own(server):
    read(server, "library-9", ONE, Part("pumps", "theirs"), salt=salt_hash("other"))
    (theirs,) = server.ask("library", library="pumps", salt="other")["documents"]
    assert theirs["document"] == "theirs"
    assert server.ask("remove_documents", library="pumps", salt="other") == {"deleted": 1}
    assert server.ask("libraries")[0]["parts"] == 3


def test_keys_count_in_the_budgets(tmp_path):
    """Three sessions fit; three documents, each with keys beside its state, do not."""

    def key_bytes(num_tokens: int) -> int:
        return 4 * num_tokens

    room = 3 * size_of(40) + 2 * key_bytes(40)
    options = {"memory": room, "disk": room, "key_bytes": key_bytes}
    server = Server(tmp_path / "sessions", **options)
    for number in range(3):
        server.say([number, *ONE[1:]], f"talk-{number}")
    server.settle()
    assert server.store.memory.nbytes == server.store.disk.nbytes == 3 * size_of(40)
    server.close()
    server = Server(tmp_path / "documents", **options)
    for number in range(3):
        read(server, f"library-{number}", [number, *ONE[1:]], Part("pumps", f"{number}.md"))
    server.settle()
    tiers = (server.store.memory, server.store.disk)
    for tier in tiers:
        assert tier.nbytes == 2 * (size_of(40) + key_bytes(40))
        assert sorted(s.header.session for s in tier.states.values()) == ["library-1", "library-2"]
    assert [server.store.counts[f"evicted-{tier.name}"] for tier in tiers] == [1, 1]
    server.close()
    again = Server(tmp_path / "documents", **options)
    assert again.store.disk.nbytes == 2 * (size_of(40) + key_bytes(40))


def test_keys_are_taken_when_a_part_is_stored_and_when_they_are_missing(server):
    (worker,), directory = server.workers, server.store.directory
    worker._shelf = shelf = KeyShelf(keys_of, directory and directory.path)
    part = server.say(ONE, "library-8", kind="prompt", part=Part("valves", "c.md"))
    talk = server.tell(TWO, "talk")
    keys = keys_of(row_of(ONE), len(ONE))
    assert same(shelf.find(part.id), keys) and shelf.find(talk.id) is None

    def lose():
        shelf.drop(part.id)
        if directory is not None:
            keys_file(directory.path, part.id).unlink()
        assert shelf.find(part.id) is None

    lose()
    assert same(worker.document_keys(part.id, len(ONE)), keys)
    assert same(shelf.find(part.id), keys)
    lose()
    if directory is not None:
        worker._states.clear()  # the state is in its file alone
    assert worker.document_keys(part.id, len(ONE), 7).num_tokens == 7
    assert shelf.find(part.id) is None  # those of the newest tokens are not kept
    assert same(worker.document_keys(part.id, len(ONE)), keys)
    server.ask("remove_documents", library="valves")
    server.settle()
    assert shelf.find(part.id) is None
    with pytest.raises((OSError, StateFileError)):
        worker.document_keys(part.id, len(ONE))


def test_keys_without_a_state_are_removed_after_a_while(tmp_path):
    server = Server(tmp_path, memory=100 * ROW)
    assert server.store.directory is not None
    old, new = (keys_file(server.store.directory.path, c * 32) for c in "ab")
    for path in (old, new):
        path.write_bytes(b"keys")
    os.utime(old, (1, 1))
    server.store.directory.scan(set())
    assert not old.exists() and new.exists()
