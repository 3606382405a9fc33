"""A state's file is read completely or not at all, and says why not."""

import errno
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lola_vllm.core.layers import SequenceLayout
from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.state import LayerLayout, StateLayout
from lola_vllm.memory.sessions.file import (
    StateFileError,
    StateHeader,
    _checksum,
    file_name,
    parse_name,
    read_header,
    read_state,
    read_tokens,
    write_state,
)
from lola_vllm.memory.sessions.partial import (
    _HOST,
    PARTIAL_AGE_S,
    aside,
    remove_partials,
    write_aside,
)
from lola_vllm.memory.sessions.prefix_hash import PrefixHashes, namespace
from tests.support.sessions import FINGERPRINT, Server

# Parts with one number for each entry of the sparse cache.
PER_PAIR = ("positions", "score_weights", "sparse_k_scale", "sparse_v_scale")

TOKENS = np.arange(300, dtype=np.int32)
ROW = np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8)


def header(tokens=TOKENS, **fields):
    hashes = PrefixHashes(namespace(FINGERPRINT.key), tokens)
    n = len(tokens)
    return StateHeader(
        id="ab" * 16, session="agent-7", turn=3, kind="answer", num_tokens=n,
        prefix_hash=hashes.prefix_hash(n).hex(), block_hash=hashes.block_hash(n).hex(),
        fingerprint=FINGERPRINT.to_dict(), **fields,
    )  # fmt: skip


@pytest.fixture
def path(tmp_path):
    path = tmp_path / file_name("ab" * 16, 0, 1)
    write_state(path, header(), TOKENS, ROW)
    return path


def reason(path, read=read_state, **kwargs):
    with pytest.raises(StateFileError) as error:
        read(path, **kwargs)
    assert str(error.value)
    return error.value.reason


def test_what_was_written_is_read(path):
    found = read_state(path, FINGERPRINT)
    assert found.header == header()
    assert (found.tokens == TOKENS).all() and (found.data == ROW).all()
    assert read_header(path) == header() and (read_tokens(path) == TOKENS).all()
    assert parse_name(path.name) == ("ab" * 16, 0, 1)
    assert path.stat().st_mode & 0o777 == 0o600 and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("where", ["head", "metadata", "tokens", "state"])
def test_a_flipped_bit_is_found(path, where):
    data = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    at = {"head": 3, "metadata": data.index(b"agent-7"), "tokens": start + 5, "state": -7}[where]
    offsets = json.loads(data[8:start])
    if where in ("tokens", "state"):
        at = start + offsets[where]["data_offsets"][0] + 5
    data[at] ^= 4
    path.write_bytes(data)
    assert reason(path) == "damaged"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9999])
