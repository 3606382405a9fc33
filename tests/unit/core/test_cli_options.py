"""Fields of a dataclass as options: what is given counts, and the default for what is not."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from lola_vllm.command import cli
from lola_vllm.core.cli_options import add_fields, from_options, option
from lola_vllm.evaluation.chats import ChatPlan
from lola_vllm.evaluation.copying import CopyPlan
from lola_vllm.evaluation.perplexity import PerplexityPlan
from lola_vllm.evaluation.recall import RecallPlan
from lola_vllm.evaluation.settings import Setting
from lola_vllm.evaluation.stream import StreamPlan
from lola_vllm.training.distill.options import DistillOptions


@dataclass
class Options:
    needed: str = option("what it is")
    number: int = option("how many", 0)
    share: float = option("how much", 0.5)
    kind: Literal["a", "b"] = option("a (the default) or b", "a")
    switch: bool = option("on", False)
    words: list[str] = option("several", ["x", "y"])
    place: Path | None = option("where", None, type=Path, metavar="DIR")
    other: int = option("of another part", 3, part="second")
    inner: int = 4


def parse(argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_fields(parser, Options)
    add_fields(parser.add_argument_group("second"), Options, "second")
    return parser.parse_args(argv.split())


def test_fields_become_options():
    args = parse("--needed a")
    assert args.words == "x,y"
    assert from_options(Options, args, words=["x", "y"]) == Options("a")
    args = parse("--needed a --number 2 --share 1 --kind b --switch --place d --other 5")
    assert from_options(Options, args, words=[], inner=6) == Options(
        "a", 2, 1.0, "b", True, [], Path("d"), 5, 6
    )
    assert not hasattr(args, "inner")
    parser = argparse.ArgumentParser()
    add_fields(parser, Options)
    told = {action.dest: action.help for action in parser._actions}
    assert told["number"] == "how many (default: 0)" and told["place"] == "where"
    assert told["kind"] == "a (the default) or b" and told["switch"] == "on"
    for argv in ("--number 2", "--needed a --number x", "--needed a --kind c"):
        with pytest.raises((argparse.ArgumentError, SystemExit)):
            parse(argv)


class StopError(Exception):
    pass


def made_by(monkeypatch: pytest.MonkeyPatch, command: str, target: str, at: int) -> Any:
    """What the command gives to the function `target` as its argument number `at`."""
    found = []

    def stop(*args: Any, **_: Any) -> None:
        found.append(args[at])
        raise StopError

    monkeypatch.setattr(target, stop)
    with pytest.raises(StopError):
        cli.main(command.split())
    return found[0]


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ("", DistillOptions()),
        (
            '--recipe {"rows":3,"learning_rate":1,"lora_rank":2,"dtype":"float32",'
            '"gradient_checkpointing":true,"train_windows":[4,8],"state_heads":"query"} '
            '--lola-config {"window_size":4}',
            DistillOptions(
                rows=3,
                learning_rate=1.0,
                lora_rank=2,
                dtype="float32",
                gradient_checkpointing=True,
                train_windows=(4, 8),
                state_heads="query",
                lola_config={"window_size": 4},
            ),
        ),
    ],
)
def test_distill(monkeypatch, given, options):
    command = f"distill --base b --data d --out o {given}"
    assert made_by(monkeypatch, command, "lola_vllm.training.distill.run.distill", 3) == options


@pytest.mark.parametrize(
    ("given", "plan"),
    [
        ("recall --texts t", RecallPlan(texts="t")),
        (
            "recall --tasks vt,niah-3 --lengths 64,32 --samples 2 --seed 3",
            RecallPlan(["vt", "niah-3"], [32, 64], 2, 3),
        ),
        (
            "recall --tasks chat-fact --texts t --lengths 900 --distances 300",
            ChatPlan(["chat-fact"], [900], [300], "t"),
        ),
        (
            "copy --texts t --kinds code,prose --lengths 900,800 --distances 300 --samples 2 "
            "--seed 4",
            CopyPlan("t", ["code", "prose"], [800, 900], [300], 2, 4),
        ),
        ("perplexity --texts t --stream 64 --every 2", StreamPlan("t", 64, 2)),
        ("perplexity --texts t", PerplexityPlan("t")),
        (
            "perplexity --texts t --windows 2 --window-length 8 --seed 3",
            PerplexityPlan("t", 2, 8, 3),
        ),
    ],
)
def test_eval(monkeypatch, given, plan):
    command = f"eval {given} --model m"
    assert made_by(monkeypatch, command, "lola_vllm.evaluation.command._evaluate", 1) == plan
    args = made_by(monkeypatch, command, "lola_vllm.evaluation.command._evaluate", 0)
    assert args.without == Setting("model", Path("m")).without
