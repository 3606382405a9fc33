"""One call of `lola-vllm eval`: its records, its files, and how an interrupted one is resumed."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lola_vllm.core import cpu
from lola_vllm.evaluation import EvalError, engine, summary
from lola_vllm.evaluation.plan import Plan
from lola_vllm.evaluation.results import Record, Row, fingerprint
from lola_vllm.evaluation.settings import REFERENCE, Setting, check, measure

SAVE_EVERY_S = 60.0


def evaluate(
    plan: Plan,
    settings: Sequence[Setting],
    out: Path,
    *,
    batch: int,
    engine_args: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> str:
    """Ask every setting, each in a process of its own, and write a report after each.

    Args:
        plan: what is asked. settings: of different names; others are compared with `REFERENCE`.
        out: a directory for the results, made if need be. batch: sequences at once.
        engine_args: more arguments of `vllm.LLM`. resume: go on with what is at `out`.

    Returns:
        The table.

    Raises:
        EvalError: what cannot be asked, a setting that failed, or an `out` that cannot be written
            or has other results. What was measured before a failure is in its files.
    """
    given = dict(engine_args or {})
    plan.check()
    for setting in settings:
        check(setting, plan.max_length if setting.is_lola else plan.softmax_length)
    other = next((name for name in given if name != "dtype"), None)
    if plan.read_in_pieces and other is not None:
        raise EvalError(
            f"--engine-args: {other} is of vLLM's engine, and this text is read in transformers, "
            "which takes dtype alone; leave it out"
        )
    prints = {model: fingerprint(model) for model in {setting.model for setting in settings}}
    comparison = Comparison(out, plan, [Record(s, prints[s.model]) for s in settings], batch)
    comparison.begin(resume)
    models = ", ".join(dict.fromkeys(setting.model.name for setting in settings))
    dtypes = " and ".join(dict.fromkeys(engine.dtype_of(s, given) for s in settings))
    each = f" for each of {len(settings)} settings" if len(settings) > 1 else ""
    device = "CPU" if _gpu_name() is None else "GPU"
    asked = ", ".join(f"{key} {value}" for key, value in comparison.fields.items())
    print(f"{models} on the {device} in {dtypes}: {plan.name} of {asked}{each}", file=sys.stderr)
    for record in comparison.records:
        record.memory = measure(record.setting, record.dtype or "bfloat16")
    for record in comparison.records:
        comparison.ask(record, given)
    return comparison.table()


class Comparison:
    """Records of all settings, in files of one directory.

    Args:
        out: the directory, made if need be. plan: what every setting is asked.
        records: one per setting. batch: sequences at once.

    Attributes:
        fields: of the plan, for people and files.

    Raises:
        EvalError: `out` cannot be written.
    """

    def __init__(self, out: Path, plan: Plan, records: list[Record], batch: int) -> None:
        self.out, self.plan, self.records = out, plan, records
        self.path = out / f"{plan.name}.json"
        named = (record for record in records if record.setting.name == REFERENCE)
        self.reference = next(named, None)
        # Names, without paths of this machine.
        fields = vars(plan)
        self.fields = {**fields, "texts": fields["texts"] and Path(fields["texts"]).name}
        self._head: dict[str, Any] = {
            "evaluation": plan.name,
            "plan": self.fields,
            "batch": batch,
            "machine": describe_machine(),
        }
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvalError(f"--out {out}: cannot be made ({error.strerror})") from None
        if not os.access(out, os.W_OK):
            raise EvalError(f"--out {out}: cannot be written; choose another directory")

    def begin(self, resume: bool) -> None:
        """Take up the results in `out`, or refuse to write over them.

        Raises:
            EvalError: results that are not to be resumed, or of another plan or setting.
        """
        if not self.path.exists():
            return
        if not resume:
            raise EvalError(
                f"{self.path} is there already: --resume goes on with it, --out puts this run "
                "elsewhere"
            )
        try:
            old = json.loads(self.path.read_text(encoding="utf-8"))
            rows = {row["name"]: row for row in old["settings"]}
            changed = _differences(old["plan"], self.fields)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EvalError(f"--resume: {self.path} cannot be read ({error}); remove it") from None
        if changed:
            raise EvalError(f"--resume: {self.path} is of another plan: {changed}")
        for record in self.records:
            row = rows.get(record.setting.name)
            if row is None:
                continue
            changed = _differences({key: row.get(key) for key in record.identity}, record.identity)
            if changed:
                raise EvalError(
                    f"--resume: setting {record.setting.name!r} in {self.path} is another one: "
                    f"{changed}"
                )
            record.take_up(row)

    def ask(self, record: Record, engine_args: Mapping[str, Any]) -> None:
        """Ask a setting what its record has not, and save the answers as they come."""
        began = saved = time.monotonic()
        before, done, batch = record.seconds, self.plan.done(record.samples), self._head["batch"]

        def keep() -> None:
            record.seconds = before + time.monotonic() - began
            self.save()
            rows, seconds = len(record.samples), record.seconds
            print(f"{record.setting.name}: {rows} rows after {seconds:,.0f} s", file=sys.stderr)

        try:
            if not record.finished:
                for event in engine.ask(self.plan, record.setting, done, batch, engine_args):
                    if "dtype" in event:
                        record.dtype = event["dtype"]
                        record.memory = measure(record.setting, event["dtype"])
                    record.samples += event.get("rows", [])
                    if time.monotonic() - saved > SAVE_EVERY_S:
                        keep()
                        saved = time.monotonic()
            record.finished = True
        finally:
            keep()
        self.table()

    def save(self) -> None:
        """Write the JSON in one step: an interrupted run leaves the last complete file."""
        part = self.path.with_name(self.path.name + ".part")
        text = json.dumps(self._report(), indent=1, ensure_ascii=False)
        part.write_text(f"{text}\n", encoding="utf-8")
        part.replace(self.path)

    def _report(self) -> Row:
        """What the JSON says now."""
        rows = [
            {
                **record.to_json(),
                **self.plan.numbers(record, self.reference),
                "samples": record.samples,
            }
            for record in self._begun
        ]
        return {**self._head, "settings": rows}

    def table(self) -> str:
        """Write summary and Markdown of what there is; returns the Markdown."""
        path = self.out / f"{self.plan.name}.summary.json"
        summary.write(path, self._report(), "lola-vllm eval")
        table = self.plan.table(self._begun, self.reference)
        (self.out / f"{self.plan.name}.md").write_text(table + "\n", encoding="utf-8")
        return table

    @property
    def _begun(self) -> list[Record]:
        return [record for record in self.records if record.samples]


def _differences(old: Row, new: Row) -> str:
    # What is off or empty may be missing: earlier versions had other fields.
    keys = [key for key in {**old, **new} if (old.get(key) or None) != (new.get(key) or None)]
    return ", ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in keys)


def describe_machine() -> dict[str, Any]:
    """Processor, cores, and versions of packages, without names of users or paths."""
    versions: dict[str, str | None] = {}
    for package in ("lola-vllm", "vllm", "torch"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # vLLM's builds have several names
            versions[package] = None
    return {
        "cpu": cpu.name(),
        "cores": os.cpu_count(),
        "gpu": _gpu_name(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
