"""The child process of one setting: `python -m lola_vllm.eval.worker`, a job on its standard input.

A process of its own gives all memory back when it ends, and takes environment variables that only
count at start-up. It answers with lines on its standard output, each a JSON object. What vLLM
prints goes elsewhere, and is shown if the child fails without a message of ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lola_vllm.eval.errors import EvalError
from lola_vllm.eval.plans import PLANS, Plan, plan_name
from lola_vllm.eval.recall import Emit
from lola_vllm.eval.record import Record
from lola_vllm.eval.settings import Setting

LAST_LINES = 30
USER_ERROR = 2  # exit status where the message says all


def run_setting(
    plan: Plan,
    record: Record,
    batch: int,
    engine_args: Mapping[str, Any],
    emit: Emit,
) -> None:
    """Evaluate one setting in a child process.

    Args:
        plan: what to ask. record: whom; its samples are not asked again.
        batch: sequences at once. engine_args: more arguments of `vllm.LLM`.
        emit: is given the plan's events, `{"event": "ready", "dtype": name}` before them and
            `{"event": "done", "selections_by_other_score": n}` after.

    Raises:
        EvalError: the setting failed; the child's own message, or how it died.
    """
    setting = record.setting
    job = {
        "plan": plan_name(plan),
        "fields": vars(plan),
        "setting": {**vars(setting), "model": str(setting.model)},
        "done": sorted(plan.done(record.samples)),
        "batch": batch,
        "engine_args": dict(engine_args),
    }
    environment = dict(os.environ)
    if setting.score != "sre":
        environment["LOLA_VLLM_OPS"] = "torch"  # the back end whose score can be changed
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    failure = None
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "lola_vllm.eval.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        assert child.stdin and child.stdout
        try:
            with contextlib.suppress(BrokenPipeError):  # its exit status says more
                child.stdin.write(json.dumps(job))
                child.stdin.close()
            for line in child.stdout:
                if not line.endswith("\n"):
                    break  # it died while writing
                event = json.loads(line)
                if event["event"] == "error":
                    failure = event["message"]
                else:
                    emit(event)
            status = child.wait()
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        if status not in (0, USER_ERROR):
            log.seek(0)
            sys.stderr.writelines(log.readlines()[-LAST_LINES:])
    if failure is None and status != 0:
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        failure = f"its process {how}; if memory ran out, lower --batch or --lengths"
    if failure is not None:
        raise EvalError(f"setting {setting.name!r}: {failure}")


def main() -> int:
    """Run the job on standard input."""
    # Libraries print to file descriptor 1 as they like; our lines need one of their own.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)

        def emit(event: dict[str, Any]) -> None:
            out.write(json.dumps(event) + "\n")
            out.flush()

        try:
            _run(json.load(sys.stdin), emit)
        except EvalError as error:
            emit({"event": "error", "message": str(error)})
            return USER_ERROR
        except ValidationError as error:  # vLLM's refusal of an option
            emit({"event": "error", "message": "; ".join(e["msg"] for e in error.errors())})
            return USER_ERROR
        except Exception as error:
            emit({"event": "error", "message": f"{type(error).__name__}: {error}"})
            raise
    return 0


def _run(job: dict[str, Any], emit: Emit) -> None:
    from lola_vllm.eval.ablation import score_by
    from lola_vllm.eval.engine import EngineModel

    plan = PLANS[job["plan"]](**job["fields"])
    setting = Setting(**{**job["setting"], "model": Path(job["setting"]["model"])})
    with score_by(setting.score) as selections:
        model = EngineModel(setting, plan.max_length, job["batch"], job["engine_args"])
        emit({"event": "ready", "dtype": model.dtype})
        plan.run(model, emit, {tuple(key) for key in job["done"]})
        emit({"event": "done", "selections_by_other_score": len(selections)})


if __name__ == "__main__":
    sys.exit(main())
