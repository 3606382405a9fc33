"""What the store keeps, finds, gives up and forgets."""

import os
import threading
from dataclasses import replace

import pytest

from lola_vllm.memory.sessions.catalog import NotStored
from lola_vllm.memory.sessions.directory import DELETED
from lola_vllm.memory.sessions.file import read_header
from lola_vllm.memory.sessions.names import parse_reference
from lola_vllm.memory.sessions.orders import DISK
from lola_vllm.memory.sessions.prefix_hash import HASH_BLOCK, salt_hash
from lola_vllm.memory.sessions.settings import StoreSettings, parse_bytes
from tests.support.sessions import FINGERPRINT, ROW, Server, row_of, size_of

TEXT = list(range(1000, 1700))


@pytest.mark.parametrize(
    "n", [1, 2, HASH_BLOCK - 1, HASH_BLOCK, HASH_BLOCK + 1, 2 * HASH_BLOCK, 2 * HASH_BLOCK + 7]
)
def test_a_state_is_found_by_every_text_that_goes_on_from_it(server, n):
    server.say(TEXT[:n])
    assert server.restore(TEXT[: n + 1]) == n
    assert server.restore([*TEXT[:n], 5, 6, 7]) == n
    assert server.restore(TEXT[:n]) == 0  # at least one token has to be computed
    assert server.restore([5, *TEXT[1:]]) == 0


def test_the_longest_prefix_wins(server):
    for n in (3, 300, 10, 256, 257, 512, 600):
        server.say(TEXT[:n])
    for longest, found in ((700, 600), (601, 600), (600, 512), (258, 257), (257, 256), (11, 10)):
        assert server.restore(TEXT[:longest]) == found
    assert server.restore([*TEXT[:299], 0, 0]) == 257


def test_salts_and_adapters_part_states(server):
    alice = salt_hash("alice")
    server.say(TEXT[:50], salt=alice)
    server.say(TEXT[:40], adapter="lora:1")
    assert server.restore(TEXT[:60]) == 0
    assert server.restore(TEXT[:60], salt=salt_hash("bob")) == 0
    assert server.restore(TEXT[:60], salt=alice, adapter="lora:1") == 0
    assert server.restore(TEXT[:60], salt=alice) == 50
    assert server.restore(TEXT[:60], adapter="lora:1") == 40


def test_a_chat_is_one_session_and_a_branch_another(server):
    first = server.say(TEXT[:100])
    second = server.say(TEXT[:200])
    assert first.session == second.session and second.header.turn == 2
    assert first.superseded and not second.superseded
    branch = server.say([*TEXT[:100], 7, 8, 9])
    assert branch.session != first.session
    assert branch.header.parent == first.id
    assert len(server.store.sessions) == 2


def test_the_same_text_is_stored_once(server):
    state = server.say(TEXT[:100])
    assert server.say(TEXT[:100]) == (state, "was there")
    named = server.say(TEXT[:100], "agent-7")
    assert named.header.session == "agent-7"
    assert len(server.store.states) == 2


def test_a_fork_of_a_file_is_restored_before_its_own_file_is_there(tmp_path):
    """The thread that reads must not come before the one that copies."""
    server = Server(tmp_path, memory=0)
    server.tell(TEXT[:100], "agent-7")
    free = threading.Event()
    server.workers[0]._writer.submit(free.wait, 20)
    server.manager.fork("agent-7", "twig")
    (twig,) = server.store.lookup(parse_reference("twig"))
    server.store.load(twig, 2, "request")
    server.step()
    server.workers[0]._reader.submit(int).result()  # all that can be read now
    free.set()
    events = [(outcome.event, outcome.state) for outcome in server.settle()]
    assert ("loaded", twig.id) in events and "load-failed" not in dict(events)
    assert server.pools[0][2].equal(row_of(TEXT[:100]))
    assert not server.workers[0]._making


