"""Files that were put in each other's place: no reader gives an owner another's text."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lola_vllm.core.ops.int8 import quantize
from lola_vllm.memory.documents.keys import DocumentKeys
from lola_vllm.memory.documents.shelf import KeyShelf
from lola_vllm.memory.sessions.file import StateFileError, keys_file, read_state, write_state
from lola_vllm.memory.sessions.names import Part, parse_reference
from lola_vllm.memory.sessions.prefix_hash import salt_hash
from lola_vllm.memory.sessions.tiers import Stored
from tests.support.sessions import ROW, Server, row_of

HERS, HIS = list(range(100, 140)), list(range(500, 540))
TEXTS = {"alice": HERS, "bob": HIS}
BOTH = (0, 1)  # ranks
each_rank = pytest.mark.parametrize("ranks", [BOTH, (1,)])


def started(root: Path, sealed: bool, **settings: Any) -> Server:
    if sealed:
        settings["key_file"] = root / "secret"
        settings["key_file"].write_text("0123456789abcdef" * 4)
    return Server(root / "states", memory=0, **settings)


@pytest.fixture(params=["plain", "encrypted"])
def server(request, tmp_path):
    """One with two ranks, with a session of each owner in files alone."""
    server = started(tmp_path, request.param == "encrypted", ranks=2)
    for salt, tokens in TEXTS.items():
        server.say(tokens, "talk", salt=salt_hash(salt))
    server.tell([1, 2, 3], "more", salt=salt_hash("alice"))
    return server


def state_of(server: Server, salt: str, session: str = "talk") -> Stored:
    (state,) = server.store.lookup(parse_reference(session), salt_hash(salt))
    return state


def exchange(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def swap(server: Server, ranks: tuple[int, ...] = BOTH) -> None:
    """Have her files hold his text, under her state's id. (One that has his id is told by its name:
    `test_file.py`.)"""
    directory, states = server.store.directory, [state_of(server, salt) for salt in TEXTS]
    hers, his = (directory.files(state.id) for state in states)
    for rank in ranks:
        found = read_state(his[rank], key=directory.key)
        header = replace(found.header, id=states[0].id)
        write_state(hers[rank], header, found.tokens, found.data, directory.key)


def is_refused(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Her session counts as damaged, and his is still listed."""
    server.settle()
    assert server.ask("show", session="talk", salt="alice")["kind"] == "not-found"
    assert server.store.failures["damaged"] >= 1
    assert any("another state" in record.getMessage() for record in caplog.records)
    assert server.ask("show", session="talk", salt="bob")["tokens"] == len(HIS)


@pytest.mark.parametrize(
    ("method", "arguments", "ranks"),
    [
        ("tokens", {"reference": "talk"}, BOTH),
        ("files", {"reference": "talk"}, (0,)),
        ("files", {"reference": "talk"}, (1,)),
        ("fork", {"reference": "talk", "to": "new"}, BOTH),
        ("compose", {"sources": ["talk", "more"], "to": "new"}, BOTH),
        ("compose_parts", {"sources": ["talk", "more"]}, BOTH),
        ("past", {"reference": "talk", "size": 8}, BOTH),
    ],
)
def test_who_asks_for_a_session_does_not_get_anothers(server, caplog, method, arguments, ranks):
    swap(server, ranks)
    answer = server.ask(method, **arguments, salt="alice")
    assert answer.keys() == {"error", "kind"} and answer["kind"] == "not-found"
    assert "error" in server.ask("show", session="new", salt="alice")
    is_refused(server, caplog)


@each_rank
def test_a_request_does_not_start_from_anothers(server, caplog, ranks):
    swap(server, ranks)
    state = server.store.find(server.store.prefix_hashes([*HERS, 7], "", salt_hash("alice")), 40)
    assert state is not None
    server.store.load(state, 2, "request")
    events = [outcome.event for outcome in server.settle()]
    assert events.count("load-failed") == len(ranks)
    assert not any(server.pools[rank][2].any() for rank in ranks)
    is_refused(server, caplog)


