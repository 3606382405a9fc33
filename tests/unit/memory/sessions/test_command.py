"""`lola-vllm states`: what a directory holds by owner, moved and deleted without a server."""

import errno
import json

import pytest

from lola_vllm.command import cli
from lola_vllm.memory.sessions import inventory
from lola_vllm.memory.sessions.names import PAST, Part, parse_reference
from lola_vllm.memory.sessions.owner import engine_salt, owner_of
from lola_vllm.memory.sessions.prefix_hash import salt_hash
from tests.support.sessions import Server

TEXT = list(range(1000, 1400))


def salt(key, own=None):
    return salt_hash(own if key is None else engine_salt(owner_of(key), own))


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for name in ("one", "two"):
        monkeypatch.setenv(name.upper(), name)


@pytest.fixture
def directory(tmp_path):
    """Sessions of nobody, of a salt, and of a key with and without a salt."""
    server = Server(tmp_path)
    server.say(TEXT[:100], "plain")
    server.say(TEXT[:200], "plain")
    server.say(TEXT[:110], "salted", salt=salt(None, "sea"))
    server.say(TEXT[:120], "keyed", salt=salt("one"))
    server.say(TEXT[:130], "both", salt=salt("one", "sea"))
    server.settle()
    server.close()
    return tmp_path


def states(directory, verb, *words):
    return cli.main(["states", verb, "--lola-state-dir", str(directory), *words])


def listed(directory, capsys, *words):
    capsys.readouterr()
    assert states(directory, "list", "--json", *words) == 0
    return {row["owner"]: row for row in json.loads(capsys.readouterr().out)["owners"]}


def found(directory, tokens, of, **settings):
    """Tokens that a server restores for an owner's salt, after a check of the rows."""
    server = Server(directory, memory=0, **settings)
    n = server.restore(tokens, salt=of)
    server.close()
    return n


def test_states_are_listed_by_owner(directory, capsys):
    owner = owner_of("one")[:16]
    rows = listed(directory, capsys, "--keys", "env:ONE")
    assert list(rows) == ["none", owner]
    none, one = rows.values()
    assert (none["sessions"], none["states"], none["salts"]) == (["salted", "plain"], 3, 2)
    assert (one["sessions"], one["states"], one["salts"]) == (["both", "keyed"], 2, 2)
    assert (none["reached"], one["reached"]) == (0, 2)
    files = list(directory.rglob("*.safetensors"))
    assert none["bytes"] + one["bytes"] == sum(file.stat().st_size for file in files)
    assert states(directory, "list") == 0
    text = capsys.readouterr().out
    assert "none: 2 sessions, 3 states" in text and f"{owner}: 2 sessions" in text
    assert "salted, plain" in text and owner_of("one") not in text
    assert listed(directory, capsys, "--keys", "none")["none"]["reached"] == 3


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("sealed", [False, True])
def test_states_of_no_key_move_to_a_key_and_from_key_to_key(
    tmp_path, capsys, ranks, sealed, key_file
):
    settings = {"ranks": ranks, **({"key_file": key_file} if sealed else {})}
    words = ["--lola-state-key-file", str(key_file)] if sealed else []
    root = tmp_path / "states"
    server = Server(root, **settings)
    for n in (100, 200):
        server.say(TEXT[:n], "agent")
    server.ask("pin", reference="agent")
    server.say(TEXT[:110], "agent", salt=salt(None, "sea"))
    server.settle()
    before = server.manager.show("agent")
    server.close()
    for source, target, key in (
        ("none", "env:ONE", "one"), ("env:ONE", "env:TWO", "two"),
        (owner_of("two")[:16], "env:ONE", "one"), ("env:ONE", "none", None),
    ):  # fmt: skip
        assert states(root, "move", "--from", source, "--to", target, *words) == 0
        assert "agent: 2 states moved" in capsys.readouterr().out
        assert found(root, TEXT[:210], salt(key), **settings) == 200
        assert found(root, TEXT[:210], salt(key, "sea"), **settings) == 110
        for other in {None, "one", "two"} - {key}:
            assert found(root, TEXT[:210], salt(other), **settings) == 0
        server = Server(root, **settings)
        mine = None if key is None else engine_salt(owner_of(key), None)
        after = server.manager.show("agent", mine)
        server.close()
        assert [s["turn"] for s in after["states"]] == [s["turn"] for s in before["states"]]
        assert after["pinned"] and after["states"][1]["parent"] == after["states"][0]["id"]
    if sealed:
        assert states(root, "list") == 0
        told = capsys.readouterr()
        assert "3 states are not read" in told.err and "give it with --lola-state-key" in told.err
        assert told.out == "no states that can be read\n"