def test_names_turns_forks_and_deletion(server):
    for n in (100, 200, 300):
        server.say(TEXT[:n], "agent-7")
    server.settle()
    manager = server.manager
    hashes = server.store.prefix_hashes(TEXT)
    ask = lambda text: server.store.resolve(parse_reference(text), hashes, 699).header  # noqa: E731
    assert ask("agent-7").num_tokens == 300 and ask("agent-7@2").num_tokens == 200
    manager.fork("agent-7@2", "twig")
    assert manager.tokens("twig")["tokens"] == TEXT[:200]  # before it is written
    server.settle()
    assert manager.tokens("twig")["tokens"] == TEXT[:200]
    assert ask("twig").num_tokens == 200 and ask("twig").turn == 1
    assert manager.call("fork", {"reference": "agent-7", "to": "twig"})["kind"] == "exists"
    manager.rename("agent-7", "agent-8")
    server.settle()
    assert ask("agent-8@3").num_tokens == 300
    with pytest.raises(NotStored, match="agent-7"):
        ask("agent-7")
    assert manager.tokens("agent-8@1")["tokens"] == TEXT[:100]
    if server.store.directory is not None and not server.store.memory.budget:
        for state in server.store.lookup(parse_reference("agent-8@1")):
            server.store.directory.files(state.id)[0].unlink()
        assert manager.call("tokens", {"reference": "agent-8@1"})["kind"] == "not-found"
    server.ask("delete", reference="agent-8@3")
    with pytest.raises(NotStored, match=r"turn 3 .* these are: (1, )?2$"):
        ask("agent-8@3")
    server.ask("delete", reference="agent-8")
    server.settle()
    assert [one["session"] for one in manager.sessions()] == ["twig"]
    assert server.restore(TEXT) == 200
    manager.clear()
    server.settle()
    assert_empty(server)


def assert_empty(server):
    store = server.store
    assert not store.states and not store.sessions and not store._tokens
    assert not store.index._states
    assert store.memory.nbytes == store.disk.nbytes == 0
    assert not store.memory._sessions and not store.disk._superseded
    assert all(worker.num_states == worker.num_waiting == 0 for worker in server.workers)
    if store.directory is not None:
        left = [n for n in os.listdir(store.directory.path) if not n.endswith(DELETED)]
        assert left == []
    assert store.memory.owners == store.disk.owners == 0
    assert not store.memory._used and not store.disk._used


@pytest.mark.parametrize(("memory", "disk"), [(100, None), (0, 100), (40, 100), (100, 40)])
def test_ten_thousand_sessions_through_a_budget_of_a_hundred(tmp_path, memory, disk):
    directory = None if disk is None else tmp_path
    server = Server(directory, memory * size_of(4), (disk or 0) * size_of(4))
    count = 10_000 if disk is None else 1_000  # files take their time
    most = max(memory, disk or 0)
    for i in range(count):
        server.say([i, 1, 2, 3])
        assert server.store.memory.nbytes <= memory * size_of(4)
        assert server.store.disk.nbytes <= (disk or 0) * size_of(4)
        if disk is not None and i % 50 == 0:
            server.settle()
    server.settle()
    assert len(server.store.states) == most
    assert server.workers[0].num_states == memory
    if directory is not None:
        assert len(os.listdir(server.store.directory.path)) == disk
    assert server.restore([count - 1, 1, 2, 3, 4]) == 4
    assert server.restore([count - most, 1, 2, 3, 4]) == 4
    assert server.store.memory.nbytes <= memory * size_of(4)  # a file takes no more of it
    assert server.restore([count - most - 1, 1, 2, 3, 4]) == 0
    server.manager.clear()
    server.settle()
    assert_empty(server)


def test_superseded_turns_leave_before_whole_sessions():
    server = Server(memory=4 * size_of(40))
    server.say(TEXT[:10], "old")
    server.say(TEXT[:20], "chat")
    server.say(TEXT[:30], "chat")
    server.say(TEXT[:40], "chat")
    server.say(TEXT[:50], "chat")  # turn 1 of the chat goes, not the older session
    assert server.manager.show("chat")["turns"] == [2, 3, 4]
    for n in range(5):
        server.say([n, n, n], f"other-{n}")
    names = {one["session"] for one in server.manager.sessions()}
    assert not {"old", "chat"} & names


def test_states_expire(tmp_path):
    server = Server(tmp_path, ttl=60)
    server.say(TEXT[:50])
    server.say(TEXT[:60], ttl=600)
    server.clock.now += 61
    assert server.restore(TEXT[:60]) == 0
    assert server.restore(TEXT[:70]) == 60
    server.clock.now += 600
    server.step()
    server.settle()
    assert_empty(server)


def test_a_restart_finds_what_was_written(tmp_path):
    server = Server(tmp_path)
    for n in (100, 200):
        server.say(TEXT[:n], "agent-7")
    server.say(TEXT[:300], salt=salt_hash("alice"))
    server.close()
    server = Server(tmp_path)
    assert server.restore(TEXT) == 200
    assert server.restore(TEXT, salt=salt_hash("alice")) == 300
    assert server.manager.show("agent-7")["turns"] == [1, 2]
    assert server.manager.tokens("agent-7")["tokens"] == TEXT[:200]
    assert server.say(TEXT[:400], "agent-7").header.turn == 3
    server.close()
    other = Server(tmp_path, fingerprint=replace(FINGERPRINT, tensors="other"))
    assert other.restore(TEXT) == 0 and not other.store.states


