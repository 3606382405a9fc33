"""A directory of plain states gets a key: what is said of it, and its encryption by command."""

import os
import signal
import subprocess
import sys

import pytest
from safetensors import safe_open

from lola_vllm.command import cli
from lola_vllm.memory.documents.shelf import KeyShelf
from lola_vllm.memory.sessions.cipher import read_key
from tests.support.sessions import Server
from tests.unit.memory.documents.test_shelf import ROW, keys_of, same

TEXT = list(range(1000, 1400))
LENGTHS = (100, 150, 200)


@pytest.fixture(params=[1, 2], ids=["one rank", "two ranks"])
def root(tmp_path, request):
    """A directory of a server without a key: turns of a session, and with one rank the keys of a
    document."""
    root = tmp_path / "states"
    server = Server(root, ranks=request.param)
    for n in LENGTHS:
        server.say(TEXT[:n], "agent")
    server.settle()
    if request.param == 1:
        state = max(server.store.states)  # whose keys are then the last file of all
        KeyShelf(keys_of, server.store.directory.path).add(state, ROW, 20, disk=True)
    server.close()
    return root


def states(root, verb, *words):
    return cli.main(["states", verb, "--lola-state-dir", str(root), *words])


def encrypt(root, key_file):
    return states(root, "encrypt", "--lola-state-key-file", str(key_file))


def files(root):
    return sorted(root.rglob("*.safetensors"))


def ranks(root):
    return len(files(root)) // len(LENGTHS)


def sealed(file):
    with safe_open(file, framework="numpy") as opened:
        return "cipher" in opened.metadata()


def found(root, count, **settings):
    """The states that a server restores, from files alone."""
    server = Server(root, memory=0, ranks=count, **settings)
    restored = {n for n in LENGTHS if server.restore(TEXT[: n + 1]) == n}
    server.close()
    return restored


def test_a_plain_directory_is_encrypted(root, key_file, capsys):
    count = ranks(root)
    for number, file in enumerate(files(root)):
        os.utime(file, (1e9 + number, 1e9 + number))
    assert found(root, count, key_file=key_file) == set()
    assert encrypt(root, key_file) == 0
    total = 3 * count + (count == 1)  # with the keys
    assert f"{total} files encrypted; 0 were encrypted before" in capsys.readouterr().out
    assert all(map(sealed, files(root)))
    assert [round(file.stat().st_mtime - 1e9) for file in files(root)] == [*range(3 * count)]
    assert {p.stat().st_mode & 0o777 for p in root.rglob("*.lola.*")} == {0o600}
    assert not any(b"agent" in file.read_bytes() for file in root.rglob("*.lola.*"))
    assert found(root, count, key_file=key_file) == {*LENGTHS}
    assert found(root, count) == set()
    for path in root.rglob("*.lola.keys"):
        assert keys_of(ROW, 20).keys[0].numbers.numpy().tobytes() not in path.read_bytes()
        shelf = KeyShelf(keys_of, path.parent, read_key(key_file))
        assert same(shelf.find(path.name.partition(".")[0]), keys_of(ROW, 20))
    assert encrypt(root, key_file) == 0
    assert f"0 files encrypted; {total} were" in capsys.readouterr().out


KILLED = """
import os, signal, sys
from lola_vllm.command import cli
left, real = int(sys.argv[1]), os.replace
def replace(*args):
    global left
    left -= 1
    if left == 0 and sys.argv[2] == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    real(*args)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
cli.main(sys.argv[3:])
"""


@pytest.mark.parametrize("root", [1], indirect=True)
@pytest.mark.parametrize("when", ["before", "after"])
def test_after_a_kill_each_state_is_there_and_it_goes_on(root, key_file, when, capsys):
    words = ["states", "encrypt", "--lola-state-dir", str(root)]
    words += ["--lola-state-key-file", str(key_file)]
    done = subprocess.run([sys.executable, "-c", KILLED, "2", when, *words], check=False)
    assert done.returncode == -signal.SIGKILL
    assert sum(map(sealed, files(root))) == (1 if when == "before" else 2)
    old, new = found(root, 1), found(root, 1, key_file=key_file)
    assert old and new and old | new == {*LENGTHS} and not old & new
    assert encrypt(root, key_file) == 0
    assert found(root, 1, key_file=key_file) == {*LENGTHS}
    assert not [p for p in root.rglob(".*") if p.name.endswith(".partial")]


@pytest.mark.parametrize("root", [1], indirect=True)
def test_a_server_without_a_key_is_in_the_way(root, key_file, capsys):
    server = Server(root)
    assert encrypt(root, key_file) == 2
    assert "a server without a key runs on it" in capsys.readouterr().err
    assert not any(map(sealed, files(root)))
    server.close()
    assert encrypt(root, key_file) == 0


@pytest.mark.parametrize("root", [1], indirect=True)
def test_a_server_with_the_key_takes_up_what_is_encrypted(root, key_file):
    server = Server(root, memory=0, key_file=key_file)
    (line,) = server.manager.stats()["unread"]
    assert line.startswith(f"3 states are not read in {root}: not encrypted, and a key is given;")
    assert "lola-vllm states encrypt --lola-state-dir" in line
    assert server.restore(TEXT) == 0
    assert encrypt(root, key_file) == 0
    server.store.upkeep.refresh()
    assert server.restore(TEXT) == 200


@pytest.mark.parametrize("root", [1], indirect=True)
def test_what_has_another_key_stays_and_is_named(root, key_file, tmp_path, capsys):
    assert encrypt(root, key_file) == 0
    other = tmp_path / "other"
    other.write_text("another secret of 32 characters!")
    capsys.readouterr()
    given = ["--lola-state-key-file", str(other)]
    for key, why in (([], "give it with --lola-state-key"), (given, "encrypted with another key")):
        assert states(root, "list", *key) == 0
        told = capsys.readouterr()
        assert told.out == "no states that can be read\n"
        assert "3 states are not read" in told.err and why in told.err
    server = Server(root, key_file=other)
    assert "give the one that they were written with" in server.manager.stats()["unread"][0]
    server.tell(TEXT[:90], "mine")
    server.close()
    assert encrypt(root, other) == 2
    told = capsys.readouterr()
    assert told.err.count("not encrypted: ") == 3 and "the key here is another one" in told.err
    assert states(root, "rm", "--all", "--yes", *given) == 2
    told = capsys.readouterr()
    unread = [str(file.relative_to(root)) for file in files(root)]
    assert len(unread) == 3 and "1 states deleted" in told.out
    for name in unread:
        assert f"{name}: cannot be read; it stays; --unread deletes it too" in told.out
    assert states(root, "rm", "--all", "--yes", *given) == 2  # again
    server = Server(root, key_file=key_file)  # which knows them
    assert len(server.store.states) == 3
    assert states(root, "rm", "--keep", "none", "--unread", "--yes", *given) == 0
    assert "3 states deleted" in capsys.readouterr().out and files(root) == []
    server.store.upkeep.refresh()
    assert not server.store.states


def test_without_a_key_nothing_is_encrypted(root, capsys):
    assert states(root, "encrypt") == 2
    assert "no key to encrypt with: give --lola-state-key-file" in capsys.readouterr().err
    assert states(root, "rm", "--all", "--yes") == 0 and files(root) == []
    assert states(root, "rm", "--all", "--yes") == 0
    assert "nothing to delete" in capsys.readouterr().out
