"""Keys on a shelf: in files, in memory, encrypted, and taken again."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lola_vllm.core.ops.int8 import quantize
from lola_vllm.memory.documents import shelf as module
from lola_vllm.memory.documents.keys import DocumentKeys, KeysError
from lola_vllm.memory.documents.shelf import KeyShelf
from lola_vllm.memory.sessions.cipher import StateKey
from lola_vllm.memory.sessions.file import file_name, keys_file, write_state
from tests.unit.memory.sessions.test_file import ROW as PAGES
from tests.unit.memory.sessions.test_file import TOKENS, header

ROW = torch.zeros(8, dtype=torch.uint8)


def keys_of(_row: Tensor, num_tokens: int, newest: int | None = None) -> DocumentKeys:
    num_tokens = num_tokens if newest is None else newest
    generator = torch.Generator().manual_seed(num_tokens)
    keys = quantize(torch.randn(num_tokens, 16, generator=generator))
    return DocumentKeys(num_tokens, (keys,), (torch.arange(num_tokens),))


def with_states(directory: Path, key: StateKey | None = None) -> Path:
    """A directory with the files of three states, which keys in files are of."""
    for name in "abc":
        told = replace(header(), id=name * 32)
        write_state(directory / file_name(told.id, 0, 1), told, TOKENS, PAGES, key)
    return directory


def same(one: DocumentKeys | None, other: DocumentKeys) -> bool:
    return one is not None and all(
        torch.equal(a, b)
        for x, y in zip(one.keys, other.keys, strict=True)
        for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("key", [None, StateKey(b"k" * 32)], ids=["plain", "sealed"])
def test_they_come_back_from_their_file(tmp_path, key):
    KeyShelf(keys_of, with_states(tmp_path, key), key).add("a" * 32, ROW, 20, disk=True)
    assert same(KeyShelf(keys_of, tmp_path, key).find("a" * 32), keys_of(ROW, 20))
    path = keys_file(tmp_path, "a" * 32)
    assert path.stat().st_mode & 0o777 == 0o600
    plain = keys_of(ROW, 20).keys[0].numbers.numpy().tobytes()
    assert (plain in path.read_bytes()) is (key is None)
    path.write_bytes(path.read_bytes()[:-9])  # a file that was cut is no file
    assert KeyShelf(keys_of, tmp_path, key).find("a" * 32) is None


def test_a_file_with_another_key_is_refused(tmp_path):
    path = tmp_path / "keys"
    keys_of(ROW, 20).write(path, StateKey(b"k" * 32))
    for key in (None, StateKey(b"x" * 32)):
        with pytest.raises(KeysError):
            DocumentKeys.read(path, key)
    keys_of(ROW, 20).write(path)
    with pytest.raises(KeysError, match="not encrypted"):
        DocumentKeys.read(path, StateKey(b"k" * 32))


@pytest.mark.parametrize("disk", [False, True])
def test_without_a_file_they_are_held_until_they_are_dropped(tmp_path, disk):
    """Also where that of their state could not be written, or is gone: it would be outlived."""
    kept = KeyShelf(keys_of, tmp_path)
    kept.add("a" * 32, ROW, 20, disk=disk)
    assert not list(tmp_path.iterdir())
    assert same(kept.find("a" * 32), keys_of(ROW, 20))
    kept.drop("a" * 32)
    assert kept.find("a" * 32) is None


def test_those_with_a_file_leave_memory_for_others(tmp_path, monkeypatch):
    """Those that had to be opened stay, as many as there is room for."""
    monkeypatch.setattr(module, "CACHE_BYTES", 2 * keys_of(ROW, 20).nbytes)
    key = StateKey(b"k" * 32)
    kept = KeyShelf(keys_of, with_states(tmp_path, key), key)
    for name in "abc":
        kept.add(name * 32, ROW, 20, disk=True)
    for name in "abc":
        keys_file(tmp_path, name * 32).unlink()
    assert [name for name in "abc" if kept.find(name * 32) is not None] == ["b", "c"]


def test_files_stay_open_until_they_are_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_OPEN", 2)
    kept = KeyShelf(keys_of, with_states(tmp_path))
    for name in "abc":
        kept.add(name * 32, ROW, 20, disk=True)
        assert kept.find(name * 32) is kept.find(name * 32)
    kept.drop("c" * 32)
    for name in "abc":
        keys_file(tmp_path, name * 32).unlink()
    assert [name for name in "abc" if same(kept.find(name * 32), keys_of(ROW, 20))] == ["b"]
