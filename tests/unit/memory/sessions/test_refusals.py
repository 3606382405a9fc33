"""What cannot be done, each with the words for it."""

import functools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from lola_vllm.command import cli
from lola_vllm.memory.sessions.catalog import NotStored
from lola_vllm.memory.sessions.cipher import StateKeyError, read_key
from lola_vllm.memory.sessions.file import write_state
from lola_vllm.memory.sessions.names import SessionNameError, check_name, parse_reference
from lola_vllm.memory.sessions.prefix_hash import salt_hash
from lola_vllm.memory.sessions.request import read_params
from lola_vllm.memory.sessions.settings import StoreSettings, StoreSettingsError
from lola_vllm.serving.sessions.wrappers import check_params
from tests.support.sessions import ROW, Server, size_of
from tests.unit.memory.sessions.test_file import ROW as PAGES
from tests.unit.memory.sessions.test_file import TOKENS, header

ONE, TWO = list(range(100, 130)), list(range(500, 541))
GIVEN = "given by the server; take another"
ENDLESS = "a finite number of seconds above 0"
ALICE = salt_hash("alice")


def settings(**given: Any) -> Any:
    return StoreSettings.from_mapping(given)


def asked(session_id: str | None = None, n: int = 1, **lola: Any) -> None:
    transfer = {"kv_transfer_params": {"lola": lola}}
    check_params(SamplingParams(n=n, extra_args=transfer), session_id)


def fault(**lola: Any) -> None:
    (found,) = read_params({"lola": lola}).faults
    raise ValueError(found)


def written(**fields: Any) -> None:
    write_state(Path("x"), replace(header(), **fields), TOKENS, PAGES)


@pytest.mark.parametrize(
    ("error", "words", "calls"),
    [
        (SessionNameError, "1 to 64", [functools.partial(check_name, name) for name in (
            "", "a/b", "../x", "a b", "a@1", "x" * 65, "\u00e9", 7, None, "a\n")]),
        (SessionNameError, "turn", [functools.partial(parse_reference, text) for text in (
            "agent@", "agent@0", "agent@x", "agent@-1")]),
        (ValueError, ENDLESS, [functools.partial(fault, ttl=ttl) for ttl in (
            float("nan"), float("inf"), -float("inf"), 0, -1, True, "1", 10**400)]),
        (ValueError, GIVEN, [functools.partial(fault, save=n) for n in ("auto-1", "shared-1")]),
        (StoreSettingsError, "finite number", [
            functools.partial(StoreSettings, 1, None, 0, ttl) for ttl in (float("nan"), 0.0)]),
        (StoreSettingsError, "one key", [
            lambda: settings(state_key_file="x", state_key_variable="KEY")]),
        *((StoreSettingsError, key, [functools.partial(settings, **{key: value})])
          for key, value in (
              ("state_ram", "much"), ("state_disk", -1), ("state_dir", 3), ("state_ttl", "x"),
              ("state_tll", 4), ("state_key_file", 3), ("state_key_file", ""),
              ("state_key_variable", 3))),
        *((StoreSettingsError, key, [lambda key=key, value=value: settings(**{key: value}).key()])
          for key, value in (("state_key_file", "/no/file"), ("state_key_file", "/"),
                             ("state_key_variable", "NO_SUCH_VARIABLE"))),
        (VLLMValidationError, r"kv_transfer_params.lola.save = '../x'", [
            lambda: asked(save="../x")]),
        (VLLMValidationError, r"session_id = '../x'", [lambda: asked("../x")]),
        (VLLMValidationError, "nearest valid name: 'from'", [lambda: asked(form="a")]),
        (VLLMValidationError, "n = 2: a session goes on with one", [lambda: asked(n=2, save="a")]),
        (VLLMValidationError, "goes on with 'a'; fork it", [lambda: asked("a", n=3)]),
        (ValueError, ".", [functools.partial(written, **fields) for fields in (
            {"expires": float("nan")}, {"created": float("inf")}, {"adapter": "a\nb"})]),
    ],
)  # fmt: skip
def test_calls(error, words, calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in calls:
        with pytest.raises(error, match=words):
            call()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"Secret!?\n", b"x" * 31 + b"\n", b"x" * 5000])
