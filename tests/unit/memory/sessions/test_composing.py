"""Sessions made of others: what is found, kept, refused and told."""

import threading
from pathlib import Path
from typing import Any

import pytest

from lola_vllm.memory.sessions import transfer
from lola_vllm.memory.sessions.catalog import NotStored
from lola_vllm.memory.sessions.file import read_state
from lola_vllm.memory.sessions.names import parse_reference
from lola_vllm.memory.sessions.prefix_hash import salt_hash
from tests.support.sessions import Server, composed_row, names, row_of

ONE, TWO = list(range(100, 130)), list(range(500, 541))
BOTH = ONE[:24] + TWO  # a document begins at a multiple of 8


@pytest.fixture
def server(server):
    server.say(ONE, "one")
    server.tell(TWO, "two")
    return server


def loaded(server: Server, session: str, prompt: list[int], salt: str = "") -> Any:
    """The row that a prompt starts from, and how many tokens it covers."""
    hashes = server.store.prefix_hashes(prompt, "", salt)
    state = server.store.resolve(parse_reference(session), hashes, len(prompt) - 1, "", salt)
    server.store.load(state, 2, "request")
    outcomes = server.settle()
    assert not [outcome for outcome in outcomes if "failed" in outcome.event]
    return server.pools[0][2], state.header.num_tokens


def test_it_goes_on_from_the_composed_state(server):
    shown = server.ask("compose", sources=["one", "two@1"], to="both")
    assert shown["made_of"] == ["one@1", "two@1"] and shown["tokens"] == len(BOTH)
    assert server.ask("tokens", reference="both")["tokens"] == BOTH
    row, n = loaded(server, "both", [*BOTH, 7])  # the composition has not been waited for
    assert n == len(BOTH) == 24 + 41
    assert row.equal(composed_row([row_of(ONE), row_of(TWO)], [30, 41]))
    server.ask("compose", sources=["two", "one"], to="turned")
    row, n = loaded(server, "turned", [*TWO[:40], *ONE, 7])
    assert row.equal(composed_row([row_of(TWO), row_of(ONE)], [41, 30]))


@pytest.mark.parametrize("deleted", [False, True])
def test_what_is_made_of_a_composition_waits_for_it(server, deleted):
    """Also where the composition is deleted before it is made."""
    free = threading.Event()
    server.workers[0]._writer.submit(free.wait, 20)
    server.ask("compose", sources=["one", "two"], to="both")
    server.ask("fork", reference="both", to="twig")
    server.ask("compose", sources=["both", "one"], to="three")
    server.step()
    if deleted and server.store.directory is None:  # of files, the deletion waits by itself
        server.ask("delete", reference="both")
        server.step()
    free.set()
    server.settle()
    row, n = loaded(server, "twig", [*BOTH, 7])
    made = composed_row([row_of(ONE), row_of(TWO)], [30, 41])
    assert n == len(BOTH) and row.equal(made)
    row, n = loaded(server, "three", [*BOTH[:64], *ONE, 7])
    assert n == 94 and row.equal(composed_row([made, row_of(ONE)], [65, 30]))
    assert not server.workers[0]._making and not server.workers[0]._reading


def test_no_other_text_finds_it(server):
    """The state of reading the same tokens is another one."""
    server.ask("compose", sources=["one", "two"], to="both")
    server.settle()
    assert server.restore([*BOTH, 7]) == 0
    server.say(BOTH, "read")
    assert server.restore([*BOTH, 7]) == len(BOTH)
    row, _ = loaded(server, "both", [*BOTH, 7])
    assert not row.equal(row_of(BOTH))
    with pytest.raises(NotStored, match="does not begin"):
        loaded(server, "both", [0, *BOTH])