@each_rank
@pytest.mark.parametrize(
    ("method", "arguments"),
    [("fork", {"reference": "talk"}), ("compose", {"sources": ["talk", "more"]})],
)
def test_a_rank_makes_nothing_of_anothers(server, caplog, method, arguments, ranks):
    assert "error" not in server.manager.call(method, {**arguments, "to": "new", "salt": "alice"})
    swap(server, ranks)  # before the ranks get their orders
    failed = [outcome for outcome in server.settle() if "failed" in outcome.event]
    assert {o.event for o in failed} == {"read-failed", "save-failed"}
    assert {o.fault for o in failed} == {"damaged"}
    assert "error" in server.ask("show", session="new", salt="alice")
    is_refused(server, caplog)


@each_rank
def test_a_file_of_anothers_is_not_rewritten(server, ranks):
    swap(server, ranks)
    files = server.store.directory.files(state_of(server, "alice").id)
    before = [path.read_bytes() for path in files]
    renamed = server.ask("rename", session="talk", to="new", salt="alice")
    assert renamed["kind"] == "unavailable"
    assert [path.read_bytes() for path in files] == before


def test_a_header_of_another_text_is_not_taken_over(server):
    """One server's file under the id of another's state, as whoever writes files may put it."""
    state = state_of(server, "alice")
    before = state.header
    theirs = {**vars(state_of(server, "bob").header), "id": state.id, "tail": [7], "turn": 9}
    server.store.upkeep._take_over(state, type(before)(**theirs))
    assert state.header == before


def keys_of(row: Tensor, num_tokens: int, newest: int | None = None) -> DocumentKeys:
    """Keys that are the row."""
    keys = quantize(row.float().view(-1, 16))
    return DocumentKeys(newest or num_tokens, (keys,), (torch.arange(ROW // 16),))


def new_shelf(server: Server) -> dict[str, str]:
    """A shelf as after a start; the ids of the documents."""
    directory, (worker,) = server.store.directory, server.workers
    worker._shelf = KeyShelf(keys_of, directory.path, directory.key)
    return {salt: state_of(server, salt, f"library-{salt}").id for salt in TEXTS}


@pytest.fixture(params=["plain", "encrypted"])
def library(request, tmp_path):
    """One with a document of each owner, and its keys."""
    server = started(tmp_path, request.param == "encrypted")
    directory = server.store.directory
    server.workers[0]._shelf = KeyShelf(keys_of, directory.path, directory.key)
    for salt, tokens in TEXTS.items():
        part = Part("pumps", "a.md")
        server.say(tokens, f"library-{salt}", kind="prompt", salt=salt_hash(salt), part=part)
    server.settle()
    return server


def are_of(server: Server, salt: str) -> bool:
    """Whether the keys of an owner's document are its own."""
    found = server.workers[0].document_keys(new_shelf(server)[salt], len(HERS))
    expected = keys_of(row_of(TEXTS[salt]), len(HERS)).keys[0]
    return torch.equal(found.keys[0].numbers, expected.numbers)


def test_keys_come_from_the_file_of_their_state(library, monkeypatch):
    monkeypatch.setattr(library.workers[0], "_from_file", None)  # no state is read for them
    assert all(are_of(library, salt) for salt in TEXTS)


@pytest.mark.parametrize("kept", ["", "hash", "id"])
def test_keys_of_another_state_are_made_anew(library, caplog, kept):
    """A file of the same name that says nothing of its state, or of another text, or id."""
    directory, state = library.store.directory, state_of(library, "alice", "library-alice")
    names = {"id": state.id + "00" * 16, "hash": "00" * 16 + state.header.prefix_hash, "": ""}
    path = keys_file(directory.path, state.id)
    keys_of(row_of(HIS), len(HIS)).write(path, directory.key, bytes.fromhex(names[kept]))
    assert are_of(library, "alice")
    assert "of another state" in caplog.text and "taken from the state again" in caplog.text
    caplog.clear()
    assert are_of(library, "alice") and not caplog.text  # they were written


@pytest.mark.parametrize("newest", [False, True])
def test_keys_are_not_taken_from_anothers_state(library, newest):
    ids, (worker,) = new_shelf(library), library.workers
    exchange(*(library.store.directory.files(state)[0] for state in ids.values()))
    with pytest.raises(StateFileError, match="another state"):
        if newest:
            worker.document_keys(ids["alice"], len(HERS), 7)
        else:
            worker.document_keys(ids["alice"], len(HERS))
    library.settle()
    assert library.ask("show", session="library-alice", salt="alice")["kind"] == "not-found"
