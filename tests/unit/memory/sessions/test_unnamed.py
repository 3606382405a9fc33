"""Texts that nobody named: in memory only, unless the operator or a name says otherwise."""

import pytest

from lola_vllm.memory.sessions.catalog import NotStored
from lola_vllm.memory.sessions.file import read_header
from tests.support.sessions import Server

TEXT = list(range(1000, 1700))
UNNAMED = [None, "shared-0123456789abcdef"]


def files(tmp_path):
    return list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("name", UNNAMED)
def test_a_text_that_nobody_named_does_not_reach_the_disk(tmp_path, name):
    server = Server(tmp_path, store="named")
    state = server.say(TEXT[:100], name)
    server.say(TEXT[100:200], "agent-7")
    server.settle()
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
