"""Files whose names were swapped: no reader gives an owner another's text."""

from __future__ import annotations

from collections.abc import Callable
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
from lola_vllm.memory.sessions.inventory import Inventory, OwnerFilter
from lola_vllm.memory.sessions.names import Part, parse_reference
from lola_vllm.memory.sessions.prefix_hash import salt_hash
from lola_vllm.memory.sessions.tiers import Stored
from tests.support.sessions import ROW, Server, row_of

HERS, HIS = list(range(100, 140)), list(range(500, 540))
TEXTS = {"alice": HERS, "bob": HIS}


def started(root: Path, sealed: bool, **settings: Any) -> Server:
    if sealed:
        settings["key_file"] = root / "secret"
        settings["key_file"].write_text("0123456789abcdef" * 4)
    return Server(root / "states", memory=0, **settings)


@pytest.fixture(params=["plain", "encrypted"])
def server(request: Any, tmp_path: Path) -> Server:
    """One with two ranks, with a session of each owner in files alone."""
    server = started(tmp_path, request.param == "encrypted", ranks=2)
    for salt, tokens in TEXTS.items():
        server.say(tokens, "talk", salt=salt_hash(salt))
    server.say([1, 2, 3], "more", salt=salt_hash("alice"))
    server.settle()
    return server


def state_of(server: Server, salt: str, session: str = "talk") -> Stored:
    (state,) = server.store.lookup(parse_reference(session), salt_hash(salt))
    return state


