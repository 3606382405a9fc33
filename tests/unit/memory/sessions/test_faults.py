"""A file that is whole stays, whatever fails; and what is deleted is gone."""

import errno
import os
import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lola_vllm.memory.sessions import directory, transfer, upkeep
from lola_vllm.memory.sessions.directory import DELETED, StateDirectory
from lola_vllm.memory.sessions.file import read_header, read_state
from lola_vllm.memory.sessions.names import PAST, Part
from tests.support.sessions import Server, names, row_of

TEXT = list(range(1000, 1700))


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(params=["files", "both"])
def server(request, tmp_path):
    server = Server(tmp_path) if request.param == "both" else Server(tmp_path, memory=0)
    return server


def break_rewrites(server, monkeypatch, fault):
    """Have files not be written: the disk is full, or many changes wait for it."""
    if fault == "full":
        monkeypatch.setattr(directory, "write_state", full)
    else:
        monkeypatch.setattr(upkeep, "MAX_OPERATIONS", 0)


def after_a_start(server, tmp_path):
    return Server(tmp_path, memory=0, fingerprint=server.store.fingerprint)


@pytest.mark.parametrize("fault", ["full", "slow"])
def test_a_change_that_is_not_written_leaves_the_file_and_the_header(
    server, tmp_path, monkeypatch, fault
):
    server.tell(TEXT[:100], "agent-7")
    break_rewrites(server, monkeypatch, fault)
    answer = server.ask("rename", session="agent-7", to="agent-8")
    assert answer["kind"] == "unavailable" and "all is as it was" in answer["error"]
    assert server.store.failures == {"io": 1}
    server.settle()
    assert names(server) == {"agent-7"}
    assert server.restore(TEXT) == 100
    monkeypatch.undo()
    other = after_a_start(server, tmp_path)
    assert names(other) == {"agent-7"} and other.restore(TEXT) == 100


def test_a_rename_takes_all_states_of_a_session_or_none(tmp_path, monkeypatch):
    server = Server(tmp_path, memory=0)
    for n in (100, 200, 300):
        state = server.say(TEXT[:n], "agent-7")
    segment = Part(PAST, state.header.session_id)
    server.tell(TEXT[:40], "library-0", kind="prompt", part=segment)
    write, calls = directory.write_state, []

    def third_fails(*args):
        calls.append(args)
        return full() if len(calls) == 3 else write(*args)

    monkeypatch.setattr(directory, "write_state", third_fails)
    assert server.ask("rename", session="agent-7", to="agent-8")["kind"] == "unavailable"
    files = [server.store.directory.files(s)[0] for s in server.store.states]
    assert {read_header(file).session for file in files} == {"agent-7", "library-0"}
    assert names(server) == {"agent-7", "library-0"}
    assert sorted(os.listdir(server.store.directory.path)) == sorted(f.name for f in files)
    for one in (server, after_a_start(server, tmp_path)):
        assert len(one.ask("past", reference="agent-7", size=40)["segments"]) == 1


def test_a_change_waits_for_a_state_that_is_being_written(tmp_path, monkeypatch):
    server, gate = Server(tmp_path, memory=0), threading.Event()
    write = transfer.write_state
    monkeypatch.setattr(transfer, "write_state", lambda *args: (gate.wait(20), write(*args))[1])
    state = server.say(TEXT[:100], "agent-7")
    answer = server.manager.rename("agent-7", "agent-8")
    assert "operation" in answer and names(server) == {"agent-8"}
    time.sleep(0.1)
    assert server.manager.result(**answer) == answer  # not over
    gate.set()
    server.settle()
    assert server.manager.result(**answer)["session"] == "agent-8"
    assert read_header(server.store.directory.files(state.id)[0]).session == "agent-8"


