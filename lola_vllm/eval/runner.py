"""Running a plan against a directory or a server, with a progress bar over everything."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lola_vllm.eval.errors import EvalError
from lola_vllm.eval.perplexity import PerplexityPlan
from lola_vllm.eval.recall import RecallPlan
from lola_vllm.eval.results import Record
from lola_vllm.eval.server import ServerModel
from lola_vllm.eval.settings import Setting, measure
from lola_vllm.eval.worker import run_setting

Plan = RecallPlan | PerplexityPlan


class Progress:
    """A bar that counts tokens of all settings; without tqdm there is none.

    Args:
        tokens: in all, at most.
    """

    def __init__(self, tokens: int) -> None:
        try:
            from tqdm import tqdm
        except ImportError:
            self._bar = None
        else:
            self._bar = tqdm(total=tokens, unit="tok", unit_scale=True, file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, tokens: int, what: str) -> None:
        """So many tokens more, of the setting `what`."""
        if self._bar is not None:
            self._bar.set_description(what, refresh=False)
            self._bar.update(tokens)


def run_directory(
    plan: Plan, setting: Setting, batch: int, engine_args: Mapping[str, Any], progress: Progress
) -> Record:
    """Evaluate a model directory in a process of its own.

    Raises:
        EvalError: as `worker.run_setting`.
    """
    record = Record(setting)

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "ready":
            record.dtype = event["dtype"]
        elif event["event"] == "done":
            record.selections = event["selections_by_other_score"]
        else:
            record.samples += event["samples"]
            progress.update(event["tokens"], setting.name)

    start = time.monotonic()
    run_setting(plan, setting, batch, engine_args, note)
    record.seconds = time.monotonic() - start
    record.memory = measure(setting, record.dtype or "bfloat16")
    return record


def run_server(
    plan: Plan,
    url: str,
    name: str | None,
    api_key: str | None,
    tokenizer: Path | None,
    batch: int,
    progress: Progress,
) -> Record:
    """Evaluate a served model; what a sequence costs there is not known.

    Raises:
        EvalError: as `ServerModel`, or lengths that the server does not take.
    """
    model = ServerModel(url, name, api_key, tokenizer, batch)
    if model.max_length is not None and plan.max_length > model.max_length:
        raise EvalError(
            f"a length of {plan.max_length} tokens: the server takes {model.max_length} "
            "(--max-model-len); ask for shorter ones"
        )
    record = Record(Setting(model.name, Path(model.name)))

    def note(event: dict[str, Any]) -> None:
        record.samples += event["samples"]
        progress.update(event["tokens"], model.name)

    start = time.monotonic()
    plan.run(model, note)
    record.seconds = time.monotonic() - start
    return record
