"""One call of `lola-vllm eval`: its records, its files, and how an interrupted one is resumed."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

from lola_vllm.evaluation import EvalError, results, summary
from lola_vllm.evaluation.chats import ChatPlan
from lola_vllm.evaluation.copying import CopyPlan
from lola_vllm.evaluation.models import Emit
from lola_vllm.evaluation.perplexity import PerplexityPlan
from lola_vllm.evaluation.plan import Plan
from lola_vllm.evaluation.recall import RecallPlan
from lola_vllm.evaluation.results import Record
from lola_vllm.evaluation.settings import measure
from lola_vllm.evaluation.stream import StreamPlan

SAVE_EVERY_S = 30.0
# Of the progress bar, in a terminal and in a file.
REFRESH_S, REFRESH_FILE_S = 0.5, 60.0
PLANS: dict[str, type[Plan]] = {
    plan.name: plan for plan in (RecallPlan, PerplexityPlan, StreamPlan, CopyPlan, ChatPlan)
}


class EvaluationSession:
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
        # Names, without paths of this machine.
        fields = vars(plan)
        texts = Path(fields["texts"]).name if fields["texts"] else None
        self._head: dict[str, Any] = {
            "evaluation": plan.name,
            "plan": {**fields, "texts": texts},
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
        return self.out / f"{self.plan.name}.json"

    def begin(self, *, resume: bool, force: bool) -> None:
        """Resume or replace the results in `out`, or refuse to.

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

    def run(self, ask: Callable[[Record, Emit], None]) -> str:
        """Measure every record that is not finished, and write a report after each.

        Args:
            ask: gets a record and a function for events: those of the plan, and optionally "ready"
                before them (see `engine.run_setting`).

        Returns:
            The table.
        """
        table = ""
        with self._progress() as bar:
            for record in self.records:
                start, before = time.monotonic(), record.seconds

                def note(event: dict[str, Any], record: Record = record) -> None:
                    if event["event"] == "ready":
                        record.dtype = event["dtype"]
                        record.memory = measure(record.setting, event["dtype"])
                    else:
                        record.samples += event["samples"]
                        if bar is not None:
                            bar.set_description(record.setting.name, refresh=False)
                            bar.update(self._cost(event["samples"]))
                        self.save(soon=True)

                try:
                    if not record.finished:
                        ask(record, note)
                    record.finished = True
                finally:
                    record.seconds = before + time.monotonic() - start
                    self.save()
                table = self.report()
        return table

    def _progress(self) -> Any:
        """A bar that counts tokens of all settings; without tqdm there is none."""
        try:
            from tqdm import tqdm
        except ImportError:
            return nullcontext()
        return tqdm(
            total=len(self.records) * self.plan.tokens,
            initial=sum(self._cost(record.samples) for record in self.records),
            unit="tok",
            unit_scale=True,
            mininterval=REFRESH_S if sys.stderr.isatty() else REFRESH_FILE_S,
        )

    def _cost(self, samples: list[dict[str, Any]]) -> int:
        return sum(self.plan.cost(sample) for sample in samples)

    def save(self, *, soon: bool = False) -> None:
        """Write the JSON; with `soon`, unless that was done a moment ago."""
        if soon and time.monotonic() - self._saved < SAVE_EVERY_S:
            return
        results.write(self.path, self._report())
        self._saved = time.monotonic()

    def _report(self) -> dict[str, Any]:
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

    def report(self) -> str:
        """Write JSON, summary and Markdown of what there is; returns the Markdown."""
        self.save()
        name = self.plan.command or self.plan.name
        path = self.out / f"{self.plan.name}.summary.json"
        summary.write(path, self._report(), f"lola-vllm eval {name}")
        table = self.plan.table(self._begun, self.reference)
        (self.out / f"{self.plan.name}.md").write_text(table + "\n", encoding="utf-8")
        return table

    @property
    def _begun(self) -> list[Record]:
        return [record for record in self.records if record.samples]


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    # What is off or empty may be missing: earlier versions had other fields.
    keys = [key for key in {**old, **new} if (old.get(key) or None) != (new.get(key) or None)]
    return ", ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in keys)


def describe_machine() -> dict[str, Any]:
    """Processor, cores, and versions of packages, without names of users or paths."""
    versions: dict[str, str | None] = {}
    for package in ("lola-vllm", "vllm", "torch"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # a served model needs no vLLM here
            versions[package] = None
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "gpu": _gpu_name(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