def test_a_shared_beginning_is_deleted_with_the_last_session_that_was_moved(tmp_path):
    server = Server(tmp_path)
    server.say(TEXT[:300], "shared-0123456789abcdef", kind="prompt")
    server.say(TEXT[:350], "agent")
    server.say([*TEXT[:300], 5, 6], "agent-2")
    server.settle()
    server.close()
    assert states(tmp_path, "move", "--from", "none", "--to", "env:ONE") == 0
    server = Server(tmp_path)
    assert server.store.disk.owners == 1 and len(server.store.states) == 3
    mine = engine_salt(owner_of("one"), None)
    assert server.ask("delete", reference="agent", salt=mine) == {"deleted": 1}
    assert server.ask("delete", reference="agent-2", salt=mine) == {"deleted": 2}
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_a_running_server_takes_part_in_a_move(directory):
    server = Server(directory)
    assert server.restore(TEXT[:210]) == 200  # it is in memory too
    assert states(directory, "move", "--from", "none", "--to", "env:TWO") == 0
    server.store.upkeep.refresh()
    server.settle()
    assert server.restore(TEXT[:210]) == 0
    assert server.restore(TEXT[:210], salt=salt("two")) == 200


def test_what_was_composed_and_segments_move_with_their_session(tmp_path):
    server = Server(tmp_path)
    server.say(TEXT[:100], "one")
    server.say(TEXT[:40], "two")
    server.settle()
    server.say(TEXT[:120], "one")
    made = server.ask("compose_parts", sources=["one", "two"])["session"]
    session = server.ask("past", reference="one", size=40)["session_id"]
    server.say(TEXT[:40], "library-0", kind="prompt", part=Part(PAST, session))
    server.store.forget(server.store.lookup(parse_reference("one"))[0])  # for others
    server.settle()
    server.close()
    for source, target in (("none", "env:ONE"), ("env:ONE", "env:TWO")):
        assert states(tmp_path, "move", "--from", source, "--to", target) == 0
    server = Server(tmp_path)
    mine = engine_salt(owner_of("two"), None)
    assert server.ask("show", session=made, salt=mine)["made_of"] == ["one@2", "two@1"]
    assert len(server.ask("past", reference="one", size=40, salt=mine)["segments"]) == 1
    server.ask("rename", session="one", to="first", salt=mine)
    assert server.ask("delete", reference="first", salt=mine) == {"deleted": 2}
    assert server.ask("show", session=made, salt=mine)["kind"] == "not-found"


def test_a_session_whose_name_is_taken_stays(directory, capsys):
    server = Server(directory)
    server.say(TEXT[200:300], "plain", salt=salt("two"))
    server.settle()
    server.close()
    assert states(directory, "move", "--from", "none", "--to", "env:TWO") == 2
    out = capsys.readouterr()
    assert "not moved: plain: the other owner has a session of this name" in out.err
    assert "salted: 1 states moved" in out.out
    assert found(directory, TEXT[:210], salt(None)) == 200
    assert found(directory, TEXT[200:310], salt("two")) == 100


@pytest.mark.parametrize("files", [1, 2, 3])
@pytest.mark.parametrize("at", ["write_state", "unlink"])
def test_an_interrupted_move_goes_on(directory, monkeypatch, files, at):
    left = [files]

    def failing(method):
        def call(*args):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.EIO, "the disk is gone")
            return method(*args)

        return call

    with monkeypatch.context() as patch:
        if at == "write_state":
            patch.setattr(inventory, at, failing(inventory.write_state))
        else:
            patch.setattr(inventory.StateDirectory, at, failing(inventory.StateDirectory.unlink))
        stopped = states(directory, "move", "--from", "none", "--to", "env:TWO")
        assert stopped == (2 if left[0] < 0 else 0)
    assert states(directory, "move", "--from", "none", "--to", "env:TWO") == 0
    assert found(directory, TEXT[:210], salt("two")) == 200
    assert found(directory, TEXT[:210], salt("two", "sea")) == 110
    assert found(directory, TEXT[:210], salt(None)) == 0
    assert len(list(directory.rglob("*.safetensors"))) == 5


def test_what_no_key_reaches_is_deleted(directory, capsys, monkeypatch):
    (directory / "keys").write_text("another\n\none\n")
    assert states(directory, "rm", "--keep", f"file:{directory / 'keys'}") == 2
    out = capsys.readouterr()
    assert "3 states of 2 names" in out.out and "--yes" in out.err
    server = Server(directory)
    assert len(server.store.states) == 5
    assert states(directory, "rm", "--keep", f"file:{directory / 'keys'}", "--yes") == 0
    server.store.upkeep.refresh()  # a server that runs forgets them too
    assert {name for _, name in server.store.sessions} == {"keyed", "both"}
    server.close()
    assert len(list(directory.rglob("*.safetensors"))) == 2
    assert states(directory, "rm", "--keep", "env:ONE", "none", "--yes") == 0
    assert "reach all states" in capsys.readouterr().out
    monkeypatch.setattr("getpass.getpass", lambda prompt: "two")
    assert states(directory, "rm", "--keep", "prompt", "--yes") == 0
    assert list(directory.rglob("*.safetensors")) == []
