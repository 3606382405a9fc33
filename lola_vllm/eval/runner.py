"""Running a session's plan against directories or a server, with one progress bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lola_vllm.eval.errors import EvalError
from lola_vllm.eval.record import Record
from lola_vllm.eval.server import ServerModel
from lola_vllm.eval.session import Session
from lola_vllm.eval.settings import measure
from lola_vllm.eval.worker import run_setting

# Of the bar, in a terminal and in a file.
REFRESH_S, REFRESH_FILE_S = 0.5, 60.0

# Told of a record and of samples that were added to it.
Advance = Callable[[Record, list[dict[str, Any]]], None]


@contextmanager
def _progress(session: Session, total: int) -> Iterator[Advance]:
    """A bar that counts tokens of all settings; without tqdm there is none."""

    def cost(samples: list[dict[str, Any]]) -> int:
        return sum(session.plan.cost(sample) for sample in samples)

    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda record, samples: None
        return
    with tqdm(
        total=total,
        initial=sum(cost(record.samples) for record in session.records),
        unit="tok",
        unit_scale=True,
        mininterval=REFRESH_S if sys.stderr.isatty() else REFRESH_FILE_S,
    ) as bar:

        def advance(record: Record, samples: list[dict[str, Any]]) -> None:
            bar.set_description(record.setting.name, refresh=False)
            bar.update(cost(samples))

        yield advance


def run_directories(session: Session, batch: int, engine_args: Mapping[str, Any]) -> str:
    """Evaluate every setting of a session, each in a process of its own.

    Args:
        session: says what, of whom, and keeps the results; what it holds is not asked again.
        batch: sequences at once. engine_args: more arguments of `vllm.LLM`.

    Returns:
        The table.

    Raises:
        EvalError: a setting failed; what was measured before is in the session's files.
    """
    table = ""
    with _progress(session, len(session.records) * session.plan.tokens) as advance:
        for record in session.records:
            start, before = time.monotonic(), record.seconds

            def note(event: dict[str, Any], record: Record = record) -> None:
                if event["event"] == "ready":
                    record.dtype = event["dtype"]
                elif event["event"] == "done":
                    record.selections += event["selections_by_other_score"]
                else:
                    record.samples += event["samples"]
                    advance(record, event["samples"])
                    session.save(soon=True)

            record.memory = measure(record.setting, record.dtype or "bfloat16")
            try:
                if not record.finished:
                    run_setting(session.plan, record, batch, engine_args, note)
                record.finished = True
            finally:
                record.seconds = before + time.monotonic() - start
                record.memory = measure(record.setting, record.dtype or "bfloat16")
                session.save()
            table = session.report()
    return table


def run_server(session: Session, model: ServerModel) -> str:
    """Evaluate a served model; what a sequence costs there is not known.

    Args:
        session: of one record. model: the server's.

    Returns:
        The table.

    Raises:
        EvalError: lengths that the server does not take, or a request that failed.
    """
    (record,) = session.records
    plan = session.plan
    if model.max_length is not None and plan.max_length > model.max_length:
        raise EvalError(
            f"a length of {plan.max_length} tokens: the server takes {model.max_length} "
            "(--max-model-len); ask for shorter ones"
        )
    start, before = time.monotonic(), record.seconds
    with _progress(session, plan.tokens) as advance:

        def note(event: dict[str, Any]) -> None:
            record.samples += event["samples"]
            advance(record, event["samples"])
            session.save(soon=True)

        try:
            plan.run(model, note, plan.done(record.samples))
            record.finished = True
        finally:
            record.seconds = before + time.monotonic() - start
            session.save()
    return session.report()