def say_on(server: Server, session: str, more: list[int], to: str | None = None, **kw: Any) -> Any:
    """Another turn of a session, or what goes on from it under another name."""
    parent = server.store.lookup(parse_reference(session))[-1]
    tokens = server.ask("tokens", reference=session)["tokens"] + more
    hashes = server.store.prefix_hashes(tokens, "", "", parent.header.composed)
    turn = server.store.open_turn(to or session, parent)
    server.pools[0][1] = row_of(tokens)
    state, _ = server.store.save(turn, hashes, len(tokens), "answer", 1, parent=parent, **kw)
    server.settle()
    return state


def test_what_was_composed_goes_with_its_source_under_another_name(server):
    made = server.ask("compose_parts", sources=["one", "two"])["session"]
    server.ask("compose", sources=["one", "two"], to="both")
    server.settle()
    assert made not in {one["session"] for one in server.ask("sessions")}
    server.ask("rename", session="one", to="first")
    server.say(ONE[:20], "one")  # another session, which nothing is made of
    server.settle()
    assert server.ask("delete", reference="one") == {"deleted": 1}
    assert names(server) == {"first", "two", "both", made}
    assert server.ask("delete", reference="first") == {"deleted": 1, "composed": ["both"]}
    assert names(server) == {"two", "both"}


@pytest.mark.parametrize("restarted", [False, True])
def test_a_source_is_known_when_it_went_on(server, restarted, tmp_path):
    """The state that was composed may have left for others; the session is still the same."""
    if restarted and server.store.directory is None:
        pytest.skip("nothing is there after a start without a directory")
    say_on(server, "one", [1])
    made = server.ask("compose_parts", sources=["one", "two"])["session"]
    server.settle()
    say_on(server, "one", [2])
    for state in server.store.lookup(parse_reference("one"))[:-1]:
        server.store.forget(state)
    server.settle()
    if restarted:
        server.close()
        server.__init__(tmp_path)  # type: ignore[misc]
    say_on(server, "one", [3])
    assert made in names(server)
    server.ask("rename", session="one", to="first")
    server.ask("delete", reference="first")
    assert names(server) == {"two"}


def test_a_fork_is_another_source(server):
    server.say(ONE, "one", kind="prompt")
    server.ask("fork", reference="one", to="twig")
    made = server.ask("compose_parts", sources=["twig", "two"])["session"]
    server.settle()
    server.ask("delete", reference="one")
    assert names(server) == {"twig", "two", made}
    server.ask("delete", reference="twig")
    assert names(server) == {"two"}


def test_owners_are_told_apart_in_what_was_composed(server):
    """Sessions of two owners have the same names."""
    theirs = salt_hash("other")
    for name, tokens in (("one", ONE), ("two", TWO)):
        server.say(tokens, name, salt=theirs)
    server.settle()
    made = {salt: server.ask("compose_parts", sources=["one", "two"], salt=salt)["session"]
            for salt in (None, "other")}  # fmt: skip
    for salt in (None, "other"):
        server.ask("compose", sources=["one"], to=f"of-{salt}", salt=salt)
    (mine,), (hers,) = (server.store.lookup(parse_reference("one"), salt) for salt in ("", theirs))
    server.say([9] * 40, "import", salt=theirs)  # which may come with sources of others
    (brought,) = server.store.lookup(parse_reference("import"), theirs)
    server.store.change(brought, sources=[mine.id, hers.id])
    server.settle()
    assert server.ask("delete", reference="one") == {"deleted": 1, "composed": ["of-None"]}
    assert names(server) == {"one", "two", "of-None", "of-other", "import", made["other"]}
    assert server.ask("show", session=made["other"], salt="other")["made_of"]