def test_a_directory_over_budget_loses_what_no_server_used(tmp_path):
    one, two = (Server(tmp_path, memory=0, disk=3 * size_of(10)) for _ in range(2))
    for n in (1, 2, 3):
        one.tell([n] * 10)
    two.store.upkeep.refresh()
    assert two.restore([1] * 11) == 10
    for state in two.store.states.values():  # files have times of whole clocks, tests do not
        state.used = float(state.used)
    two.tell([4] * 10)
    one.store.upkeep.refresh()
    assert len(one.store.states) == 3
    assert one.restore([4] * 11) == one.restore([1] * 11) == 10


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_damaged_file_is_counted_and_computed_again(tmp_path, damage):
    server = Server(tmp_path, memory=0)
    server.say(TEXT[:100])
    server.tell([7] * 50)
    state = server.store.find(server.store.prefix_hashes(TEXT), 699)
    path = server.store.directory.files(state.id)[0]
    if damage == "flip":
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        path.unlink()
    assert server.restore(TEXT) == 0
    assert sum(server.store.failures.values()) == 1
    assert server.restore(TEXT) == 0 and sum(server.store.failures.values()) == 1
    assert server.restore([7] * 60) == 50
    server.settle()
    assert not path.exists()
    server.say(TEXT[:100])
    assert server.restore(TEXT) == 100


def test_a_directory_that_vanishes_loses_nothing_in_memory(tmp_path):
    root = tmp_path / "states"
    server = Server(root)
    server.tell(TEXT[:100])
    server.store.directory.path.rename(tmp_path / "elsewhere")
    server.tell(TEXT[:200])
    assert server.store.failures == {"io": 1}
    assert server.restore(TEXT) == 200 and server.restore(TEXT[:150]) == 100
    server.store.upkeep.refresh()
    assert server.restore(TEXT) == 200
    (tmp_path / "elsewhere").rename(server.store.directory.path)
    server.tell(TEXT[:300])
    assert server.restore(TEXT) == 300
    assert len(os.listdir(server.store.directory.path)) == 2


def test_a_slow_disk_does_not_fill_the_memory(tmp_path, monkeypatch):

    from lola_vllm.memory.sessions import transfer

    server, gate = Server(tmp_path, memory=3 * size_of(10)), threading.Event()
    server.store.max_waiting = server.workers[0].max_waiting = 5
    write = transfer.write_state
    monkeypatch.setattr(transfer, "write_state", lambda *args: (gate.wait(20), write(*args))[1])
    for n in range(20):
        state = server.say([n] * 10)
        assert server.workers[0].num_waiting <= 5 and server.workers[0].num_states <= 3
        assert bool(state.unwritten) == (n >= 5) == (DISK not in state.tiers)
    server.step()
    assert server.store.failures == {"slow": 15}
    gate.set()
    server.settle()
    kept = (17, 18, 19, 0, 1, 2, 3, 4)  # the newest in memory, the first in files
    assert all(server.restore([n] * 11) for n in kept)
    assert not any(server.restore([n] * 11) for n in range(5, 17))
    assert not server.say([20] * 10).unwritten and not server.store.failures["io"]
    server.settle()
    assert not server.store.waits_for_disk


def test_all_ranks_or_none(tmp_path):
    server = Server(tmp_path, ranks=2)
    server.say(TEXT[:100])
    server.tell([3] * 30)
    assert server.restore(TEXT) == 100
    server.close()
    server = Server(tmp_path, ranks=2, memory=0)
    assert server.restore(TEXT) == 100
    state = server.store.find(server.store.prefix_hashes(TEXT), 699)
    server.store.directory.files(state.id)[1].unlink()
    assert server.restore(TEXT) == 0
    server.settle()
    assert server.restore([3] * 31) == 30
    assert len(os.listdir(server.store.directory.path)) == 2  # of the other state


