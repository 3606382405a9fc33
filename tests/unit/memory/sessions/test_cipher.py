"""A state's file that only its key opens: nothing of the text is in it, and no change is unseen."""

import base64
import hashlib
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lola_vllm.memory.sessions import cipher as ciphers
from lola_vllm.memory.sessions.cipher import (
    STATE,
    TOKENS,
    StateKey,
    read_key,
    sealed_size,
)
from lola_vllm.memory.sessions.file import (
    StateFileError,
    file_name,
    read_header,
    read_state,
    read_tokens,
    write_state,
)
from lola_vllm.memory.sessions.prefix_hash import PrefixHashes, namespace
from lola_vllm.memory.sessions.settings import StoreSettings
from tests.support.sessions import FINGERPRINT, SECRET, Server
from tests.unit.memory.sessions.test_file import header as plain_header
from tests.unit.memory.sessions.test_file import reason

KEY, OTHER = StateKey(SECRET.encode()), StateKey(b"another secret of 32 characters!")
PIECE = 256
# Several pieces of each section; token ids whose bytes are found if they are there.
TOKENS_IN = np.arange(1_000_000, 1_000_300, dtype=np.int32)
ROW = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8)
TEXT = list(range(700))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces of 256 bytes, so that small files have several."""
    monkeypatch.setattr(ciphers, "_PIECE", PIECE)


@pytest.fixture
def path(tmp_path):
    """An encrypted file."""
    path = tmp_path / file_name("ab" * 16, 0, 1)
    write_state(path, header(), TOKENS_IN, ROW, KEY)
    return path


def header(**fields):
    told = replace(plain_header(TOKENS_IN), adapter="dialect:00", **fields)
    hashes, n = PrefixHashes(namespace(FINGERPRINT.key, told.adapter), TOKENS_IN), len(TOKENS_IN)
    return replace(
        told, prefix_hash=hashes.prefix_hash(n).hex(), block_hash=hashes.block_hash(n).hex()
    )


def metadata(path: Path) -> dict[str, str]:
    with safe_open(str(path), framework="numpy") as file:
        return file.metadata()


def test_what_was_encrypted_is_read_with_its_key(path):
    found = read_state(path, FINGERPRINT, KEY)
    assert found.header == header() == read_header(path, KEY)
    assert (found.tokens == TOKENS_IN).all() and (found.data == ROW).all()
    assert found.tokens.dtype == np.int32 and found.data.flags.writeable
    assert (read_tokens(path, KEY) == TOKENS_IN).all()
    assert path.stat().st_mode & 0o777 == 0o600 and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("count", [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 5 * PIECE + 7])
def test_sections_of_any_length(count):
    data = np.arange(count, dtype=np.uint8)
    cipher = KEY.new_file()
    sealed = np.frombuffer(b"".join(cipher.seal(STATE, data)), np.uint8)
    assert len(sealed) == sealed_size(count)
    assert (KEY.of_file(cipher.salt).open(STATE, sealed) == data).all()
    for cut in range(len(sealed)):
        with pytest.raises(ValueError):
            cipher.open(STATE, sealed[:cut])


def test_nothing_of_a_text_is_in_its_file(path):
    data = path.read_bytes()
    for i in range(len(TOKENS_IN) - 1):
        assert TOKENS_IN[i : i + 2].tobytes() not in data
    for i in range(0, len(ROW) - 8):
        assert ROW[i : i + 8].tobytes() not in data
    told = header()
    secret = (
        "agent-7", "answer", "dialect", told.prefix_hash, told.block_hash, told.id, "num_tokens",
        told.fingerprint["config"] + '"', SECRET, KEY._secret.hex(),
    )  # fmt: skip
    for text in secret:
        assert text.encode() not in data and bytes(text, "ascii").hex().encode() not in data
    assert set(metadata(path)) == {"format", "version", "cipher", "key", "salt", "header"}


def test_no_two_writes_share_a_key(tmp_path):
    """A rename rewrites the file: under the key of before, nonces would come again."""
    found = set()
    for number in range(20):
        write_state(tmp_path / "x", header(), TOKENS_IN, ROW, KEY)
        told = metadata(tmp_path / "x")
        found.add((told["salt"], told["header"], load_file(tmp_path / "x")["state"].tobytes()))
        assert len({salt for salt, _, _ in found}) == number + 1
    assert len({sealed for _, sealed, _ in found}) == len({row for _, _, row in found}) == 20


@pytest.mark.parametrize("read", [read_header, read_tokens, read_state])
def test_another_key_and_no_key_are_told_as_such(path, read, tmp_path):
    assert reason(path, read, key=OTHER) == reason(path, read) == "key"
    with pytest.raises(StateFileError, match="there is no key here"):
        read(path)
    with pytest.raises(StateFileError, match="another one"):
        read(path, key=OTHER)
    write_state(tmp_path / "plain", plain_header(TOKENS_IN), TOKENS_IN, ROW)
    assert reason(tmp_path / "plain", read, key=KEY) == "plain"
    assert read_state(tmp_path / "plain", key=KEY, plain=True).header.session == "agent-7"


def changed(path, tensors=None, **fields):
    """The file with other metadata or other sealed bytes."""
    told, sealed = metadata(path), load_file(path)
    save_file({**sealed, **(tensors or {})}, path, metadata={**told, **fields})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"salt": "00" * 32}, "damaged"), ({"salt": ""}, "damaged"), ({"salt": "zz"}, "damaged"),
        ({"header": ""}, "damaged"), ({"header": "!"}, "damaged"), ({"header": "AAAA"}, "damaged"),
        ({"cipher": "none"}, "version"), ({"cipher": ""}, "version"), ({"key": ""}, "key"),
    ],
)  # fmt: skip
def test_metadata_that_was_changed(path, fields, expected):
    changed(path, **fields)
    assert reason(path, key=KEY) == reason(path, read_header, key=KEY) == expected


def test_a_file_that_says_it_is_plain_is_not_believed(path):
    """Its sealed header in the place of a plain one, with a checksum that is right."""
    told = metadata(path)
    told = {name: told[name] for name in ("format", "version", "header")}
    told["header_checksum"] = hashlib.sha256(told["header"].encode()).hexdigest()
    save_file(load_file(path), path, metadata=told)
    assert reason(path, key=KEY) == "plain" and reason(path) == "damaged"


STEP = PIECE + 16


@pytest.mark.parametrize("section", ["tokens", "state"])
@pytest.mark.parametrize(
    "tamper",
    [
        lambda one, two: np.concatenate([one[STEP : 2 * STEP], one[:STEP], one[2 * STEP :]]),
        lambda one, two: np.concatenate([one[:STEP], one[:STEP], one[2 * STEP :]]),
        lambda one, two: one[:STEP],
        lambda one, two: one[: len(one) // STEP * STEP],
        lambda one, two: one[:-1],
        lambda one, two: np.concatenate([one[:-1], one[-1:] ^ 4]),
        lambda one, two: one[:0],
        lambda one, two: np.concatenate([one, one[:STEP]]),
        lambda one, two: two,
        lambda one, two: np.concatenate([one[:STEP], two[STEP:]]),
    ],
    ids=["swapped", "twice", "cut", "cut at a piece", "cut by a byte", "flipped", "empty", "longer",
         "of another file", "half of another file"],
)  # fmt: skip
def test_pieces_that_are_swapped_cut_or_of_other_files_are_found(path, tmp_path, section, tamper):
    other = tmp_path / "other"
    write_state(other, header(), TOKENS_IN, ROW, KEY)  # the same state, written once more
    one, two = load_file(path)[section], load_file(other)[section]
    read_state(path, key=KEY)
    changed(path, {section: np.ascontiguousarray(tamper(one, two))})
    assert reason(path, key=KEY) == "damaged"


def test_sections_and_headers_do_not_change_places(path, tmp_path):
    sections = load_file(path)
    told = metadata(path)
    n = len(sections["tokens"])
    save_file({"tokens": sections["state"][:n], "state": sections["tokens"]}, path, metadata=told)
    assert reason(path, key=KEY) == "damaged"
    write_state(path, header(), TOKENS_IN, ROW, KEY)
    other = tmp_path / "other"
    write_state(other, header(session="agent-8"), TOKENS_IN, ROW, KEY)
    changed(path, header=metadata(other)["header"])
    assert reason(path, read_header, key=KEY) == "damaged"
    cipher = KEY.new_file()
    sealed = np.frombuffer(b"".join(cipher.seal(TOKENS, ROW)), np.uint8)
    with pytest.raises(ValueError, match="piece 0"):
        cipher.open(STATE, sealed)


def test_a_header_with_a_right_seal_is_checked_too(path):
    """Whoever has the key, another release for one, may write what makes no sense."""
    told = metadata(path)
    cipher = KEY.of_file(bytes.fromhex(told["salt"]))
    text = cipher.open(ciphers.HEADER, np.frombuffer(base64.b64decode(told["header"]), np.uint8))
    values = {**json.loads(text.tobytes()), "num_tokens": -1}
    sealed = cipher.seal(ciphers.HEADER, np.frombuffer(json.dumps(values).encode(), np.uint8))
    changed(path, header=base64.b64encode(b"".join(sealed)).decode())
    assert reason(path, read_header, key=KEY) == "damaged"


def test_a_server_with_a_key_keeps_its_states_over_a_restart(tmp_path, key_file):
    server = Server(tmp_path / "states", memory=0, ranks=2, key_file=key_file)
    server.tell(TEXT[:100], "agent")
    server.manager.rename("agent", "agent-7")
    server.manager.fork("agent-7", "agent-8")
    server.settle()
    assert server.manager.tokens("agent-8")["tokens"] == TEXT[:100]
    for file in server.store.directory.path.iterdir():
        assert metadata(file)["cipher"] and b"agent-" not in file.read_bytes()
    server.close()
    server = Server(tmp_path / "states", memory=0, ranks=2, key_file=key_file)
    assert server.restore(TEXT) == 100 and server.manager.show("agent-7")["tokens"] == 100
    assert not server.store.failures


def test_a_file_that_is_another_keys_by_now_is_kept(tmp_path, key_file):
    """Between the scan and the load, another server may have put it there."""
    server = Server(tmp_path / "states", memory=0, key_file=key_file)
    server.tell(TEXT[:100])
    (path,) = server.store.directory.path.iterdir()
    found = read_state(path, key=KEY)
    write_state(path, found.header, found.tokens, found.data, OTHER)
    assert server.restore(TEXT) == 0
    server.settle()
    assert server.store.failures == {"key": 1} and path.exists()


def test_files_leave_encrypted_and_come_with_the_same_key_or_plain(tmp_path, key_file):
    server = Server(tmp_path / "one", key_file=key_file)
    server.tell(TEXT[:100], "a")
    (sealed,) = server.manager.files("a")["files"]
    assert reason(Path(sealed)) == "key"
    same = Server(tmp_path / "two", memory=0, key_file=key_file)
    same.manager.import_file(sealed, "b")
    plain = tmp_path / "plain"
    write_state(plain, *read_state(Path(sealed), key=KEY))
    same.manager.import_file(str(plain), "c")
    assert same.restore(TEXT) == 100
    for file in same.store.directory.path.iterdir():
        assert metadata(file)["cipher"] and b'"c"' not in file.read_bytes()
    none = Server(tmp_path / "three")
    answer = none.manager.call("import_file", {"file": sealed, "session": "b"})
    assert answer["kind"] == "bad" and "encrypted" in answer["error"]


def test_keys_are_read_from_a_file_or_a_variable(key_file, monkeypatch):
    monkeypatch.setenv("SOME_KEY", SECRET)
    assert read_key() is None
    assert read_key(key_file).check == read_key(variable="SOME_KEY").check == KEY.check
    assert KEY.check != OTHER.check and len(KEY.check) == 16
    found = StoreSettings.from_mapping({"state_key_file": str(key_file)})
    assert found.key().check == KEY.check and SECRET not in repr(found)
    found = StoreSettings.from_mapping({"state_key_variable": "SOME_KEY"})
    assert found.key().check == KEY.check


def test_a_key_is_not_shown_and_does_not_leave_its_process():
    assert SECRET not in repr(KEY) and SECRET not in str(vars(KEY.new_file()))
    with pytest.raises(TypeError, match="other processes"):
        pickle.dumps(KEY)
