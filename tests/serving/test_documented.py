"""What the documentation asks a server, in the order of each page, from a tiny model.

tests/support/documented.py says which commands these are.
"""

import io
import json
import shlex
import subprocess
import sys

import pytest

from lola_vllm.command import cli
from tests.support.documented import ROOT, documented, programs
from tests.support.servers import KEY

PAGES = sorted({page for page, _ in documented("http")})
SAID = "the hidden state of the window is read by the model "
ADDRESS, NAME = "http://127.0.0.1:8000", "smollm2-lola"


def here(text: str, server) -> str:
    """A command or program of a page for the server of these tests."""
    text = text.replace(ADDRESS, server.url).replace(f'"{NAME}"', '"tiny"')
    return text.replace("[0, 29]", "[0, 1]").replace("$KEY", KEY)


def curl(command: str) -> None:
    words = shlex.split(command)
    if not any(word.startswith("Authorization") for word in words):
        words += ["-H", f"Authorization: Bearer {KEY}"]
    done = subprocess.run([*words, "-sS", "--fail-with-body"], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert not isinstance(json.loads(done.stdout).get("error"), dict), done.stdout


def command_line(command: str, server, monkeypatch) -> int:
    _, *words = shlex.split(command)
    if words[0] == "sessions" and "--url" not in words:
        words += ["--url", server.url]
    if words[0] == "chat":
        words += ["--max-tokens", "6"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is gravity?\n"))
    return cli.main(words)


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_are_answered(page, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    if page == "docs/sessions.md":  # which goes on from a third turn
        for _ in range(3):
            said = tiny.client.post("/v1/lola/sessions/agent-7/append", json={"prompt": SAID})
            assert said.status_code == 200, said.text
    library = "/v1/lola/libraries/pages"
    if page == "docs/library.md":  # `lola-vllm library add` has its own tests
        document = {"document": "docker.md", "text": SAID * 8}
        said = tiny.client.post(f"{library}/documents", json=document)
        assert said.status_code == 200, said.text
    for _, command in [found for found in documented("http") if found[0] == page]:
        command = here(command, tiny)
        if command.startswith("curl "):
            curl(command)
            continue
        tries = 50 if " export " in command else 1  # until the server has written the state
        assert 0 in (command_line(command, tiny, monkeypatch) for _ in range(tries)), command
    for name in ("agent-7", "agent-8", "agent-9", "my-chat", "pump-log", "pumps"):
        tiny.client.delete(f"/v1/lola/sessions/{name}")
    tiny.client.delete(library)


def test_the_programs_for_the_openai_client(tiny, monkeypatch, capsys):
    names: dict[str, object] = {}
    found = programs(ROOT / "docs/howto/openai-client.md")
    assert len(found) == 3
    for program in found:
        text = here(program, tiny).replace('api_key="none"', f'api_key="{KEY}"')
        exec(compile(text, "openai-client.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "'session': 'ada', 'turn': 1" in printed
    detail = tiny.client.get("/v1/lola/sessions/ada").json()
    assert detail["turn"] == 2
