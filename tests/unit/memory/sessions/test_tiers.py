"""Budgets: what counts, who leaves, and what one owner may take of the others."""

import threading

import pytest
import torch

from lola_vllm.memory.sessions import host_copy
from lola_vllm.memory.sessions.owner import engine_salt, owner_of
from lola_vllm.memory.sessions.prefix_hash import salt_hash
from lola_vllm.memory.sessions.settings import StoreSettings, StoreSettingsError
from lola_vllm.memory.sessions.tiers import IDLE_S
from tests.support.sessions import ROW, Server, size_of

ALICE, BOB, CAROL = map(salt_hash, ("alice", "bob", "carol"))


def sessions(server, salt):
    return {name for owner, name in server.store.sessions if owner == salt}


def test_one_owner_does_not_push_the_others_out():
    server = Server(memory=12 * size_of(10))
    for n in range(3):
        server.say([n] * 10, f"bob-{n}", salt=BOB)
    server.say([9] * 10, "carol", salt=CAROL)
    for n in range(50):
        server.say([n] * 10, f"alice-{n}", salt=ALICE)
    assert len(sessions(server, BOB)) == 3 and len(sessions(server, CAROL)) == 1
    assert sessions(server, ALICE) == {f"alice-{n}" for n in range(42, 50)}
    for n in range(3, 50):  # an equal share for each of three is four states
        server.say([n] * 10, f"bob-{n}", salt=BOB)
    assert len(sessions(server, CAROL)) == 1
    assert len(sessions(server, ALICE)) >= 4 and len(sessions(server, BOB)) >= 4


def test_a_key_with_many_salts_is_one_owner():
    server = Server(memory=12 * size_of(10))
    for n in range(6):
        server.say([n] * 10, f"bob-{n}", salt=salt_hash(engine_salt(owner_of("bob"), None)))
    salts = [salt_hash(engine_salt(owner_of("alice"), f"salt-{n}")) for n in range(50)]
    for n, salt in enumerate(salts):
        server.say([n] * 10, f"alice-{n}", salt=salt)
    assert server.store.memory.owners == 2
    kept = [name for _, name in server.store.sessions]
    assert kept == [*(f"bob-{n}" for n in range(6)), *(f"alice-{n}" for n in range(44, 50))]


def test_an_owner_who_was_idle_for_a_day_makes_room():
    server = Server(memory=4 * size_of(10))
    server.say([9] * 10, "bob", salt=BOB)
    for n in range(8):
        server.say([n] * 10, f"alice-{n}", salt=ALICE)
    assert sessions(server, BOB) == {"bob"}
    server.clock.now += IDLE_S
    for n in range(8):
        server.say([n] * 10, f"alice-{n}", salt=ALICE)
    server.say([20] * 10, "alice-20", salt=ALICE)
    assert sessions(server, BOB) == set() and len(sessions(server, ALICE)) == 4


class Copied(threading.Event):
    """An event of a device."""

    def synchronize(self):
        assert self.wait(20)


class FakeDevice(host_copy.Staging):
    """Copies to buffers that count as pinned, complete when the test says so."""

    def __init__(self):
        super().__init__()
        self.copies = []

    def _fill(self, buffer, block):
        buffer.copy_(block)
        self.copies.append(Copied())
        return self.copies[-1]


@pytest.fixture
def pinned(monkeypatch):
    """Bytes of what is pinned, at torch's allocator, which rounds them up to a power of two."""
    pinned, real = [], torch.empty

    def empty(*args, pin_memory=False, **options):
        made = real(*args, **options)
        if pin_memory:
            pinned.append(1 << (made.nbytes - 1).bit_length())
        return made

    monkeypatch.setattr(torch, "empty", empty)
    return pinned


def test_states_stay_in_ordinary_memory_of_their_own_size(pinned):
    """Only a few pinned buffers are used, however many states are stored."""
    device, rows = FakeDevice(), []
    blocks = [torch.full((ROW + 3,), n, dtype=torch.uint8) for n in range(40)]
    for block in blocks:
        rows.append(device.copy(block))
        device.copies[-1].set()
    for block, row in zip(blocks, rows, strict=True):
        assert row.wait().equal(block)
        assert row.wait().untyped_storage().nbytes() == ROW + 3
        assert row.wait().data_ptr() not in {b.data_ptr() for b in device._free}
    assert len(pinned) == len(device._free) == host_copy.MAX_STAGED
    assert sum(pinned) == host_copy.staging_bytes(ROW + 3)


def test_staging_is_part_of_the_memory_for_states():
    size = ROW + 3
    staging = host_copy.staging_bytes(size)
    assert staging == host_copy.MAX_STAGED * 2 ** (size - 1).bit_length()
    given = StoreSettings(memory=staging + 5 * size)
    assert given.without(staging).memory == 5 * size
    assert StoreSettings().without(staging).memory == 0
    with pytest.raises(StoreSettingsError, match=f"state_ram = {staging}: .* more than {staging}"):
        StoreSettings(memory=staging).without(staging)


def test_a_row_may_be_waited_for_by_several_threads(pinned):
    device, found = FakeDevice(), []
    row = device.copy(torch.arange(50, dtype=torch.uint8))
    threads = [threading.Thread(target=lambda: found.append(row.wait())) for _ in range(2)]
    for thread in threads:
        thread.start()
    device.copies[0].set()
    for thread in threads:
        thread.join()
    assert all(one.equal(torch.arange(50, dtype=torch.uint8)) for one in found)
    assert len(found) == 2 and len(device._free) == 1