def test_many_forks_at_once_are_all_written(tmp_path, monkeypatch):
    """Also more than may wait to be written: they would be lost when they leave the memory."""
    server = Server(tmp_path)
    server.store.max_waiting = server.workers[0].max_waiting = 2
    server.tell(TEXT[:100], "agent-7")
    gate, write = threading.Event(), transfer.write_state
    monkeypatch.setattr(transfer, "write_state", lambda *args: (gate.wait(20), write(*args))[1])
    for n in range(10):
        server.manager.fork("agent-7", f"fork-{n}")
        server.step()
    assert server.workers[0].num_waiting <= 2
    assert len(server.store._waiting) <= 2  # those that are copied from a file do not count
    gate.set()
    server.settle()
    assert not server.say([7] * 100, "after").unwritten
    server.settle()
    server.close()
    monkeypatch.undo()
    again = Server(tmp_path)
    assert names(again) == {"agent-7", "after", *(f"fork-{n}" for n in range(10))}


@pytest.mark.parametrize("ends", ["before the answer", "after it"])
def test_a_write_under_way_does_not_bring_a_deleted_state_back(tmp_path, monkeypatch, ends):
    server, gate, began = Server(tmp_path, memory=0), threading.Event(), threading.Event()
    write, unlink = transfer.write_state, StateDirectory.unlink

    def slow(*args):
        began.set()
        gate.wait(20)
        return write(*args)

    def end_write(directory, states):
        unlink(directory, states)
        gate.set()
        server.workers[0]._writer.submit(int).result()

    monkeypatch.setattr(transfer, "write_state", slow)
    if ends == "before the answer":
        monkeypatch.setattr(StateDirectory, "unlink", end_write)
    server.say(TEXT[:100], "agent-7")
    began.wait(20)
    answer = server.manager.delete("agent-7")
    while "operation" in answer:
        time.sleep(0.005)
        answer = server.manager.call("result", answer)
    assert answer == {"deleted": 1} and server.store.states == {}
    gate.set()
    server.workers[0]._writer.submit(int).result()
    monkeypatch.setattr(StateDirectory, "unlink", unlink)
    other = after_a_start(server, tmp_path)  # the server was killed before its next step
    assert other.store.states == {}


@pytest.mark.parametrize("reference", ["agent-7", "agent-7@2"])
def test_a_file_that_cannot_be_removed_is_counted_and_stays_listed(
    server, tmp_path, monkeypatch, reference
):
    for n in (100, 200):
        server.say(TEXT[:n], "agent-7")
    server.settle()
    unlink = type(tmp_path).unlink

    def denied(path, missing_ok=False):
        if path.name.endswith(".safetensors"):
            raise PermissionError(errno.EACCES, "Permission denied")
        unlink(path, missing_ok)

    monkeypatch.setattr(type(tmp_path), "unlink", denied)
    answer = server.ask("delete", reference=reference)
    assert answer["kind"] == "unavailable" and "still listed" in answer["error"]
    assert server.store.failures["io"] == 1
    assert server.manager.show("agent-7")["turns"] == [1, 2]
    assert not [n for n in os.listdir(server.store.directory.path) if n.endswith(DELETED)]
    monkeypatch.undo()
    assert server.ask("delete", reference=reference) == {
        "deleted": 2 if reference == "agent-7" else 1
    }
    server.settle()
    other = after_a_start(server, tmp_path)
    assert len(other.store.states) == (0 if reference == "agent-7" else 1)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("composed", [False, True])
def test_what_is_deleted_leaves_the_memory_of_other_servers(tmp_path, composed, on_disk):
    """And what one of them composed of it for a request, though it was renamed meanwhile."""
    one, two = Server(tmp_path), Server(tmp_path)
    state = one.tell(TEXT[:100], "agent-7")
    two.store.upkeep.refresh()
    assert two.restore(TEXT) == 100
    if composed:
        two.ask("compose_parts", sources=["agent-7"])
        two.ask("compose", sources=["agent-7"], to="mine")
    if not on_disk:
        one.store._leave(state, one.store.disk)
    one.settle(), two.settle()
    two.store.upkeep.refresh()
    assert two.restore(TEXT) == 100
    one.ask("rename", session="agent-7", to="agent-8")
    assert one.ask("delete", reference="agent-8")["deleted"] == 1
    two.store.upkeep.refresh()
    two.settle()
    left = names(two)
    assert left == ({"mine"} if composed else set())
    assert two.workers[0].num_states == len(left) and not two.store.failures


