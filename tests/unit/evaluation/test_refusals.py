"""What `lola-vllm eval` refuses before a model is loaded, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from lola_vllm.command import cli
from lola_vllm.training.texts import SEPARATOR

NIAH = "recall --tasks niah-1 --lengths 512"
AT = "recall --tasks niah-1"
CHAT = "recall --tasks chat-fact --lengths 2000 --texts TEXTS"
COPY = "copy --lengths 2000 --texts TEXTS"
PERPLEXITY = "perplexity --texts TEXTS"
STREAM = f"{PERPLEXITY} --stream --stream-length 4000 --block 2000"
SEED = ["--engine-args", '{"seed": 1}']
REFUSALS = (
    (NIAH, ["--tasks", "niah-7"], "'niah-7' is no task"),
    (NIAH, ["--tasks", "niah-2"], "needs real text; give --texts"),
    (NIAH, ["--lengths", "1k"], "--lengths: 1k: must be whole numbers"),
    (NIAH, ["--lengths", ","], "--lengths: ,: must be one or more"),
    (NIAH, ["--lengths", "0"], "--lengths: 0: must be one or more positive"),
    (NIAH, ["--lengths", "8192"], "8192 tokens"),
    (NIAH, ["--samples", "0"], "--samples: 0: must be at least 1"),
    (NIAH, ["--samples", "x"], "--samples: invalid whole number value: 'x'"),
    (NIAH, ["--batch", "0"], "--batch: 0: must be at least 1"),
    (NIAH, ["--engine-args", "[]"], "--engine-args: []: must be an object"),
    (NIAH, ["--engine-args", "{"], "--engine-args: {: not valid JSON"),
    (NIAH, ["--lola-config", '{"window_size": 0}'], "lola_config.window_size = 0"),
    (NIAH, ["--reference", "nowhere"], "nowhere: no such directory"),
    (NIAH, ["--out", "FILE"], "cannot be made"),
    (AT, ["--distances", "900", "--lengths", "1000"], "--distances 900: the longest of --lengths"),
    (AT, ["--distances", "100", "--tasks", "vt"], "--distances: vt hides its answer in several"),
    (AT, ["--distances", "8000"], "11072 tokens: "),
    ("recall", ["--tasks", "chat-fact"], "--tasks chat-fact: needs real text; give --texts"),
    (CHAT, ["--distances", "200"], "--distances 200: must be at least 250 more than 0"),
    (CHAT, ["--distances", "300,500"], "--distances 500: must be at least 250 more than 300"),
    (CHAT, ["--lengths", "500"], "holds none of the --distances 250, 500, 1000, 2000, 4000"),
    (CHAT, ["--tasks", "chat-fact,niah-1"], "--tasks niah-1: the tasks of conversations are"),
    (CHAT, ["--model", "http://localhost"], "a server carries no state"),
    (CHAT, SEED, "--engine-args: seed is of vLLM's engine"),
    (COPY, ["--distances", "200"], "--distances 200: must be at least 250"),
    (COPY, ["--lengths", "600"], "holds none of the --distances 250, 500, 1000"),
    (COPY, ["--passages", "0"], "--passages: 0: must be at least 1"),
    (COPY, ["--model", "http://localhost"], "a server carries no state"),
    (COPY, SEED, "--engine-args: seed is of vLLM's engine"),
    (STREAM, ["--block", "4"], "--block: 4: must be at least 8"),
    (STREAM, ["--stream-length", "100"], "--stream-length 100: must be at least 4000"),
    (STREAM, ["--context", "0"], "--context: 0: must be at least 1"),
    (STREAM, ["--model", "http://localhost"], "a server carries no state"),
    (STREAM, SEED, "--engine-args: seed is of vLLM's engine"),
    (STREAM, ["--stream-length", "5000"], "5001 tokens: "),
)


@pytest.mark.parametrize(("asked", "options", "message"), REFUSALS)
def test_refusals(
    models: Path, capsys: pytest.CaptureFixture[str], asked: str, options: list[str], message: str
) -> None:
    texts, out = models / "t.txt", models / "out"
    texts.write_text(SEPARATOR.join(f"A document {i}." for i in range(99)), encoding="utf-8")
    argv = ["eval", *asked.replace("TEXTS", str(texts)).split(), "--model", str(models / "lola")]
    options = [str(texts / "out") if word == "FILE" else word for word in options]
    try:
        status = cli.main([*argv, "--out", str(out), *options])
    except SystemExit as error:  # of argparse
        status = error.code
    assert status == 2 and message in capsys.readouterr().err
    assert not out.exists()
