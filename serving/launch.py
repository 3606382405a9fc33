"""`lola-vllm serve`: `vllm serve` with numbers that fit the machine, each with its reason.

All choices are options and environment variables that a user could also give to vLLM. They are
printed before vLLM replaces this process. Values that the user gives are not changed.
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
from typing import Any, NamedTuple

import psutil
import torch

from lola_vllm.core import cpu
from lola_vllm.core.config import MODEL_TYPE
from lola_vllm.core.sizing import Pool, cpu_room, gpu_room, weight_bytes
from lola_vllm.core.state import SequenceLayout
from lola_vllm.engine.estimate import DTYPES, GIB, MIB, Row, estimate
from lola_vllm.memory.sessions.settings import STORE_KEY
from lola_vllm.models.files import CheckpointError, read_json, weight_files
from lola_vllm.models.quantize import faster_weights
from lola_vllm.serving import store_options
from lola_vllm.serving.options import given_options, masked, number

PLUGIN = "lola"
# Address to listen on without --host; the images set it.
HOST_ENV = "LOLA_VLLM_HOST"
GPU_UTILIZATION = 0.9
# Limits of sequences per core and per machine. More sequences would only wait for each other.
SEQUENCES_PER_CORE = 32
MAX_SEQUENCES = 256
# Bounds on the tokens between two cached states, which otherwise follow from a state's cost.
MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = 256, 4096

# Options of vLLM that mean nothing without prefix caching.
_OF_CACHING = (
    "enable-prefix-caching",
    "block-size",
    "mamba-block-size",
    "prefix-cache-retention-interval",
    "kv-events-config",
)
# Settings of the store that say nothing about what is stored.
_OF_ROUTES = {"allowed_hosts", "list_sessions"}
_PLUGIN_GROUPS = ("general", "platform", "io_processor", "stat_logger")


class Machine(NamedTuple):
    """Facts for the choices: "cpu" or "cuda", cores, and memory free for vLLM in bytes.

    `host`: free memory of the machine; None where it is the same memory.
    """

    device: str
    cores: int
    memory: int
    host: int | None = None


class ChosenOption(NamedTuple):
    """An option or environment variable that was chosen, its value, and why."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Launch:
    """The command that `lola-vllm serve` runs.

    Attributes:
        command: the program and its arguments. options, env: the choices; a flag has the value
            "". notes: remarks to print.
    """

    command: list[str]
    options: list[ChosenOption]
    env: list[ChosenOption]
    notes: list[str]

    def __str__(self) -> str:
        chosen = [(f"{c.name} {c.value}".rstrip(), c.reason) for c in self.options]
        chosen += [(f"{c.name}={c.value}", c.reason) for c in self.env]
        lines = (f"  {setting}\n      {reason}" for setting, reason in chosen)
        running = f"running: {shlex.join(masked(self.command))}"
        return "\n".join([*self.notes, *lines, running])


def this_machine(cores: int) -> Machine:
    """The machine in its present state. vLLM may use `cores`."""
    if torch.cuda.is_available():
        _, total = torch.cuda.mem_get_info()
        return Machine("cuda", cores, total, psutil.virtual_memory().available)
    return Machine("cpu", cores, psutil.virtual_memory().available)


def plan(
    model: str, options: Sequence[str], machine: Machine, env: Mapping[str, str] = os.environ
) -> Launch:
    """Choose the options that the user has not given.

    Args:
        model: as for `vllm serve`. options: the rest of its command line.

    Raises:
        CheckpointError: a directory that holds no LoLA model, options that cannot be read, or a
            machine that is too small.
    """
    store = store_options.split(options)
    options = store.rest
    given = given_options(options)
    command = [_vllm(), "serve", model]
    chosen = _front(given, env)
    chosen_env = _environment(machine, env)
    directory = Path(model)
    if directory.is_dir():
        config = _config(directory)
        dtype, quick = _quick(config, given, machine, env)
        row = _state(directory, given, dtype)
        bytes_per_state = _ranks(given).state_bytes(row.sequence)
        notes = [
            f"{model}: {bytes_per_state / MIB:.2f} MiB per state in {dtype}, on {machine.device} "
            f"with {machine.cores} cores and {machine.memory / GIB:.1f} GiB of memory"
        ]
        if machine.device == "cpu" and (faster := faster_weights(directory)):
            how = f"lola-vllm quantize --model {model} --weights {faster} --out {model}-{faster}"
            notes.append(f"{faster} weights decode faster on this CPU, but may recall less: {how}")
        name = directory.resolve().name
        if "served-model-name" not in given and name:
            reason = "the directory's name, for requests and metrics"
            chosen.insert(0, ChosenOption("--served-model-name", name, reason))
        weights = weight_bytes(
            sum(file.stat().st_size for file in weight_files(directory)), config, dtype
        )
        stored = _stored(store, row, weights, given, machine)
        if any(store_options.stores(choice.value) for choice in stored) and _may_replace(given):
            given = {**given, "no-enable-prefix-caching": ""}
            reason = (
                "the store keeps states at any token, and a running sequence takes half the memory;"
                "\n      --enable-prefix-caching has both"
            )
            chosen.append(ChosenOption("--no-enable-prefix-caching", "", reason))
        chosen += quick + _numbers(config, row, weights, given, machine, env, store.memory or 0)
        chosen += stored
    else:
        chosen += _stored(store, None, 0, given, machine)
        notes = [f"{model} is no directory here: the numbers are left to vLLM"]
    flags = [part for choice in chosen for part in (choice.name, choice.value) if part]
    return Launch([*command, *flags, *options], chosen, chosen_env, notes)