def test_keys_that_are_none(tmp_path, monkeypatch, content):
    path = tmp_path / "key"
    path.write_bytes(content)
    monkeypatch.setenv("SOME_KEY", content.decode())
    for given, place in ((str(path), {"file": path}), ("SOME_KEY", {"variable": "SOME_KEY"})):
        with pytest.raises(StateKeyError, match="openssl rand") as error:
            read_key(**place)  # type: ignore[arg-type]
        assert given in str(error.value)
        assert not content or content.strip().decode() not in str(error.value)
    with pytest.raises(StoreSettingsError):  # and is not a plain directory
        Server(tmp_path / "s", key_file=tmp_path / "none")


@pytest.fixture
def server(server):
    for name, tokens, more in (
        ("one", ONE, {}), ("two", TWO, {}), ("tiny", [1, 2, 3], {}),
        ("tuned", ONE, {"adapter": "lora:1"}), ("hers", TWO, {"salt": ALICE}),
    ):  # fmt: skip
        server.say(tokens, name, **more)
    server.settle()
    return server


def composed(*sources: str, to: str = "new") -> tuple[str, dict[str, Any]]:
    return "compose", {"sources": list(sources), "to": to}


@pytest.mark.parametrize(
    ("asked", "kind", "words"),
    [
        (composed("one", "gone"), "not-found", "nothing is stored under 'gone'"),
        (composed("one", "hers"), "not-found", "'hers'"),
        (composed("one", "two@2"), "not-found", "turn 2"),
        (composed("one", "two", to="one"), "exists", "there is such a session"),
        (composed("one", "tuned"), "bad", "several adapters"),
        (composed("tiny", "one"), "bad", "too short"),
        (composed(), "bad", "give 1 to 64"),
        (composed("one", to="auto-1"), "bad", GIVEN),
        (("fork", {"reference": "one", "to": "shared-1"}), "bad", GIVEN),
        (("fork", {"reference": "one", "to": "two"}), "exists", "there is such a session"),
        (("rename", {"session": "one", "to": "auto-1"}), "bad", GIVEN),
        (("rename", {"session": "one", "to": "two"}), "exists", "there is such a session"),
        (("import_file", {"file": "x", "session": "library-1"}), "bad", GIVEN),
        (("past", {"reference": "tuned", "size": 8}), "bad", "tuned has an adapter"),
        (("past", {"reference": "none", "size": 8}), "not-found", "'none'"),
        (("library", {"library": "valves"}), "not-found", "no library 'valves'"),
        (("result", {"operation": 7}), "not-found", "operation = 7"),
        (("close", {}), "bad", "no such method"),
    ],
)
def test_what_is_asked_of_sessions(server, asked, kind, words):
    before = server.ask("sessions")
    answer = server.ask(asked[0], **asked[1])
    assert (answer.get("kind"), words in answer.get("error", "")) == (kind, True), answer
    assert server.ask("sessions") == before


def test_what_requests_start_from(server):
    """Of another salt it is not told that there is one."""
    for name, text, longest, more, words in (
        ("hers", TWO, 41, {}, "nothing is stored under 'hers'"),
        ("hers", [1, *TWO], 41, {"salt": ALICE}, "does not begin with the 41 tokens"),
        ("hers", TWO, 20, {"salt": ALICE}, "covers 41 tokens.*only 21"),
        ("hers", TWO, 41, {"salt": ALICE, "adapter": "x"}, "another adapter"),
    ):
        hashes = server.store.prefix_hashes(text, salt=ALICE)
        with pytest.raises(NotStored, match=words):
            server.store.resolve(parse_reference(name), hashes, longest, **more)
    small = Server(memory=ROW - 1)
    with pytest.raises(NotStored, match=f"takes {size_of(10)} bytes"):
        small.say(ONE[:10])
    assert not small.store.states and not small.store.sessions


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rm", "--keep", "env:NO_SUCH", "--yes"], "no such environment variable"),
        (["rm", "--keep", "file:/none", "--yes"], "the key cannot be read"),
        (["rm", "--keep", "env:EMPTY", "--yes"], "there is no key in it"),
        (["rm", "--keep", "sk-secret", "--yes"], "--keep: must be none"),
        (["list", "--lola-state-dir", "no-such"], "no such directory"),
    ],
)
def test_what_is_asked_of_a_directory(words, message, tmp_path, capsys, monkeypatch):
    server = Server(tmp_path)
    server.tell(ONE, "one")
    monkeypatch.setenv("EMPTY", " \n")
    verb, *more = words
    assert cli.main(["states", verb, "--lola-state-dir", str(tmp_path), *more]) == 2
    error = capsys.readouterr().err
    assert message in error and "sk-secret" not in error
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1 and not Path("no-such").exists()
