"""One call of `lola-vllm eval`: its records, its files, and going on with an interrupted one."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from lola_vllm.eval import results
from lola_vllm.eval.errors import EvalError
from lola_vllm.eval.machine import describe_machine
from lola_vllm.eval.plans import Plan, plan_name
from lola_vllm.eval.recall import RecallPlan
from lola_vllm.eval.record import Record

SAVE_EVERY_S = 30.0


class Session:
    """Records of all settings, in files of one directory.

    Args:
        out: the directory, made if need be. plan: what every setting is asked.
        records: one per setting. reference: the one that others are compared with.
        batch: sequences at once, for the record.

    Raises:
        EvalError: `out` cannot be written.
    """

    def __init__(
        self, out: Path, plan: Plan, records: list[Record], reference: Record | None, batch: int
    ) -> None:
        self.out, self.plan, self.records, self.reference = out, plan, records, reference
        self.name = plan_name(plan)
        # Names, not where things lie on this machine.
        texts = Path(plan.texts).name if plan.texts else None
        self._head: dict[str, Any] = {
            "evaluation": self.name,
            "plan": {**vars(plan), "texts": texts},
            "batch": batch,
            "machine": describe_machine(),
        }
        self._saved = time.monotonic()
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvalError(f"--out {out}: cannot be made ({error.strerror})") from None
        if not os.access(out, os.W_OK):
            raise EvalError(f"--out {out}: cannot be written; choose another directory")

    @property
    def path(self) -> Path:
        """The JSON file."""
        return self.out / f"{self.name}.json"

    def begin(self, *, resume: bool, force: bool) -> None:
        """Take up the results that `out` holds, replace them, or refuse to.

        Raises:
            EvalError: results and neither option, or results of another plan or setting.
        """
        if force or not self.path.exists():
            return
        if not resume:
            raise EvalError(
                f"{self.path} is there already: --resume goes on with it, --force replaces it, "
                "--out puts this run elsewhere"
            )
        try:
            old = json.loads(self.path.read_text(encoding="utf-8"))
            rows = {row["name"]: row for row in old["settings"]}
            changed = _differences(old["plan"], self._head["plan"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EvalError(
                f"--resume: {self.path} cannot be read ({error}); use --force"
            ) from None
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

    def save(self, *, soon: bool = False) -> None:
        """Write the JSON; with `soon`, unless that was done a moment ago."""
        if soon and time.monotonic() - self._saved < SAVE_EVERY_S:
            return
        if isinstance(self.plan, RecallPlan):
            rows = results.recall_json(self._begun)
        else:
            rows = results.perplexity_json(self._begun, self.reference)
        results.write(self.path, {**self._head, "settings": rows})
        self._saved = time.monotonic()

    def report(self) -> str:
        """Write JSON, Markdown and pictures of what there is; returns the Markdown."""
        self.save()
        if isinstance(self.plan, RecallPlan):
            table = results.recall_table(self._begun)
            self._draw()
        else:
            table = results.perplexity_table(self._begun, self.reference)
        (self.out / f"{self.name}.md").write_text(table + "\n", encoding="utf-8")
        return table

    @property
    def _begun(self) -> list[Record]:
        return [record for record in self.records if record.samples]

    def _draw(self) -> None:
        from lola_vllm.eval.plots import plot_recall

        try:
            plot_recall(self._begun, self.out)
        except ImportError as error:
            print(
                f"no pictures: {error}; 'pip install matplotlib' or lola-vllm[eval] brings them",
                file=sys.stderr,
            )


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in keys)
