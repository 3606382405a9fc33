"""`lola-vllm serve`: `vllm serve` with numbers that fit the machine, each with its reason.

Decides nothing that vLLM could not be told by hand: options and environment variables, printed
before vLLM takes this process over. What the user gives is left alone.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import yaml

from lola_vllm.checkpoint.files import CheckpointError, read_json, weight_files
from lola_vllm.checkpoint.quantize import faster_weights
from lola_vllm.config import MODEL_TYPE
from lola_vllm.estimate import DTYPES, GIB, MIB, Row, estimate

PLUGIN = "lola"
# Python, torch and vLLM in three processes on a CPU; activations and CUDA graphs on a GPU.
CPU_OVERHEAD = 3 * GIB
GPU_OVERHEAD = 3 * GIB
GPU_UTILIZATION = 0.9
# More sequences at once than this per core, or than this on any machine, only wait for each other.
SEQUENCES_PER_CORE = 32
MAX_SEQUENCES = 256
# Tokens between two cached states: what a state costs, within these bounds.
MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = 256, 4096

# Short spellings that vLLM takes of options that matter here.
_SHORT = {"-tp": "tensor-parallel-size", "-pp": "pipeline-parallel-size"}
_PLUGIN_GROUPS = ("general", "platform", "io_processor", "stat_logger")


class Machine(NamedTuple):
    """What the choices depend on: "cpu" or "cuda", its cores, and memory free for vLLM in bytes."""

    device: str
    cores: int
    memory: int


class Choice(NamedTuple):
    """An option or environment variable that was chosen, its value, and why."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Launch:
    """What `lola-vllm serve` is going to run.

    Attributes:
        command: the program and its arguments. options, env: what was chosen. notes: what to know.
    """

    command: list[str]
    options: list[Choice]
    env: list[Choice]
    notes: list[str]

    def __str__(self) -> str:
        chosen = [(f"{c.name} {c.value}", c.reason) for c in self.options]
        chosen += [(f"{c.name}={c.value}", c.reason) for c in self.env]
        lines = (f"  {setting}\n      {reason}" for setting, reason in chosen)
        return "\n".join([*self.notes, *lines, f"running: {shlex.join(self.command)}"])


def this_machine(cores: int) -> Machine:
    """The machine as it is now, of which vLLM may use `cores`."""
    if torch.cuda.is_available():
        _, total = torch.cuda.mem_get_info()
        return Machine("cuda", cores, total)
    return Machine("cpu", cores, psutil.virtual_memory().available)


def plan(
    model: str, options: Sequence[str], machine: Machine, env: Mapping[str, str] = os.environ
) -> Launch:
    """Choose what the user has not.

    Args:
        model: as for `vllm serve`. options: the rest of its command line.

    Raises:
        CheckpointError: a directory that holds no LoLA model, options that cannot be read, or a
            machine that is too small.
    """
    given = given_options(options)
    command = [_vllm(), "serve", model]
    chosen_env = _environment(machine, env)
    if not Path(model).is_dir():
        note = f"{model} is no directory here: the numbers are left to vLLM"
        return Launch([*command, *options], [], chosen_env, [note])
    row = _state(Path(model), given)
    notes = [
        f"{model}: {row.bytes_per_sequence / MIB:.2f} MiB per state, on {machine.device} with "
        f"{machine.cores} cores and {machine.memory / GIB:.1f} GiB of memory"
    ]
    if machine.device == "cpu" and (weights := faster_weights(Path(model))):
        how = f"lola-vllm quantize --model {model} --weights {weights} --out {model}-{weights}"
        notes.append(f"{weights} weights decode faster on this CPU, but may recall less: {how}")
    chosen = _numbers(Path(model), row, given, machine, env)
    flags = [part for choice in chosen for part in (choice.name, choice.value)]
    return Launch([*command, *flags, *options], chosen, chosen_env, notes)


def run(launch: Launch, cpus: Set[int]) -> None:
    """Give this process over to vLLM, on these CPUs; does not return."""
    os.sched_setaffinity(0, cpus)
    environment = {**os.environ, **{choice.name: choice.value for choice in launch.env}}
    sys.stdout.flush()
    os.execve(launch.command[0], launch.command, environment)