def test_a_server_keeps_in_memory_what_another_had_no_room_for(tmp_path):
    """A budget of another server is no deletion."""
    one, two = Server(tmp_path), Server(tmp_path)
    state = one.tell(TEXT[:100], "agent-7")
    two.store.upkeep.refresh()
    assert two.restore(TEXT) == 100
    one.store.forget(state)
    one.settle()
    two.store.upkeep.refresh()
    assert two.restore(TEXT) == 100


def test_marks_of_deletions_do_not_pile_up(tmp_path, monkeypatch):
    server = Server(tmp_path, memory=0)
    server.tell(TEXT[:100], "agent-7")
    server.ask("delete", reference="agent-7")
    (mark,) = server.store.directory.path.iterdir()
    server.store.upkeep.refresh()
    assert mark.exists()
    os.utime(mark, (0, 0))
    server.store.upkeep.refresh()
    assert not mark.exists()


def test_states_expire_on_a_server_without_requests(server):
    woken = threading.Event()
    server.store.wake = woken.set
    server.say(TEXT[:100], "agent-7", ttl=50)
    server.tell(TEXT[:50], "agent-8")
    woken.clear()
    server.clock.now += 100
    assert woken.wait(20), "an idle engine is not told"
    path = server.store.directory.path
    deadline = time.monotonic() + 20
    while len(os.listdir(path)) != 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(os.listdir(path)) == 1  # with no step of the engine
    assert names(server) == {"agent-8"}
    server.step()
    assert server.workers[0].num_states == (1 if server.store.memory.budget else 0)


@pytest.mark.parametrize("change", ["rename", "tail"])
def test_servers_share_names_and_tails(tmp_path, change):
    one, two = Server(tmp_path, disk=3 * 1000), Server(tmp_path, disk=3 * 1000)
    state = one.tell(TEXT[:100], "agent-7", kind="prompt")
    two.store.upkeep.refresh()
    if change == "rename":
        one.ask("rename", session="agent-7", to="agent-8")
    else:
        one.tell(TEXT[:100], "agent-7", tail=[7])
    two.store.upkeep.refresh()
    theirs = replace(two.store.states[state.id].header, rank=0)
    assert theirs == state.header


def test_a_servers_own_change_is_not_undone_by_what_it_reads(tmp_path):
    server = Server(tmp_path)
    state = server.tell(TEXT[:100], "agent-7")
    for name in ("a", "b", "c"):
        server.manager.rename(server.store.states[state.id].header.session, name)
        server.store.upkeep.refresh()
        assert names(server) == {name}
    server.settle()
    server.store.upkeep.refresh()
    assert names(server) == {"c"}
    assert read_header(server.store.directory.files(state.id)[0]).session == "c"


def test_the_thread_survives_whatever_it_finds(tmp_path, monkeypatch):
    server = Server(tmp_path)
    broken = threading.Event()

    def broken_header(path, key=None):
        broken.set()
        raise RuntimeError("a header that nobody thought of")

    monkeypatch.setattr(directory, "read_header", broken_header)
    name = "0" * 32 + ".0of1.lola.safetensors"
    (server.store.directory.path / name).write_bytes(b"x")
    assert broken.wait(20)
    monkeypatch.undo()
    server.tell(TEXT[:100], "agent-7")
    assert server.ask("rename", session="agent-7", to="agent-8")["session"] == "agent-8"
    assert server.store.failures["damaged"] >= 1


@pytest.mark.parametrize("wrong", ["unreadable", "renamed", "damaged"])
def test_files_that_are_not_ours_are_neither_used_nor_deleted(tmp_path, wrong):
    server = Server(tmp_path, memory=0)
    state = server.tell(TEXT[:100], "agent-7")
    file = server.store.directory.files(state.id)[0]
    content = file.read_bytes()
    server.close()
    if wrong == "renamed":
        other = file.with_name("1" * 32 + file.name[32:])
        file.rename(other)
        file = other
    elif wrong == "damaged":
        file.write_bytes(content[:8] + b"?" * 64 + content[72:])  # its JSON
    else:
        file.unlink()
        file.symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").write_bytes(content)
    again = Server(tmp_path, memory=0)
    assert not again.store.states and again.restore(TEXT) == 0
    reason = "damaged" if wrong == "renamed" else wrong
    assert again.store.failures == {reason: 1}
    again.settle()
    assert file.is_symlink() or file.exists()