def exchange(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


Swap = Callable[..., None]


@pytest.fixture(params=["names", "ids"])
def swap(request: Any) -> Swap:
    """Has her files hold his text: the names of two files are exchanged, or his is written under
    her state's id."""

    def swapped(server: Server, ranks: tuple[int, ...] = (0, 1)) -> None:
        directory, states = server.store.directory, [state_of(server, salt) for salt in TEXTS]
        hers, his = (directory.files(state.id) for state in states)
        for rank in ranks:
            if request.param == "names":
                exchange(hers[rank], his[rank])
            else:
                found = read_state(his[rank], key=directory.key)
                header = replace(found.header, id=states[0].id)
                write_state(hers[rank], header, found.tokens, found.data, directory.key)

    return swapped


def is_refused(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Her session counts as damaged, and his is still listed."""
    server.settle()
    assert server.ask("show", session="talk", salt="alice")["kind"] == "not-found"
    assert server.store.failures["damaged"] >= 1
    assert any("another state" in record.getMessage() for record in caplog.records)
    assert server.ask("show", session="talk", salt="bob")["tokens"] == len(HIS)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("tokens", {"reference": "talk"}),
        ("files", {"reference": "talk"}),
        ("fork", {"reference": "talk", "to": "new"}),
        ("compose", {"sources": ["talk", "more"], "to": "new"}),
        ("compose_parts", {"sources": ["talk", "more"]}),
        ("past", {"reference": "talk", "size": 8}),
    ],
)
def test_who_asks_for_a_session_does_not_get_anothers(
    server: Server,
    swap: Swap,
    caplog: pytest.LogCaptureFixture,
    method: str,
    arguments: dict[str, Any],
) -> None:
    swap(server)
    answer = server.ask(method, **arguments, salt="alice")
    assert answer.keys() == {"error", "kind"} and answer["kind"] == "not-found"
    assert "error" in server.ask("show", session="new", salt="alice")
    is_refused(server, caplog)


@pytest.mark.parametrize("ranks", [(0,), (1,)])
def test_an_export_is_refused_whichever_file_was_swapped(
    server: Server, swap: Swap, caplog: pytest.LogCaptureFixture, ranks: tuple[int, ...]
) -> None:
    swap(server, ranks)
    assert "error" in server.ask("files", reference="talk", salt="alice")
    is_refused(server, caplog)


@pytest.mark.parametrize("ranks", [(0, 1), (1,)])
@pytest.mark.parametrize("by", ["name", "tokens"])
def test_a_request_does_not_start_from_anothers(
    server: Server, swap: Swap, caplog: pytest.LogCaptureFixture, by: str, ranks: tuple[int, ...]
) -> None:
    swap(server, ranks)
    prompt = [*HERS, 7]
    hashes = server.store.prefix_hashes(prompt, "", salt_hash("alice"))
    if by == "name":
        reference = parse_reference("talk")
        state = server.store.resolve(reference, hashes, len(HERS), "", salt_hash("alice"))
    else:
        found = server.store.find(hashes, len(HERS))
        assert found is not None
        state = found
    server.store.load(state, 2, "request")
    events = [outcome.event for outcome in server.settle()]
    assert events.count("load-failed") == len(ranks)
    for rank in ranks:
        assert not server.pools[rank][2].any()
    is_refused(server, caplog)


@pytest.mark.parametrize("ranks", [(0, 1), (1,)])
@pytest.mark.parametrize(
    ("method", "arguments"),
    [("fork", {"reference": "talk"}), ("compose", {"sources": ["talk", "more"]})],
)
def test_a_rank_makes_nothing_of_anothers(
    server: Server,
    swap: Swap,
    caplog: pytest.LogCaptureFixture,
    method: str,
    arguments: dict[str, Any],
    ranks: tuple[int, ...],
) -> None:
    assert "error" not in server.manager.call(method, {**arguments, "to": "new", "salt": "alice"})
    swap(server, ranks)  # before the ranks get their orders
    failed = [outcome for outcome in server.settle() if "failed" in outcome.event]
    assert {o.event for o in failed} == {"read-failed", "save-failed"}
    assert {o.fault for o in failed} == {"damaged"}
    assert "error" in server.ask("show", session="new", salt="alice")
    is_refused(server, caplog)


@pytest.mark.parametrize("ranks", [(0, 1), (1,)])
@pytest.mark.parametrize(
    ("method", "arguments"),
    [("rename", {"session": "talk", "to": "new"}), ("pin", {"reference": "talk"})],
)
def test_a_file_of_anothers_is_not_rewritten(
    server: Server,
    swap: Swap,
    caplog: pytest.LogCaptureFixture,
    method: str,
    arguments: dict[str, Any],
    ranks: tuple[int, ...],
) -> None:
    swap(server, ranks)
    files = server.store.directory.files(state_of(server, "alice").id)
    before = [path.read_bytes() for path in files]
    assert server.ask(method, **arguments, salt="alice")["kind"] == "unavailable"
    assert [path.read_bytes() for path in files] == before
    assert any("another state" in record.getMessage() for record in caplog.records)
    assert not state_of(server, "alice").header.pinned


@pytest.mark.parametrize("ranks", [(0, 1), (1,)])
def test_an_operator_moves_no_files_that_were_swapped(
    server: Server, swap: Swap, ranks: tuple[int, ...]
) -> None:
    directory = server.store.directory
    inventory = Inventory(directory.path.parent, directory.key)
    swap(server, ranks)
    told: list[str] = []
    failed = inventory.move(OwnerFilter("none", none=True), "ab" * 16, told.append)
    # By their names, neither owner's files move; by their ids, his do.
    assert failed and all("another state" in line for line in failed)
    assert sorted([*told, *(line.partition(":")[0] for line in failed)]) in (
        ["more: 1 states moved", "talk", "talk"],
        ["more: 1 states moved", "talk", "talk: 1 states moved"],
    )


def test_a_header_of_another_text_is_not_taken_over(server: Server) -> None:
    """One server's file under the id of another's state, as whoever writes files may put it."""
    state = state_of(server, "alice")
    before = state.header
    theirs = {**vars(state_of(server, "bob").header), "id": state.id, "tail": [7], "turn": 9}
    server.store.upkeep._take_over(state, type(before)(**theirs))
    assert state.header == before


@pytest.fixture(params=["plain", "encrypted"])
def library(request: Any, tmp_path: Path) -> Server:
    """One with a document of each owner, and its keys."""
    server = started(tmp_path, request.param == "encrypted")
    (worker,) = server.workers
    worker._shelf = shelf(server)
    for salt, tokens in TEXTS.items():
        part = Part("pumps", "a.md")
        server.say(tokens, f"library-{salt}", kind="prompt", salt=salt_hash(salt), part=part)
    server.settle()
    return server


def shelf(server: Server) -> KeyShelf:
    """A new one, as after a start."""
    directory = server.store.directory
    return KeyShelf(keys_of, directory.path, directory.key)


def keys_of(row: Tensor, num_tokens: int, newest: int | None = None) -> DocumentKeys:
    """Keys that are the row."""
    keys = quantize(row.float().view(-1, 16))
    return DocumentKeys(newest or num_tokens, (keys,), (torch.arange(ROW // 16),))


def keys_here(server: Server, salt: str) -> DocumentKeys:
    (worker,) = server.workers
    worker._shelf = shelf(server)
    found = worker.document_keys(state_of(server, salt, f"library-{salt}").id, len(HERS))
    assert isinstance(found, DocumentKeys)
    return found


def are_of(keys: DocumentKeys, tokens: list[int]) -> bool:
    expected = keys_of(row_of(tokens), len(tokens)).keys[0]
    return torch.equal(keys.keys[0].numbers, expected.numbers)


def key_files(server: Server) -> list[Path]:
    ids = [state_of(server, salt, f"library-{salt}").id for salt in TEXTS]
    return [keys_file(server.store.directory.path, state) for state in ids]


def test_keys_come_from_the_file_of_their_state(
    library: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(path.exists() for path in key_files(library))
    monkeypatch.setattr(library.workers[0], "_from_file", None)  # no state is read for them
    assert are_of(keys_here(library, "alice"), HERS) and are_of(keys_here(library, "bob"), HIS)


@pytest.mark.parametrize("kept", ["", "hash", "id", "neither"])
def test_keys_of_another_state_are_made_anew(
    library: Server, caplog: pytest.LogCaptureFixture, kept: str
) -> None:
    """A file of the same name that says nothing of its state, or of another text, or id."""
    state, (path, _) = state_of(library, "alice", "library-alice"), key_files(library)
    names = {"id": state.id + "00" * 16, "hash": "00" * 16 + state.header.prefix_hash, "": ""}
    key = library.store.directory.key
    if kept == "neither":
        exchange(*key_files(library))
    else:
        keys_of(row_of(HIS), len(HIS)).write(path, key, bytes.fromhex(names[kept]))
    assert are_of(keys_here(library, "alice"), HERS)
    assert "of another state" in caplog.text and "taken from the state again" in caplog.text
    caplog.clear()
    assert are_of(keys_here(library, "alice"), HERS) and not caplog.text  # they were written
    assert are_of(keys_here(library, "bob"), HIS)


@pytest.mark.parametrize("with_keys", [False, True])
@pytest.mark.parametrize("newest", [False, True])
def test_keys_are_not_taken_from_anothers_state(
    library: Server, caplog: pytest.LogCaptureFixture, newest: bool, with_keys: bool
) -> None:
    (worker,) = library.workers
    worker._shelf = shelf(library)
    ids = {salt: state_of(library, salt, f"library-{salt}").id for salt in TEXTS}
    exchange(*(library.store.directory.files(state)[0] for state in ids.values()))
    if with_keys:
        exchange(*key_files(library))
    with pytest.raises(StateFileError, match="another state"):
        if newest:
            worker.newest_keys(ids["alice"], len(HERS), 7)
        else:
            worker.document_keys(ids["alice"], len(HERS))
    library.settle()
    assert library.ask("show", session="library-alice", salt="alice")["kind"] == "not-found"
    assert "another state" in caplog.text