def run(launch: Launch, cpus: Set[int]) -> None:
    """Replace this process by vLLM, on these CPUs; does not return."""
    os.sched_setaffinity(0, cpus)
    environment = {**os.environ, **{choice.name: choice.value for choice in launch.env}}
    sys.stdout.flush()
    os.execve(launch.command[0], launch.command, environment)


class _Ranks(NamedTuple):
    """vLLM's workers: ranks per model, machines, and replicas per machine."""

    tensor: int
    pipeline: int
    nodes: int
    replicas: int

    @property
    def per_model(self) -> int:
        return self.tensor * self.pipeline

    def state_bytes(self, sequence: SequenceLayout) -> int:
        """Bytes of a state on the rank where it takes most, whichever layers vLLM gives it."""
        pages = [layer.page_bytes for layer in sequence.layers]
        size = -(-len(pages) // self.pipeline)
        return max(sum(pages[i : i + size]) for i in range(len(pages) - size + 1))


def _ranks(given: Mapping[str, str]) -> _Ranks:
    def size(*names: str) -> int:
        return next((n for name in names if (n := number(given.get(name)))), 1)

    return _Ranks(
        size("tensor-parallel-size"),
        size("pipeline-parallel-size"),
        size("nnodes"),
        size("data-parallel-size-local", "data-parallel-size"),
    )


def _front(given: Mapping[str, str], env: Mapping[str, str]) -> list[ChosenOption]:
    """The options that clients notice: name, address and details of answers."""
    chosen = []
    if not {"host", "uds"} & set(given):
        if HOST_ENV in env:
            chosen.append(ChosenOption("--host", env[HOST_ENV], HOST_ENV))
        else:
            reason = "this machine only; --host 0.0.0.0 is for all that can reach it"
            chosen.append(ChosenOption("--host", "127.0.0.1", reason))
    if not _is_set(given, "enable-prompt-tokens-details"):
        reason = "answers tell how many tokens of a prompt came from cached states"
        chosen.append(ChosenOption("--enable-prompt-tokens-details", "", reason))
    return chosen


def _is_set(given: Mapping[str, str], flag: str) -> bool:
    """Whether a flag was given, either way."""
    return flag in given or f"no-{flag}" in given


def _config(model: Path) -> dict[str, Any]:
    """The `config.json` of a LoLA model."""
    config = read_json(model / "config.json")
    if config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{model}: not a LoLA model (model_type is not {MODEL_TYPE!r}); make one with "
            "lola-vllm init, convert or distill, or use 'vllm serve' for this one"
        )
    return config