def given_options(options: Sequence[str]) -> dict[str, str]:
    """What a command line of `vllm serve` sets: long name without dashes -> value, "" for flags.

    A `--config` file counts; the command line goes before it, as in vLLM.
    """
    given: dict[str, str] = {}
    name = None
    for part in options:
        if part.startswith("--") or part in _SHORT:
            option, equals, value = part.partition("=")
            name = _SHORT.get(option, option[2:].replace("_", "-"))
            given[name] = value
            if equals:
                name = None
        elif name is not None:
            given[name] = part
            name = None
    if "config" in given:
        given = {**_config_file(Path(given["config"])), **given}
    return given


def _config_file(path: Path) -> dict[str, str]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise CheckpointError(f"--config {path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"--config {path}: must hold option names and their values")
    return {
        str(name).replace("_", "-"): value if isinstance(value, str) else json.dumps(value)
        for name, value in content.items()
    }


def _state(model: Path, given: Mapping[str, str]) -> Row:
    """What a state of the model costs on one rank, with the user's options."""
    if read_json(model / "config.json").get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{model}: not a LoLA model (model_type is not {MODEL_TYPE!r}); make one with "
            "lola-vllm init, convert or distill, or use 'vllm serve' for this one"
        )
    try:
        overrides = json.loads(given.get("hf-overrides", "{}"))
    except ValueError as error:
        raise CheckpointError(f"--hf-overrides: not valid JSON ({error})") from None
    lola = overrides.get("lola_config", {}) if isinstance(overrides, dict) else {}
    dtype = {"half": "float16", "float": "float32"}.get(given.get("dtype", ""), given.get("dtype"))
    result = estimate(
        model,
        lola,
        # Left to itself, vLLM takes one of two bytes, for a float32 model too.
        dtype=dtype if dtype in DTYPES else "bfloat16",
        tensor_parallel_size=_number(given.get("tensor-parallel-size")) or 1,
    )
    return next(row for row in result.rows if row.chosen)