def test_threads_use_a_store_at_once(tmp_path):
    server = Server(tmp_path, memory=20 * ROW, disk=50 * ROW)
    faults = []

    def manage():
        try:
            for i in range(300):
                server.manager.sessions()
                server.manager.call("fork", {"reference": "s-1", "to": f"fork-{i}"})
                server.manager.call("rename", {"session": f"fork-{i - 2}", "to": f"new-{i}"})
                server.manager.call("delete", {"reference": f"fork-{i - 5}"})
                server.manager.call("delete", {"reference": f"new-{i - 5}"})
                server.store.upkeep.refresh()
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=manage) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(600):
        server.say([i % 40] * 20, f"s-{i % 10}")
    for thread in threads:
        thread.join()
    server.settle()
    assert not faults
    assert server.store.memory.nbytes <= 20 * ROW and server.store.disk.nbytes <= 50 * ROW
    server.manager.clear()
    server.settle()
    assert_empty(server)


def test_an_order_of_a_state_that_left_deletes_what_was_found_of_it_since(tmp_path):
    server = Server(tmp_path)
    server.tell(TEXT[:50], "agent")
    (left,) = server.store.states.values()
    server.store.forget(left, keep_file=True)
    server.store.upkeep.refresh()
    (found,) = server.store.states.values()
    assert found.id == left.id and found is not left
    server.ask("rename", session="agent", to="other")
    server.store.forget(left)
    server.settle()
    assert_empty(server)


def test_references_and_settings():
    assert parse_reference("agent-7@3") == ("agent-7", 3)
    assert parse_bytes("1.5 GiB", "x") == 3 * 2**29 and parse_bytes("512m", "x") == 2**29
    settings = StoreSettings.from_mapping({"state_ram": "2GiB", "state_dir": "/x", "state_ttl": 60})
    assert settings.memory == 2**31 and settings.enabled


def test_what_was_said_after_a_state_is_kept_with_it(server):
    """The last token of an answer is sampled, and no state covers it until the text goes on."""
    prompt = server.say(TEXT[:50], "agent", kind="prompt")
    server.tell(TEXT[:60], "agent", tail=[TEXT[60]])
    told = server.manager.tokens("agent")
    assert (told["tokens"], told["tail"], told["kind"]) == (TEXT[:60], [TEXT[60]], "answer")
    # An answer of one token: its state is that at the end of the prompt.
    server.say(TEXT[:80], "short", kind="prompt")
    state, _ = server.store.save(
        server.store.open_turn("short", None)._replace(number=1),
        server.store.prefix_hashes(TEXT[:80]), 80, "answer", 1, tail=[7],
    )  # fmt: skip
    server.settle()
    server.store.upkeep.refresh()
    told = server.manager.tokens("short")
    assert (told["tokens"], told["tail"], told["kind"]) == (TEXT[:80], [7], "answer")
    assert server.restore([*TEXT[:80], 7, 8]) == 80
    assert prompt.header.tail == []
    if server.store.directory is not None:
        assert read_header(server.store.directory.files(state.id)[0]).tail == [7]
    server.manager.fork("short", "branch")
    server.settle()
    assert server.manager.tokens("branch")["tail"] == [7]


# Texts that nobody named: in memory only, unless the operator or a name says otherwise.
UNNAMED = [None, "shared-0123456789abcdef"]


def files(tmp_path):
    return list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("name", UNNAMED)
def test_a_text_that_nobody_named_does_not_reach_the_disk(tmp_path, name):
    server = Server(tmp_path, store="named")
    state = server.say(TEXT[:100], name)
    server.tell(TEXT[100:200], "agent-7")
    assert state.tiers == {"memory"}
    assert [read_header(path).session for path in files(tmp_path)] == ["agent-7"]
    assert server.restore(TEXT[:110]) == 100  # and is found all the same
    server.close()
    server = Server(tmp_path, store="named")
    assert [session for _, session in server.store.sessions] == ["agent-7"]
    server.close()
    server = Server(tmp_path, memory=0, store="named")
    with pytest.raises(NotStored, match="give a name, or start the server with --lola-store all"):
        server.say(TEXT[:100], name)


@pytest.mark.parametrize("name", UNNAMED)
@pytest.mark.parametrize("verb", ["rename", "fork"])
def test_a_text_that_gets_a_name_reaches_the_disk(tmp_path, verb, name):
    server = Server(tmp_path, store="named", ranks=2)
    state = server.say(TEXT[:100], name)
    auto = state.header.session
    subject = {"session": auto} if verb == "rename" else {"reference": auto}
    found = server.ask(verb, to="agent-7", **subject)
    assert found["states"][0]["tiers"] == ["disk", "memory"]
    server.settle()
    assert [read_header(path).session for path in files(tmp_path)] == ["agent-7"] * 2
    server.close()
    server = Server(tmp_path, store="named", ranks=2)
    assert server.restore(TEXT[:110]) == 100
    assert "error" in server.ask("show", session=auto)
