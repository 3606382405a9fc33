"""What commands make of their options: what is given counts, and the default for what is not."""

from pathlib import Path
from typing import Any

import pytest

from lola_vllm.command import cli
from lola_vllm.evaluation.chats import ChatPlan
from lola_vllm.evaluation.copying import CopyPlan
from lola_vllm.evaluation.perplexity import PerplexityPlan
from lola_vllm.evaluation.recall import RecallPlan
from lola_vllm.evaluation.settings import Setting
from lola_vllm.evaluation.stream import StreamPlan
from lola_vllm.training.distill.options import DistillOptions


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
