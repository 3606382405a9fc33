"""`lola-vllm states`: what a directory holds by owner, moved and deleted without a server."""

import json

import pytest

from lola_vllm.command import cli
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
    server.tell(TEXT[:130], "both", salt=salt("one", "sea"))
    server.close()
    return tmp_path


def states(directory, verb, *words):
    return cli.main(["states", verb, "--lola-state-dir", str(directory), *words])


def listed(directory, capsys, *words):
    capsys.readouterr()
    assert states(directory, "list", "--json", *words) == 0
    return {row["owner"]: row for row in json.loads(capsys.readouterr().out)["owners"]}


def test_states_are_listed_by_owner(directory, capsys):
    owner = owner_of("one")[:16]
    rows = listed(directory, capsys)
    assert list(rows) == ["none", owner]
    none, one = rows.values()
    assert (none["sessions"], none["states"], none["salts"]) == (["salted", "plain"], 3, 2)
    assert (one["sessions"], one["states"], one["salts"]) == (["both", "keyed"], 2, 2)
    files = list(directory.rglob("*.safetensors"))
    assert none["bytes"] + one["bytes"] == sum(file.stat().st_size for file in files)
    assert states(directory, "list") == 0
    text = capsys.readouterr().out
    assert "none: 2 sessions, 3 states" in text and f"{owner}: 2 sessions" in text
    assert "salted, plain" in text and owner_of("one") not in text


def test_what_no_key_reaches_is_deleted(directory, capsys):
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
    assert states(directory, "rm", "--keep", "env:TWO", "--yes") == 0
    assert list(directory.rglob("*.safetensors")) == []