def _quick(
    config: Mapping[str, Any], given: Mapping[str, str], machine: Machine, env: Mapping[str, str]
) -> tuple[str, list[ChosenOption]]:
    """The dtype that the model will have, and the options for speed on a CPU."""
    # Without an option, vLLM takes a dtype of two bytes, also for a float32 model.
    stored = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    dtype = stored if stored in ("float16", "bfloat16") else "bfloat16"
    chosen = []
    asked = given.get("dtype", "auto")
    asked = {"half": "float16", "float": "float32"}.get(asked, asked)
    if asked in DTYPES:
        dtype = asked
    elif machine.device == "cpu" and "quantization" not in given:
        preferred = cpu.preferred_dtype(config, env)
        if preferred:
            dtype = preferred
            flag = cpu.bfloat16_flag(env)
            reason = f"this CPU multiplies it fast ({flag})"
            if flag is None:
                reason = "this CPU has no bfloat16 instructions, and is several times faster so"
            chosen.append(ChosenOption("--dtype", dtype, reason))
    compiling = {"compilation-config", "optimization-level"} & set(given)
    # vLLM's stages on a CPU need torch.compile, see config_hook.
    staged = _ranks(given).pipeline > 1
    if machine.device == "cpu" and not (compiling or staged or _is_set(given, "enforce-eager")):
        reason = (
            "torch.compile costs a minute at the start and then decodes up to a fifth faster;\n"
            "      --no-enforce-eager has it"
        )
        chosen.append(ChosenOption("--enforce-eager", "", reason))
    return dtype, chosen


def _state(model: Path, given: Mapping[str, str], dtype: str) -> Row:
    """Bytes of a state on one tensor-parallel rank, with the user's options."""
    try:
        overrides = json.loads(given.get("hf-overrides", "{}"))
    except ValueError as error:
        raise CheckpointError(f"--hf-overrides: not valid JSON ({error})") from None
    lola = overrides.get("lola_config", {}) if isinstance(overrides, dict) else {}
    result = estimate(model, lola, dtype=dtype, tensor_parallel_size=_ranks(given).tensor)
    return next(row for row in result.rows if row.chosen)