def _numbers(
    model: Path, row: Row, given: Mapping[str, str], machine: Machine, env: Mapping[str, str]
) -> list[Choice]:
    caching = "no-enable-prefix-caching" not in given and given.get(
        "enable-prefix-caching", ""
    ).lower() not in ("false", "0")
    state = row.bytes_per_sequence
    # A running sequence holds its own state and the last one at a block boundary; one more on a
    # CPU, where nothing else fills the pool, is for prefixes that may come again.
    states = (3 if machine.device == "cpu" else 2) if caching else 1
    sized = "kv-cache-memory-bytes" in given or "VLLM_CPU_KVCACHE_SPACE" in env
    room, where = _room(model, given, machine)
    pool = _number(given.get("kv-cache-memory-bytes"))
    if pool:
        room, where = pool, "your --kv-cache-memory-bytes"
    unknown = sized and not pool
    chosen = []

    wanted = _number(given.get("max-num-seqs"))
    fits = (room // state - 1) // states  # one more is vLLM's null block
    if fits < 1 and not unknown:
        raise CheckpointError(
            f"{where}: {max(0, room) / MIB:.0f} MiB are left for states and one sequence takes "
            f"{(states + 1) * state / MIB:.0f} MiB; free memory, use --no-enable-prefix-caching, "
            "or a smaller sparse_cache_size"
        )
    if "max-num-seqs" not in given:
        limit = MAX_SEQUENCES
        if machine.device == "cpu":
            limit = min(limit, SEQUENCES_PER_CORE * machine.cores)
        wanted = limit if unknown else min(limit, fits)
        reason = f"{where} would hold {fits:,}"
        if wanted == limit:
            per_core = f"{SEQUENCES_PER_CORE} per core; " if machine.device == "cpu" else ""
            reason = f"{per_core}more would only wait for each other"
        chosen.append(Choice("--max-num-seqs", str(wanted), reason))
    if caching and "block-size" not in given:
        chosen.append(_block_size(model, row, given))
    if machine.device == "cpu" and not sized and wanted:
        of = f"{states} states" if states > 1 else "one state"
        chosen.append(
            Choice(
                "--kv-cache-memory-bytes",
                str((states * min(wanted, fits) + 1) * state),
                f"{of} for each of {min(wanted, fits)} sequences, and vLLM's null block",
            )
        )
    return chosen


def _room(model: Path, given: Mapping[str, str], machine: Machine) -> tuple[int, str]:
    """Bytes for states on a rank, and what to call them."""
    ranks = _number(given.get("tensor-parallel-size")) or 1
    weights = sum(file.stat().st_size for file in weight_files(model)) // ranks
    if machine.device == "cpu":  # half, so that the machine stays usable
        return (machine.memory - weights - CPU_OVERHEAD) // 2, "half of the free memory"
    try:
        utilization = float(given["gpu-memory-utilization"])
    except (KeyError, ValueError):
        utilization = GPU_UTILIZATION
    room = int(machine.memory * utilization) - weights - GPU_OVERHEAD
    return room, f"{utilization:.0%} of the GPU"


def _block_size(model: Path, row: Row, given: Mapping[str, str]) -> Choice:
    even = row.layout.break_even_tokens()
    length = _number(given.get("max-model-len")) or int(
        read_json(model / "config.json").get("max_position_embeddings", MAX_BLOCK_SIZE)
    )
    size = MIN_BLOCK_SIZE
    while size < even and size < MAX_BLOCK_SIZE:
        size *= 2
    while size > max(16, length // 2):
        size //= 2
    return Choice(
        "--block-size",
        str(size),
        f"tokens between two cached states; one costs as much as {even:,} tokens of a full cache",
    )


def _environment(machine: Machine, env: Mapping[str, str]) -> list[Choice]:
    chosen = []
    if "VLLM_PLUGINS" not in env:
        # vLLM loads every plugin but those that add routes while this is unset, so name them all.
        names = {e.name for g in _PLUGIN_GROUPS for e in entry_points(group=f"vllm.{g}_plugins")}
        plugins = ",".join([PLUGIN, *sorted(names - {PLUGIN})])
        chosen.append(Choice("VLLM_PLUGINS", plugins, "routes /v1/lola and metrics lola:*"))
    elif PLUGIN not in env["VLLM_PLUGINS"].split(","):
        raise CheckpointError(
            f"VLLM_PLUGINS = {env['VLLM_PLUGINS']!r} leaves LoLA out; add {PLUGIN!r} or unset it"
        )
    if machine.device == "cpu":
        if "OMP_WAIT_POLICY" not in env:
            why = "threads that spin while they wait slow each other down"
            chosen.append(Choice("OMP_WAIT_POLICY", "PASSIVE", why))
        if "VLLM_CPU_OMP_THREADS_BIND" not in env:
            why = "two servers would bind to the same cores"
            chosen.append(Choice("VLLM_CPU_OMP_THREADS_BIND", "nobind", why))
    return chosen


def _vllm() -> str:
    beside = Path(sys.executable).parent / "vllm"
    found = str(beside) if beside.is_file() else shutil.which("vllm")
    if found is None:
        raise CheckpointError(
            "the command 'vllm' is not installed; run 'lola-vllm doctor' to see what is missing"
        )
    return found


def _number(text: str | None) -> int | None:
    """An integer as vLLM reads it (k, m, g for thousands, K, M, G for 1024), None if it is none."""
    units = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
    try:
        if text and text[-1] in units:
            return int(float(text[:-1]) * units[text[-1]])
        return int(text) if text else None
    except ValueError:
        return None


def serve(model: str, options: Sequence[str], cpus: Set[int], dry_run: bool = False) -> int:
    """What the command `lola-vllm serve` does.

    Args:
        cpus: those this process was started on. With OMP_NUM_THREADS set, importing torch leaves
            it fewer, and vLLM would inherit them.
    """
    launch = plan(model, options, this_machine(len(cpus)))
    print(launch)
    if not dry_run:
        run(launch, cpus)
    return 0
