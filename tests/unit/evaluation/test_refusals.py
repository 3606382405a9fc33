"""What `lola-vllm eval` refuses before a model is loaded, and in which words."""

import pytest

from lola_vllm.command import cli
from lola_vllm.training.texts import SEPARATOR

NIAH = "recall --tasks niah-1 --lengths 512"
AT = "recall --tasks niah-1"
CHAT = "recall --tasks chat-fact --lengths 2000 --texts TEXTS"
COPY = "copy --lengths 2000 --texts TEXTS"
STREAM = "perplexity --texts TEXTS --stream 10000"
SEED = ["--engine-args", '{"seed": 1}']
# What follows an "@" is written to a file, which is given instead.
REFUSALS = (
    (NIAH, ["--tasks", "niah-7"], "'niah-7' is no task; choose from niah-1"),
    (NIAH, ["--tasks", ","], "--tasks: name at least one"),
    (NIAH, ["--tasks", "niah-2"], "needs real text; give --texts"),
    (NIAH, ["--lengths", "1k"], "--lengths: 1k: must be whole numbers"),
    (NIAH, ["--lengths", ","], "--lengths: ,: must be one or more"),
    (NIAH, ["--lengths", "0"], "--lengths: 0: must be one or more positive"),
    (NIAH, ["--lengths", "8192"], "a length of 8192 tokens: "),
    (NIAH, ["--samples", "0"], "--samples: 0: must be at least 1"),
    (NIAH, ["--samples", "x"], "--samples: invalid whole number value: 'x'"),
    (NIAH, ["--batch", "0"], "--batch: 0: must be at least 1"),
    (NIAH, ["--engine-args", "[]"], "--engine-args: []: must be an object"),
    (NIAH, ["--engine-args", "{"], "--engine-args: {: not valid JSON"),
    (NIAH, ["--lola-config", '{"window_size": 0}'], "lola_config.window_size = 0"),
    (NIAH, ["--lola-config", '{"windw_size": 8}'], "nearest valid name: 'window_size'"),
    (NIAH, ["--lola-config", "a={"], "'a={': not JSON"),
    (NIAH, ["--lola-config", "a=3"], "must be a JSON object"),
    (NIAH, ["--lola-config", "{}", "--lola-config", "{}"], "two settings are named 'override'"),
    (NIAH, ["--sweep", "@{"], "t: Expecting property name"),
    (NIAH, ["--sweep", "@[]"], "t: no row; must be a list of objects with name, model"),
    (NIAH, ["--sweep", "@[3]"], "'int' object is not a mapping; must be a list of objects"),
    (NIAH, ["--sweep", '@[{"name": "a", "window": 8}]'], "t: 0.window: Unexpected keyword"),
    (NIAH, ["--sweep", '@[{"lola_config": {}}]'], "t: 0.name: "),
    (NIAH, ["--sweep", "nowhere"], "nowhere: cannot be read"),
    (NIAH, ["--reference", "nowhere"], "nowhere: no config.json there"),
    (NIAH, ["--without", "window"], "'window' is no part; leave out hidden-state, importance"),
    (NIAH, ["--model", "LLAMA", "--without", "importance"], "is a llama model, which has no"),
    (NIAH, ["--model", "LLAMA", "--lola-config", '{"a": 1}'], "make a LoLA checkpoint with"),
    (NIAH, ["--out", "@"], "cannot be made"),
    (AT, ["--distances", "900", "--lengths", "1000"], "--distances 900: the longest of --lengths"),
    (AT, ["--distances", "100", "--tasks", "vt"], "--distances: vt hides its answer in several"),
    (AT, ["--distances", "8000"], "11072 tokens: "),
    ("recall", ["--tasks", "chat-fact"], "--tasks chat-fact: needs real text; give --texts"),
    (CHAT, ["--distances", "200"], "--distances 200: must be at least 250 more than 0"),
    (CHAT, ["--distances", "300,500"], "--distances 500: must be at least 250 more than 300"),
    (CHAT, ["--lengths", "500"], "holds none of the --distances 250, 500, 1000, 2000, 4000"),
    (CHAT, ["--tasks", "chat-fact,niah-1"], "--tasks niah-1: the tasks of conversations are"),
    (CHAT, SEED, "--engine-args: seed is of vLLM's engine"),
    (COPY, ["--distances", "200"], "--distances 200: must be at least 250"),
    (COPY, ["--lengths", "600"], "holds none of the --distances 250, 500, 1000"),
    (STREAM, ["--stream", "100"], "--stream 100: must be at least 4096"),
    (STREAM, ["--every", "0"], "--every: 0: must be at least 1"),
    (STREAM, [], "a length of 10001 tokens: "),
)


@pytest.mark.parametrize(("asked", "options", "message"), REFUSALS)
def test_refusals(models, capsys, asked, options, message):
    texts, file, out = models / "texts.txt", models / "t", models / "out"
    texts.write_text(SEPARATOR.join(f"A document {i}." for i in range(99)), encoding="utf-8")
    argv = ["eval", *asked.replace("TEXTS", str(texts)).split(), "--model", str(models / "lola")]
    argv += ["--out", str(out)]
    for option in options:
        if option.startswith("@"):
            file.write_text(option[1:])
            option = str(file)
        argv.append(option.replace("LLAMA", str(models / "llama")))
    try:
        status = cli.main(argv)
    except SystemExit as error:  # of argparse
        status = error.code
    assert status == 2 and message in capsys.readouterr().err
    assert not out.exists()