def _numbers(
    config: Mapping[str, Any],
    row: Row,
    weights: int,
    given: Mapping[str, str],
    machine: Machine,
    env: Mapping[str, str],
    stored: int = 0,
) -> list[ChosenOption]:
    caching = "no-enable-prefix-caching" not in given and given.get(
        "enable-prefix-caching", ""
    ).lower() not in ("false", "0")
    pool = Pool.of(_ranks(given).state_bytes(row.sequence), machine.device, caching)
    sized = "kv-cache-memory-bytes" in given or "VLLM_CPU_KVCACHE_SPACE" in env
    room, where = _room(weights, given, machine, stored)
    asked = number(given.get("kv-cache-memory-bytes"))
    if asked:
        room, where = asked, "your --kv-cache-memory-bytes"
    unknown = sized and not asked
    chosen = []

    wanted = number(given.get("max-num-seqs"))
    fits = pool.sequences_in(room)
    if fits < 1 and not unknown:
        raise CheckpointError(
            f"{where}: {max(0, room) / MIB:.0f} MiB are left for states and one sequence takes "
            f"{pool.bytes_for(1) / MIB:.0f} MiB; free memory, use --no-enable-prefix-caching, "
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
        chosen.append(ChosenOption("--max-num-seqs", str(wanted), reason))
    if caching and "block-size" not in given:
        chosen.append(_block_size(config, row, given))
    if machine.device == "cpu" and not sized and wanted:
        of = f"{pool.per_sequence} states" if pool.per_sequence > 1 else "one state"
        chosen.append(
            ChosenOption(
                "--kv-cache-memory-bytes",
                str(pool.bytes_for(min(wanted, fits))),
                f"{of} for each of {min(wanted, fits)} sequences, and vLLM's null block",
            )
        )
    return chosen


def _stored(
    store: store_options.StoreOptions,
    row: Row | None,
    weights: int,
    given: Mapping[str, str],
    machine: Machine,
) -> list[ChosenOption]:
    """The store of states: in memory, unless the user says more or takes its place in vLLM."""
    ranks = _ranks(given)
    ram = None
    taken = {"kv-transfer-config", "kv-offloading-size"} & set(given)
    useful = ranks.pipeline == 1 and given.get("runner") != "pooling"
    if row is not None and not taken and store.memory is None and useful:
        here = Machine("cpu", machine.cores, machine.host or machine.memory)
        room, _ = _room(weights if machine.device == "cpu" else 0, given, here)
        state = ranks.state_bytes(row.sequence) * ranks.per_model
        ram = store_options.default_memory(room * ranks.per_model, state)
    value = store.value(ram)
    if value is None:
        return []
    reason = "nothing is stored, as you say"
    settings = store_options.read(json.loads(value).get(STORE_KEY, {}))
    if settings.enabled:
        what = "with a name " if settings.store == "named" else ""
        reason = "states outlive their requests, as you say"
        if "state_dir" in store.given:
            reason += f": those of conversations {what}also in {store.given['state_dir']}"
        reason += ";\n      --lola-store none keeps nothing (docs/privacy.md)"
    if ram and not store.given.keys() - _OF_ROUTES:
        reason = (
            f"{ram / MIB:.0f} MiB of stored states, in memory only: a conversation goes on where "
            "it\n      stopped; --lola-state-dir keeps those with a name for the next start, "
            "--lola-store none\n      keeps nothing"
        )
    return [ChosenOption(store_options.ADDITIONAL, value, reason)]


def _may_replace(given: Mapping[str, str]) -> bool:
    """Whether a store can take the place of prefix caching: nothing was said about its blocks, and
    there is one engine, which every request comes to."""
    return _ranks(given).replicas == 1 and not any(_is_set(given, flag) for flag in _OF_CACHING)


def _room(
    weights: int, given: Mapping[str, str], machine: Machine, stored: int = 0
) -> tuple[int, str]:
    """Bytes for states on a rank, and a description of them."""
    ranks = _ranks(given)
    if machine.device == "cpu":
        workers = max(1, ranks.replicas * ranks.per_model // ranks.nodes)
        all_weights = workers * weights // ranks.per_model
        stored *= ranks.replicas
        room = cpu_room(machine.memory, all_weights, workers, stored)
        each = f", shared by {workers} ranks," if workers > 1 else ""
        return room, f"half of what weights and processes leave of the memory{each}"
    try:
        utilization = float(given["gpu-memory-utilization"])
    except (KeyError, ValueError):
        utilization = GPU_UTILIZATION
    room = gpu_room(machine.memory, utilization, weights // ranks.per_model)
    return room, f"{utilization:.0%} of the GPU"


def _block_size(config: Mapping[str, Any], row: Row, given: Mapping[str, str]) -> ChosenOption:
    even = row.sequence.break_even_tokens()
    length = number(given.get("max-model-len")) or int(
        config.get("max_position_embeddings", MAX_BLOCK_SIZE)
    )
    size = MIN_BLOCK_SIZE
    while size < even and size < MAX_BLOCK_SIZE:
        size *= 2
    while size > max(16, length // 2):
        size //= 2
    return ChosenOption(
        "--block-size",
        str(size),
        f"tokens between two cached states; one costs as much as {even:,} tokens of a full cache",
    )


def _environment(machine: Machine, env: Mapping[str, str]) -> list[ChosenOption]:
    chosen = []
    if "VLLM_PLUGINS" not in env:
        # Without this variable, vLLM loads all plugins except those that add routes. With it, vLLM
        # loads only the named ones, so all are named.
        names = {e.name for g in _PLUGIN_GROUPS for e in entry_points(group=f"vllm.{g}_plugins")}
        plugins = ",".join([PLUGIN, *sorted(names - {PLUGIN})])
        chosen.append(ChosenOption("VLLM_PLUGINS", plugins, "routes /v1/lola and metrics lola:*"))
    elif PLUGIN not in env["VLLM_PLUGINS"].split(","):
        raise CheckpointError(
            f"VLLM_PLUGINS = {env['VLLM_PLUGINS']!r} leaves LoLA out; add {PLUGIN!r} or unset it"
        )
    if machine.device == "cpu":
        if "OMP_WAIT_POLICY" not in env:
            why = "threads that spin while they wait slow each other down"
            chosen.append(ChosenOption("OMP_WAIT_POLICY", "PASSIVE", why))
        if "VLLM_CPU_OMP_THREADS_BIND" not in env:
            why = "two servers would bind to the same cores"
            chosen.append(ChosenOption("VLLM_CPU_OMP_THREADS_BIND", "nobind", why))
    return chosen


def _vllm() -> str:
    beside = Path(sys.executable).parent / "vllm"
    found = str(beside) if beside.is_file() else shutil.which("vllm")
    if found is None:
        raise CheckpointError(
            "the command 'vllm' is not installed; run 'lola-vllm doctor' to see what is missing"
        )
    return found


def serve(model: str, options: Sequence[str], cpus: Set[int], dry_run: bool = False) -> int:
    """What the command `lola-vllm serve` does.

    Args:
        cpus: those on which this process was started. With OMP_NUM_THREADS set, importing torch
            reduces them, and vLLM would inherit the reduced set.
    """
    launch = plan(model, options, this_machine(len(cpus)))
    print(launch)
    if not dry_run:
        run(launch, cpus)
    return 0