def test_a_file_that_cannot_be_read_now_is_not_deleted(tmp_path, monkeypatch):
    server = Server(tmp_path, memory=0)
    state = server.tell(TEXT[:100], "agent-7")

    def unreadable(path, *args, **kwargs):
        raise transfer.StateFileError(path, "unreadable", "Input/output error")

    monkeypatch.setattr(transfer, "read_state", unreadable)
    assert server.restore(TEXT) == 0
    server.settle()
    monkeypatch.undo()
    assert server.store.directory.files(state.id)[0].exists()
    again = after_a_start(server, tmp_path)
    assert again.restore(TEXT) == 100


VERBS = ("say", "tail", "rename", "delete", "fork", "restart")
STEPS = st.lists(
    st.tuples(
        st.sampled_from(VERBS),
        st.integers(0, 1),
        st.sampled_from(["none", "ENOSPC", "EIO", "slow", "kill"]),
    ),
    min_size=2,
    max_size=12,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS)
def test_a_state_that_was_on_disk_is_there_until_it_is_deleted(tmp_path_factory, steps):
    """Whatever is asked for, and whatever fails meanwhile."""
    root = tmp_path_factory.mktemp("states")
    server, acknowledged = Server(root), set()
    for verb, which, fault in steps:
        session = f"s{which}"
        with pytest.MonkeyPatch.context() as patch:
            arm(patch, server, fault)
            if verb == "delete":
                gone = {s.id for s in server.store.states.values() if s.header.session == session}
            answer = carry_out(server, verb, session, waits=fault != "kill")
            if verb == "delete" and "error" not in answer:
                acknowledged -= gone
            if fault != "kill":
                server.settle()
        if fault == "kill":
            kill(server)
        elif verb == "restart":
            server.close()
        if fault == "kill" or verb == "restart":
            server = Server(root)
        for state in acknowledged:
            (file,) = server.store.directory.files(state)
            found = read_state(file)
            assert torch.from_numpy(found.data).equal(row_of(found.tokens.tolist()))
            assert state in server.store.states, (verb, fault)
        acknowledged |= {s for s in server.store.disk.states if server.store.directory.complete(s)}
    server.close()


def arm(patch, server, fault):
    """Have what is done next fail."""
    if fault in ("ENOSPC", "EIO"):

        def fail(path, *_):
            path.with_name(f".{path.name}.other.1.partial").touch()
            raise OSError(getattr(errno, fault), fault)

        patch.setattr(transfer, "write_state", fail)
        patch.setattr(directory, "write_state", fail)
    elif fault == "slow":
        patch.setattr(upkeep, "MAX_OPERATIONS", 0)
        patch.setattr(server.workers[0], "max_waiting", 0)


def carry_out(server, verb, session, waits):
    """Ask for something; where it `waits`, to its end."""
    ask = server.ask if waits else lambda method, **args: server.manager.call(method, args)
    there = [s for s in server.store.states.values() if s.header.session == session]
    longest = max((s.header.num_tokens for s in there), default=0)
    text = [ord(session[1]), *TEXT]
    if verb == "say":
        server.say(text[: longest + 20], session)
    elif verb == "tail" and there:
        server.say(text[:longest], session, tail=[3])
    elif verb == "rename":
        return ask("rename", session=session, to="aside")
    elif verb == "fork":
        return ask("fork", reference=session, to="twig")
    elif verb == "delete":
        return ask("delete", reference=session)
    return {}


def kill(server):
    """End a server as a signal does: what waits is not done."""
    worker, upkeep = server.workers[0], server.store.upkeep
    worker._writing.clear()
    for thread in (worker._writer, worker._reader):
        thread.shutdown(wait=True, cancel_futures=True)
    upkeep._waiting.clear()
    upkeep.close()
