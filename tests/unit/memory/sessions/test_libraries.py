"""Libraries in the store: what is listed, composed once, expired and deleted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lola_vllm.memory.sessions.file import KEYS_SUFFIX, StateFileError, keys_file
from lola_vllm.memory.sessions.manager import COMPOSED_TTL
from lola_vllm.memory.sessions.names import Part, part_session
from lola_vllm.memory.sessions.prefix_hash import salt_hash
from tests.support.sessions import ROW, Server, names, row_of, size_of

ONE, TWO, THREE = list(range(100, 140)), list(range(500, 541)), list(range(700, 760))


@pytest.fixture(params=["memory", "both"])
def server(request: Any, tmp_path: Path) -> Server:
    directory = None if request.param == "memory" else tmp_path
    server = Server(directory, memory=100 * ROW)
    read(server, "library-1", ONE, Part("pumps", "a.md", 1, 2))
    read(server, "library-2", TWO, Part("pumps", "a.md", 2, 2))
    read(server, "library-3", THREE, Part("pumps", "b.md"))
    server.settle()
    return server


def read(server: Server, session: str, tokens: list[int], part: Part, **options: Any) -> None:
    server.say(tokens, session, kind="prompt", part=part, **options)


def test_a_library_is_its_parts(server: Server) -> None:
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


def test_parts_are_composed(server: Server) -> None:
    made = server.ask("compose_parts", sources=["library-1", "library-3"])
    assert server.ask("show", session=made["session"])["made_of"] == ["library-1@1", "library-3@1"]
    one, two = server.ask("texts", sessions=["library-1", "library-3"])
    assert made["tokens"] == one + two
    turned = server.ask("compose_parts", sources=["library-3", "library-1"])
    assert turned["session"] != made["session"] and turned["tokens"][:40] == two[:40]
    (state,) = server.ask("show", session=turned["session"])["states"]
    assert 0 < state["expires"] - server.clock.now <= COMPOSED_TTL


def test_a_deleted_document_takes_the_answers_along(server: Server) -> None:
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


def test_a_document_is_replaced_when_the_new_one_is_whole(server: Server) -> None:
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


def test_two_additions_of_a_title_do_not_mix_their_parts(server: Server) -> None:
    for number, one, other in ((1, ONE, TWO), (2, THREE[:40], THREE[40:])):
        for addition, tokens in (("a", one), ("b", other)):
            name = part_session(addition * 24, number)
            read(server, name, tokens[::-1], Part("pumps", "d.md", number, 2))
    *_, document = server.ask("library", library="pumps")["documents"]
    assert [part["tokens"] for part in document["parts"]] == [len(TWO), len(THREE[40:])]
    assert document["complete"] and server.ask("libraries")[0]["documents"] == 3


def test_owners_see_their_own(server: Server) -> None:
    read(server, "library-9", ONE, Part("pumps", "theirs"), salt=salt_hash("other"))
    (theirs,) = server.ask("library", library="pumps", salt="other")["documents"]
    assert theirs["document"] == "theirs"
    assert server.ask("remove_documents", library="pumps", salt="other") == {"deleted": 1}
    assert server.ask("libraries")[0]["parts"] == 3


def test_keys_count_in_the_budgets(tmp_path: Path) -> None:
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


class Keys:
    """A shelf that notes what it gets."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[Tensor, int, bool]] = {}

    def add(self, state: str, row: Tensor, num_tokens: int, disk: bool) -> object:
        self.kept[state] = (row.clone(), num_tokens, disk)
        return self.kept[state]

    def of_state(self, row: Tensor, num_tokens: int, count: int) -> object:
        return row.clone(), num_tokens, count

    def find(self, state: str) -> object | None:
        return self.kept.get(state)

    def drop(self, state: str) -> None:
        self.kept.pop(state, None)


def test_keys_are_taken_when_a_part_is_stored_and_when_they_are_missing(server: Server) -> None:
    (worker,) = server.workers
    worker._shelf = keys = Keys()
    on_disk = server.store.directory is not None
    server.say(ONE, "library-8", kind="prompt", part=Part("valves", "c.md"))
    server.say(TWO, "talk")
    server.settle()
    (kept,) = keys.kept.values()
    assert torch.equal(kept[0], row_of(ONE)) and kept[1:] == (len(ONE), on_disk)
    (part,) = server.ask("library", library="valves")["documents"][0]["parts"]
    keys.kept.clear()
    found = worker.document_keys(part["id"], len(ONE))
    assert found is keys.kept[part["id"]] and torch.equal(found[0], row_of(ONE))
    assert found[1:] == (len(ONE), on_disk)
    if on_disk:  # and from the file
        keys.kept.clear()
        worker._states.clear()
        assert torch.equal(worker.document_keys(part["id"], len(ONE))[0], row_of(ONE))
    keys.kept.clear()
    row, *numbers = worker.document_keys(part["id"], len(ONE), 7)  # of memory, or of the file
    assert torch.equal(row, row_of(ONE)) and numbers == [len(ONE), 7] and not keys.kept
    server.ask("remove_documents", library="valves")
    server.settle()
    assert not keys.kept
    with pytest.raises((OSError, StateFileError)):
        worker.document_keys(part["id"], len(ONE))


def test_keys_without_a_state_are_removed_after_a_while(tmp_path: Path) -> None:
    server = Server(tmp_path, memory=100 * ROW)
    assert server.store.directory is not None
    old, new = (keys_file(server.store.directory.path, c * 32) for c in "ab")
    for path in (old, new):
        path.write_bytes(b"keys")
    os.utime(old, (1, 1))
    server.store.directory.scan(set())
    assert not old.exists() and new.exists()
