"""A state's file is read completely or not at all, and says why not."""

import json
import os
import resource
import stat
import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from lola_vllm.config import LolaConfig
from lola_vllm.sessions import StateFileError, StateHeader, read_state, write_state
from lola_vllm.sessions.chain import Chain, namespace
from lola_vllm.sessions.file import file_name, parse_name, read_header, read_tokens, remove_partials
from lola_vllm.state import LayerLayout, SequenceLayout, StateLayout
from tests.support.sessions import FINGERPRINT

# Parts with one number for each slot of the sparse cache, or as `bounds` several rows of them.
PER_PAIR = ("positions", "saliency", "sparse_k_scale", "sparse_v_scale", "bounds")

TOKENS = np.arange(300, dtype=np.int32)
ROW = np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8)


def header(tokens=TOKENS, **fields):
    chain = Chain(namespace(FINGERPRINT.key), tokens)
    n = len(tokens)
    return StateHeader(
        id="ab" * 16, session="agent-7", turn=3, kind="answer", num_tokens=n,
        key=chain.key(n).hex(), boundary=chain.boundary(n).hex(),
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
    assert (found.tokens == TOKENS).all() and (found.row == ROW).all()
    assert read_header(path) == header() and (read_tokens(path) == TOKENS).all()
    assert parse_name(path.name) == ("ab" * 16, 0, 1)


def test_anybody_can_open_the_container_but_only_its_owner_may(path):
    assert set(load_file(path)) == {"tokens", "state"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == [path.name]


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
    from safetensors import safe_open

    with safe_open(str(path), framework="numpy") as file:
        old = file.metadata()
    save_file(load_file(path), path, metadata={**old, **metadata})


def test_other_versions_and_other_files_are_told_apart(path):
    rewrite(path, version="2")
    assert reason(path) == "version"
    save_file({"weight": ROW}, path)
    assert reason(path) == "foreign"
    path.write_text("hello")
    assert reason(path) == "damaged"
    path.unlink()
    assert reason(path) == "missing"
    path.mkdir()
    assert reason(path) in ("unreadable", "damaged")


def test_a_link_is_not_followed(path, tmp_path):
    link = tmp_path / file_name("cd" * 16, 0, 1)
    link.symlink_to(path)
    assert reason(link) == "unreadable"


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
    """A limit on file sizes stands for a full disk; another process, as it cannot be lifted."""
    code = f"""
import resource, sys, numpy as np
sys.path.insert(0, {str(os.getcwd())!r})
from tests.unit.test_session_files import header, TOKENS
from lola_vllm.sessions import write_state
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    write_state(Path({str(tmp_path)!r}) / "x", header(), TOKENS, np.zeros(100_000, np.uint8))
except OSError as error:
    print("OSError:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "OSError" in done.stdout, done.stderr
    assert os.listdir(tmp_path) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_files_that_a_killed_process_left_are_removed(tmp_path):
    from lola_vllm.sessions.file import _HOST

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / f".x.{_HOST}.{dead.pid}.partial"
    others = [tmp_path / f".x.{_HOST}.{os.getpid()}.partial", tmp_path / ".x.other.1.partial"]
    for path in (left, *others):
        path.write_bytes(b"x")
    assert remove_partials(tmp_path) == 1
    assert not left.exists() and all(path.exists() for path in others)


@pytest.mark.parametrize("fields", [{}, {"saliency": True}, {"sparse_dtype": "int8"}])
@pytest.mark.parametrize("interval", [1, 8])
@pytest.mark.parametrize("n", [1, 3, 20, 45, 90])
def test_a_cleaned_row_has_what_is_valid_and_nothing_else(n, interval, fields):
    config = LolaConfig(
        window_size=16, sparse_cache_size=24, sink_size=2, feature_dim=8,
        update_interval=interval, **fields,
    )  # fmt: skip
    layout = StateLayout.from_config(config, 2, 2, 16, torch.float32)
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
        # Only the rows of bounds have their slots in the last dimension.
        slots = -1 if name in PER_PAIR else -2
        (kept, rest), (stored, _) = (
            getattr(views, name)[0].split([k, 24 - k], dim=slots) for views in (new, old)
        )
        assert kept.contiguous().view(torch.uint8).equal(stored.contiguous().view(torch.uint8))
        assert not rest.contiguous().view(torch.uint8).any()
    assert bool(new.H.view(torch.uint8).any()) == bool(layout.num_folded(count) > 0)
    held = sum(bool(x.any()) for x in new.exact_k[0, 0].contiguous().view(torch.uint8))
    assert held == min(n, 2) + n - int(layout.window_start(count)) if n > 2 else held == n