@pytest.mark.parametrize("ttl", [None, 5000.0])
def test_what_goes_on_from_it_does_not_outlive_its_parts(server, ttl):
    server.tell([1, 2, 3, 4, 5, 6, 7, 8], "short", ttl=60.0)
    end = server.store.lookup(parse_reference("short"))[0].header.expires
    server.ask("compose", sources=["short", "two"], to="both")
    server.settle()
    server.ask("compose", sources=["both", "one"], to="more", ttl=20.0)
    server.settle()
    for session in ("both", "more"):
        state = say_on(server, session, [7], ttl=ttl)
        assert state.header.expires == say_on(server, session, [8], f"{session}-on").header.expires
        assert state.header.expires == end  # and not that of the 20 seconds
    assert say_on(server, "both", [9], ttl=5.0).header.expires < end
    server.clock.now += 61
    assert names(server) == {"one", "two"}


def test_what_is_made_of_a_text_without_a_name_stays_in_memory(tmp_path):
    server = Server(tmp_path, store="named")
    server.say(TWO, "two")
    auto = server.say(ONE).header.session
    server.settle()
    assert auto.startswith("auto-")

    def tiers(session: str) -> list[set[str]]:
        return [state.tiers for state in server.store.lookup(parse_reference(session))]

    server.ask("compose", sources=[auto, "two"], to="both")
    made = server.ask("compose_parts", sources=["two", auto])["session"]
    server.settle()
    say_on(server, "both", [7])
    server.ask("compose", sources=["both", "two"], to="more")
    server.ask("fork", reference="both", to="twig")
    server.settle()
    say_on(server, "twig", [6])
    unnamed = say_on(server, made, [8], "auto-0123").header.session
    say_on(server, made, [9], "talk")
    server.ask("rename", session=unnamed, to="named")
    server.ask("rename", session="both", to="again")
    server.ask("compose", sources=["two"], to="other")
    server.settle()
    for session in ("again", made, "more", "twig", "talk", "named"):
        assert all(found == {"memory"} for found in tiers(session)), session
    assert tiers("other") == tiers("two") == [{"memory", "disk"}]
    assert len(list(server.store.directory.path.iterdir())) == 2
    server.close()
    server = Server(tmp_path / "all", store="all")
    auto = server.say(ONE).header.session
    server.ask("compose", sources=[auto], to="both")
    assert tiers("both") == [{"memory", "disk"}]


def test_what_goes_on_from_it_remembers_it(server):
    server.ask("compose", sources=["one", "two"], to="both")
    server.settle()
    say_on(server, "both", [7, 8, 9])
    longer = [*BOTH, 7, 8, 9]
    assert server.ask("show", session="both")["made_of"] == ["one@1", "two@1"]
    assert server.store.find(server.store.prefix_hashes([*longer, 1]), len(longer)) is None
    assert loaded(server, "both", [*longer, 1])[1] == len(longer)
    server.ask("fork", reference="both", to="twig")
    assert loaded(server, "twig", [*longer, 1])[1] == len(longer)
    server.ask("compose", sources=["both", "one"], to="more")
    assert server.ask("show", session="more")["made_of"] == ["both@2", "one@1"]


def test_a_file_of_it_is_one_of_a_composed_state(tmp_path):
    server = Server(tmp_path / "a")
    server.say(ONE, "one")
    server.say(TWO, "two")
    server.ask("compose", sources=["one", "two"], to="both")
    server.settle()
    (file,) = server.ask("files", reference="both")["files"]
    found = read_state(Path(file))
    assert found.tokens.tolist() == BOTH and found.header.composed == found.header.id
    other = Server(tmp_path / "b")
    other.ask("import_file", file=file, session="copy")
    other.settle()
    assert other.restore([*BOTH, 7]) == 0
    assert loaded(other, "copy", [*BOTH, 7])[1] == len(BOTH)
    again = Server(tmp_path / "a")  # after a restart
    assert loaded(again, "both", [*BOTH, 7])[1] == len(BOTH)


def test_a_composition_that_fails_is_gone(server):
    server.workers[0]._composed = transfer._no_composing
    server.ask("compose", sources=["one", "two"], to="both")
    events = {outcome.event: outcome.reason for outcome in server.settle()}
    assert "composes no states" in events["save-failed"]
    assert "error" in server.ask("show", session="both")