def test_a_torn_file_is_found(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert reason(path) == reason(path, read_header) == "damaged"


def rewrite(path, **metadata):
    """The same tensors under other metadata."""
    with safe_open(str(path), framework="numpy") as file:
        old = file.metadata()
    save_file(load_file(path), path, metadata={**old, **metadata})


def test_other_versions_and_other_files_are_told_apart(path):
    rewrite(path, version="1")
    assert reason(path) == "version"
    save_file({"weight": ROW}, path)
    assert reason(path) == "foreign"
    path.write_text("hello")
    assert reason(path) == "damaged"
    path.unlink()
    assert reason(path) == "missing"
    path.mkdir()
    assert reason(path) in ("unreadable", "damaged")


def test_tokens_of_another_text_are_found_even_with_a_right_checksum(path):
    write_state(path, header(), TOKENS + 1, ROW)
    assert reason(path) == reason(path, read_tokens) == "damaged"


@pytest.mark.parametrize(
    ("field", "words"),
    [("config", "model config"), ("tensors", "checkpoint"), ("dtype", "dtype"), ("ranks", "ranks")],
)
def test_a_state_of_another_model_is_refused_by_name(path, field, words):
    other = replace(FINGERPRINT, **{field: "other"})
    with pytest.raises(StateFileError, match=words) as error:
        read_state(path, other)
    assert error.value.reason == "foreign"
    assert read_state(path, replace(FINGERPRINT, tokenizer="another", template="too"))


def test_a_full_disk_leaves_nothing(tmp_path):
    def parts():
        yield b"part"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_aside(tmp_path / "x", parts())
    assert os.listdir(tmp_path) == []


def dead_process():
    """The id of a process of this machine that has ended."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    return dead.pid


def test_what_containers_left_is_removed_when_it_is_old(tmp_path):
    """Process 1 of a container that is gone is alive to every other, under any name of a host."""
    names = (
        ".x.other.1.partial", f".x.{_HOST}.1.partial", f".x.{_HOST}.1-0a1b2c3d.partial",
    )  # fmt: skip
    kept = (".notes", "x.partial", ".tmp", "agent.lola.safetensors")
    for name in (*names, *kept):
        (tmp_path / name).write_bytes(b"x")
    assert remove_partials(tmp_path) == 0
    for name in (*names, *kept):
        os.utime(tmp_path / name, (0, time.time() - PARTIAL_AGE_S + 60))
    assert remove_partials(tmp_path) == 0
    for name in (*names, *kept):
        os.utime(tmp_path / name, (0, time.time() - PARTIAL_AGE_S - 60))
    assert remove_partials(tmp_path) == len(names)
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_writer_that_lives_keeps_its_file_whatever_its_name_and_age(tmp_path, monkeypatch, at):
    """A slow one of another container, whose process is not seen here; at each part it writes."""
    monkeypatch.setattr(os, "getpid", dead_process)
    found = []

    def parts():
        for number in range(3):
            if number == at:
                (path,) = tmp_path.iterdir()
                os.utime(path, (0, 0))
                found.append(remove_partials(tmp_path))
            yield b"part"

    assert write_aside(tmp_path / "x", parts()) == 12
    assert found == [0] and (tmp_path / "x").read_bytes() == b"part" * 3
    assert os.listdir(tmp_path) == ["x"]


def test_a_writer_that_was_killed_leaves_nothing_that_stays(tmp_path, monkeypatch):
    """The next look at the directory removes and counts it."""
    server = Server(tmp_path)
    monkeypatch.setattr(os, "getpid", dead_process)
    aside(server.store.directory.path / "x.lola.safetensors").write_bytes(b"x")
    server.store.upkeep.refresh()
    assert os.listdir(server.store.directory.path) == []
    assert server.store.failures == {"partial": 1}


def forged(path, **fields):
    """The file with other fields in its header, and with checksums that are right."""
    found = read_state(path)
    values = {**json.loads(found.header.to_json()), **fields}
    for name in [name for name, value in values.items() if value is ...]:
        del values[name]
    rewrite_header(path, json.dumps(values))


def rewrite_header(path, text):
    """Any text as the header of a file whose checksums are right."""
    tensors = load_file(path)
    checksum = _checksum(text, tensors["tokens"], tensors["state"])
    sha = hashlib.sha256(text.encode()).hexdigest()
    rewrite(path, header=text, header_checksum=sha, checksum=checksum)


PARTS = FINGERPRINT.to_dict()
WRONG = {
    "id": ["", "x" * 32, "AB" * 16, "ab" * 15, 7, None, "ab" * 16 + "\n"],
    "session": ["", "a/b", "../x", "a b", "x" * 65, "\x1b[2J", "a\n", 7, None],
    "turn": [0, -1, 2**40, 1.5, "1", True, None],
    "kind": ["", "state", None, 1],
    "num_tokens": [-1, 0, 299, 301, 2**31, 10**30, 300.0, "300", True, None],
    "prefix_hash": ["", "zz" * 16, "ab", None, 3],
    "block_hash": ["", "zz" * 16, "ab", None, 3],
    "fingerprint": [
        {}, None, [], "x", {**PARTS, "more": "x"}, {**PARTS, "dtype": 3}, {**PARTS, "dtype": None},
        {k: v for k, v in PARTS.items() if k != "tensors"}, {**PARTS, "dtype": "\x1b]0;x\x07"},
    ],
    "adapter": [None, 3, "a\nb", "x" * 2000],
    "salt": [None, 3, "alice", "zz" * 16],
    "created": [-1, "now", None, True, 1e30, float("nan"), float("inf"), -float("inf"), 10**400],
    "expires": ["never", True, [], float("nan"), float("inf"), 10**400],
    "parent": ["", "x", 3, "zz" * 16],
    "pinned": [0, 1, "yes", None, []],
    "tail": [None, "7", [None], ["7"], [1.5], [-1], [2**31], [True], [[7]], {}],
    "rank": [-1, 1, 10_000, "0", None, True, 0.0],
    "ranks": [0, -1, 10**9, "1", None, True],
    "origin": ["", "zz" * 16, 3],
    "until": ["never", True, [], float("nan")],
    "sources": [None, "ab" * 16, [None], ["x"], [3]],
}  # fmt: skip


LATER = ("origin", "until", "sources")  # which files of before sessions had ids do not have


@pytest.mark.parametrize("field", sorted(WRONG))
def test_a_header_that_makes_no_sense_is_damaged_whatever_its_checksum_says(path, field):
    whole = path.read_bytes()
    for value in WRONG[field] + ([] if field in LATER else [...]):
        path.write_bytes(whole)
        forged(path, **{field: value})
        for read in (read_header, read_tokens, read_state):
            assert reason(path, read) == "damaged", value


def test_a_file_of_before_sessions_had_ids_is_read(path):
    forged(path, **dict.fromkeys(LATER, ...))
    assert read_header(path) == header() and read_header(path).session_id == header().id


@pytest.mark.parametrize("read", [read_header, read_tokens, read_state])
def test_a_file_holds_the_state_that_is_asked_for(path, read):
    right = header()
    read(path, expected=replace(right, session="agent-9", turn=5, pinned=True))
    for other in (
        {"id": "cd" * 16}, {"salt": "cd" * 16}, {"prefix_hash": "cd" * 16}, {"num_tokens": 299},
        {"rank": 1, "ranks": 2}, {"ranks": 2},
    ):  # fmt: skip
        assert reason(path, read, expected=replace(right, **other)) == "damaged", other
    for name in (file_name("cd" * 16, 0, 1), file_name("ab" * 16, 1, 2)):
        other = path.with_name(name)
        shutil.copy(path, other)
        assert reason(other, read) == "damaged", name
    shutil.copy(path, path.with_name("export.lola.safetensors"))  # as people call it
    read(path.with_name("export.lola.safetensors"))


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", "NaN", "[" * 100_000, '{"a": ' * 100_000, "\ud800", "1" * 5000]
)
def test_a_header_that_is_no_header_is_damaged(path, text):
    if text == "\ud800":
        text = json.dumps({**json.loads(header().to_json()), "adapter": text})
    rewrite_header(path, text)
    assert reason(path) == reason(path, read_header) == "damaged"


def test_a_container_of_other_tensors_is_damaged_at_the_header(path):
    """A server that looks at headers alone would list it, and a request would wait for it."""
    whole = load_file(path)
    for tensors in (
        {"tokens": TOKENS[:-1], "state": ROW}, {"tokens": TOKENS.astype(np.int64), "state": ROW},
        {"tokens": TOKENS[None], "state": ROW}, {"tokens": TOKENS}, {"state": ROW},
        {"tokens": TOKENS, "state": ROW[None]}, {"tokens": TOKENS, "state": TOKENS},
    ):  # fmt: skip
        write_state(path, header(), TOKENS, ROW)
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata()
        save_file(tensors, path, metadata=metadata)
        assert reason(path, read_header) == reason(path) == "damaged"
    assert set(whole) == {"tokens", "state"}


@pytest.mark.parametrize("fields", [{}, {"context_shift": 16}, {"sparse_dtype": "int8"}])
@pytest.mark.parametrize("interval", [1, 8])
@pytest.mark.parametrize("n", [1, 3, 20, 45, 90])
def test_a_cleaned_row_has_what_is_valid_and_nothing_else(n, interval, fields):
    config = LolaConfig(
        window_size=16, sparse_cache_size=24, sink_size=2,
        update_interval=interval, **fields,
    )  # fmt: skip
    layout = StateLayout.from_config(config, 2, 2, 16, 8, torch.float32)
    sequence = SequenceLayout((LayerLayout((layout,)),) * 2)
    row = torch.randint(1, 256, (sequence.row_bytes + 64,), dtype=torch.uint8)
    clean = sequence.cleaned(row, n)
    assert clean.equal(sequence.cleaned(clean, n))
    assert not clean[sequence.row_bytes :].any()
    count = torch.tensor(n)
    old, new = (layout.views(sequence.pages(x[None])[1]) for x in (row, clean))
    k = int(layout.num_sparse(count))
    for name in layout.parts:
        if name in ("H", "s", "exact_k", "exact_v") or not getattr(old, name).numel():
            continue
        # Only the rows of bounds have their entries in the last dimension.
        entries = -1 if name in PER_PAIR else -2
        (kept, rest), (stored, _) = (
            getattr(views, name)[0].split([k, 24 - k], dim=entries) for views in (new, old)
        )
        assert kept.contiguous().view(torch.uint8).equal(stored.contiguous().view(torch.uint8))
        assert not rest.contiguous().view(torch.uint8).any()
    assert bool(new.H.view(torch.uint8).any()) == bool(layout.num_folded(count) > 0)
    held = sum(bool(x.any()) for x in new.exact_k[0, 0].contiguous().view(torch.uint8))
    assert held == min(n, 2) + n - int(layout.window_start(count)) if n > 2 else held == n
